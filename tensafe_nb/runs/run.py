"""A run: a training loop on a thread of its own, which you can watch, await, pause, step and stop."""

import contextlib
import copy
import logging
import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tensafe_nb import lifetimes
from tensafe_nb.checks import checked
from tensafe_nb.display import as_given, settle, visible, widgets
from tensafe_nb.errors import (
    ArtifactNotFoundError,
    ClientClosedError,
    DPBudgetExceededError,
    FutureCancelledError,
    FutureFailedError,
    FutureTimeoutError,
    ServerConnectionError,
    TGTinkerError,
    ValidationError,
    near_misses,
)
from tensafe_nb.events import Event, RunConfigured, RunDescribed, RunState, RunStep
from tensafe_nb.futures import HEARTBEAT, FutureHandle, Promise, follow, handle_of
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.measured import Measured, Reading
from tensafe_nb.history.sinks.forwarding import Forwarding
from tensafe_nb.protocol.results import FutureStatus, LoadStateResult, RunResult, RunStatus, SaveStateResult
from tensafe_nb.runs.checkpoints import Checkpoints, checkpoint_of
from tensafe_nb.runs.description import described, keep, versions
from tensafe_nb.runs.loop import Loop, RunClient

logger = logging.getLogger(__name__)

R = TypeVar("R")

SILENT_SECONDS = 60.0  # after which another client takes a run, with nothing in the queue, to have ended


class TakenOverError(Exception):
    """Another client has said that the run ended, and trains in its place."""


class RunThread(threading.Thread):
    """The thread of a run. While it lives, it keeps run and client, whoever else has let go of them meanwhile."""

    def run(self) -> None:
        """Run the run; in a notebook, then look whether it was the last that referred to its client."""
        super().run()  # which lets go of its target
        if lifetimes.in_notebook():
            lifetimes.collect()


