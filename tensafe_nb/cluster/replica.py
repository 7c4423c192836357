"""A replica: one engine of a group, in a thread, a process or an actor of its own.

It *answers asks*, which change nothing and may be asked again of another replica, and *follows tells*, which change
all replicas in the same way, so that each of them is a backup of every other (state machine replication, Schneider
1990, ACM Computing Surveys 22(4)).
"""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensafe_nb.config import SamplingConfig, StepConfig, TrainingConfig
from tensafe_nb.data.labels import TurnEnd
from tensafe_nb.engine import state as states
from tensafe_nb.engine.accumulation import Tally, Window
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.low_rank import Factors
from tensafe_nb.engine.models.memory import presentable
from tensafe_nb.engine.plain_step import PlainStep
from tensafe_nb.engine.sampling import sampler
from tensafe_nb.engine.sampling.prompts import ReadPrompts
from tensafe_nb.engine.state import EngineState
from tensafe_nb.errors import FutureCancelledError, TGTinkerError
from tensafe_nb.losses import Loss
from tensafe_nb.protocol.batch import Array, BatchData
from tensafe_nb.protocol.results import Prompt, ReadAdapterResult, SampledPiece, SampledSequence
from tensafe_nb.store.home import Home

Emit = Callable[[tuple[Any, ...]], None]  # takes a message, see `Replica.do`


@dataclass(frozen=True, slots=True)
class ReplicaStanding:
    """Where a replica stands after a tell; that of all of them is the same, or one of them is none of the group.

    Attributes:
        step: Optimiser steps taken.
        policy_version: Of the weights.
        window: What has been accumulated.
        digest: A hash of the trained weights.
        value: What the tell has returned.
    """

    step: int
    policy_version: int
    window: Window
    digest: str
    value: Any = None


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a group has to know of its replicas' model."""

    config: TrainingConfig
    about: dict[str, Any]
    fingerprint: str
    tokenizer: Any
    overhead: int
    has_dropout: bool
    standing: ReplicaStanding


