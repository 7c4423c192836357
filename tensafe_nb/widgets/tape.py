"""A recorded run as a page without a kernel plays it: what the page of a panel would be told, with its moments.

The panel itself tells it, over a line that keeps every message: so page and notebook cannot show different things.
"""

import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any, final

import numpy as np

from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Event, Rollouts
from tensafe_nb.runs.record import RunRecord
from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.feed.flusher import Flusher, Member
from tensafe_nb.widgets.feed.recording import Recording
from tensafe_nb.widgets.feed.rollouts import ASKED, Decode, message
from tensafe_nb.widgets.live.dashboard import Dashboard
from tensafe_nb.widgets.replay import LONGEST_GAP, MARK
from tensafe_nb.widgets.wire import json_number

MOST_FRAMES = 600  # more would not be told apart in the time for which somebody watches
MOST_SAMPLES = 6_000_000  # bytes of prompts and answers
WATCHED = 15.0  # s that a replay takes at most, at the speed with which it begins
STANDING_STILL = {
    "active": False,
    "eta": None,
    "op": None,
    "op_s": None,
    "hint": None,
}  # time goes on with frames only
NOT_KEPT = "The samples of this step are not kept any more."

Content = dict[str, Any]
Frame = tuple[float, list[Content]]  # seconds since the run began, what is told then


@final
class Tape:
    """A recorded run, told once to a panel from beginning to end.

    Args:
        record: The run.
        samples: So many prompts of a step, with their answers.
        decode: Turns token ids into their texts; None leaves answers whole.

    Attributes:
        feed: Of the run; it stands at the end once the frames were made.
    """

    def __init__(self, record: RunRecord, samples: int = 0, decode: Decode | None = None) -> None:
        self._samples, self._decode = samples, decode
        self._recording = Recording(record, MARK)
        config = self._recording.config
        if Path(config.model_ref).is_absolute():  # pages are handed out: where it lies is nobody's business
            self._recording.config = config.replace(model_ref=Path(config.model_ref).name)
        self.feed = Feed(self._recording, _ByHand(self._recording.now), clock=self._recording.now)
        self.feed.expect(self._recording.run)

    @property
    def run(self) -> Any:
        """The run, as far as it was told."""
        return self._recording.run

    def content(self) -> Content:
        """Return what `static/player.js` plays.

        Raises:
            ValidationError: The log cannot be read to its end.
        """
        try:
            frames = [(moment, told) for moment, told in self._frames() if told]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValidationError(
                f"The log {self._recording.history.path} cannot be read to its end: {error}."
            ) from error
        return {
            "title": f"{self.feed.client_id} · {self.feed.description}",
            "speed": speed_of(frames[-1][0]),
            "frames": frames,
            "rollouts": self._rollouts() if self._samples else None,
        }

    def _frames(self) -> Iterator[Frame]:
        line = _KeptLine()
        panel = Dashboard(self.feed, comm=line)
        panel.receive(None, {"t": "hello", "mount": True}, ())
        events = list(self._recording.events())
        moments = self._moments(events)
        frame_of = [int(MOST_FRAMES * moment / (moments[-1] or 1.0)) for moment in moments]
        for event, moment, frame, following in zip(
            events, moments, frame_of, [*frame_of[1:], None], strict=True
        ):
            self._recording.tell(event)
            if frame != following:
                panel.flush()
                yield round(moment, 3), line.taken()
        panel.close()

    def _moments(self, events: Sequence[Event]) -> list[float]:
        """Return when each event is told: what came before the run at once, long waits cut short."""
        started = self._recording.run.started_at
        times = list(accumulate((max(event.time, started) for event in events), max))
        gaps = [later - earlier for earlier, later in pairwise(times)]
        longest = max(LONGEST_GAP, 10 * float(np.quantile(gaps or [0.0], 0.9)))
        return list(accumulate((min(gap, longest) for gap in gaps), initial=0.0))

    def _rollouts(self) -> dict[int, Content]:
        """Return the samples by their step: of all, or of as many evenly spread ones as there is room for."""
        found = sorted(self.feed.state.rollouts.items())
        kept = [self._samples_of(step, rollouts) for step, rollouts in found[-1:]]
        if kept:
            room = max(1, MOST_SAMPLES // len(json.dumps(kept[0])))
            every = math.ceil(len(found) / room)
            kept += [self._samples_of(step, rollouts) for step, rollouts in found[-1 - every :: -every]]
        return {content["step"]: content for content in reversed(kept)}

    def _samples_of(self, step: int, rollouts: Rollouts) -> Content:
        try:
            content = message(step, self.feed.history.rollouts_file(rollouts), self._decode, ASKED)
        except ValidationError:  # says where on this machine
            return {"t": "rollouts", "step": step, "why": NOT_KEPT}
        groups = sorted(content["groups"], key=lambda group: not group["signal"])  # first those that teach
        left_out = content["left_out"] + len(groups[self._samples :])
        return content | {"groups": groups[: self._samples], "left_out": left_out}


def speed_of(seconds: float) -> int:
    """Return how many times as fast as it went a run is shown at first: 1, 2, 5, 10 and so on."""
    speeds = (factor * int(10**power) for power in count() for factor in (1, 2, 5))
    return next(speed for speed in speeds if seconds / speed <= WATCHED)


@final
class _ByHand(Flusher):
    """A flusher without a thread: whoever tells the events flushes; its time is that of the recording."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()
        self._now = now

    def wake(self, member: Member, *, urgent: bool = False) -> None:
        pass

    def aside(self, work: Callable[[], None]) -> None:
        pass  # what a panel prepares aside are samples, which a tape keeps beside the frames

    def now(self) -> float:
        return self._now()


@final
class _KeptLine:
    """The line of a widget to its page, as ipywidgets needs it; the messages stay here."""

    def __init__(self) -> None:
        self.comm_id = uuid.uuid4().hex
        self._kept: list[Content] = []

    def on_msg(self, callback: Callable[[Any], None]) -> None:
        """Nobody answers."""

    def send(self, data: Mapping[str, Any], buffers: Sequence[bytes] | None = None, **_: Any) -> None:
        """Keep what the page would be told; values of traits are the page's own."""
        if data["method"] == "custom":
            self._kept.append(_as_json(data["content"], buffers or ()))

    def taken(self) -> list[Content]:
        """Hand over what has come."""
        kept, self._kept = self._kept, []
        return kept

    def close(self, **_: Any) -> None:
        """End with the widget."""


def _as_json(content: Mapping[str, Any], buffers: Sequence[bytes]) -> Content:
    """Return a message as JSON alone carries it; the time of the day at which it was sent is left out."""
    kept = {name: value for name, value in content.items() if name != "at"}
    if kept["t"] == "full":
        steps, values = np.frombuffer(buffers[0], "<u4"), np.frombuffer(buffers[1], "<f4")
        column = [kept["o"], steps.tolist(), [json_number(value) for value in values.tolist()]]
        return {"t": "delta", "s": {kept["name"]: column}}
    return kept | STANDING_STILL if kept["t"] == "status" else kept
