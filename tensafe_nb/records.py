"""The record of runs that ran before: read from the logs in the home folder, in whatever process they were written."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensafe_nb.errors import RunNotFoundError, TGTinkerError
from tensafe_nb.events import CheckpointSaved, RunHistory, RunState, StateLoaded, is_being_written
from tensafe_nb.plain import from_plain
from tensafe_nb.store import home
from tensafe_nb.types import RunStatus

logger = logging.getLogger(__name__)

TOLD = ('"RunState"', '"Metrics"', '"CheckpointSaved"', '"StateLoaded"')  # the events a record is made of


@dataclass(frozen=True, slots=True)
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
    """

    run_id: str
    state: RunStatus
    step: int
    planned_steps: int | None
    started_at: float
    reason: str | None = None
    last_checkpoint: str | None = None

    @property
    def history(self) -> RunHistory:
        """Its training client's history, read from the log."""
        return RunHistory.load(_log_of(self.run_id))


def list_runs() -> list[RunRecord]:
    """Return every run recorded in the home folder, oldest first."""
    records = [record for log in sorted(home.runs().glob("*/events.jsonl")) for record in _readable(log)]
    return sorted(records, key=lambda record: record.started_at)


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
                last_step = event.step if isinstance(event, StateLoaded) else max(last_step, event.step)
    alive = is_being_written(log)
    return [
        _record(run_id, seen, last_step, alive, checkpoints.get(run_id)) for run_id, seen in states.items()
    ]


def _record(
    run_id: str, states: Sequence[RunState], last_step: int, alive: bool, checkpoint: str | None
) -> RunRecord:
    first, last = states[0], states[-1]
    state = RunStatus(last.state)
    if not state.ended and not alive:
        state = RunStatus.INTERRUPTED
    step = last.step if RunStatus(last.state).ended else last_step
    return RunRecord(run_id, state, step, first.planned_steps, first.time, last.reason, checkpoint)
