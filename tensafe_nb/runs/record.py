"""Records of runs: read from the logs in the home folder, in whatever process they were written."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tensafe_nb.checks import checked
from tensafe_nb.display import Facts, table, visible, widgets
from tensafe_nb.errors import RunNotFoundError, ValidationError
from tensafe_nb.events import (
    CheckpointSaved,
    ClientCreated,
    Metrics,
    RunConfigured,
    RunDescribed,
    RunState,
    RunStep,
    StateLoaded,
)
from tensafe_nb.history.log import UNREADABLE, RunHistory
from tensafe_nb.history.measured import Measured, Reading
from tensafe_nb.history.sinks.forwarding import check_samples, replay_into
from tensafe_nb.history.sinks.sink import sink_of
from tensafe_nb.history.state import ClientState, RunSoFar
from tensafe_nb.locks import is_being_written
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.runs.description import described, keep, kept
from tensafe_nb.store.home import Home

MADE_OF = (
    ClientCreated,
    RunState,
    RunDescribed,
    RunStep,
    Metrics,
    CheckpointSaved,
    StateLoaded,
)  # the events a record is made of


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
        name: What it is called, if it has a name.
        tags: Words to find it by.
        notes: What its user says of it.
        model: What was trained.

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
    name: str | None = None
    tags: tuple[str, ...] = ()
    notes: str = ""
    model: str = ""

    @property
    def history(self) -> RunHistory:
        """Its training client's history, read from the log."""
        return RunHistory.load(self.log)

    @property
    def config(self) -> dict[str, Any]:
        """All that it was started with, as `TrainingRun.config`; runs of version 0.1 wrote `training` only."""
        history = RunHistory(self.log)
        told = history.events(kinds=(RunConfigured,))
        started = (e for e in told if isinstance(e, RunConfigured) and e.run_id == self.run_id)
        configured = next(started, None)
        return {
            "training": history.config.model_dump(mode="json"),
            **(dict(configured.config) if configured is not None else {}),
        }

    def describe(
        self, name: str | None = None, *, tags: str | Sequence[str] | None = None, notes: str | None = None
    ) -> "RunRecord":
        """Change what it is called and what is said of it, for whoever reads its log; returns the record as it is now.

        Args:
            name: One line; "" takes the name away. None leaves what there was, here and below.
            tags: In place of those it has.
            notes: In place of those it has.

        Raises:
            ValidationError: Something that is no text, or too long.
            StorageError: It could not be written.
        """
        before = RunDescribed(run_id=self.run_id, name=self.name, tags=self.tags, notes=self.notes)
        now = described(before, name, tags, notes)
        keep(self.log, now)
        return replace(self, name=now.name, tags=now.tags, notes=now.notes)

    def reading(self) -> Reading:
        """Return what it measured, row by row; one that resumed another begins with that one's rows."""
        return RunHistory(self.log).reading(self.run_id)

    @checked
    def log_to(self, sink: Any, where: str | Path | None = None, *, samples: int = 0, **options: Any) -> int:
        """Hand everything that this run measured to a sink, now; returns how many values there were.

        Args:
            sink: "tensorboard", "trackio", "mlflow", "wandb", a function or an object; see `TrainingClient.log_to`.
            where: The folder, the project or the experiment.
            samples: Also so many prompts of each step, with their answers.
            options: What else the sink takes.

        Raises:
            ValidationError: No such sink, or its package is not installed.
            StorageError: The sink failed.
        """
        check_samples(samples)
        name, made = sink_of(sink, where, options)
        called = RunDescribed(run_id=self.run_id, name=self.name, tags=self.tags, notes=self.notes)
        return replay_into(made, name, RunHistory(self.log), called, samples)

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
        named = f" {visible(self.name)!r}" if self.name else ""
        return f"<RunRecord {visible(self.run_id)}{named} {self.state} at step {self.step}{checkpoint}>"

    def _repr_mimebundle_(self, **_: Any) -> Any:
        if not self.state.ended:
            return {"text/plain": repr(self), "text/html": table(f"run {self.run_id}", row_of(self))}
        return widgets().mimebundle(self)


def records_of(log: Path) -> list[RunRecord]:
    """Return the records of the runs in a log, oldest first; none where there is no log."""
    state, model = ClientState(), ""
    for event in RunHistory(log).events(kinds=MADE_OF):
        state.apply(event)
        if isinstance(event, ClientCreated):
            model = str(event.config.get("model_ref", ""))
    alive = bool(state.runs) and is_being_written(log)  # by this process or another: its lock tells
    for run_id, later in kept(log).items():
        run = state.runs.get(run_id)
        if run is not None and (run.described is None or run.described.time <= later.time):
            run.described = later
    return [record_of(run, log, alive=alive, model=model) for run in state.runs.values()]


def record_of(run: RunSoFar, log: Path, *, alive: bool, model: str) -> RunRecord:
    """Return the record of a run; one without an end whose log nobody writes any more was interrupted."""
    interrupted = not (run.state.ended or alive)
    description = run.described or RunDescribed(run_id=run.run_id)
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
        name=description.name,
        tags=description.tags,
        notes=description.notes,
        model=model,
    )


def row_of(record: RunRecord) -> Facts:
    """Return the columns of a record, as a table of records shows it in a notebook."""
    return {
        "run": record.run_id,
        "name": record.name,
        "tags": ", ".join(record.tags) or None,
        "model": record.model,
        "state": record.state,
        "steps": record.steps_done,
        "planned": record.planned_steps,
        "client's step": record.step,
        "started_at": record.started_at,
        "last checkpoint": record.last_checkpoint,
        "reason": record.reason,
        "notes": record.notes or None,
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
