"""The sections of the panel as widgets of their own."""

from typing import Any

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.widgets import (
    CheckpointTable,
    Dashboard,
    LossCurve,
    PrivacyMeter,
    RewardHistory,
    RolloutInspector,
)
from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.live import dashboard
from tensafe_nb.widgets.live.base import LiveWidget

from .conftest import FakeClient, Wire

ALONE = (CheckpointTable, LossCurve, PrivacyMeter, RewardHistory, RolloutInspector)


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.__name__)
def test_each_part_stands_alone_and_answers_its_page(client: FakeClient, feed: Feed, kind: Any) -> None:
    client.measure(loss=1.0, reward=0.5)
    client.save("art-1", step=1)
    widget = kind(feed)
    wire = Wire(widget)
    wire.load()
    told = wire.flush()
    assert told[0]["t"] == "status"
    assert isinstance(widget, LiveWidget)
    widget.close()


def test_a_widget_without_a_source_says_what_it_needs() -> None:
    with pytest.raises(TypeError, match="shows a training client or a run"):
        LossCurve()


@pytest.mark.parametrize("kind", [LossCurve, Dashboard], ids=lambda kind: kind.__name__)
def test_what_has_no_history_is_refused_by_every_widget(kind: Any) -> None:
    with pytest.raises(
        ValidationError, match=r"runs, and records of runs, not 'tc-1/1'\. .*load_run\(run_id\)"
    ):
        kind("tc-1/1")


def test_sections_are_chosen_by_name(client: FakeClient) -> None:
    widget = dashboard.panel_of(client, ["loss", "privacy"])
    assert widget.sections == ["loss", "privacy"]
    assert widget is not dashboard.panel_of(client)
    with pytest.raises(ValidationError, match=r"no section 'losses'.*loss"):
        Dashboard(client, ["losses"])
    client.close()
    assert widget.feed.settle(10)