class Replica:
    """Carries out what a group asks and tells, one call after the other.

    Args:
        emit: Takes its messages: ("progress", call, done, total), ("piece", call, piece of a sequence),
            ("answer", call, value) and ("error", call, exception).
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._engine: Engine
        self._interrupted = threading.Event()
        self._digest: tuple[int, str] = (-1, "")

    def do(self, call: int, method: str, arguments: Sequence[Any]) -> None:
        """Carry out a call and emit how it ended."""
        self._interrupted.clear()

        def tick(done: int, total: int) -> None:
            if self._interrupted.is_set():
                raise FutureCancelledError("cancelled while running")
            if total:
                self._emit(("progress", call, done, total))

        try:
            value = getattr(self, method)(*arguments, *((call, tick) if method in TICKING else ()))
        except TGTinkerError as error:
            self._emit(("error", call, error))
        except Exception as error:  # noqa: BLE001  # whatever a model or a loss raises is the caller's to know
            self._emit(("error", call, presentable(error)))
        else:
            self._emit(("answer", call, value))

    def interrupt(self) -> None:
        """Let what is being asked end at its next micro-batch or token; from any thread."""
        self._interrupted.set()

    # at the beginning

    def load(self, config: TrainingConfig, home: Home | None) -> Introduction:
        """Load the model; says what came of it."""
        try:
            self._engine = engine = Engine(config, models.load(config, home))
        except Exception as error:
            raise models.refuse(error, config.model_ref) from error
        return Introduction(
            engine.config,
            engine.about,
            engine.fingerprint,
            engine.tokenizer,
            engine.forward_pass.overhead,
            engine.forward_pass.has_dropout,
            self._standing(),
        )

    # asks

    def contribute(
        self,
        batch: BatchData,
        loss: Loss,
        pieces: Sequence[Array],
        secret: int,
        return_logprobs: bool,
        call: int,
        tick: sampler.Tick,
    ) -> tuple[list[Array | None], Tally]:
        batch = self._engine.with_reference(batch, loss, tick, pieces)
        return self._step.contribute(batch, loss, pieces, secret, return_logprobs, tick)

    def evaluate(
        self,
        batch: BatchData,
        loss: Loss,
        return_logprobs: bool,
        pieces: Sequence[Array],
        call: int,
        tick: sampler.Tick,
    ) -> Tally:
        return self._engine.evaluate(batch, loss, return_logprobs, tick, pieces)

    def compute_logprobs(
        self,
        batch: BatchData,
        temperature: float,
        reference: bool,
        pieces: Sequence[Array],
        call: int,
        tick: sampler.Tick,
    ) -> Any:
        return self._engine.compute_logprobs(batch, temperature, reference, tick, pieces)

    def encode(
        self, prompts: Sequence[Prompt], config: SamplingConfig
    ) -> tuple[list[list[int]], list[TurnEnd], list[int | None]]:
        return self._engine.encode(prompts, config)

    def read(self, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> ReadPrompts:
        return self._engine.read(prompts, config)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        turns: Sequence[TurnEnd],
        streams: Sequence[int | None],
        config: SamplingConfig,
        seed: int,
        before: Sequence[int],
        stream: bool,
        call: int,
        tick: sampler.Tick,
    ) -> list[SampledSequence]:
        def tell(piece: SampledPiece) -> None:
            self._emit(("piece", call, piece))

        told = tell if stream else None
        return sampler.sample(
            self._engine.model,
            prompts,
            config,
            seed,
            tick,
            turns,
            told,
            streams,
            before,
            elsewhere=self._engine.elsewhere(config.engine),
        )

    def estimate(self, batch_size: int | None, length: int | None) -> Any:
        return self._engine.estimate(batch_size, length)

    def capture(self, include_optimizer: bool) -> EngineState:
        return self._engine.capture(include_optimizer)

    def factors(self, layers: Sequence[int], modules: Sequence[str] | None) -> Factors:
        return self._engine.factors(layers, modules)

    def read_adapter(self) -> ReadAdapterResult:
        return self._engine.read_adapter()

    def streams(self) -> dict[str, Any]:
        return self._engine.streams()

    # tells

    def forward_backward(
        self, batch: BatchData, loss: Loss, return_logprobs: bool, call: int, tick: sampler.Tick
    ) -> ReplicaStanding:  # of the only replica there is
        return self._standing(self._engine.forward_backward(batch, loss, tick, return_logprobs))

    def absorb(self, gradients: Sequence[Array | None], tally: Tally, loss: Loss) -> ReplicaStanding:
        return self._standing(self._step.absorb(gradients, tally, loss))

    def optim_step(self, step: StepConfig) -> ReplicaStanding:
        return self._standing(self._engine.optim_step(step=step))

    def discard_gradients(self) -> ReplicaStanding:
        self._engine.discard_gradients()
        return self._standing()

    def freeze_reference(self) -> ReplicaStanding:
        return self._standing(self._engine.freeze_reference())

    def load_adapter(self, tensors: Mapping[str, Array]) -> ReplicaStanding:
        return self._standing(self._engine.load_adapter(tensors))

    def restore(self, state: EngineState, keep_moments: bool) -> ReplicaStanding:
        self._engine.restore(state, keep_moments=keep_moments)
        self._digest = (-1, "")
        return self._standing()

    def restore_streams(self, facts: Mapping[str, Any]) -> ReplicaStanding:
        self._engine.restore_streams(facts)
        return self._standing()

    def adopt(self, state: EngineState) -> ReplicaStanding:
        """Become what another replica is: also the number of its weights."""
        self.restore(state, True)
        self._engine.optimizer.policy_version = state.facts["policy_version"]
        return self._standing()

    # inside

    @property
    def _step(self) -> PlainStep:
        step = self._engine.training_step
        assert isinstance(step, PlainStep)  # a group trains nothing privately
        return step

    def _standing(self, value: Any = None) -> ReplicaStanding:
        engine = self._engine
        if self._digest[0] != engine.policy_version:
            weights = hashlib.blake2b(digest_size=16)
            for _, parameter in engine.model.trainable:
                weights.update(states.bytes_of(parameter))
            self._digest = engine.policy_version, weights.hexdigest()
        return ReplicaStanding(engine.step, engine.policy_version, engine.window, self._digest[1], value)


TICKING = frozenset(  # what can be interrupted, and says how far it is
    {
        "forward_backward",
        "contribute",
        "evaluate",
        "compute_logprobs",
        "sample",
    }
)
