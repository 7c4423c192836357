"""The chart of a comparison: what a page is told, what its buttons do, and what stays in the file."""

import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb import widgets
from tensafe_nb.comparing.results import Measure, Standings, Track
from tensafe_nb.comparing.showing import shown_of
from tensafe_nb.widgets import page
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


def content_of(page: Path) -> dict[str, Any]:
    """Return what the script of a page is given to show."""
    text = page.read_text(encoding="utf-8")
    [found] = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return dict(json.loads(found))


def test_a_page_of_it_shows_what_the_chart_shows_and_loads_nothing(race: Race, tmp_path: Path) -> None:
    with pytest.raises(tn.ValidationError, match=r"comparison cmp-1 .*still under way"):
        page.write_race(tmp_path / "race.html", race.shown())
    race.done, race.state, race.lost = 8, "FINISHED", (("b", 3),)
    saved = page.write_race(tmp_path / "race.html", race.shown(), "Rates & <b>")
    text, shown = saved.read_text(encoding="utf-8"), race.shown()
    standing, points, status = content_of(saved)["messages"]
    assert standing["rows"] == shown.standing["rows"] and status["labels"] == ["a", "b"]
    assert points["s"]["1"][1:] == [list(range(1, 9)), list(shown.curves["1"][1])]
    assert "Rates &amp; &lt;b&gt;" in text and shown.table in text and page.OPERATOR not in text
    [script] = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert "showRaces()" in script and not re.search(r"\b(src|href)=|^import ", text, re.MULTILINE)


def test_the_page_of_private_trainings_is_their_operators(race: Race, tmp_path: Path) -> None:
    race.done, race.state = 8, "FINISHED"
    private = replace(race.shown(), status=race.shown().status | {"dp": True})
    saved = page.write_race(tmp_path / "race.html", private)
    assert page.OPERATOR in saved.read_text(encoding="utf-8")
    assert os.name != "posix" or saved.stat().st_mode & 0o777 == 0o600


def test_outside_jupyter_it_is_a_picture_and_a_table_and_in_marimo_its_chart_as_well(
    race: Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, still = widgets.comparison_mime(race)
    assert kind == "text/html" and "data:image/png;base64," in still and "b over a by" in still
    charts: list[ComparisonChart] = []

    class Marimo:
        """What is asked of marimo."""

        @staticmethod
        def running_in_notebook() -> bool:
            return True

        @staticmethod
        def as_html(widget: ComparisonChart) -> Any:
            charts.append(widget)
            return SimpleNamespace(text="<marimo-anywidget>")

    monkeypatch.setitem(sys.modules, "marimo", Marimo)
    _, shown = widgets.comparison_mime(race)
    assert shown == (
        f"<marimo-anywidget><details><summary>As it stood when this cell was run</summary>{still}</details>"
    )
    wire = Wire(charts[0])
    wire.mount()
    assert curves(wire.sent) == {"0": 2, "0±": 2, "1": 2, "1±": 2}
    charts[0].close()
