"""A training loop you can watch, await, pause, step and stop; and the record of those that ran before."""

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from math import ceil
from typing import Any, Protocol, TypeVar

from tensafe_nb.batch import BatchData
from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import (
    ClientClosedError,
    FutureCancelledError,
    FutureFailedError,
    FutureTimeoutError,
    ValidationError,
)
from tensafe_nb.events import Event, Metrics, RunHistory, RunState, RunStep
from tensafe_nb.futures import HEARTBEAT, FutureHandle, Promise
from tensafe_nb.registry import load_dotted
from tensafe_nb.types import ForwardResult, FutureStatus, RunResult, RunStatus

logger = logging.getLogger(__name__)

Batch = BatchData | Mapping[str, Any]
R = TypeVar("R")
EVAL_SLICE = 64  # held-out batches in the queue at a time
LONG_WINDOW = 400  # batches per step from which on the queue holds one step only


class RunClient(Protocol):
    """What a run needs of a training client."""

    @property
    def training_client_id(self) -> str: ...
    @property
    def config(self) -> TrainingConfig: ...
    @property
    def step(self) -> int: ...
    @property
    def history(self) -> RunHistory: ...
    def publish(self, event: Event) -> Event: ...
    def sync_events(self) -> None: ...
    def forward_backward(self, batch: Batch) -> FutureHandle[Any]: ...
    def forward(self, batch: Batch) -> FutureHandle[Any]: ...
    def optim_step(self) -> FutureHandle[Any]: ...


class Loop(Protocol):
    """What a run repeats; every method is called on the run's own thread."""

    lookahead: int  # steps that may be under way before the oldest is collected
    curve: str  # the metric that tells how it goes

    def attach(self, run: "TrainingRun") -> None:
        """Get to know the run: its id for metrics, and its `wait` for results needed within a step."""

    def submit(self, index: int) -> Sequence[FutureHandle[Any]] | None:
        """Queue step `index` and return the handles to wait for; None when there is nothing left."""

    def collect(self, index: int, results: Sequence[Any]) -> None:
        """Take the results of step `index`."""


