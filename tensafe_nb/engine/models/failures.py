"""What becomes of an exception before a future carries it: no tensors held, a lack of memory named."""

import traceback

import torch

from tensafe_nb.errors import InsufficientMemoryError


def presentable(error: BaseException) -> BaseException:
    """Let go of the tensors that the traceback holds, and name a lack of memory."""
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
        f"lower micro_batch_tokens in TrainingConfig, or shorten or split the batch."
    )
    named.__cause__ = error
    return named
