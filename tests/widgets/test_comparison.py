"""The chart of a comparison: what a page is told, what its buttons do, and what stays in the file."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tensafe_nb.comparing.results import Measure, Standings, Track
from tensafe_nb.comparing.showing import shown_of
from tensafe_nb.widgets.live.comparison import ComparisonChart
from tensafe_nb.widgets.still.race import Shown

from .conftest import HandFlusher, Output, Wire


class Race:
    """A comparison whose numbers are written down."""

    comparison_id = "cmp-1"

    def __init__(self) -> None:
        self.done, self.state, self.lost = 2, "RUNNING", ()
        self.told: list[str] = []
        self._watchers: list[Callable[[], None]] = []

    def shown(self) -> Shown:
        steps = np.arange(1, self.done + 1)
        tracks = [
            Track(arm, seed, f"tc-{arm}{seed}/1", "FAILED" if (arm, seed) in self.lost else "PAUSED", self.done,
                  "gone", steps, gain * steps + seed + 0.1 * ((seed * steps * (1 + gain)) % 3))
            for arm, gain in (("a", 0), ("b", 1))
            for seed in range(4)
        ]  # fmt: skip
        measure = Measure("reward", 1, higher=True, planned=8)
        told = Standings("rates", measure, {"a": {}, "b": {}}, tracks, self.state)
        active = self.state == "RUNNING"
        return shown_of(told.result(), self.comparison_id, active=active, steer=True, reason=None)

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def pause(self) -> None:
        self.told.append("pause")

    def stop(self) -> None:
        self.told.append("stop")


@pytest.fixture
def race() -> Race:
    return Race()


@pytest.fixture
def wire(race: Race) -> Iterator[Wire]:
    chart = ComparisonChart(race, HandFlusher())
    yield Wire(chart)
    chart.close()


def curves(sent: list[tuple[dict[str, Any], list[bytes]]]) -> dict[str, int]:
    """Return how many points of each curve a page was sent."""
    return {content["name"]: len(buffers[0]) // 4 for content, buffers in sent if content["t"] == "full"}


def test_a_page_is_told_curves_table_and_verdicts(race: Race, wire: Wire) -> None:
    assert wire.flush() == []  # nobody looks yet
    wire.mount()
    assert curves(wire.sent) == {"0": 2, "0±": 2, "1": 2, "1±": 2}
    told = {content["t"]: content for content, _ in wire.sent}
    assert told["status"]["labels"] == ["a", "b"] and told["status"]["of"] == 8
    assert told["standing"]["verdicts"] == [[str(told["standing"]["verdicts"][0][0]), True]]
    assert told["standing"]["rows"][1][0] == "b" and told["standing"]["columns"][-1] == "note"
    race.done = 3
    [delta] = wire.flush_kind("delta")
    assert {name: entry[:2] for name, entry in delta["s"].items()} == {
        name: [2, [3]] for name in ("0", "0±", "1", "1±")
    }


def test_when_a_seed_falls_away_the_curves_are_told_anew(race: Race, wire: Wire) -> None:
    wire.mount()
    race.lost = (("b", 3),)
    wire.flush()
    assert curves(wire.sent)["1"] == 2
    [standing] = [content for content, _ in wire.sent if content["t"] == "standing"]
    assert standing["rows"][1][3] == "3 of 4"


def test_its_buttons_steer_the_race_and_a_record_says_that_it_cannot(race: Race, wire: Wire) -> None:
    wire.mount()
    for number, what in enumerate(("pause", "stop", "resume")):
        wire.page_says(t="do", do=what, n=number)
    answers = wire.flush_kind("ack")
    assert race.told == ["pause", "stop"]
    assert [answer["why"] is None for answer in answers] == [True, True, False]


def test_it_falls_silent_when_the_race_is_over(race: Race, wire: Wire) -> None:
    wire.mount()
    assert wire.widget.live and wire.again == 5.0
    race.state = "FINISHED"
    wire.flush()
    assert wire.again is None and not wire.widget.live


def test_a_picture_and_a_table_stay_in_the_file(race: Race, outputs: list[Output]) -> None:
    chart = ComparisonChart(race, HandFlusher())
    chart.show()
    picture, table, live = outputs
    assert picture.data["image/png"] and picture.metadata["image/png"]["alt"].startswith(
        "rates: running, step 2 of 8"
    )
    assert (
        "b over a by" in table.data["text/html"] and "application/vnd.jupyter.widget-view+json" in live.data
    )
    outputs.clear()
    race.done, race.state = 8, "FINISHED"
    assert chart._still is not None
    chart._still.flush()  # draws
    chart._still.flush()
    assert [one.update for one in outputs] == [True, True] and not chart._still.live
    assert "step 8 of 8" in outputs[0].data["text/html"] and "step 8 of 8" in outputs[1].data["text/plain"]
    chart.close()
    assert replace(race.shown(), curves={}).picture() is None