class TrainingRun:
    """A loop on a thread of its own. The cell that starts it returns at once.

    Await it, or call `result()`, when the end is needed; interrupting that wait does not stop the run.

    Example:
        >>> run = tc.fit(batches, steps=100)
        >>> run.pause(); run.step(5); run.resume()
        >>> result = await run
    """

    def __init__(self, client: RunClient, loop: Loop, number: int, planned_steps: int | None = None) -> None:
        self.run_id = f"{client.training_client_id}/{number}"
        self.planned_steps = planned_steps
        self.steps_done = 0
        self._client = client
        self._loop = loop
        self.curve = loop.curve
        self.started_at = time.time()
        self._state = RunStatus.RUNNING
        self._wants_pause = self._wants_stop = False
        self._credit: int | None = None  # steps left to take before pausing again
        self._inflight: deque[tuple[int, Sequence[FutureHandle[Any]]]] = deque()
        self._changed = threading.Condition()
        self._promise: Promise[RunResult] = Promise()
        self._first_step, self._first_event = client.step, client.history.last_seq
        self._last_step_at = time.perf_counter()
        self._thread = threading.Thread(target=self._main, name=f"tsnb-run-{number}", daemon=True)
        loop.attach(self)

    # what a user does

    @property
    def state(self) -> RunStatus:
        """RUNNING, PAUSING, PAUSED, STOPPING, STOPPED, FINISHED or FAILED."""
        return self._state

    @property
    def client(self) -> RunClient:
        """The training client it trains."""
        return self._client

    @property
    def history(self) -> RunHistory:
        """The client's history: curves and events, of this run and those before it."""
        return self._client.history

    def pause(self) -> None:
        """Submit no further step; what is in flight finishes."""
        with self._changed:
            self._wants_pause = True
            if self._state is RunStatus.RUNNING:
                self._set_state(RunStatus.PAUSING)

    def resume(self) -> None:
        """Go on after a pause."""
        with self._changed:
            self._go_on(None)

    def step(self, steps: int = 1) -> None:
        """Take some steps, then pause.

        Raises:
            ValidationError: Fewer than one step.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValidationError(f"run.step({steps!r}): take a whole number of steps, at least one.")
        with self._changed:
            self._go_on(steps)

    def _go_on(self, credit: int | None) -> None:
        self._wants_pause, self._credit = False, credit
        if self._state is RunStatus.PAUSING:
            self._set_state(RunStatus.RUNNING)
        self._changed.notify_all()

    def stop(self) -> None:
        """Cancel the run's waiting operations and end it; no step is torn, and the client stays usable."""
        with self._changed:
            if self._state.ended:
                return
            self._wants_stop = True
            self._set_state(RunStatus.STOPPING)
            self._changed.notify_all()

    def done(self) -> bool:
        """Whether it has ended."""
        return self._promise.done

    def result(self, timeout: float | None = None) -> RunResult:
        """Wait for the end.

        Raises:
            FutureTimeoutError: Not there in time; the run goes on.
            TGTinkerError: What made it fail.
        """
        if not self._promise.wait(timeout):
            raise FutureTimeoutError(
                f"The run {self.run_id} was not done after {timeout} s (step {self.steps_done} of "
                f"{self.planned_steps or '?'}). It goes on: wait again, or call stop()."
            )
        return self._promise.outcome()

    def __await__(self) -> Generator[Any, None, RunResult]:
        yield from self._promise.wait_async().__await__()
        return self._promise.outcome()

    def __repr__(self) -> str:
        return f"<TrainingRun {self.run_id} {self._state}, step {self.steps_done} of {self.planned_steps or '?'}>"

    def freeze(self) -> None:
        """Put a picture and a table of how things stand into the calling cell."""
        load_dotted("tensafe_nb.widgets:freeze")(self)

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return load_dotted("tensafe_nb.widgets:mimebundle")(self)

    # what the thread does

    def start(self) -> "TrainingRun":
        """Start the thread; called once, by the training client."""
        self._publish_state()
        self._thread.start()
        return self

    def wait(self, handle: FutureHandle[R]) -> R:
        """Wait for a result within a step, on the run's thread; `stop()` cancels what is waited for."""
        while True:
            if self._wants_stop:
                handle.cancel()
            with contextlib.suppress(FutureTimeoutError):
                return handle.result(timeout=HEARTBEAT)

    def _result_of(self, handle: FutureHandle[Any]) -> Any:
        """Wait for a result between steps; after `stop()` what waits is cancelled and what runs may finish."""
        while True:
            if self._wants_stop:
                self._cancel_pending()
            with contextlib.suppress(FutureTimeoutError):
                return handle.result(timeout=HEARTBEAT)

    def _cancel_pending(self) -> None:
        for _, handles in self._inflight:
            for handle in handles:
                if handle.state is FutureStatus.PENDING:
                    handle.cancel()

    def join(self, timeout: float) -> None:
        """Wait until the thread is gone; a thread that is stuck in the user's code is left behind, with a warning."""
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning(
                "%s is still inside your data or reward function; its thread is left behind", self.run_id
            )
            self._end(RunStatus.STOPPED, None)

    def _main(self) -> None:
        try:
            self._drive()
        except BaseException as error:  # noqa: BLE001  # whatever the user's data or rewards raise ends this run, visibly
            by_stop = isinstance(error, FutureCancelledError | FutureFailedError | ClientClosedError)
            self._end(RunStatus.STOPPED if self._wants_stop and by_stop else RunStatus.FAILED, error)
        else:
            self._end(RunStatus.STOPPED if self._wants_stop else RunStatus.FINISHED, None)

    def _drive(self) -> None:
        for index in itertools.count():
            if self._over(index):
                break
            handles = self._loop.submit(index)
            if handles is None:
                break
            with self._changed:
                self._inflight.append((index, handles))
            while len(self._inflight) > self._loop.lookahead:
                self._collect()
        while self._inflight:
            self._collect()

    def _over(self, index: int) -> bool:
        """Wait while paused; then say whether the run has reached its end or was stopped."""
        if self.planned_steps is not None and index >= self.planned_steps:
            return True
        if self._wants_pause or self._credit == 0:
            while self._inflight:
                self._collect()
            self._wait_while_paused()
        with self._changed:
            if self._credit is not None:
                self._credit -= 1
            return self._wants_stop

    def _wait_while_paused(self) -> None:
        with self._changed:
            if self._credit == 0:
                self._wants_pause, self._credit = True, None
            if self._wants_stop or not self._wants_pause:
                return  # what was in flight took a while: the user has gone on meanwhile
            self._set_state(RunStatus.PAUSED)
            self._client.sync_events()
            self._changed.wait_for(lambda: self._wants_stop or not self._wants_pause)
            if self._state is RunStatus.PAUSED:
                self._set_state(RunStatus.RUNNING)

    def _collect(self) -> None:
        index, handles = self._inflight[0]
        try:
            results = [self._result_of(handle) for handle in handles]
        finally:
            with self._changed:
                self._inflight.popleft()
        self._loop.collect(index, results)
        self.steps_done = index + 1
        now = time.perf_counter()
        self._client.publish(
            RunStep(run_id=self.run_id, done=self.steps_done, duration=now - self._last_step_at)
        )
        self._last_step_at = now

    def _end(self, state: RunStatus, error: BaseException | None) -> None:
        failed = state is RunStatus.FAILED
        try:
            self._cancel_rest()
            with self._changed:
                self._set_state(state, str(error) if failed else None)
            self._client.sync_events()
        finally:  # whoever waits is told, whatever happens to the log
            if failed and error is not None:
                self._promise.fail(error)
            else:
                steps = self._client.step - self._first_step
                metrics = self._client.history.last(after=self._first_event)
                self._promise.succeed(RunResult(self.run_id, str(state), steps, metrics))

    def _cancel_rest(self) -> None:
        for _, handles in self._inflight:
            for handle in handles:
                handle.cancel()

    def _set_state(self, state: RunStatus, reason: str | None = None) -> None:
        if state is not self._state:
            self._state = state
            self._publish_state(reason)

    def _publish_state(self, reason: str | None = None) -> None:
        self._client.publish(
            RunState(
                run_id=self.run_id,
                state=str(self._state),
                step=self._client.step,
                planned_steps=self.planned_steps,
                reason=reason,
            )
        )


