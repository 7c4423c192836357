"""The worker of a training client: one thread, one engine, one queue; a failure ends a handle, never the thread."""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar, cast

from tensafe_nb.config import TrainingConfig
from tensafe_nb.core.auditor import Auditor
from tensafe_nb.core.bus import EventBus
from tensafe_nb.core.encrypted import EncryptedConnections, EncryptedSide
from tensafe_nb.core.engines import MakesEngines, Trains
from tensafe_nb.core.executor import Executor
from tensafe_nb.core.past import Keeper, Resumed, Told
from tensafe_nb.core.privacy import Guarantee
from tensafe_nb.core.queue import Job, JobQueue
from tensafe_nb.engine.canaries import audit
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.low_rank import Factors
from tensafe_nb.engine.models.memory import presentable
from tensafe_nb.engine.sampling import llama_cpp
from tensafe_nb.engine.sampling.sampler import SampleCall
from tensafe_nb.errors import (
    ClientClosedError,
    ClusterError,
    FutureCancelledError,
    FutureFailedError,
    TGTinkerError,
    ValidationError,
)
from tensafe_nb.events import (
    Alarm,
    Event,
    OperationCancelled,
    OperationFailed,
    OperationFinished,
    OperationQueued,
    OperationStarted,
    Progress,
    ReplicaChange,
    ReplicasChanged,
    StatusChanged,
    check_reported,
)
from tensafe_nb.futures import FutureHandle, Promise, handle_of
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.stream import Subscriber
from tensafe_nb.lifetimes import collect
from tensafe_nb.losses import Loss
from tensafe_nb.privacy.audit_canary import PrivacyAudit
from tensafe_nb.privacy.ledger.charges import LedgerLog
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tensafe_nb.protocol.operations import (
    ForwardBackward,
    FreezeReference,
    LoadState,
    Operation,
    OptimStep,
    Sample,
    SaveState,
)
from tensafe_nb.protocol.results import (
    ClientStatus,
    FutureStatus,
    SaveStateResult,
    StateSource,
    StepEstimate,
    TrainingClientInfo,
)
from tensafe_nb.store.vault import Vault

