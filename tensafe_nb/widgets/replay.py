"""Replay of a recorded run in the panel: as it went, read from its log, at its own pace or a multiple of it."""

import itertools
import threading
import time
from collections.abc import Generator
from math import isfinite
from pathlib import Path
from typing import Any, final

from tensafe_nb import widgets
from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import RunNotFoundError, TGTinkerError, ValidationError
from tensafe_nb.events import Event
from tensafe_nb.futures import Promise
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.runs.record import RunRecord, load_run, read_log
from tensafe_nb.widgets.feed.recording import Recording

MARK = "REPLAY"
LONGEST_GAP = 2.0  # s without an event, as watched: a night in which a run was paused is not worth watching
_numbers = itertools.count(1)


@final
class Replay:
    """A recorded run on its way through the panel; made by `replay`. Await it where its end is needed.

    Example:
        >>> await tn.replay("tc-7f3a/1", speed=100)
    """

    def __init__(self, record: RunRecord, speed: float) -> None:
        self.record, self.speed = record, speed
        self._recording = Recording(record, MARK)
        self._hurry = threading.Event()
        self._promise: Promise[RunRecord] = Promise()
        name = f"tsnb-replay-{next(_numbers)}"
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    @property
    def run_id(self) -> str:
        """The recorded run."""
        return self.record.run_id

    @property
    def state(self) -> RunStatus:
        """The state in which the run was at the moment that is shown."""
        return self._recording.run.state

    @property
    def steps_done(self) -> int:
        """Steps of the run that are shown."""
        return self._recording.run.steps_done

    @property
    def history(self) -> RunHistory:
        """The curves and events, as far as they are shown."""
        return self._recording.history

    @property
    def run(self) -> Any:
        """The run as a panel or a curve of it shows it: `LossCurve(replay.run)`."""
        return self._recording.run

    def start(self) -> "Replay":
        """Begin; called once, by `replay`."""
        self._thread.start()
        return self

    def done(self) -> bool:
        """Whether it has come to its end."""
        return self._promise.done

    def result(self, timeout: float | None = None) -> RunRecord:
        """Wait until everything was shown, or `timeout` seconds; return the record of the run.

        Raises:
            ValidationError: The log cannot be read to its end.
        """
        self._promise.wait(timeout)
        return self._promise.outcome() if self.done() else self.record

    def __await__(self) -> Generator[Any, None, RunRecord]:
        return self._promise.awaited()

    def close(self) -> None:
        """Show what is left at once, and end."""
        self._hurry.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def freeze(self) -> None:
        """Put a picture and a table of how things stand into the calling cell."""
        widgets.freeze(self.run)

    def __repr__(self) -> str:
        planned = self.record.planned_steps or "?"
        return (
            f"<REPLAY ×{self.speed:g} of run {self.run_id} {self.state}, step {self.steps_done} of {planned}>"
        )

    def _repr_mimebundle_(self, **_: Any) -> Any:
        bundle = widgets.mimebundle(self.run)
        return bundle if isinstance(bundle, tuple) else {"text/plain": repr(self)}

    def _main(self) -> None:
        recording, failure = self._recording, None
        due = time.monotonic()
        try:
            for event in recording.events():
                if recording.started:
                    due += self._gap(event)
                    self._hurry.wait(max(due - time.monotonic(), 0))
                recording.tell(event)
        except (TGTinkerError, OSError, ValueError, TypeError, KeyError) as error:
            failure = ValidationError(f"The log {self.record.log} cannot be read to its end: {error}.")
            recording.break_off(str(failure))
        widgets.settle(self.run)
        if failure is None:
            self._promise.succeed(self.record)
        else:
            self._promise.fail(failure)

    def _gap(self, event: Event) -> float:
        return min(max(event.time - self._recording.now(), 0) / self.speed, LONGEST_GAP)


@checked
def replay(run: str | Path | RunRecord, speed: float = 20.0, *, show: bool = True) -> Replay:
    """Show a recorded run in the panel, moving as it moved; labelled REPLAY, and without buttons.

    Returns at once. Nothing is trained and nothing is written. Stretches in which nothing happened are cut short.

    Args:
        run: Its id, a record from `list_runs()`, or an event log (`events.jsonl`), of which the last run is shown.
        speed: So many times as fast as it went.
        show: Show it: a panel in a notebook, else a bar or lines.

    Raises:
        RunNotFoundError: No such run, or no run in the file.
        ValidationError: A speed that is no positive number, a run that is still under way, or a file that is no log.

    Example:
        >>> await tn.replay(tn.list_runs()[-1], speed=50)
    """
    if not isinstance(speed, int | float) or isinstance(speed, bool) or not isfinite(speed) or speed <= 0:
        raise ValidationError(
            f"replay: speed={as_given(speed)} must be a number above 0: 20 is twenty times as fast."
        )
    record = find_record(run)
    if not record.state.ended:
        raise ValidationError(
            f"The run {record.run_id} is still under way ({record.state}): its own panel is the live one. "
            f"It can be replayed when it has ended."
        )
    replayed = Replay(record, float(speed))
    if show:
        widgets.show_run(replayed.run)
    return replayed.start()


def find_record(run: str | Path | RunRecord) -> RunRecord:
    """Return the record of a run by its id, of the last run in a log, or as given."""
    if isinstance(run, RunRecord):
        return run
    if isinstance(run, Path) or run.endswith(".jsonl"):
        records = read_log(Path(run))
        if not records:
            raise RunNotFoundError(f"There is no run in {run}.")
        return records[-1]
    return load_run(run)
