"""The estimate of a training step before it is taken: a short probe, which leaves the engine as it was.

The probe computes a loss and its gradient on made-up tokens with `torch.autograd.grad`, which writes to no weight and
no `.grad`, in evaluation mode, which draws no random number. Memory is counted tensor by tensor, not read from the
system.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensafe_nb.display import as_given
from tensafe_nb.engine import optimizers
from tensafe_nb.engine.models import memory
from tensafe_nb.errors import InsufficientMemoryError, ValidationError
from tensafe_nb.losses import resolve_loss
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.results import StepEstimate

if TYPE_CHECKING:
    from tensafe_nb.engine.engine import Engine

PROBE_TOKENS = 512  # a micro-batch of more is not run: what it takes is worked out from one of so many
LONGEST_PROBE = 1_024  # tokens of a row; what a longer row takes is worked out too
SCRATCH = 4_000_000  # numbers that the optimiser is tried on; what more take is worked out
SECONDS, AT_LEAST = 0.3, 3  # time a probe for so long, and so often: the median counts
TOKEN_CE = resolve_loss("token_ce")
LENGTH = 512  # where the caller names none and the model takes as many


@dataclass(frozen=True, slots=True)
class Probe:
    """What one pass over some tokens took: seconds, and bytes at the peak of the forward pass and of the whole."""

    tokens: int
    seconds: float
    forward_bytes: float
    peak_bytes: float


def estimate(engine: "Engine", batch_size: int | None = None, length: int | None = None) -> StepEstimate:
    """Return what a step of this engine takes; it must not work meanwhile.

    Args:
        engine: Its weights, gradients, optimiser and random streams stay as they are.
        batch_size: Rows of a step; None takes the configuration's, all batches of an accumulation together.
        length: Tokens of a row; None takes 512, or the model's context where that is shorter.

    Raises:
        ValidationError: A device whose memory cannot be asked, or sizes that do not fit the model.
        InsufficientMemoryError: A step will not fit the memory that is there; says what would.
    """
    if engine.model.device.type not in ("cpu", "cuda"):
        raise ValidationError(
            f"estimate(): the memory of device {as_given(engine.model.device.type)} cannot be asked for. It works on "
            f"cpu and cuda."
        )
    rows, length = sizes_of(engine, batch_size, length)
    found, micro_rows = Estimator(engine).step(rows, length)
    check_fit(found, micro_rows, engine.config.gradient_checkpointing)
    return found


def sizes_of(engine: "Engine", batch_size: int | None, length: int | None) -> tuple[int, int]:
    """Return rows and tokens of a step: those asked for, checked, or the configuration's."""
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