R = TypeVar("R")
Streams: TypeAlias = Callable[[], Mapping[str, Any]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """A source, found: the state that a training client starts from.

    Attributes:
        source: As it was named.
        relative: The client whose loaded base weights to share, if it is still there.
        saved: The state that is still being written, where it is.
    """

    source: StateSource
    relative: "Worker | None" = None
    saved: Promise[SaveStateResult] | None = None

    @classmethod
    def of(cls, source: StateSource, relative: "Worker | None") -> "Origin":
        """Find what a source names.

        Raises:
            ValidationError: It names a result that is not here.
        """
        if source.future_id is None:
            return cls(source, relative)
        saved = relative.promise_of(source.future_id) if relative is not None else None
        if saved is None:
            raise ValidationError(
                f"The source {source.future_id!r} of {source.parent!r} is not here any more: name the artifact that it "
                f"saved."
            )
        return cls(source, relative, saved)

    def artifact_id(self) -> str:
        """Return the id of the state; waits until it is written."""
        if self.saved is None:
            return str(self.source.artifact_id)
        self.saved.wait()
        return self.saved.outcome().artifact_id


OF_MODEL = ("device", "precision", "context", "trained_parameters")  # what there is to tell of a loaded model


def lost_to_privacy(job: Job) -> FutureFailedError:
    """Return what becomes of a private client's operation that ran or waited as its process ended."""
    return FutureFailedError(
        f"{job.kind.verb} was lost: the server ended before it was done, and private training is never repeated, which "
        f"would spend privacy twice. The weights are those of the last step that ended, and a draw that was made is "
        f"paid for, once. Go on with the next draw."
    )


loaded_models: "weakref.WeakSet[Any]" = weakref.WeakSet()  # of this process


class Worker:
    """Runs the operations of one training client on a thread of its own.

    The thread holds the worker, and the worker never the client: so a client that nobody refers to any more can be
    told from one in use. It then says `detach()`, as `close()` does for who wants to say when.

    Args:
        training_client_id: Names the thread.
        config: What the engine is made of; it is loaded on the thread.
        bus: Where to publish.
        default_loss: For operations that name none.
        vault: Where states are kept, and what happened is written down.
        ledger: Where the tenant's privacy accounts are.
        origin: Where it starts; afresh when None.
        keeper: Keeps it for a process to come; None lets it end with this one.
        resumed: What an earlier process has left of it: its model is loaded when there is something to do.
        served: Its tokenizer is given to nobody in this process.
        engines: Makes its engine.
    """

    def __init__(
        self,
        training_client_id: str,
        config: TrainingConfig,
        bus: EventBus,
        default_loss: Loss,
        vault: Vault,
        ledger: LedgerLog,
        origin: Origin | None = None,
        keeper: Keeper | None = None,
        resumed: Resumed | None = None,
        *,
        served: bool = False,
        engines: MakesEngines,
    ) -> None:
        self._served, self._engines = served, engines
        self.training_client_id = training_client_id
        self.config = config
        self.bus = bus
        self.created_at = time.time()
        self._pid = os.getpid()
        self.status = ClientStatus.INITIALIZING
        self.reason: str | None = None
        self._loaded: Promise[TrainingClientInfo] = Promise()
        self._tokenizer: Any = None
        self._model: dict[str, Any] = {}  # what there is to tell of the loaded model
        self._executor: Executor | None = None
        self._reached = (0, 0)  # step and policy version, once the engine is gone
        self._failure: TGTinkerError | None = None
        self._gone: ClusterError | None = None  # why there is no engine any more
        self._queue = JobQueue()
        self._running: list[Job] = []  # one, or samples that are drawn together
        self._visitors = 0  # who waits for the model or holds it, between two operations
        self._promises: weakref.WeakValueDictionary[str, Promise[Any]] = weakref.WeakValueDictionary()
        self._closing = False
        # One entry for each client at the other end of the line; a list, since appending and popping are atomic.
        self._holders = [training_client_id]
        self._default_loss = default_loss
        self._vault = vault
        self._private = config.dp_config is not None and config.dp_config.enabled
        self._auditor = Auditor(vault.audit, training_client_id, private=self._private)
        self._guarantee = Guarantee(ledger, config, training_client_id)
        self._ledger = ledger
        self._origin, self._source = origin, None if origin is None else origin.source
        self._computing = threading.Lock()
        self._changing = threading.RLock()
        self._undisturbed = threading.Condition(self._changing)  # nobody waits for the model any more
        self._wakes: SimpleQueue[None] = SimpleQueue()  # one for each time that the thread has to look up
        self._submitting = threading.RLock()
        self._told = Told(bus)  # what operations tell
        self.connections = EncryptedConnections(vault, training_client_id, private=self._private)
        self._keeper = keeper
        self._base: str | None = None  # the automatic checkpoint that it can be brought back from
        self._interrupted: Resumed | None = None
        self._moved = False  # since that checkpoint
        self._to_go = self._wanted = self._stopped = self._repeating = False
        self._back: Promise[None] = Promise()  # ends when the model is in memory
        self.redrawn: list[
            tuple[int, bytes]
        ] = []  # draws that an earlier process has left owed, entered here
        if resumed is not None:
            self._resume(resumed)
        models.import_transformers()  # on the caller's thread
        self._thread = threading.Thread(
            target=self._main, name=f"tsnb-worker-{training_client_id}", daemon=True
        )
        self._loaded.owner = self._back.owner = self._thread
        self._thread.start()

    def _resume(self, left: Resumed) -> None:
        """Take over what an earlier process has left: on the caller's thread, before this one's begins."""
        info = left.info
        self.created_at, self._reached = info.created_at, (info.step, info.policy_version)
        self.status, self.reason = ClientStatus(info.status), info.reason
        self._model = {name: getattr(info, name) for name in OF_MODEL}
        self._guarantee.metrics = info.dp_metrics
        self._base, self._failure = left.base, left.failure
        self._interrupted = left
        for job in left.jobs:
            job.promise.owner = None
            self._promises[job.future_id] = job.promise
            self._queue.put(job)
            self._moved |= job.past is not None
            if self._private and job.past is None and job.kind in (ForwardBackward, OptimStep):
                job.refusal = lost_to_privacy(job)
        self._repeating = self._moved
        made, unit = left.draws
        if made:  # the ledger says which of them are paid for; the others are, with the next
            charged = self._vault.audit.entries(self.training_client_id, "dp_charge", made, 0)
            self.redrawn = [self._guarantee.enter_draw(unit) for _ in range(made - len(charged))]
        if self.status is ClientStatus.READY:
            self._loaded.succeed(self.info())

    # called from any thread

    @property
    def history(self) -> RunHistory:
        """The log, and the curves in it."""
        return self.bus.history

    def subscribe(self, subscriber: Subscriber, after: int | None = None) -> Callable[[], None]:
        """SampleCall `subscriber(event)` on every event; see `EventBus.subscribe`."""
        return self.bus.subscribe(subscriber, after)

    def publish_all(self, events: Sequence[Event], before: Callable[[int], object]) -> int:
        """Number and record what a run tells; see `EventBus.publish_all`.

        Raises:
            ValidationError: An event that is the core's own to tell.
        """
        for event in events:
            check_reported(event)
        return self.bus.publish_all(events, before)

    def publish(self, event: Event) -> Event:
        """Number and record what a run tells.

        Raises:
            ValidationError: An event that is the core's own to tell.
        """
        check_reported(event)
        return self.bus.publish(event)

    def sync(self) -> None:
        """Put every recorded event on the disk."""
        self.bus.sync()

    def ready(self) -> FutureHandle[TrainingClientInfo]:
        """Return a handle that ends once the model is loaded; loading cannot be cancelled."""
        return handle_of(
            self._loaded, "ready", self.training_client_id, TrainingClientInfo, cancel=lambda: False
        )

    def tokenizer(self) -> Any:
        """Return the model's tokenizer; waits until the model is loaded."""
        if self._tokenizer is None:
            self._bring_back()
        return self._tokenizer

    def _bring_back(self) -> None:
        """Wait until the model is in memory."""
        self._loaded.wait()
        self._loaded.outcome()
        with self._changing:
            back = self._back
            self._wanted = not back.done
        self._wakes.put(None)
        back.wait()
        back.outcome()

    def attach(self) -> bool:
        """Count one more client at the other end of the line; False if the end has begun."""
        with self._changing:
            if not self._closing:
                self._holders.append(self.training_client_id)
            return not self._closing

    def remember(self, job: Job) -> FutureHandle[Any]:
        """Return a handle of an operation that an earlier process was given."""
        self._promises[job.future_id] = job.promise
        return self.handle_of(job)

    def promise_of(self, future_id: str) -> Promise[Any] | None:
        """Return the promise of an operation, as long as somebody keeps its handle or it is to run."""
        return self._promises.get(future_id)

    @property
    def waiting(self) -> int:
        """How many operations wait, or were cancelled and wait to be passed over; takes no lock."""
        return len(self._queue)

    def submit(
        self,
        operation: Operation[R],
        future_id: str | None = None,
        before: Callable[[Job], object] = lambda job: None,
    ) -> FutureHandle[R]:
        """Put an operation at the end of the queue.

        Args:
            operation: The operation.
            future_id: Its id, where the submitter has named it already.
            before: Called when it can be taken, before anything of it is told.

        Raises:
            ClientClosedError: The client is closed.
            QueueFullError: Too many wait already.
            ValidationError: What it names is not there, or does not fit this client.
        """
        return self._enter(self.job_of(operation), future_id, before)

    def job_of(self, operation: Operation[Any]) -> Job:
        """Return the job of an operation; see `Job.of`."""
        if isinstance(operation, Sample):
            llama_cpp.check(operation.sampling, self.config)
        return Job.of(operation, self._default_loss)

    def refuse(
        self,
        kind: type[Operation[R]],
        future_id: str,
        error: TGTinkerError,
        before: Callable[[Job], object] = lambda job: None,
    ) -> FutureHandle[R]:
        """Let an operation that a server could not take fail in its turn: it breaks its window, and is on record."""
        return self._enter(Job(None, kind, refusal=error), future_id, before)

    def cancel(self, handles: Sequence[FutureHandle[Any]]) -> int:
        """Cancel several operations, in the order given; return how many were cancelled."""
        return sum(handle.cancel() for handle in handles)

    def _enter(self, job: Job, future_id: str | None, before: Callable[[Job], object]) -> FutureHandle[Any]:
        job.future_id = future_id or job.future_id
        job.promise.owner = self._thread
        handle = self.handle_of(job)
        with self._submitting:  # keeps the order of events; `_changing` is never held while publishing
            self._refuse_if_closed(job)
            if self._failure is None:
                before(job)
            self._promises[job.future_id] = job.promise
            self.bus.publish(OperationQueued(future_id=job.future_id, operation=job.kind.verb))
            with self._changing:
                failure, late = self._failure, self._closing
                if failure is None:
                    self._queue.put(job)
            self._wakes.put(None)
        if failure is not None:
            try:
                self._fail(job, failure)
            except Exception:  # the handle has ended, and says why; nobody's call is to fail for the log
                logger.exception("the audit record of %s could not be written", job.kind.verb)
        elif late:  # closed while this was being submitted
            self._cancel(job)
        return handle

    def handle_of(self, job: Job) -> FutureHandle[Any]:
        """Return what is given out for a job: it keeps the result, and neither this worker nor its model."""
        line = weakref.ref(self)  # while the job is pending or runs, the thread keeps the worker

        def cancel() -> bool:
            worker = line()
            return worker is not None and worker._cancel(job)

        def position() -> int | None:
            worker = line()
            if worker is None:
                return None
            with worker._changing:
                return worker._queue.position(job)

        handle = FutureHandle(
            job.promise,
            operation=job.kind.verb,
            future_id=job.future_id,
            training_client_id=self.training_client_id,
            result_type=job.kind.result,
            cancel=cancel,
            position=position,
        )
        job.handle = weakref.ref(handle)
        return handle

    def _refuse_if_closed(self, job: Job) -> None:
        name = job.kind.verb
        if os.getpid() != self._pid:
            raise ClientClosedError(
                f"{name}: the training client {self.training_client_id} belongs to the process this one was forked "
                f"from. Create a client here."
            )
        with self._changing:
            if self._closing:
                raise ClientClosedError(
                    f"{name}: the training client {self.training_client_id} is closed. Create a new one."
                )
            self._queue.check_room()

    def info(self) -> TrainingClientInfo:
        with self._changing:
            depth = self._queue.depth + len(self._running)
        step, policy_version = self._progress
        return TrainingClientInfo(
            self.training_client_id,
            self.config.model_ref,
            str(self.status),
            step,
            depth,
            self.created_at,
            reason=self.reason,
            dp_metrics=self._guarantee.metrics,
            policy_version=policy_version,
            source=self._source,
            away=self.is_away,
            **self._model,
        )

    def refresh(self) -> TrainingClientInfo:
        """Return how it stands; see `info`."""
        return self.info()

    @property
    def _progress(self) -> tuple[int, int]:
        """Optimiser steps taken, and the version of the weights."""
        executor = self._executor
        away = executor is None or self._repeating
        return self._reached if away else (executor.step, executor.policy_version)  # type: ignore[union-attr]

    def enter_draw(self, unit: str) -> tuple[int, bytes]:
        """Number a Poisson draw that is about to be made, and give the key of its ticket's hashes; from any thread.

        Raises:
            ValidationError: It trains without differential privacy.
        """
        return self._guarantee.enter_draw(unit)

    def privacy_statement(self) -> PrivacyStatement:
        """Return the privacy statement of what this client trains, as things stand now; from any thread.

        Raises:
            ValidationError: It trains without differential privacy.
        """
        return Guarantee(self._ledger, self.config, self.training_client_id).statement()

    def privacy_audit(self, canaries: int, steps: int) -> PrivacyAudit:
        """Train a model of canaries as privately as this client trains; on the caller's thread."""
        return audit(self.config, canaries, steps)

    def estimate(self, batch_size: int | None, length: int | None) -> StepEstimate:
        """Return what a training step will take; on the caller's thread, between two operations.

        Raises:
            ClientClosedError: The client is closed.
        """
        self._bring_back()
        with self._between_operations():
            executor = self._executor
            if executor is None or self._closing:
                raise ClientClosedError(
                    f"estimate: the training client {self.training_client_id} is closed. Create a new one."
                )
            return executor.engine.estimate(batch_size, length)

    def factors(self, layers: Sequence[int], modules: Sequence[str] | None) -> tuple[int, Factors]:
        """Return the version of the weights, and the adapters of some layers; on the caller's thread, as `estimate`.

        Raises:
            ClientClosedError: The client is closed.
        """
        self._bring_back()
        with self._between_operations():
            executor = self._executor
            if executor is None or self._closing:
                raise ClientClosedError(
                    f"The training client {self.training_client_id} is closed. Create a new one."
                )
            return executor.policy_version, executor.engine.factors(layers, modules)

    @contextmanager
    def _between_operations(self) -> Iterator[None]:
        """Hold the model between two operations: before the next one, and before any sample joins those that run."""
        with self._changing:
            self._visitors += 1
        try:
            with self._computing:
                yield
        finally:
            with self._changing:
                self._visitors -= 1
                self._undisturbed.notify_all()

    @property
    def encrypted(self) -> EncryptedSide:
        """What answers encrypted calls."""
        return EncryptedSide(self, self.connections, served=self._served)

    def close(self) -> None:
        """Cancel what waits, stop what runs at its next micro-batch or token, end the thread, free the model.

        A `save_state` that comes next is carried out: the checkpoint of a script that then fails is not lost.
        """
        if os.getpid() != self._pid or self._stopped:
            return  # a forked child has no thread to end, and the log is its parent's
        with self._changing:
            self._closing = True
            pending = list(dropwhile(lambda job: job.kind is SaveState, self._queue.pending()))
            for job in self._running:
                job.promise.cancel_requested = True
        self._wakes.put(None)
        for job in pending:
            if self._cancel(job) and job.kind is SaveState:
                logger.warning(
                    "closing %s: a save_state was given up, as what comes before it in the queue was; wait for the "
                    "handle of a checkpoint you want",
                    self.training_client_id,
                )
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._announce(ClientStatus.TERMINATED)

    def put_away(self) -> None:
        """Let go of the model once nothing is to be done, behind a checkpoint: the next operation brings it back."""
        self._to_go = self._keeper is not None
        self._wakes.put(None)

    @property
    def is_away(self) -> bool:
        """Whether the model is not in memory, and not on its way there."""
        ended = self._closing or self._failure is not None
        return self._executor is None and self._loaded.done and not ended

    def stop(self) -> None:
        """End the thread behind the operation that runs; what waits, and the training client, are left to their keeper.

        A `save_state` that comes next is carried out, as it is when the client is closed.
        """
        with self._changing:
            self._stopped = True
        self._wakes.put(None)
        self._thread.join()

    def hang_up(self) -> None:
        """Write out the log; nothing is recorded after this."""
        self.bus.close()

    def leave(self) -> None:
        """End with the process's own end of the line; see `close`."""
        self.close()

    def detach(self) -> None:
        """One client less: after the last, end once nothing is left whose outcome can reach somebody.

        What is called when an object is freed may be called in the middle of anything: it takes no lock, and does not
        wait.
        """
        with suppress(IndexError):
            self._holders.pop()
        self._wakes.put(None)

    def _cancel(self, job: Job) -> bool:
        if job.promise.cancel_pending():
            self._note_cancelled(job)
            return True
        job.promise.cancel_requested = True
        if threading.current_thread() is not self._thread:
            job.promise.wait()
        return job.promise.state is FutureStatus.CANCELLED

    # on the worker's thread

    def _main(self) -> None:
        try:
            if self._failure is not None:
                self._die(self._failure)
            elif self._loaded.done or self._load():  # one that was ready is brought back when it is needed
                while (job := self._next()) is not None:
                    if self._executor is None and not self._load():
                        break
                    if job.past is None:
                        self._run(job)
                    else:
                        self._repeat(job)
                    if self._gone is not None:
                        self._die(self._gone)
                        break
        except BaseException as error:
            logger.exception("the worker of %s died", self.training_client_id)
            self._die(FutureFailedError(f"The worker of {self.training_client_id} died: {error!r}"))
        finally:
            self._leave_state()
            self.connections.end()
            self._free()
            self._back.fail(ClientClosedError(f"The training client {self.training_client_id} is closed."))
            if not self._holders:
                self.close()
                self.hang_up()

    def _free(self) -> None:
        """Let go of the model; what a model refers to in a circle, only the collector finds."""
        self._reached = self._progress
        executor, self._executor = self._executor, None
        if executor is None:
            return
        executor.engine.close()
        model = weakref.ref(executor.engine.holder)
        del executor
        if model() is not None:
            collect()

    def _load(self) -> bool:
        """Load the model, and the state it starts from; return whether there is anything to work with."""
        self._loaded.start()
        if self._is_left():
            self._loaded.fail(ClientClosedError(f"Nobody refers to {self.training_client_id} any more."))
            return False
        if len(loaded_models) > 0:
            collect()  # a cell that was run again has let go of another model: make room before this one
        try:
            engine = self._make_engine()
            self.config = engine.config  # a folder with an adapter has brought its configuration
            self._guarantee.attach(engine)
            self._tokenizer = engine.tokenizer
            self._model = engine.about
            loaded_models.add(engine.holder)
            executor = Executor(
                engine, self._queue, self._vault, self._guarantee, self._told, self.training_client_id
            )
            if self._base is not None and self._keeper is not None:
                executor.take_back(self._keeper.states, self._base)
            elif self._origin is not None:
                self._told.silent = self.bus.history.state.loaded is not None
                executor.load_state(self._origin.artifact_id(), lenient_optimizer=True)
                self._told.silent = False
                self._moved = True
            self._executor = executor
        except FutureCancelledError:
            self._loaded.fail(
                ClientClosedError(f"{self.training_client_id} was closed while it was loading.")
            )
            return False
        except Exception as error:  # noqa: BLE001  # whatever breaks a load becomes the client's state
            self._die(models.refuse(error, self.config.model_ref))
            return False
        if self.status is not ClientStatus.BUSY:
            self._announce(ClientStatus.READY)
        known = self.bus.history.state.privacy
        for event in self._guarantee.standing(engine.step):
            if known is None or known.total_epsilon != event.total_epsilon:
                self.bus.publish(event)
        self._loaded.succeed(self.info())
        self._back.succeed(None)
        if self._origin is not None and self._base is None and self._keeper is not None:
            self._keep()  # from here on it needs its source no more
        return True

    def _make_engine(self) -> Trains:
        """Return an engine; that of a fork shares the frozen weights of the client it was forked from, if it can."""
        make = partial(
            self._engines.make,
            self.config,
            self._vault.home,
            tell=self._hear,
            tick=self._look_up,
            served=self._served,
        )
        relative = self._origin.relative if self._origin is not None else None
        if relative is None or self.config.lora_config is None:
            return make(None)
        if (relative.config.dtype, relative.config.device) != (self.config.dtype, self.config.device):
            return make(None)
        relative._loaded.wait()
        with relative._between_operations():  # within one, adapters may be switched off
            executor = (
                relative._executor
            )  # None where it was closed meanwhile: then the model is loaded again
            return make(None if executor is None else executor.engine)

    def _look_up(self, done: int, total: int) -> None:
        """Go on with a load only while somebody waits for it: on a cluster it may take long."""
        with self._changing:
            pending = self._queue.pending()
            saves = bool(pending) and pending[0].kind is SaveState
            ending = self._stopped or (self._closing and not saves)
        if ending or self._is_left():
            raise FutureCancelledError("closed while it was loading")

    def _hear(self, event: Event) -> None:
        """Tell what there is to know of the engine itself; that a replica was lost is an alarm, too."""
        self.bus.publish(event)
        if not isinstance(event, ReplicasChanged):
            return
        rest = f"({event.reason}); {event.replicas} of {event.wanted} go on."
        match event.change:
            case ReplicaChange.WAITING:
                name, message = "replica_waiting", f"{event.name} is not there yet: {event.reason}."
                remedy = "It starts once there is room: add a machine, or close another training client."
            case ReplicaChange.LOST:
                name, message = "replica_lost", f"{event.name} is gone {rest}"
                remedy = "Nothing else is lost: another is being started in its place."
            case ReplicaChange.MISSING:
                name, message = "replica_missing", f"No other replica comes up {rest}"
                remedy = (
                    "Look at the cluster's machines. Save a checkpoint: the weights go with the last replica."
                )
            case _:
                return
        state = self.bus.history.state
        run_id = "" if state.latest_run is None else state.latest_run.run_id
        self.bus.publish(
            Alarm(run_id=run_id, step=state.step, name=name, level="amber", message=message, remedy=remedy)
        )

    def _die(self, failure: TGTinkerError) -> None:
        """Fail everything that runs, waits, or is still to come."""
        with self._changing:
            self._failure = failure
            doomed = self._queue.pending() + self._running
        self._loaded.fail(failure)
        self._back.fail(failure)
        with ExitStack() as all_of_them:  # one that cannot be put on record keeps no other from its end
            for job in reversed(doomed):
                all_of_them.callback(self._fail, job, failure)
        self._announce(ClientStatus.ERROR, str(failure))

    def _next(self) -> Job | None:
        """Wait for the next job; None at the end."""
        while True:
            if self._is_left():
                return None
            with self._changing:
                if self._stopped and not self._saves_next():
                    return None
                away = self._executor is None
                job = None
                if not (away or self._closing) or self._queue.depth:  # what has ended brings no model back
                    job = self._queue.take()
                if job is not None:
                    self._running.append(job)
                if job is not None or self._closing:
                    return job
            if away and self._wanted:
                if not self._load():
                    return None
                continue
            if self._to_go and not away:
                self._go()
                continue
            self._wakes.get()

    def _saves_next(self) -> bool:
        pending = self._queue.pending()
        return bool(pending) and pending[0].kind is SaveState and self._executor is not None

    def _is_left(self) -> bool:
        """Whether nobody can be reached by anything that runs or waits any more: then the end has begun."""
        if self._holders:
            return False
        with self._changing:
            jobs = [*self._running, *self._queue.pending()]
            # A job that nobody waits for is carried out all the same, if a later one is still wanted.
            if self._holders or any(job.is_wanted for job in jobs):
                return False
            self._closing = True
        return True

    def _run(self, job: Job) -> None:
        self.status, self._moved, self._repeating = ClientStatus.BUSY, True, False
        if self._visitors:
            with self._changing:
                self._undisturbed.wait_for(lambda: not self._visitors)
        self._begin(job)
        kind = self._sample_kind(job)
        if kind is None:
            self._carry_out(job)
        else:
            self._sample_together(job, kind)
        if self._is_due(whole=not self._accumulating):
            self._keep()

    def _turn_over(self, job: Job) -> None:
        """Be free for what comes next, once a job has ended."""
        with self._changing:
            if job in self._running:
                self._running.remove(job)
            if not self._running and self._queue.is_empty:
                self.status = ClientStatus.READY

    def _is_due(self, *, whole: bool) -> bool:
        return self._keeper is not None and self._is_whole and self._keeper.is_due(whole=whole)

    def _begin(self, job: Job) -> None:
        """Tell that a job has its turn; what an earlier process has told of it is not told again."""
        self._told.begin(None if self._interrupted is None else self._interrupted.told.get(job.future_id))
        self._told.publish(OperationStarted(future_id=job.future_id, operation=job.kind.verb))

    def _sample_kind(self, job: Job) -> str | None:
        """Return what is equal for samples that are drawn together; None of what is carried out by itself."""
        asked = job.operation
        if not isinstance(asked, Sample) or job.refusal is not None or job.past is not None:
            return None
        return cast(Executor, self._executor).engine.kind_of(asked.sampling, len(asked.prompts))

    def _sample_together(self, job: Job, kind: str) -> None:
        """Draw what a sample asks, and together with it what samples behind it ask; each ends by itself.

        Nobody joins past an operation of another kind, nor when the client is to stop, to be kept, or to be looked at.
        """
        executor = cast(Executor, self._executor)
        samples: dict[
            SampleCall, tuple[Job, float, int]
        ] = {}  # with when they began, and seeds taken by then

        def call_of(job: Job) -> SampleCall | None:
            began = time.perf_counter()
            try:
                self._auditor.catch_up()
                call = executor.call(job, self._tick(job))
            except BaseException as error:  # noqa: BLE001  # any failure is the future's, never the worker's
                self._end(job, error, began, executor.engine.streams)
                return None
            samples[call] = job, began, executor.engine.samples_drawn
            return call

        def newcomer() -> SampleCall | None:
            while (job := self._next_sample(kind)) is not None:
                self._begin(job)
                if (call := call_of(job)) is not None:
                    return call
            return None

        def ended(call: SampleCall) -> None:
            job, began, drawn = samples.pop(call)
            try:
                result = executor.result(job, call)
            except BaseException as error:  # noqa: BLE001  # see above
                # those that began meanwhile have taken seeds as well
                self._end(job, error, began, lambda: {**executor.engine.streams(), "samples_drawn": drawn})
            else:
                self._end(job, result, began)

        with self._computing, executor.engine.together(kind) as together:
            first = call_of(job)
            if first is not None:
                together.add(first)
            together.run(newcomer, ended)

    def _next_sample(self, kind: str) -> Job | None:
        """Take the next job if it is a sample that may join those that are being drawn."""
        if len(self._queue) == 0 or self._is_due(whole=False):
            return None
        with self._changing:
            if self._stopped or self._closing or self._visitors:
                return None
            job = self._queue.take(lambda job: self._sample_kind(job) == kind)
            if job is not None:
                self._running.append(job)
        return job

    def _repeat(self, job: Job) -> None:
        """Bring about what an operation of an earlier process has left; nothing of it is told again."""
        assert self._executor is not None and job.past is not None
        self._told.silent = True
        try:
            with self._computing:
                self._executor.repeat(job, job.past)
        except Exception as error:
            raise FutureFailedError(
                f"{self.training_client_id} could not be brought back to where it was: {job.kind.verb} "
                f"{job.future_id}, which had completed, now fails: {presentable(error)}"
            ) from error
        finally:
            self._told.silent = False
            job.let_go()
            with self._changing:
                self._running.remove(job)

    # its state, kept for a process to come

    @property
    def _is_whole(self) -> bool:
        """Whether a checkpoint can hold the state: no window is broken, and none of private training is open."""
        if self._executor is None or (self._private and self._accumulating):
            return False
        return self._queue.is_whole

    def _keep(self) -> None:
        """Make an automatic checkpoint; where that cannot be done, the journal goes on from the one before."""
        assert self._executor is not None and self._keeper is not None
        try:
            base = self._executor.keep(self._keeper.states)
            self._keeper.kept(base, self._queue.last, self.info())
        except (TGTinkerError, OSError) as error:
            logger.error("no automatic checkpoint of %s: %s", self.training_client_id, error)
        else:
            self._base, self._moved = base, False

    def _leave_state(self) -> None:
        """Make a checkpoint at the end, so that nothing has to be repeated in the next process."""
        if self._stopped and self._moved and self._is_whole and self._keeper is not None:
            self._keep()

    def _go(self) -> None:
        """Let go of the model, if all of its state can be kept."""
        self._to_go = False
        if not self._is_whole:
            return
        if self._moved or self._base is None:
            self._keep()
        if self._base is None or self._moved:
            return
        with self._changing:
            self._back, self._wanted = Promise(), False
            self._back.owner = self._thread
        with self._computing:
            self._free()

    def _carry_out(self, job: Job) -> None:
        """Execute a job and end its promise."""
        began, executor, executing = time.perf_counter(), self._executor, False
        try:
            self._auditor.catch_up()
            if job.refusal is not None:
                raise job.refusal
            with self._computing:
                executing = True
                result = cast(Executor, executor).execute(job, self._tick(job))
        except BaseException as error:  # noqa: BLE001  # any failure is the future's, never the worker's
            self._end(
                job, error, began, executor.engine.streams if executing and executor is not None else None
            )
        else:
            self._end(job, result, began)

    def _end(self, job: Job, outcome: object, began: float, streams: Streams | None = None) -> None:
        """End a job's promise: on record first, then in the log, then for whoever waits.

        Args:
            job: The job.
            outcome: Its result, or what was raised.
            began: When, by the performance counter.
            streams: If it was carried out and did not complete, where the random streams stand behind it.
        """
        if not isinstance(outcome, BaseException):
            self._complete(job, outcome, time.perf_counter() - began)
            return
        try:
            if isinstance(outcome, FutureCancelledError):
                self._queue.mark_broken(job, "was cancelled", first=not self._accumulating)
                try:
                    self._note_cancelled(job, streams)
                finally:
                    job.promise.cancel()
            else:
                self._gone = outcome if isinstance(outcome, ClusterError) else None
                self._queue.mark_broken(job, "failed", first=not self._accumulating)
                self._fail(job, presentable(outcome), streams)
        finally:
            self._turn_over(job)

    def _complete(self, job: Job, result: Any, duration: float) -> None:
        try:
            self._auditor.record(job, result)
            self._keep_end(job, result, duration)
            job.let_go()
            self.bus.publish(
                OperationFinished(future_id=job.future_id, operation=job.kind.verb, duration=duration)
            )
        finally:  # whoever waits is told, whatever happens to the log
            self._turn_over(
                job
            )  # before: behind it, this thread would keep the interpreter from whoever waits
            job.promise.succeed(result)

    @property
    def _accumulating(self) -> bool:
        return self._executor is not None and self._executor.accumulating

    def _tick(self, job: Job) -> Callable[[int, int], None]:
        def tick(done: int, total: int) -> None:
            if job.promise.cancel_requested or self._is_left():
                raise FutureCancelledError("cancelled while running")
            job.promise.progress = (done, total)
            if done:
                self.bus.publish(Progress(future_id=job.future_id, done=done, total=total))

        return tick

    def _keep_end(
        self, job: Job, outcome: object, duration: float = 0.0, streams: Streams | None = None
    ) -> None:
        """Keep how an operation ended, before anybody is told; of what must not be repeated, the state behind it."""
        keeper, executor, base = self._keeper, self._executor, None
        if keeper is None:
            return
        once = (LoadState, OptimStep, FreezeReference) if self._private else (LoadState,)
        try:
            if isinstance(outcome, job.kind.result) and job.kind in once and executor is not None:
                base = executor.keep(keeper.states)
        except (TGTinkerError, OSError) as error:
            logger.error("no automatic checkpoint of %s: %s", self.training_client_id, error)
        stand = None if streams is None else streams()
        keeper.ended(job, outcome, duration=duration, streams=stand, base=base, info=self.info())
        if base is not None:
            self._base, self._moved = base, False

    def _note_cancelled(self, job: Job, streams: Streams | None = None) -> None:
        self._auditor.record(job, FutureCancelledError("cancelled"))
        self._keep_end(job, None, streams=streams)
        job.let_go()
        self.bus.publish(OperationCancelled(future_id=job.future_id, operation=job.kind.verb))

    def _fail(self, job: Job, error: BaseException, streams: Streams | None = None) -> None:
        try:
            self._auditor.record(job, error)
            self._keep_end(job, error, streams=streams)
            job.let_go()
            code = error.code if isinstance(error, TGTinkerError) else type(error).__name__
            self.bus.publish(
                OperationFailed(
                    future_id=job.future_id, operation=job.kind.verb, code=code, message=str(error)
                )
            )
        finally:  # whoever waits is told, whatever happens to the log
            job.promise.fail(error)

    def _announce(self, status: ClientStatus, reason: str | None = None) -> None:
        """Enter a status that lasts; READY and BUSY take turns unannounced, as the operations' events tell."""
        if status is not self.status:
            self.status, self.reason = status, reason or self.reason
            self.bus.publish(StatusChanged(status=str(status), reason=reason))
