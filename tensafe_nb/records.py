"""The record of runs that ran before: read from the logs in the home folder, in whatever process they were written."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensafe_nb.errors import RunNotFoundError, TGTinkerError, ValidationError
from tensafe_nb.events import CheckpointSaved, Metrics, RunHistory, RunState, StateLoaded, is_being_written
from tensafe_nb.plain import from_plain
from tensafe_nb.registry import load_dotted
from tensafe_nb.reprs import Facts, Listing, table, visible
from tensafe_nb.store import home
from tensafe_nb.types import RunStatus

logger = logging.getLogger(__name__)

TOLD = ('"RunState"', '"Metrics"', '"CheckpointSaved"', '"StateLoaded"')  # the events a record is made of


@dataclass(frozen=True, slots=True, weakref_slot=True)
class RunRecord:
    """A run as its log tells it, in this process or after it died.

    Attributes:
        run_id: `<training_client_id>/<n>`.
        state: Its last state; INTERRUPTED when the log has no end and nobody writes it.
        step: The client's optimiser step then.
        planned_steps: How many it was to take, if known.
        started_at: Unix seconds.
        reason: Why it failed.
        last_checkpoint: Artifact id of its newest checkpoint: `fit(…, resume_from=…)` goes on from there.
        curve: The metric to watch: "reward" where there is one, else "loss".
        log: The event log it was read from.

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
        return load_dotted("tensafe_nb.widgets:mimebundle")(self)


def list_runs() -> list[RunRecord]:
    """Return every run recorded in the home folder, oldest first: a list, which a notebook shows as a table."""
    records = [record for log in sorted(home.runs().glob("*/events.jsonl")) for record in _readable(log)]
    return Listing(sorted(records, key=lambda record: record.started_at), _row)


def _row(record: RunRecord) -> Facts:
    return {
        "run": record.run_id,
        "state": record.state,
        "step": record.step,
        "planned": record.planned_steps,
        "started_at": record.started_at,
        "last checkpoint": record.last_checkpoint,
        "reason": record.reason,
    }


def load_run(run_id: str) -> RunRecord:
    """Return a recorded run.

    Raises:
        RunNotFoundError: No such run in the home folder.
    """
    for record in _records(_log_of(run_id)):
        if record.run_id == run_id:
            return record
    raise RunNotFoundError(
        f"There is no run {run_id!r} under {home.runs()}. list_runs() shows all there are."
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
    return home.event_log(run_id.partition("/")[0])


def _records(log: Path) -> list[RunRecord]:
    states: dict[str, list[RunState]] = {}
    checkpoints: dict[str, str] = {}
    rewarded: set[str] = set()
    last_step = 0
    if not log.exists():
        return []
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n") and any(name in line for name in TOLD):
                event = from_plain(json.loads(line))
                if isinstance(event, RunState):
                    states.setdefault(event.run_id, []).append(event)
                if isinstance(event, CheckpointSaved) and event.run_id is not None:
                    checkpoints[event.run_id] = event.artifact_id
                if isinstance(event, Metrics) and states and "reward" in event.values:
                    rewarded.add(next(reversed(states)))
                last_step = event.step if isinstance(event, StateLoaded) else max(last_step, event.step)
    alive = is_being_written(log)
    return [
        RunRecord(
            run_id,
            *_state(seen, last_step, alive),
            planned_steps=seen[0].planned_steps,
            started_at=seen[0].time,
            reason=seen[-1].reason,
            last_checkpoint=checkpoints.get(run_id),
            curve="reward" if run_id in rewarded else "loss",
            log=log,
        )
        for run_id, seen in states.items()
    ]


def _state(states: Sequence[RunState], last_step: int, alive: bool) -> tuple[RunStatus, int]:
    last = states[-1]
    state = RunStatus(last.state)
    if state.ended:
        return state, last.step
    return (state if alive else RunStatus.INTERRUPTED), last_step