class Estimator:
    """Tries pieces of a step on an engine, and works out the whole.

    Args:
        engine: It stays as it was.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine, self._model, self._kind = engine, engine.model, engine.training_step

    def step(self, rows: int, length: int) -> tuple[StepEstimate, int]:
        """Return what a step of `rows` of `length` tokens takes, and how many of them are computed at once."""
        engine, model = self._engine, self._model
        micro_rows = self.rows_at_once(rows, length)
        micro_batches = -(-rows // micro_rows)
        piece = self.micro_batch(micro_rows, length)
        optimizer_seconds, moment_bytes = self.optimizer_step()
        gradient_bytes = memory.size_of(engine.parameters)
        # what is there only within the step: gradients and activations
        transient = self._kind.peak_bytes(
            piece.forward_bytes, piece.peak_bytes, gradient_bytes, micro_batches
        )
        seconds = piece.seconds * rows / micro_rows + optimizer_seconds
        weight_bytes = memory.size_of([*model.causal.parameters(), *model.causal.buffers()])
        kept = memory.size_of(engine.optimizer.gradients()) + _moments(engine.optimizer.torch)
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
            available_bytes=memory.available(model.device),
            precision=model.precision,
            device=str(model.device),
        )
        return found, micro_rows

    def rows_at_once(self, rows: int, length: int) -> int:
        """Return how many rows the engine computes at a time; fewer where it keeps a gradient for each."""
        fitting = min(rows, max(1, self._engine.config.micro_batch_tokens // length))
        tokens = min(length, LONGEST_PROBE, max(2, PROBE_TOKENS // 2))
        at_once, _ = self._kind.trial(self._made_up(max(2, fitting), tokens), TOKEN_CE)
        return min(fitting, at_once)

    def micro_batch(self, rows: int, length: int) -> Probe:
        """Return what a micro-batch takes: tried as it is where it is small, else worked out from smaller ones."""
        tried_length = min(length, LONGEST_PROBE)
        fitting = max(1, PROBE_TOKENS // tried_length)
        if rows <= fitting and length == tried_length:
            return self.probe(rows, length)
        whole = self.probe(fitting, tried_length)
        half = (fitting // 2, tried_length) if fitting > 1 else (1, max(1, tried_length // 2))
        part = self.probe(*half, timed=False)
        tokens = rows * length

        def at_so_many(smaller: float, larger: float) -> float:
            """Bytes are a line in the number of tokens: extended from two points."""
            return smaller + (larger - smaller) / (whole.tokens - part.tokens) * (tokens - part.tokens)

        return Probe(
            tokens,
            whole.seconds * tokens / whole.tokens * self.attention(length, tried_length),
            at_so_many(part.forward_bytes, whole.forward_bytes),
            at_so_many(part.peak_bytes, whole.peak_bytes),
        )

    def attention(self, length: int, tried: int) -> float:
        """Return how much more a token of a row of `length` costs than one of a row of `tried`, by multiplications.

        A token takes one for each weight of a matrix, and with each of the T/2 tokens before it, on average, 2 D in
        each layer: for its key and for its value.
        """
        config = self._model.causal.config
        per_position = 2 * getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0)
        matrices = sum(p.numel() for p in self._model.causal.parameters() if p.ndim == 2)
        factor: float = (matrices + per_position * length / 2) / (matrices + per_position * tried / 2)
        return factor

    def probe(self, rows: int, length: int, *, timed: bool = True) -> Probe:
        """Compute loss and gradient of made-up rows, and return what that took."""
        _, compute = self._kind.trial(self._made_up(rows, length), TOKEN_CE)
        forward_bytes, peak_bytes = self.peaks(compute)
        seconds = self._timed(lambda: compute(lambda: None)) if timed else 0.0
        return Probe(rows * length, seconds, forward_bytes, peak_bytes)

    def peaks(self, compute: Callable[[Callable[[], None]], None]) -> tuple[float, float]:
        """Return the most bytes that the forward pass, and the whole, hold beyond what is there before."""
        forward: list[float] = []
        model, device = self._model.causal, self._model.device
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            compute(lambda: forward.append(torch.cuda.max_memory_allocated(device) - before))
            return max(forward), torch.cuda.max_memory_allocated(device) - before
        with CountedBytes([*self._engine.parameters, *model.parameters(), *model.buffers()]) as counted:
            compute(lambda: forward.append(counted.peak))
        return max(forward), counted.peak

    def optimizer_step(self) -> tuple[float, float]:
        """Return seconds of an optimiser step and bytes of its moments, worked out from tensors of the same shapes."""
        parameters = self._engine.parameters
        scratch = list(scratch_like(parameters))
        optimizer = optimizers.build(self._engine.config.optimizer, scratch)
        gradients = [torch.zeros_like(parameter) for parameter in scratch]
        for parameter, gradient in zip(scratch, gradients, strict=True):
            parameter.grad = gradient

        def step() -> None:
            self._kind.rehearse(gradients)
            nn.utils.get_total_norm(gradients)
            optimizer.step()

        step()
        seconds = self._timed(step)
        share = sum(p.numel() for p in parameters) / sum(p.numel() for p in scratch)
        return seconds * share, _moments(optimizer) * share

    def _made_up(self, rows: int, length: int) -> BatchData:
        ids, labels = np.random.default_rng(0).integers(0, self._model.vocab_size, (2, rows, length))
        return BatchData(ids, labels=labels)

    def _timed(self, action: Callable[[], None]) -> float:
        """Return the median of some runs, in seconds."""
        taken: list[float] = []
        while len(taken) < AT_LEAST or sum(taken) < SECONDS:
            started = time.perf_counter()
            action()
            if self._model.device.type == "cuda":
                torch.cuda.synchronize(self._model.device)
            taken.append(time.perf_counter() - started)
        return float(np.median(taken))


class CountedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
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


def scratch_like(parameters: Sequence[nn.Parameter]) -> Iterator[nn.Parameter]:
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


def check_fit(found: StepEstimate, micro_rows: int, checkpointing: bool) -> None:
    """Refuse a step that the memory has no room for, and say what would fit.

    Raises:
        InsufficientMemoryError: It will not fit.
    """
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
    if available_bytes > lasting and not checkpointing:
        advice += " gradient_checkpointing=True computes activations again in place of keeping them."
    raise InsufficientMemoryError(
        f"A training step of {found.batch_size} rows of {found.length} tokens needs about "
        f"{_gib(found.needed_bytes)} more on {found.device} (gradients {_gib(found.gradient_bytes)}, optimiser "
        f"{_gib(found.optimizer_bytes)}, activations of {micro_rows} rows at once {_gib(found.activation_bytes)}), and "
        f"{_gib(available_bytes)} are available. {advice}",
        details={"needed_bytes": found.needed_bytes, "available_bytes": available_bytes},
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