@near_misses(
    metrics='run.history["loss"] (one series), run.table() or run.to_pandas() (all of them)',
    loss='run.history["loss"]',
    logs="run.history.events()",
    status="run.state",
    id="run.run_id",
    cancel="run.stop()",
    abort="run.stop()",
    kill="run.stop()",
    save="run.checkpoint()",
    save_state="run.checkpoint()",
)
class TrainingRun(Measured):
    """A loop on a thread of its own. The cell that starts it returns at once.

    Await it, or call `result()`, when the end is needed; interrupting that wait does not stop the run.

    Example:
        >>> run = tc.fit(batches, steps=100)
        >>> run.pause(); run.step(5); run.resume()
        >>> result = await run
    """

    def __init__(
        self,
        client: RunClient,
        loop: Loop,
        number: int,
        planned_steps: int | None = None,
        checkpoints: Checkpoints | None = None,
        resume_from: str | None = None,
        description: RunDescribed | None = None,
        started_with: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_id = f"{client.training_client_id}/{number}"
        self._description = replace(description or RunDescribed(run_id=""), run_id=self.run_id)
        self._started_with = dict(started_with or {}) | {"versions": versions()}
        self.planned_steps = planned_steps
        self.steps_done = 0
        self._client = client
        self._loop = loop
        self.curve = loop.curve
        self.started_at = time.time()
        self._state = RunStatus.RUNNING
        self._wants_pause = self._wants_stop = False
        self._credit: int | None = None  # steps left to take before pausing again
        self._orders = 0  # calls of resume() and step()
        self._ordered: int | None = None  # what the last of them asked for
        self._index = 0  # of the next step
        self._checkpoints = checkpoints or Checkpoints()
        self._resume_from = resume_from
        self._requests: deque[tuple[Callable[[], FutureHandle[Any]], Promise[Any]]] = deque()
        self._inflight: deque[tuple[int, Sequence[FutureHandle[Any]]]] = deque()
        self._changed = threading.Condition()
        self._promise: Promise[RunResult] = Promise()
        self._served_last = self._torn = False
        self._remarks: list[str] = []
        self._steps_taken = 0  # before the last time it went back
        self._first_step, self._first_event = client.step, client.history.last_seq
        self._last_step_at = time.perf_counter()
        self._driver = secrets.token_hex(6)
        self._is_mine: bool | None = None  # whether the log lists this run, or another client's of this id
        self._taken_over: str | None = None  # why another client has told its end
        self._told_at = time.time()  # when it last asked whether it is still its turn, or took a step
        self._unsubscribe = client.subscribe(self._hear)
        self._thread = RunThread(target=self._main, name=f"tsnb-run-{number}", daemon=True)
        loop.attach(self)

    @property
    def state(self) -> RunStatus:
        """RUNNING, PAUSING, PAUSED, STOPPING, STOPPED, FINISHED or FAILED; INTERRUPTED if another client took over."""
        return self._state

    @property
    def at_rest(self) -> bool:
        """Whether it is paused, and nobody has told it meanwhile to go on by `resume()` or `step()`."""
        return self._state is RunStatus.PAUSED and self._wants_pause  # in this order: no lock is needed

    @property
    def client(self) -> RunClient:
        """The training client it trains."""
        return self._client

    @property
    def history(self) -> RunHistory:
        """The client's history: curves and events, of this run and those before it."""
        return self._client.history

    @property
    def name(self) -> str | None:
        """What it is called; None has no name."""
        return self._described.name

    @property
    def tags(self) -> tuple[str, ...]:
        """Words to find it by: `list_runs(tags=…)`."""
        return self._described.tags

    @property
    def notes(self) -> str:
        """What its user says of it."""
        return self._described.notes

    @property
    def _described(self) -> RunDescribed:
        told = self.history.state.runs.get(self.run_id)
        return self._description if told is None or told.described is None else told.described

    def describe(
        self, name: str | None = None, *, tags: str | Sequence[str] | None = None, notes: str | None = None
    ) -> "TrainingRun":
        """Change what it is called and what is said of it, while it runs or after its end; returns the run.

        Args:
            name: One line; "" takes the name away. None leaves what there was, here and below.
            tags: In place of those it has.
            notes: In place of those it has.

        Raises:
            ValidationError: Something that is no text, or too long.
        """
        description = described(self._described, name, tags, notes)
        with contextlib.suppress(ClientClosedError, ServerConnectionError):  # its log may have ended before
            self._client.publish(description)
        keep(self.history.path, description)
        self._description = description
        told = self.history.state.runs.get(self.run_id)
        if told is not None:  # its log may be closed
            told.described = description
        return self

    @property
    def config(self) -> dict[str, Any]:
        """All that it was started with: `training`, `run` (the arguments), `versions`; `algo` and `reward`.

        The seed is `config["training"]["seed"]`. `tn.diff_runs` compares those of two runs.
        """
        return {"training": self._client.config.model_dump(mode="json"), **copy.deepcopy(self._started_with)}

    def reading(self) -> Reading:
        """Return what it measured, row by row; one that resumed another begins with that one's rows."""
        return self.history.reading(self.run_id)

    def pause(self) -> None:
        """Submit no further step; what is in flight finishes."""
        with self._changed:
            self._wants_pause = True
            if self._state is RunStatus.RUNNING:
                self._set_state(RunStatus.PAUSING)

    def resume(self) -> None:
        """Go on after a pause.

        Raises:
            ValidationError: Another client has taken over meanwhile: two would mix their steps.
        """
        with self._changed:
            self._go_on(None)

    @checked
    def step(self, steps: int = 1) -> None:
        """Take some steps, then pause.

        Raises:
            ValidationError: Fewer than one step; or another client has taken over meanwhile.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValidationError(f"run.step({as_given(steps)}): take a whole number of steps, at least one.")
        with self._changed:
            self._go_on(steps)

    def _go_on(self, credit: int | None) -> None:
        if self._taken_over is not None:
            raise ValidationError(
                f"The run {self.run_id} was interrupted at step {self.steps_done}: {self._taken_over}. It takes no "
                f"step any more, so that two do not mix theirs. Start another: tc.fit(…, resume_from=…) goes on from "
                f"one of its checkpoints, tc.fork() from the weights as they are."
            )
        self._orders, self._ordered = self._orders + 1, credit
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
        self._loop.interrupt()

    def checkpoint(self, **metadata: Any) -> FutureHandle[SaveStateResult]:
        """Save the state, and where the run stands in its data, between two steps.

        Args:
            metadata: Kept, sealed, with the state.
        """
        return self._between_steps(lambda: self._save(metadata), "save_state", SaveStateResult)

    @checked
    def rollback(self, artifact_id: str) -> FutureHandle[LoadStateResult]:
        """Go back to a checkpoint: weights, optimiser, random streams and place in the data.

        The run is PAUSED there when the handle ends; `resume()` and `step()` go on, also when they were called while it
        was on its way back. The curves keep the part that was abandoned.
        """
        orders = self._orders
        return self._between_steps(lambda: self._go_back(artifact_id, orders), "load_state", LoadStateResult)

    @checked
    def fork(self, artifact_id: str | None = None, step: int | None = None, **changes: Any) -> Any:
        """Return a new training client that starts from a state of this one, sharing its frozen weights.

        Args:
            artifact_id: The state; None takes that of `step`, or as it is now.
            step: An optimiser step of which there is a checkpoint.
            changes: Fields of TrainingConfig that are to be different: `optimizer={"learning_rate": 1e-3}`.

        Raises:
            ValidationError: No checkpoint of that step, or a change that the state would not fit.
        """
        if step is not None and artifact_id is None:
            artifact_id = checkpoint_of(step, self.history)
        return self._client.fork(artifact_id, **changes)

    @property
    def steps_taken(self) -> int:
        """Optimiser steps it has taken, those that a rollback gave up among them."""
        return self._steps_taken + self._client.step - self._first_step

    def remark(self, text: str) -> None:
        """Say in the result, and wherever the run is shown at its end, why it did not go as planned."""
        if text not in self._remarks:
            self._remarks.append(text)

    def done(self) -> bool:
        """Whether it has ended."""
        return self._promise.done

    @checked
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
        return self._promise.awaited()

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise ValidationError(
            "A TrainingRun belongs to this process and can be neither copied nor pickled. Its run_id can: "
            "load_run(run_id) reads what is kept of it."
        )

    def __repr__(self) -> str:
        named = f" {visible(self.name)!r}" if self.name else ""
        planned = self.planned_steps or "?"
        return f"<TrainingRun {self.run_id}{named} {self._state}, step {self.steps_done} of {planned}>"

    @checked
    def log_to(
        self, sink: Any, where: str | Path | None = None, *, samples: int = 0, **options: Any
    ) -> Forwarding:
        """Hand everything that this run measures to a sink as well, from its beginning to its end.

        Args:
            sink: "tensorboard", "trackio", "mlflow", "wandb", a function or an object; see `TrainingClient.log_to`.
            where: The folder, the project or the experiment.
            samples: Also so many prompts of each step, with their answers.
            options: What else the sink takes.

        Raises:
            ValidationError: No such sink, or its package is not installed.
        """
        return self._client.log_to(sink, where, samples=samples, only=self.run_id, **options)

    def freeze(self, samples: int = 0) -> None:
        """Put a picture and a table of how things stand into the calling cell; texts only of so many `samples`."""
        widgets().freeze(self, samples)

    def save_page(self, to: str | Path, samples: int = 0) -> Path:
        """Save the run, once it has ended, as one HTML file in which its panel plays as a replay.

        `tn.save_page` says what is in it, and takes several runs.
        """
        page: Path = widgets().save_page(self, to, samples)
        return page

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return widgets().mimebundle(self)

    def _mime_(self) -> tuple[str, str]:
        """Return what marimo shows."""
        shown: tuple[str, str] = widgets().mime(self)
        return shown

    def _left_behind(self) -> "TrainingRun":
        """Return what a notebook's output history keeps of this run: how it ended, without its client."""
        if not self.done():
            return self  # its thread keeps it anyway
        twin = object.__new__(TrainingRun)
        vars(twin).update(vars(self))
        behind: Any = getattr(self._client, "_left_behind", lambda: self._client)()
        twin._client, twin._loop, twin._unsubscribe = behind, behind, lambda: None
        return twin

    def claim(self) -> None:
        """Tell the log that this run goes on, and look what it told before; the core numbers what two tell at once.

        Raises:
            ValidationError: Another client has started a run in the same moment.
        """
        self._publish_state()
        self._client.sync_events()
        self._told_at = time.time()
        if self._is_mine is False:
            self._unsubscribe()
            raise ValidationError(
                f"Another client of {self._client.training_client_id} has just started a run, and two would mix their "
                f"steps. Await that one, or stop it there; tc.fork() gives you a client of your own."
            )

    def start(self) -> "TrainingRun":
        """Start the thread; called once, by the training client."""
        self._client.publish(RunConfigured(run_id=self.run_id, config=self._started_with))
        if self._description != RunDescribed(run_id=self.run_id):
            self._client.publish(self._description)
        self._thread.start()
        return self

    def give_up(self) -> bool:
        """End a run that nobody was given, since its beginning was interrupted; return whether it was one at all."""
        if self._is_mine is False:
            return False
        self.stop()
        if self._thread.ident is None:
            self._loop.close()
            self._end(RunStatus.STOPPED, None, reason="It was interrupted before it began.")
        return True

    def wait(self, handle: FutureHandle[R]) -> R:
        """Wait for a result within a step, on the run's thread; `stop()` cancels what is waited for."""
        while True:
            if self._wants_stop:
                handle.cancel()
            with contextlib.suppress(FutureTimeoutError):
                return handle.result(timeout=HEARTBEAT)

    def join(self, timeout: float) -> None:
        """Wait until the thread is gone; a thread that is stuck in the user's code is left behind, with a warning."""
        if threading.current_thread() is self._thread or self._thread.ident is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning(
                "%s is still inside your data or reward function; its thread is left behind", self.run_id
            )
            self._end(RunStatus.STOPPED, None)

    def _main(self) -> None:
        try:
            try:
                self._drive()
            finally:
                self._loop.close()
        except DPBudgetExceededError as error:
            self._end_with_the_budget(error)
        except TakenOverError:
            self._end(RunStatus.INTERRUPTED, None, reason=self._taken_over)
        except BaseException as error:  # noqa: BLE001  # whatever the user's data or rewards raise ends this run, visibly
            by_stop = isinstance(error, FutureCancelledError | FutureFailedError | ClientClosedError)
            self._end(RunStatus.STOPPED if self._wants_stop and by_stop else RunStatus.FAILED, error)
        else:
            self._end(RunStatus.STOPPED if self._wants_stop else RunStatus.FINISHED, None)

    def _end_with_the_budget(self, error: DPBudgetExceededError) -> None:
        """Stop as if the user had: no step was torn, and a checkpoint keeps what was trained."""
        self._cancel_inflight(running=True)
        self._inflight.clear()
        self._index = self.steps_done
        try:
            self._save({"reason": "dp_budget_exceeded"}).result()
        except TGTinkerError as trouble:
            self._end(RunStatus.FAILED, trouble)
        else:
            self._end(RunStatus.STOPPED, None, reason=str(error))

    def _drive(self) -> None:
        while not self._client.wait_for_step(HEARTBEAT) and not self._wants_stop:
            pass
        self._first_step = self._client.step  # of a restored client it was not known before
        if self._resume_from is not None:
            loading = self._client.load_state(self._resume_from, for_run=type(self._loop).__name__)
            self._seek(self.wait(loading))
            self._publish_state()
            if self.planned_steps is not None and self._index >= self.planned_steps:
                self.remark(
                    f"The checkpoint stands at step {self._index}, and this run was to end at {self.planned_steps}: "
                    f"there was nothing left to do. Steps and epochs count from the beginning of the run that saved it."
                )
        while not self._over():
            try:
                handles = self._loop.submit(self._index)
            except Exception:
                with contextlib.suppress(TGTinkerError):
                    self._collect_all()  # the step before is under way, and counts if it ends well
                raise
            if handles is None:
                break
            with self._changed:
                self._inflight.append((self._index, handles))
            self._index += 1
            # the next step is queued before the oldest is collected, so that the core never waits for Python
            while len(self._inflight) > self._loop.lookahead:
                self._collect()
            if self._checkpoints.due(self._index, self.planned_steps):
                self._save_by_itself()
        self._collect_all()
        if not self._wants_stop and self._checkpoints.missing(self._index):
            self._save_by_itself()
        self._tidy(wait=True)

    def _collect_all(self) -> None:
        while self._inflight:
            self._collect()

    def _over(self) -> bool:
        """Serve requests, wait while paused; then say whether the run has reached its end or was stopped."""
        self._serve()
        if self.planned_steps is not None and self._index >= self.planned_steps:
            return True
        if self._wants_pause or self._credit == 0:
            self._collect_all()
            self._wait_while_paused()
        silent = time.time() - self._told_at  # its machine slept, or a step took long
        if self._taken_over is None and silent > SILENT_SECONDS / 2:
            self.claim()
        self._told_at = time.time()
        with self._changed:
            if self._taken_over is not None:
                raise TakenOverError
            if self._credit is not None:  # of `step(n)`: one is spent on the step that follows
                self._credit -= 1
            return self._wants_stop

    def _wait_while_paused(self) -> None:
        with self._changed:
            if self._credit == 0:
                self._wants_pause, self._credit = True, None
            if self._goes_on():
                return  # what was in flight took a while: the user has gone on meanwhile
            self._set_state(RunStatus.PAUSED)
            self._client.sync_events()
        while not self._goes_on():
            self._serve()
            with self._changed:
                self._changed.wait_for(lambda: self._goes_on() or bool(self._requests), HEARTBEAT)
        with self._changed:
            going_on = self._state is RunStatus.PAUSED and self._taken_over is None
            if going_on:
                self._state = RunStatus.RUNNING
        if going_on:
            self.claim()

    def _goes_on(self) -> bool:
        return self._wants_stop or not self._wants_pause or self._taken_over is not None

    def _hear(self, event: Event) -> None:
        """Take note of what the log tells of this run; waits for nobody, who may wait for the log."""
        if isinstance(event, RunState) and event.run_id == self.run_id:
            if self._is_mine is None:
                self._is_mine = event.driver == self._driver
            if self._is_mine and event.state == RunStatus.INTERRUPTED:  # which no run tells of itself
                self._taken_over = event.reason or "another client told its end"

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
        self._tidy()

    def _result_of(self, handle: FutureHandle[Any]) -> Any:
        """Wait for a result between steps; after `stop()` what waits is cancelled and what runs may finish."""
        while True:
            if self._wants_stop:
                self._cancel_inflight(running=False)
            with contextlib.suppress(FutureTimeoutError):
                return handle.result(timeout=HEARTBEAT)

    def _between_steps(
        self, action: Callable[[], FutureHandle[R]], operation: str, result_type: type[R]
    ) -> FutureHandle[R]:
        """Let the run's thread do something between two steps; the handle is there at once."""
        promise: Promise[R] = Promise()
        with self._changed:
            if not self._served_last:
                self._requests.append((action, promise))
                self._changed.notify_all()
                return handle_of(promise, operation, self._client.training_client_id, result_type)
        return action()  # the run is over: nothing is between steps any more

    def _serve(self) -> None:
        while self._requests:
            action, promise = self._requests.popleft()
            if not promise.start():
                continue  # cancelled meanwhile
            try:
                follow(action(), promise)
            except BaseException as error:
                promise.fail(error)
                if self._torn or not isinstance(error, TGTinkerError):
                    raise

    def _save_by_itself(self) -> None:
        measured = self._loop.lookahead == 0  # then the step has been collected
        self._checkpoints.add(self._save({}), self._client.history, measured=measured)

    def _save(self, metadata: Mapping[str, Any]) -> FutureHandle[SaveStateResult]:
        position = {
            "run_id": self.run_id,
            "kind": type(self._loop).__name__,
            "index": self._index,
            "loop": self._loop.position(),
        }
        return self._client.save_state(metadata=metadata, position=position)

    def _go_back(self, artifact_id: str, orders: int) -> FutureHandle[LoadStateResult]:
        """Load a state and wait there; after more than so many orders, its user has said meanwhile how to go on."""
        if self._state.ended:
            return self._client.load_state(artifact_id, for_run=None)
        self._collect_all()
        before = self._client.step
        loaded = self._client.load_state(artifact_id, for_run=type(self._loop).__name__)
        result = self.wait(loaded)
        self._steps_taken += before - self._first_step
        self._torn = True  # until the data stands where the weights do
        self._seek(result)
        self._torn = False
        with self._changed:  # before the handle ends: whoever awaited it finds the run paused
            if self._orders > orders:
                self._credit = self._ordered
                if self._state is RunStatus.PAUSED and not self._wants_pause:
                    self._state = RunStatus.RUNNING
            else:
                self._wants_pause, self._credit = True, None
                if self._state in (RunStatus.RUNNING, RunStatus.PAUSING):
                    self._state = RunStatus.PAUSED
            self._publish_state()
        return loaded

    def _seek(self, loaded: LoadStateResult) -> None:
        self._first_step = loaded.step
        position = loaded.position or {}
        self._loop.seek(position["loop"])
        self._index = self.steps_done = position["index"]

    def _tidy(self, *, wait: bool = False) -> None:
        """Delete the automatic checkpoints that need not be kept."""
        for saved, known in self._checkpoints.settled(wait):
            for artifact_id in self._checkpoints.keep(saved, known, self._client.history):
                with contextlib.suppress(ArtifactNotFoundError):  # the user was first
                    self._client.delete_checkpoint(artifact_id)

    def _end(self, state: RunStatus, error: BaseException | None, reason: str | None = None) -> None:
        failed = state is RunStatus.FAILED
        reason = " ".join([*([reason] if reason else []), *self._remarks]) or None
        try:
            self._cancel_inflight(running=True)
            with self._changed:
                if self._state.ended:
                    return  # its thread was left behind, and has come back after all
                self._set_state(state, str(error) if failed else reason)
                self._served_last = True
            self._serve()
            self._client.sync_events()
        finally:  # whoever waits is told, whatever happens to the log
            self._unsubscribe()
            settle(self)  # the cell that waits ends after its outputs show the end
            if failed and error is not None:
                forget_frames(error)
                self._promise.fail(error)
            else:
                metrics = self._client.history.last(after=self._first_event)
                self._promise.succeed(
                    RunResult(
                        self.run_id, str(state), self.steps_taken, metrics, reason, steps_done=self.steps_done
                    )
                )

    def _cancel_inflight(self, *, running: bool) -> None:
        """Cancel what waits of the steps under way, and what is running too if so told."""
        for handle in (handle for _, handles in self._inflight for handle in handles):
            if running or handle.state is FutureStatus.PENDING:
                handle.cancel()

    def _set_state(self, state: RunStatus, reason: str | None = None) -> None:
        if state is not self._state:
            self._state = state
            self._publish_state(reason)

    def _publish_state(self, reason: str | None = None) -> None:
        if self._is_mine is False or self._taken_over is not None:
            return  # the run that the log lists is another's, or has ended there
        self._client.publish(
            RunState(
                run_id=self.run_id,
                state=str(self._state),
                step=self._client.step,
                planned_steps=self.planned_steps,
                reason=reason,
                done=self.steps_done,
                taken=self.steps_taken,
                curve=self.curve,
                driver=self._driver,
            )
        )


def forget_frames(error: BaseException) -> None:
    """Let go of what the frames of a failure hold, the run and its client above all: the result keeps the error."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        trace = found.__traceback__
        if trace is not None and trace.tb_frame.f_code is TrainingRun._main.__code__:
            found.__traceback__ = trace.tb_next  # still runs: it cannot be emptied
        found = found.__cause__ or found.__context__
