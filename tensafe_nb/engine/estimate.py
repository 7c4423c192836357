"""What a training step will take, found out before it is taken: a short probe that leaves the engine as it was.

The probe computes a loss and its gradient on made-up tokens with `torch.autograd.grad`, which writes to no weight and
no `.grad`, in evaluation mode, which draws no random number. Memory is counted tensor by tensor, not read from the
system.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensafe_nb.display import as_given
from tensafe_nb.engine import optimizers
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import memory
from tensafe_nb.errors import InsufficientMemoryError, ValidationError
from tensafe_nb.losses import resolve_loss
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.results import StepEstimate

PROBE_TOKENS = 512  # a micro-batch of more is not run: what it takes is worked out from one of so many
LONGEST_PROBE = 1_024  # tokens of a row; what a longer row takes is worked out too
SCRATCH = 4_000_000  # numbers that the optimiser is tried on; what more take is worked out
SECONDS, AT_LEAST = 0.3, 3  # time a probe for so long, and so often: the median counts
TOKEN_CE = resolve_loss("token_ce")
LENGTH = 512  # where the caller names none and the model takes as many


@dataclass(frozen=True, slots=True)
class _Probe:
    """What one pass over some tokens took: seconds, and bytes at the peak of the forward pass and of the whole."""

    tokens: int
    seconds: float
    forward_bytes: float
    peak_bytes: float


def estimate(engine: Engine, batch_size: int | None = None, length: int | None = None) -> StepEstimate:
    """Return what a step of this engine takes; it must not work meanwhile.

    Args:
        engine: Its weights, gradients, optimiser and random streams stay as they are.
        batch_size: Rows of a step; None takes the configuration's, all batches of an accumulation together.
        length: Tokens of a row; None takes 512, or the model's context where that is shorter.

    Raises:
        ValidationError: A device whose memory cannot be asked, or sizes that do not fit the model.
        InsufficientMemoryError: A step will not fit the memory that is there; says what would.
    """
    _check(engine)
    rows, length = _sizes(engine, batch_size, length)
    micro_rows = _rows_at_once(engine, rows, length)
    micro_batches = -(-rows // micro_rows)
    step = _in_one_piece(engine, micro_rows, length)
    optimizer_seconds, moment_bytes = _optimizer(engine)
    gradient_bytes = memory.size_of(engine.parameters)
    transient = engine.training_step.peak_bytes(
        step.forward_bytes, step.peak_bytes, gradient_bytes, micro_batches
    )
    seconds = step.seconds * rows / micro_rows + optimizer_seconds
    weight_bytes = memory.size_of([*engine.model.causal.parameters(), *engine.model.causal.buffers()])
    kept = memory.size_of(p.grad for p in engine.parameters if p.grad is not None) + _moments(
        engine.optimizer.torch
    )
    found = StepEstimate(
        batch_size=rows,
        length=length,
        micro_batches=micro_batches,
        trained_parameters=sum(p.numel() for p in engine.parameters),
        seconds_per_step=seconds,
        tokens_per_second=rows * length / seconds,
        memory_bytes=int(weight_bytes + moment_bytes + transient),
        weight_bytes=weight_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=int(moment_bytes),
        activation_bytes=int(max(0, transient - gradient_bytes)),
        needed_bytes=int(max(0, moment_bytes + transient - kept)),
        available_bytes=memory.available(engine.model.device),
        precision=engine.model.precision,
        device=str(engine.model.device),
    )
    _check_fit(found, micro_rows)
    return found


def _check(engine: Engine) -> None:
    if engine.model.device.type not in ("cpu", "cuda"):
        raise ValidationError(
            f"estimate(): the memory of device {as_given(engine.model.device.type)} cannot be asked for. It works "
            f"on cpu and "
            f"cuda."
        )


def _sizes(engine: Engine, batch_size: int | None, length: int | None) -> tuple[int, int]:
    config, context = engine.config, engine.model.context
    rows = config.batch_size * config.gradient_accumulation_steps if batch_size is None else batch_size
    tokens = min(LENGTH, context or LENGTH) if length is None else length
    for name, value in (("batch_size", rows), ("length", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValidationError(f"estimate(): {name} is a whole number from 1; it is {as_given(value)}.")
    if context is not None and tokens > context:
        raise ValidationError(
            f"estimate(): length={tokens} is more than the {context} tokens that the model was made for."
        )
    return rows, tokens


def _rows_at_once(engine: Engine, rows: int, length: int) -> int:
    """Return how many rows the engine computes at a time; fewer where it keeps a gradient for each."""
    fitting = min(rows, max(1, engine.config.micro_batch_tokens // length))
    tokens = min(length, LONGEST_PROBE, max(2, PROBE_TOKENS // 2))
    rows_at_once, _ = engine.training_step.trial(_made_up(engine, max(2, fitting), tokens), TOKEN_CE)
    return min(fitting, rows_at_once)


def _in_one_piece(engine: Engine, rows: int, length: int) -> _Probe:
    """Return what a micro-batch takes: tried as it is where it is small, else worked out from smaller ones."""
    tried_length = min(length, LONGEST_PROBE)
    fitting = max(1, PROBE_TOKENS // tried_length)
    if rows <= fitting and length == tried_length:
        return _probe(engine, rows, length)
    whole = _probe(engine, fitting, tried_length)
    half = (fitting // 2, tried_length) if fitting > 1 else (1, max(1, tried_length // 2))
    part = _probe(engine, *half, timed=False)
    tokens = rows * length
    return _Probe(
        tokens,
        whole.seconds * tokens / whole.tokens * _attention(engine, length, tried_length),
        _on_the_line(part.tokens, part.forward_bytes, whole.tokens, whole.forward_bytes, tokens),
        _on_the_line(part.tokens, part.peak_bytes, whole.tokens, whole.peak_bytes, tokens),
    )


def _on_the_line(x: float, y: float, other_x: float, other_y: float, at: float) -> float:
    return y + (other_y - y) / (other_x - x) * (at - x)


def _attention(engine: Engine, length: int, tried: int) -> float:
    """Return how much more a token of a row of `length` costs than one of a row of `tried`, by multiplications."""
    config = engine.model.causal.config
    per_position = 2 * getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0)
    matrices = sum(p.numel() for p in engine.model.causal.parameters() if p.ndim == 2)
    factor: float = (matrices + per_position * length / 2) / (matrices + per_position * tried / 2)
    return factor


def _probe(engine: Engine, rows: int, length: int, *, timed: bool = True) -> _Probe:
    _, compute = engine.training_step.trial(_made_up(engine, rows, length), TOKEN_CE)
    forward_bytes, peak_bytes = _peaks(engine, compute)
    seconds = _timed(engine, lambda: compute(_nothing)) if timed else 0.0
    return _Probe(rows * length, seconds, forward_bytes, peak_bytes)


def _nothing() -> None:
    """Note nothing."""


def _made_up(engine: Engine, rows: int, length: int) -> BatchData:
    ids, labels = np.random.default_rng(0).integers(0, engine.model.vocab_size, (2, rows, length))
    return BatchData(ids, labels=labels)


def _timed(engine: Engine, action: Callable[[], None]) -> float:
    """Return the median of some runs, in seconds."""
    taken: list[float] = []
    while len(taken) < AT_LEAST or sum(taken) < SECONDS:
        started = time.perf_counter()
        action()
        _finish(engine.model.device)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peaks(engine: Engine, compute: Callable[[Callable[[], None]], None]) -> tuple[float, float]:
    """Return the most bytes that the forward pass, and the whole, hold beyond what is there before."""
    forward: list[float] = []
    device = engine.model.device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        compute(lambda: forward.append(torch.cuda.max_memory_allocated(device) - before))
        return max(forward), torch.cuda.max_memory_allocated(device) - before
    lasting = [*engine.parameters, *engine.model.causal.parameters(), *engine.model.causal.buffers()]
    with _Counted(lasting) as counted:
        compute(lambda: forward.append(counted.peak))
    return max(forward), counted.peak


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every tensor made while it is on, until it is freed; `peak` is the most at one moment."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        where, size = storage.data_ptr(), storage.nbytes()
        if not size or where in self._known or where in self._alive:
            return
        self._alive[where] = size
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, where).atexit = False

    def _free(self, where: int) -> None:
        self._now -= self._alive.pop(where)


def _optimizer(engine: Engine) -> tuple[float, float]:
    """Return seconds of an optimiser step and bytes of its moments, worked out from tensors of the same shapes."""
    parameters = engine.parameters
    scratch = list(_scratch(parameters))
    optimizer = optimizers.build(engine.config.optimizer, scratch)

    gradients = [torch.zeros_like(parameter) for parameter in scratch]
    for parameter, gradient in zip(scratch, gradients, strict=True):
        parameter.grad = gradient

    def step() -> None:
        engine.training_step.rehearse(gradients)
        nn.utils.get_total_norm(gradients)
        optimizer.step()

    step()
    seconds = _timed(engine, step)
    share = sum(p.numel() for p in parameters) / sum(p.numel() for p in scratch)
    return seconds * share, _moments(optimizer) * share


def _scratch(parameters: Sequence[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Yield parameters like the trained ones, up to SCRATCH numbers, a piece of a larger one."""
    left = SCRATCH
    for parameter in parameters:
        rows = max(1, left * len(parameter) // parameter.numel()) if parameter.ndim else 1
        like = torch.zeros_like(parameter[:rows] if parameter.ndim else parameter)
        yield nn.Parameter(like)
        left -= like.numel()
        if left <= 0:
            return


def _moments(optimizer: torch.optim.Optimizer) -> int:
    return memory.size_of(
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


def _check_fit(found: StepEstimate, micro_rows: int) -> None:
    available_bytes = found.available_bytes
    if available_bytes is None or found.needed_bytes <= available_bytes:
        return
    lasting = found.gradient_bytes + found.optimizer_bytes
    fitting = int((available_bytes - lasting) / max(1, found.activation_bytes / micro_rows))
    if fitting >= 1:
        advice = f"micro_batch_tokens={fitting * found.length} in TrainingConfig would fit."
    elif available_bytes > lasting:
        advice = f"Not even one row of {found.length} tokens fits: shorten the rows."
    else:
        advice = (
            "Gradients and optimiser alone do not fit: train an adapter (lora_config), or a smaller model."
        )
    raise InsufficientMemoryError(
        f"A training step of {found.batch_size} rows of {found.length} tokens needs about "
        f"{_gib(found.needed_bytes)} more on {found.device} (gradients {_gib(found.gradient_bytes)}, optimiser "
        f"{_gib(found.optimizer_bytes)}, activations of {micro_rows} rows at once {_gib(found.activation_bytes)}), and "
        f"{_gib(available_bytes)} are available. {advice}",
        details={"needed_bytes": found.needed_bytes, "available_bytes": available_bytes},
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
