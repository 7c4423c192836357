"""A log read back: its curves, its events by kind, and what is no event."""

from pathlib import Path

import pytest

from tensafe_nb.core.bus import EventBus
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Alarm, Event, Metrics, Rollouts, RunStep
from tensafe_nb.history.log import RunHistory


def alarm(name: str, step: int) -> Alarm:
    return Alarm(run_id="tc-1/1", step=step, name=name, level="red", message="m", remedy="r")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of two steps, an alarm that is named like another kind of event, and rollouts."""
    bus = EventBus(tmp_path / "events.jsonl")
    for event in (
        Metrics(step=1, values={"loss": 3.0, "tokens": 10.0}),
        alarm("metrics", step=1),
        Metrics(step=2, values={"loss": 2.0, "tokens": 30.0}),
        Rollouts(run_id="tc-1/1", step=2, rollouts=4, path="1/step-2.jsonl"),
        RunStep(run_id="tc-1/1", done=2, duration=1.0),
    ):
        bus.publish(event)
    bus.close()
    return tmp_path / "events.jsonl"


def test_curves_are_read_from_any_point_on(log: Path) -> None:
    history = RunHistory.load(log)
    assert history.names == ["loss", "tokens"] and "loss" in history and "reward" not in history
    steps, values = history.series("loss", start=1)
    assert (steps.tolist(), values.tolist()) == ([2], [2.0])
    assert [column.size for column in history.series("reward")] == [0, 0]
    assert history.clock()[0].tolist() == [1, 2] and len(history.moments()) == 2


def test_what_was_measured_since_an_event_is_told_apart(log: Path) -> None:
    history = RunHistory.load(log)
    assert history.last() == history.last(after=2) == {"loss": 2.0, "tokens": 30.0}
    assert history.last(after=history.last_seq) == {}


@pytest.mark.parametrize("kind", [Metrics, Alarm, RunStep])
def test_events_of_one_kind_are_those_whatever_else_bears_its_name(log: Path, kind: type[Event]) -> None:
    found = list(RunHistory(log).events(kinds=(kind,)))
    assert found and {type(event) for event in found} == {kind}


def test_events_are_read_from_any_number_on_and_alarms_by_themselves(log: Path) -> None:
    history = RunHistory.load(log)
    assert [event.seq for event in history.events(after=3)] == [4, 5]
    assert [found.name for found in history.alarms] == ["metrics"]
    assert list(RunHistory(log.with_name("none.jsonl")).events()) == []


def test_what_is_no_event_is_refused_by_name(log: Path) -> None:
    with log.open("a") as lines:
        lines.write('["run_step"]\n')
    with pytest.raises(ValidationError, match="is no event"):
        RunHistory.load(log)


def test_texts_lie_beside_the_log_wherever_it_was_moved_to(log: Path) -> None:
    history = RunHistory.load(log)
    folder = log.parent / "rollouts" / "1"
    assert history.rollouts_file(history.state.rollouts[2]) == folder / "step-2.jsonl"
    elsewhere = Rollouts(run_id="tc-1/..", step=2, rollouts=4, path="/etc/passwd")
    assert (
        history.rollouts_file(elsewhere).name == "passwd"
        and "etc" not in history.rollouts_file(elsewhere).parts
    )


@pytest.mark.parametrize(
    ("name", "meant"), [("los", "loss"), ("Rewards", "reward"), ("grad_nrom", "grad_norm")]
)
def test_a_slip_for_a_usual_metric_is_told_before_anything_is_measured(
    tmp_path: Path, name: str, meant: str
) -> None:
    history = RunHistory(tmp_path / "events.jsonl")
    with pytest.raises(
        ValidationError, match=f"Nothing is measured yet, and '{name}' looks like .*'{meant}'"
    ):
        history[name]
    assert [column.size for column in history.series(name)] == [0, 0]


@pytest.mark.parametrize("name", [5, slice(0, 1), ["loss"]])
def test_what_is_no_name_of_a_metric_is_told_so(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValidationError, match="Nothing has measured"):
        RunHistory(tmp_path / "events.jsonl")[name]  # type: ignore[index]


@pytest.mark.parametrize("name", ["loss", "epsilon", "accuracy", "eval/los", "reward2"])
def test_any_other_metric_is_empty_before_it_is_measured(tmp_path: Path, name: str) -> None:
    assert RunHistory(tmp_path / "events.jsonl")[name].size == 0
