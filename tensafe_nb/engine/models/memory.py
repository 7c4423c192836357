"""Memory: counts what tensors take, reads what the system has left, and says so when an operation does not fit."""

import contextlib
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tensafe_nb.errors import InsufficientMemoryError

MEMORY_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))
MEMINFO = Path("/proc/meminfo")


def available(device: torch.device) -> int | None:
    """Return the bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [value for value in (left_on_machine(), left_in_container()) if value is not None]
    return min(known, default=None)


def size_of(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of tensors; one that is there under two names counts once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(sizes.values())


def left_on_machine() -> int | None:
    """Return what the kernel says is available; None where there is no Linux kernel to say it."""
    with contextlib.suppress(OSError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def left_in_container() -> int | None:
    """Return what the limit of this control group leaves; None without a limit."""
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int(path.read_text()) for path in MEMORY_FILES)
        return limit - used
    return None


def presentable(error: BaseException) -> BaseException:
    """Return what a future may carry of an error: no tensors of its traceback, a lack of memory named."""
    traceback.clear_frames(error.__traceback__)
    message = str(error)
    lacks_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in message or "out of memory" in message)
    )
    if not lacks_memory:
        return error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    named = InsufficientMemoryError(
        f"There is not enough memory for this operation ({message.splitlines()[0][:200]}). The client is still usable: "
        f"lower micro_batch_tokens in TrainingConfig, set gradient_checkpointing=True, or shorten or split the batch."
    )
    named.__cause__ = error
    return named
