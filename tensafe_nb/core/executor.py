"""The executor: carries out each operation, on engine, store and privacy account, and publishes what came of it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from tensafe_nb.config import StepConfig
from tensafe_nb.core import checkpoints
from tensafe_nb.core.engines import Trains
from tensafe_nb.core.past import Past, Told
from tensafe_nb.core.privacy import Guarantee
from tensafe_nb.core.queue import Job, JobQueue
from tensafe_nb.engine.accumulation import Tick, mean_of, no_tick
from tensafe_nb.engine.sampling import sampler
from tensafe_nb.errors import DPBudgetExceededError
from tensafe_nb.events import CheckpointSaved, Event, Metrics, StateLoaded
from tensafe_nb.futures import Promise
from tensafe_nb.losses import Loss
from tensafe_nb.protocol.batch import Array
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.operations import (
    ComputeLogprobs,
    Forward,
    ForwardBackward,
    FreezeReference,
    LoadAdapter,
    LoadState,
    OptimStep,
    ReadAdapter,
    Sample,
    SaveState,
    VoidPrivacy,
)
from tensafe_nb.protocol.results import (
    ForwardBackwardResult,
    FutureStatus,
    LoadAdapterResult,
    LoadStateResult,
    OptimStepResult,
    Result,
    SampleResult,
    SaveStateResult,
    missing_pieces,
)
from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.vault import Vault


def told_to_its_end(promise: Promise[Any], result: SampleResult, *, stream: bool) -> SampleResult:
    """Return a result, whose pieces add up to it where they are streamed."""
    for piece in missing_pieces(promise.pieces, result) if stream else ():
        promise.add_piece(piece)
    return result


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
        engine: Trains,
        queue: JobQueue,
        vault: Vault,
        guarantee: Guarantee,
        bus: Told,
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
        self._drop_stale()
        match operation:
            case ForwardBackward(batch, return_logprobs=wanted):
                loss = cast(Loss, job.loss)
                result = engine.forward_backward(batch, loss, tick, wanted)
                self._losses.append((replace(result, logprobs=None), loss.declares.prenormalised))
                return result
            case Forward(batch, return_logprobs=wanted):
                return engine.forward(batch, cast(Loss, job.loss), wanted, tick)
            case OptimStep(apply_dp_noise, step):
                return self.optim_step(apply_dp_noise, step)
            case Sample(prompts, sampling, stream):
                sampled = engine.sample(prompts, sampling, tick, job.promise.add_piece if stream else None)
                return told_to_its_end(job.promise, sampled, stream=stream)
            case ComputeLogprobs(batch, temperature, reference):
                return engine.compute_logprobs(batch, temperature, reference, tick)
            case FreezeReference():
                return engine.freeze_reference()
            case ReadAdapter():
                return engine.read_adapter()
            case LoadAdapter(tensors):
                return self.load_adapter(tensors)
            case SaveState():
                return self.save_state(operation, job.artifact_id)
            case LoadState(artifact_id, for_run, include_optimizer):
                return self.load_state(artifact_id, for_run=for_run, include_optimizer=include_optimizer)
            case VoidPrivacy(reason):
                voided = self._guarantee.void(reason)
                self._tell(self._guarantee.standing(self.step))
                return voided
        raise AssertionError(operation)

    def _drop_stale(self) -> None:
        """Drop what a step that did not complete has left: its window must not leak into the next."""
        if self._queue.stale_gradients:
            self._queue.stale_gradients = False
            self._losses.clear()
            self.engine.discard_gradients()

    def repeat(self, job: Job, past: Past) -> None:
        """Bring the model to where an operation that has ended before left it.

        What completed is computed again, if it moved something; what failed or was cancelled leaves its mark on its
        window, and the random streams where they were. Of private training nothing is computed again, for that would
        be paid twice: a gradient that was accumulated is lost, and its step fails.
        """
        engine, executed = self.engine, past.state is FutureStatus.COMPLETED or past.streams is not None
        if executed:
            self._drop_stale()
        if past.state is FutureStatus.COMPLETED:
            if isinstance(job.operation, Sample):
                engine.samples_drawn += job.operation.sampling.seed is None
            elif not engine.resumable:
                self._queue.mark_broken(job, "was lost as the server ended")
            elif job.kind in (ForwardBackward, OptimStep, FreezeReference, LoadAdapter, LoadState):
                self.execute(job, no_tick)
            return
        if past.streams is not None:
            engine.restore_streams(past.streams)
            if job.kind is ForwardBackward:
                engine.discard_gradients()
            elif job.kind is OptimStep:
                self._losses = []
        how = "failed" if past.state is FutureStatus.FAILED else "was cancelled"
        self._queue.mark_broken(job, how, first=past.started and not self.accumulating)

    def keep(self, store: ArtifactStore) -> str:
        """Seal the state between two operations, for a process to come, and return its id."""
        self._drop_stale()
        losses, broken = self._losses, self._queue.inherited
        if losses and not self.engine.resumable:
            losses, broken = [], broken or "what had been accumulated was lost as the server ended"
        saved = checkpoints.save(
            self.engine,
            store,
            SaveState(),
            training_client_id=self._client_id,
            ledger_head=self._vault.audit.head(),
            facts={"losses": encode(losses), "broken": broken},
            ledger=self._guarantee.carried(),
        )
        return saved.artifact_id

    def take_back(self, store: ArtifactStore, artifact_id: str) -> None:
        """Go on from a state that `keep` has sealed. It is this client's own: no account is joined, nothing is told."""
        _, facts = checkpoints.load(self.engine, store, artifact_id, take_over=self._guarantee.take_back)
        self._queue.inherited = facts["broken"]
        self._losses = [tuple(pair) for pair in decode(facts["losses"])]
        self.step, self.policy_version = self.engine.step, self.engine.policy_version

    def call(self, job: Job, tick: Tick) -> sampler.SampleCall:
        """Return what a sample asks, for `Together`."""
        asked = cast(Sample, job.operation)
        tell = job.promise.add_piece if asked.stream else None
        return self.engine.call(asked.prompts, asked.sampling, tick, tell)

    def result(self, job: Job, call: sampler.SampleCall) -> SampleResult:
        """Return what was drawn for a job.

        Raises:
            BaseException: What has ended its call.
        """
        return told_to_its_end(job.promise, call.result(), stream=call.tell is not None)

    def save_state(self, operation: SaveState, artifact_id: str | None) -> SaveStateResult:
        """Seal the state, with the open window: what was accumulated, and how it was broken.

        A process that was killed may have done so already: then the artifact is there, under the id it was to have.
        """
        engine, store = self.engine, self._vault.artifacts
        # A private window is never sealed: its sum of clipped gradients has no noise yet. It is dropped, and counted.
        resumable = engine.resumable
        window, broken = (self._losses, self._queue.broken) if resumable else ([], None)
        if artifact_id is not None and store.holds(artifact_id):
            saved = store.get(artifact_id)
        else:
            saved = checkpoints.save(
                engine,
                store,
                operation,
                training_client_id=self._client_id,
                ledger_head=self._vault.audit.head(),
                facts={"losses": encode(window), "broken": broken},
                ledger=self._guarantee.carried(),
                artifact_id=artifact_id,
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

    def load_adapter(self, tensors: Mapping[str, Array]) -> LoadAdapterResult:
        """Take tensors in place of the adapter's own; they come with no account of what they hold of which data."""
        loaded = self.engine.load_adapter(tensors, lambda: self._guarantee.take_over(None))
        self._queue.end_window()
        self._losses = []
        self.policy_version = loaded.policy_version
        return loaded

    def optim_step(self, apply_dp_noise: bool, step: StepConfig) -> OptimStepResult:
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
            result = engine.optim_step(apply_dp_noise, step)
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
