"""The record of runs that ran before: read from the logs in the home folder, in whatever process they were written."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensafe_nb.checks import checked
from tensafe_nb.display import Facts, Listing, table, visible, widgets
from tensafe_nb.errors import RunNotFoundError, TGTinkerError, ValidationError
from tensafe_nb.events import CheckpointSaved, Event, Metrics, RunState, RunStep, StateLoaded
from tensafe_nb.history.log import RunHistory
from tensafe_nb.locks import is_being_written
from tensafe_nb.protocol.codec import decode, tags_of
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.store.home import Home

logger = logging.getLogger(__name__)

MADE_OF = (RunState, RunStep, Metrics, CheckpointSaved, StateLoaded)  # the events a record is made of
TOLD = tuple(f'"{tag}"' for event in MADE_OF for tag in tags_of(event))  # as they appear in a line of the log


@dataclass(frozen=True, slots=True, weakref_slot=True)
class RunRecord:
    """A run as its log tells it, in this process or after it died.

    Attributes:
        run_id: `<training_client_id>/<n>`.
        state: Its last state; INTERRUPTED when the log has no end and nobody writes it.
        step: The client's optimiser step then.
        planned_steps: How many it was to take, if known.
        started_at: Unix seconds.
        reason: Why it failed, or did not go as planned.
        last_checkpoint: Artifact id of its newest checkpoint: `fit(…, resume_from=…)` goes on from there.
        curve: The metric to watch: "reward" where there is one, else "loss".
        log: The event log it was read from.
        steps: Optimiser steps it took, those that a rollback gave up among them: `RunResult.steps`.
        steps_done: Where it stood in its plan: `run.steps_done`.

    In a notebook, a run that has ended is shown as the panel it had, with its whole history.
    """

    run_id: str
    state: RunStatus
    step: int
    planned_steps: int | None
    started_at: float
    reason: str | None = None
    last_checkpoint: str | None = None
    curve: str = "loss"
    log: Path = Path()
    steps: int = 0
    steps_done: int = 0

    @property
    def history(self) -> RunHistory:
        """Its training client's history, read from the log."""
        return RunHistory.load(self.log)

    @property
    def way_on(self) -> str:
        """What can be done after an interruption, in words."""
        if self.last_checkpoint is None:
            return "its process ended in the middle; it had saved no checkpoint"
        return f"its process ended in the middle; last checkpoint {self.last_checkpoint}"

    def __repr__(self) -> str:
        checkpoint = f", last checkpoint {self.last_checkpoint}" if self.last_checkpoint else ""
        return f"<RunRecord {visible(self.run_id)} {self.state} at step {self.step}{checkpoint}>"

    def _repr_mimebundle_(self, **_: Any) -> Any:
        if not self.state.ended:
            return {"text/plain": repr(self), "text/html": table(f"run {self.run_id}", _row(self))}
        return widgets().mimebundle(self)


def list_runs() -> list[RunRecord]:
    """Return every run recorded in the home folder, oldest first: a list, which a notebook shows as a table."""
    records = [record for log in Home.of_environment().event_logs() for record in _readable(log)]
    return Listing(sorted(records, key=lambda record: record.started_at), _row)


def _row(record: RunRecord) -> Facts:
    return {
        "run": record.run_id,
        "state": record.state,
        "steps": record.steps_done,
        "planned": record.planned_steps,
        "client's step": record.step,
        "started_at": record.started_at,
        "last checkpoint": record.last_checkpoint,
        "reason": record.reason,
    }


@checked
def load_run(run_id: str) -> RunRecord:
    """Return a recorded run.

    Raises:
        RunNotFoundError: No such run in the home folder.
    """
    for record in _records(_log_of(run_id)):
        if record.run_id == run_id:
            return record
    raise RunNotFoundError(
        f"There is no run {run_id!r} under {Home.of_environment().runs()}. list_runs() shows all there are."
    )


def read_log(log: Path) -> list[RunRecord]:
    """Return the runs that an event log tells of, oldest first.

    Raises:
        ValidationError: There is no such file, or it is no event log.
    """
    if not log.is_file():
        raise ValidationError(f"There is no event log {log}. list_runs() shows the runs of this machine.")
    try:
        return _records(log)
    except (TGTinkerError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValidationError(f"{log} cannot be read as an event log: {error}.") from error


def _readable(log: Path) -> list[RunRecord]:
    try:
        return _records(log)
    except (TGTinkerError, ValueError, TypeError, KeyError) as error:
        logger.warning("the log %s cannot be read and is left out: %s", log, error)
        return []


def _log_of(run_id: str) -> Path:
    return Home.of_environment().event_log(run_id.partition("/")[0])


@dataclass(slots=True)
class _Account:
    """What a log says of one run, line by line."""

    begun: RunState
    last: RunState
    done: int = 0  # steps of its plan
    done_at: int = 0  # the client's step then
    given_up: int = 0  # optimiser steps before the last time it went back
    first: int = 0  # the client's step where it began, or where it went back to
    checkpoint: str | None = None
    rewarded: bool = False

    def end(self, log: Path, step: int, alive: bool) -> RunRecord:
        """Return the record, with the client's latest step."""
        state, last = RunStatus(self.last.state), self.last
        taken = self.given_up + step - self.first
        done = self.done
        if state.ended:
            step = last.step
            taken = self.given_up + step - self.first if last.taken is None else last.taken
        elif not alive:
            state = RunStatus.INTERRUPTED
            if not self.rewarded:  # an optimiser step is a step; its end could not be written any more
                done += step - self.done_at
        return RunRecord(
            last.run_id,
            state,
            step,
            planned_steps=self.begun.planned_steps,
            started_at=self.begun.time,
            reason=last.reason,
            last_checkpoint=self.checkpoint,
            curve="reward" if self.rewarded else "loss",
            log=log,
            steps=taken,
            steps_done=done,
        )


def _records(log: Path) -> list[RunRecord]:
    if not log.exists():
        return []
    runs: dict[str, _Account] = {}
    step, ends_at = 0, {}  # the client's step, now and at the end of each run
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.endswith("\n") or not any(name in line for name in TOLD):
                continue
            event = decode(json.loads(line))
            before = step
            step = _step_after(event, step)
            match event:
                case RunState(run_id=run_id):
                    if run_id not in runs:
                        runs[run_id] = _Account(event, event, first=event.step, done_at=event.step)
                    account = runs[run_id]
                    account.last = event
                    if event.done is not None:
                        account.done, account.done_at = event.done, event.step
                case RunStep(run_id=run_id, done=done) if run_id in runs:
                    runs[run_id].done, runs[run_id].done_at = done, step
                case CheckpointSaved(run_id=str(run_id)) if run_id in runs:
                    runs[run_id].checkpoint = event.artifact_id
                case Metrics(values=values) if "reward" in values and runs:
                    runs[event.run_id if event.run_id in runs else next(reversed(runs))].rewarded = True
                case StateLoaded() if (
                    runs and not RunStatus((account := list(runs.values())[-1]).last.state).ended
                ):
                    account.given_up, account.first = account.given_up + before - account.first, step
                    account.done_at = step
            if runs:
                ends_at[next(reversed(runs))] = step
    alive = is_being_written(log)
    return [account.end(log, ends_at[run_id], alive) for run_id, account in runs.items()]


def _step_after(event: Event, step: int) -> int:
    """Return the client's optimiser step after an event; what loops measure is numbered by their own steps."""
    match event:
        case StateLoaded(step=found) | RunState(step=found):
            return found
        case Metrics(step=found, run_id=None) | CheckpointSaved(step=found):
            return max(step, found)
    return step
