"""The branch of each curve that led to the weights as they are: a state that is loaded brings back what led to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tensafe_nb.events import CheckpointSaved, Event, Metrics, StateLoaded
from tensafe_nb.history.state import ClientState

CLOCK = ""  # stands for everything that was measured, whatever it was
Counts = Mapping[str, int]  # points of each curve
Span = tuple[int, int | None]  # from a point's number to another's; None has no end yet


@dataclass(frozen=True, slots=True)
class Stretch:
    """Points that were measured one after the other, without anything loaded in between."""

    start: Counts
    end: Counts


@dataclass(frozen=True, slots=True)
class Saved:
    """What had led to a checkpoint.

    Attributes:
        before: Up to the last state that was loaded before it.
        start: Where the last stretch began.
        end: Where it was when the checkpoint was saved.
        step: The client's step.
        done: Steps of its own that a run with rewards had done; None without one.
    """

    before: tuple[Stretch, ...]
    start: Counts
    end: Counts
    step: int
    done: int | None


class Branches:
    """Follows which points of the curves belong to the client as it stands.

    Args:
        steps: Returns the steps of each curve, as far as it is measured.
        state: Of the client.
    """

    def __init__(self, steps: Callable[[], Mapping[str, Sequence[int]]], state: ClientState) -> None:
        self._steps, self._state = steps, state
        self._before: tuple[Stretch, ...] = ()
        self._start: Counts = {}
        self._saved: dict[str, Saved] = {}
        self._by_loops: set[str] = set()  # curves that are numbered by the steps of loops

    def apply(self, event: Event) -> None:
        """Take in the next event, behind the state."""
        match event:
            case Metrics(values=values, run_id=None):
                self._by_loops.difference_update(values)
            case Metrics(values=values):
                self._by_loops.update(values)
            case CheckpointSaved():
                run = self._state.latest_run
                done = run.steps_done if run is not None and run.rewarded else None
                self._saved[event.artifact_id] = Saved(
                    self._before, self._start, self._counts(), event.step, done
                )
            case StateLoaded():
                saved = self._saved.get(event.artifact_id)  # of another client: nothing here led to it
                self._before = (
                    () if saved is None else (*saved.before, Stretch(saved.start, self._end_of(saved)))
                )
                self._start = self._counts()

    def spans(self, name: str) -> list[Span]:
        """Return which points of a curve led to the client as it stands; one span without an end for all of them."""
        found: list[Span] = []
        for stretch in self._before:
            start, end = stretch.start.get(name, 0), stretch.end.get(name, 0)
            if found and found[-1][1] == start:
                start = found.pop()[0]
            if end > start:
                found.append((start, end))
        start = self._start.get(name, 0)
        if found and found[-1][1] == start:
            start = found.pop()[0]
        return [*found, (start, None)]

    def _counts(self) -> Counts:
        return {name: len(steps) for name, steps in self._steps().items()}

    def _end_of(self, saved: Saved) -> Counts:
        """Return where the curves were when it was saved, with what was told of its step a moment later."""
        end = {}
        for name, steps in self._steps().items():
            reached = saved.end.get(name, 0)
            step = saved.done if name in self._by_loops and saved.done is not None else saved.step
            while reached < len(steps) and steps[reached] <= step and self._grows(steps, reached):
                reached += 1
            end[name] = reached
        return end

    @staticmethod
    def _grows(steps: Sequence[int], index: int) -> bool:
        return index == 0 or steps[index] > steps[index - 1]