class SupervisedLoop:
    """Batches → forward_backward → optim_step, with held-out evaluation in between.

    Args:
        client: What to train.
        batches: A list, a `data.Batches`, or any iterable; iterated anew for each epoch.
        epochs: Passes over the batches; None repeats them until the run's steps are reached, or once.
        eval_batches: Held-out batches, evaluated before the first step, every `eval_every` steps, and at the end.
        eval_every: Steps between evaluations.
        steps: Planned steps; None takes what the epochs give.
    """

    curve = "loss"

    def __init__(
        self,
        client: RunClient,
        batches: Iterable[Batch],
        *,
        epochs: int | None,
        steps: int | None,
        eval_batches: Iterable[Batch] | None,
        eval_every: int | None,
    ) -> None:
        self._client = client
        self._accumulation = client.config.gradient_accumulation_steps
        self.lookahead = 1 if self._accumulation < LONG_WINDOW else 0
        self._eval_batches = [BatchData.of(batch) for batch in eval_batches or ()]
        self._eval_every = eval_every
        self._passes = epochs if epochs is not None else (None if steps is not None else 1)
        self._evaluated_after: int | None = None
        self._batches = self._each_batch(batches)
        self.planned_steps = steps if steps is not None else self._count(batches)
        if isinstance(batches, Sized) and len(batches) == 0:
            self._refuse_emptiness()

    def attach(self, run: TrainingRun) -> None:
        self._run = run

    def submit(self, index: int) -> Sequence[FutureHandle[Any]] | None:
        batches = [BatchData.of(batch) for batch in itertools.islice(self._batches, self._accumulation)]
        if not batches:
            self._end_of_data(index)
            return None
        if index == 0:
            self._evaluate()
        training = [self._client.forward_backward(batch) for batch in batches] + [self._client.optim_step()]
        due = self._eval_every is not None and (index + 1) % self._eval_every == 0
        if due or index + 1 == self.planned_steps:
            self._evaluated_after = index
            self._evaluate()
        return training

    def collect(self, index: int, results: Sequence[Any]) -> None:
        """Nothing to do: the worker publishes what a step measured."""

    def _end_of_data(self, index: int) -> None:
        """Evaluate after the last step, which nobody knew to be the last; refuse to have had none at all."""
        if index == 0:
            self._refuse_emptiness()
        if self._evaluated_after != index - 1:
            self._evaluate()

    @staticmethod
    def _refuse_emptiness() -> None:
        raise ValidationError("fit() was given no batches: there is nothing to train on.")

    def _evaluate(self) -> None:
        """Measure the held-out loss behind whatever is queued, a slice at a time: the queue has an end."""
        results: list[ForwardResult] = []
        for start in range(0, len(self._eval_batches), EVAL_SLICE):
            part = self._eval_batches[start : start + EVAL_SLICE]
            results += [self._run.wait(handle) for handle in [self._client.forward(batch) for batch in part]]
        if results:
            values = {"eval/loss": _mean_loss(results)}
            self._client.publish(Metrics(step=self._client.step, values=values, run_id=self._run.run_id))

    def _each_batch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for epoch in itertools.count() if self._passes is None else range(self._passes):
            empty = True
            for batch in batches:
                empty = False
                yield batch
            if empty and epoch and self._passes is not None:
                raise ValidationError(
                    f"fit: epochs={self._passes}, but the batches could be iterated only once. "
                    f"Give a list or data.Batches instead of a generator."
                )
            if empty:
                return

    def _count(self, batches: Iterable[Batch]) -> int | None:
        if self._passes is None or not isinstance(batches, Sized):
            return None
        return ceil(len(batches) * self._passes / self._accumulation)


def _mean_loss(results: Sequence[ForwardResult]) -> float:
    weight = sum(result.weight for result in results)
    return sum(result.loss * result.weight for result in results) / weight
