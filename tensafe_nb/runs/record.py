"""Records of runs: read from the logs in the home folder, in whatever process they were written."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensafe_nb.checks import checked
from tensafe_nb.display import Facts, Listing, table, visible, widgets
from tensafe_nb.errors import RunNotFoundError, ValidationError
from tensafe_nb.events import CheckpointSaved, Metrics, RunState, RunStep, StateLoaded
from tensafe_nb.history.log import UNREADABLE, RunHistory
from tensafe_nb.history.measured import Measured, Reading
from tensafe_nb.history.state import ClientState, RunSoFar
from tensafe_nb.locks import is_being_written
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.store.home import Home

logger = logging.getLogger(__name__)

MADE_OF = (RunState, RunStep, Metrics, CheckpointSaved, StateLoaded)  # the events a record is made of


@dataclass(frozen=True, slots=True, weakref_slot=True)
class RunRecord(Measured):
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

    def reading(self) -> Reading:
        """Return what it measured, row by row; one that resumed another begins with that one's rows."""
        return self.history.reading(self.run_id)

    @property
    def way_on(self) -> str:
        """The way on after an interruption, in words."""
        if self.last_checkpoint is None:
            return "its process ended in the middle; it had saved no checkpoint"
        return f"its process ended in the middle; last checkpoint {self.last_checkpoint}"

    def save_page(self, to: str | Path, samples: int = 0) -> Path:
        """Save it as one HTML file in which its panel plays as a replay; `tn.save_page` says what is in it."""
        page: Path = widgets().save_page(self, to, samples)
        return page

    def __repr__(self) -> str:
        checkpoint = f", last checkpoint {self.last_checkpoint}" if self.last_checkpoint else ""
        return f"<RunRecord {visible(self.run_id)} {self.state} at step {self.step}{checkpoint}>"

    def _repr_mimebundle_(self, **_: Any) -> Any:
        if not self.state.ended:
            return {"text/plain": repr(self), "text/html": table(f"run {self.run_id}", row_of(self))}
        return widgets().mimebundle(self)


def records_of(log: Path) -> list[RunRecord]:
    """Return the records of the runs in a log, oldest first; none where there is no log."""
    state = ClientState()
    for event in RunHistory(log).events(kinds=MADE_OF):
        state.apply(event)
    alive = bool(state.runs) and is_being_written(log)  # by this process or another: its lock tells
    return [record_of(run, log, alive=alive) for run in state.runs.values()]


def record_of(run: RunSoFar, log: Path, *, alive: bool) -> RunRecord:
    """Return the record of a run; one without an end whose log nobody writes any more was interrupted."""
    interrupted = not (run.state.ended or alive)
    return RunRecord(
        run.run_id,
        RunStatus.INTERRUPTED if interrupted else run.state,
        run.step,
        planned_steps=run.planned_steps,
        started_at=run.started_at,
        reason=run.reason,
        last_checkpoint=run.checkpoint,
        curve="reward" if run.rewarded else "loss",
        log=log,
        steps=run.steps_taken,
        steps_done=run.steps_done_if_killed if interrupted else run.steps_done,
    )


def list_runs() -> list[RunRecord]:
    """Return every run recorded in the home folder, oldest first: a list, which a notebook shows as a table."""
    records = []
    for log in Home.of_environment().event_logs():
        try:
            records += records_of(log)
        except UNREADABLE as error:
            logger.warning("the log %s cannot be read and is left out: %s", log, error)
    return Listing(sorted(records, key=lambda record: record.started_at), row_of)


def row_of(record: RunRecord) -> Facts:
    """Return the columns of a record, as a table of records shows it."""
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
    for record in records_of(Home.of_environment().event_log(run_id.partition("/")[0])):
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
        return records_of(log)
    except UNREADABLE as error:
        raise ValidationError(f"{log} cannot be read as an event log: {error}.") from error
