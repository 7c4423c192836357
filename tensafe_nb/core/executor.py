"""The executor: carries out each operation, on engine, store and privacy account, and publishes what came of it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from tensafe_nb.config import SamplingConfig
from tensafe_nb.core import checkpoints
from tensafe_nb.core.bus import EventBus
from tensafe_nb.core.privacy import Guarantee
from tensafe_nb.core.queue import Job, JobQueue
from tensafe_nb.engine.accumulation import Tick, mean_of
from tensafe_nb.engine.engine import Engine
from tensafe_nb.errors import DPBudgetExceededError
from tensafe_nb.events import CheckpointSaved, Event, Metrics, StateLoaded
from tensafe_nb.losses import Loss
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.operations import (
    ComputeLogprobs,
    Forward,
    ForwardBackward,
    FreezeReference,
    LoadState,
    OptimStep,
    Sample,
    SaveState,
    VoidPrivacy,
)
from tensafe_nb.protocol.results import (
    ForwardBackwardResult,
    LoadStateResult,
    OptimStepResult,
    Prompt,
    Result,
    SampledPiece,
    SampleResult,
    SaveStateResult,
    missing_pieces,
)
from tensafe_nb.store.vault import Vault


class Executor:
    """Carries out the operations of one training client, one after the other.

    Args:
        engine: The model in training.
        queue: Knows whether the open window is whole.
        vault: Where states are kept.
        guarantee: The privacy of what is trained.
        bus: Where to publish.
        client_id: Whose operations.
    """

    def __init__(
        self,
        engine: Engine,
        queue: JobQueue,
        vault: Vault,
        guarantee: Guarantee,
        bus: EventBus,
        client_id: str,
    ) -> None:
        self.engine, self._queue, self._vault = engine, queue, vault
        self._guarantee, self._bus, self._client_id = guarantee, bus, client_id
        # Results of the open window, and whether their loss was normalised by who sent the batch.
        self._losses: list[tuple[ForwardBackwardResult, bool]] = []
        self.step, self.policy_version = engine.step, engine.policy_version

    @property
    def accumulating(self) -> bool:
        """Whether a forward_backward of the open window has left its gradient."""
        return bool(self._losses)

    def execute(self, job: Job, tick: Tick) -> Result:
        """Carry out an operation."""
        engine, operation = self.engine, job.operation
        if self._queue.stale_gradients:  # a step did not complete: its window must not leak into the next
            self._queue.stale_gradients = False
            self._losses.clear()
            engine.discard_gradients()
        match operation:
            case ForwardBackward(batch):
                loss = cast(Loss, job.loss)
                result = engine.forward_backward(batch, loss, tick)
                self._losses.append((result, loss.declares.prenormalised))
                return result
            case Forward(batch, return_logprobs=wanted):
                return engine.forward(batch, cast(Loss, job.loss), wanted, tick)
            case OptimStep(apply_dp_noise):
                return self.optim_step(apply_dp_noise)
            case Sample(prompts, sampling, stream):
                return self.sample(job, prompts, sampling, stream, tick)
            case ComputeLogprobs(batch, temperature, reference):
                return engine.compute_logprobs(batch, temperature, reference, tick)
            case FreezeReference():
                return engine.freeze_reference()
            case SaveState():
                return self.save_state(operation)
            case LoadState(artifact_id, for_run):
                return self.load_state(artifact_id, for_run=for_run)
            case VoidPrivacy(reason):
                voided = self._guarantee.void(reason)
                self._tell(self._guarantee.standing(self.step))
                return voided
        raise AssertionError(operation)

    def sample(
        self, job: Job, prompts: Sequence[Prompt], sampling: SamplingConfig, stream: bool, tick: Tick
    ) -> SampleResult:
        """Draw completions; where they are streamed, tell their texts as they grow, to whoever holds the handle."""
        promise = job.promise

        def tell(sequence: int, text: str) -> None:
            promise.add_piece(SampledPiece(sequence, text))

        result = self.engine.sample(prompts, sampling, tick, tell if stream else None)
        for piece in missing_pieces(promise.pieces, result) if stream else ():
            promise.add_piece(piece)
        return result

    def save_state(self, operation: SaveState) -> SaveStateResult:
        """Seal the state, with the open window: what was accumulated, and how it was broken."""
        engine = self.engine
        # A private window is never sealed: its sum of clipped gradients has no noise yet. It is dropped, and counted.
        resumable = engine.training_step.resumable
        window, broken = (self._losses, self._queue.broken) if resumable else ([], None)
        saved = checkpoints.save(
            engine,
            self._vault.artifacts,
            operation,
            training_client_id=self._client_id,
            ledger_head=self._vault.audit.head(),
            facts={"losses": encode(window), "broken": broken},
            ledger=self._guarantee.carried(),
        )
        dropped = 0 if resumable else engine.window.batches
        saved = replace(saved, dp_metrics=self._guarantee.metrics, dropped_batches=dropped)
        run_id = (operation.position or {}).get("run_id")
        self._bus.publish(
            CheckpointSaved(
                artifact_id=saved.artifact_id,
                step=saved.step,
                size_bytes=saved.size_bytes,
                content_hash=saved.content_hash,
                name=saved.name,
                run_id=run_id,
            )
        )
        self._bus.sync()  # whoever finds the artifact finds its event
        return saved

    def load_state(self, artifact_id: str, **options: Any) -> LoadStateResult:
        """Take over the state of an artifact; see `checkpoints.load`."""
        engine = self.engine
        take_over = self._guarantee.take_over
        loaded, facts = checkpoints.load(
            engine, self._vault.artifacts, artifact_id, take_over=take_over, **options
        )
        self._queue.end_window()  # the state brings the window it was saved with
        self._queue.inherited = facts["broken"]
        self._losses = [tuple(pair) for pair in decode(facts["losses"])]
        self.step, self.policy_version = engine.step, engine.policy_version
        self._bus.publish(StateLoaded(artifact_id=loaded.loaded_artifact_id, step=loaded.step))
        self._tell(self._guarantee.standing(loaded.step))
        return loaded

    def optim_step(self, apply_dp_noise: bool) -> OptimStepResult:
        """Take the step of a whole window, and pay for it; a broken window ends here without one."""
        engine = self.engine
        losses, self._losses = self._losses, []  # the window ends here, however the step does
        error = self._queue.end_window()
        if error is not None:
            engine.discard_gradients()
            raise error
        self._guarantee.before_step()
        # A private engine pays before it moves a weight: a crash in between costs budget, never privacy.
        try:
            result = engine.optim_step(apply_dp_noise)
        except DPBudgetExceededError:
            self._tell(self._guarantee.standing(engine.step, refused=True))
            raise
        self.step, self.policy_version = result.step, result.policy_version
        values = {
            **mean_of(losses),
            "tokens": sum(result.tokens_processed for result, _ in losses),
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "param_delta_norm": result.param_delta_norm,
        }
        if result.dp_metrics is not None:
            values["dp/epsilon"] = result.dp_metrics.total_epsilon
        self._bus.publish(Metrics(step=result.step, values=values))
        self._tell(self._guarantee.after_step(result))
        return result

    def _tell(self, events: Iterable[Event]) -> None:
        for event in events:
            self._bus.publish(event)
