"""How much memory tensors take, and how much there is: read from the system, without a package for it."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

MEMORY_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))
MEMINFO = Path("/proc/meminfo")


def available(device: torch.device) -> int | None:
    """Return the bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [value for value in (_of_the_machine(), _of_the_container()) if value is not None]
    return min(known, default=None)


def size_of(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of tensors; one that is there under two names counts once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(sizes.values())


def _of_the_machine() -> int | None:
    with contextlib.suppress(OSError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _of_the_container() -> int | None:
    """Return what the limit of this control group leaves; None without a limit."""
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int(path.read_text()) for path in MEMORY_FILES)
        return limit - used
    return None
