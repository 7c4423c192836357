"""Curves that are made of others, and several on the same axes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Metrics, StateLoaded
from tensafe_nb.widgets import (
    LossCurve,
)
from tensafe_nb.widgets.feed.curves import RATE, TOKENS, Curves, names_of
from tensafe_nb.widgets.feed.feed import Feed

from .conftest import FakeClient, HandFlusher, Wire


@pytest.fixture
def pair(
    client: FakeClient, feed: Feed, tmp_path: Path, flusher: HandFlusher
) -> Iterator[tuple[Feed, FakeClient, Feed]]:
    other = FakeClient(tmp_path / "other.jsonl")
    other.training_client_id = "tc-9"
    yield feed, other, Feed(other, flusher)
    other.bus.close()


def test_several_runs_share_the_axes(client: FakeClient, pair: tuple[Feed, FakeClient, Feed]) -> None:
    feed, other, other_feed = pair
    client.measure(loss=3.0)
    other.measure(loss=2.0)
    other.measure(loss=1.0)
    widget = LossCurve(feed, other_feed)
    wire = Wire(widget)
    wire.load()
    counts = {content["name"]: content for content in wire.flush_kind("full")}
    assert {"loss", "1:loss"} <= set(counts)
    assert widget.labels == ["tc-1", "tc-9"]
    widget.close()


def test_seven_runs_are_refused(feed: Feed) -> None:
    with pytest.raises(ValidationError, match="at most 6"):
        LossCurve(*[feed] * 7)


def test_tokens_add_up_and_their_rate_needs_two_steps(client: FakeClient, feed: Feed) -> None:
    curves = Curves([feed])
    for tokens in (10.0, 30.0):
        client.publish(Metrics(step=client.step + 1, values={"loss": 1.0, "tokens": tokens}))
        client.step += 1
    assert curves.series(TOKENS)[1].tolist() == [10.0, 40.0]
    steps, rates = curves.series(RATE)
    assert steps.tolist() == [2]
    assert rates[0] > 0
    client.publish(Metrics(step=3, values={"loss": 1.0, "tokens": 5.0}))
    assert curves.series(TOKENS, 2)[1].tolist() == [45.0]
    assert curves.series(RATE, 1)[0].tolist() == [3]
    assert names_of(feed, all_curves=True) == ["loss", "~time", "~tokens", "tokens/s"]


def test_what_is_measured_now_and_then_is_a_curve_of_what_was_measured(
    client: FakeClient, feed: Feed
) -> None:
    name, nan = "policy/approx_kl", float("nan")
    for step, value in enumerate((nan, 0.1, nan, nan, 0.2, nan), 1):
        client.publish(Metrics(step=step, values={name: value, "loss": 1.0}))
        client.save(f"art-{step}", step=step)
    curves = Curves([feed])
    assert [column.tolist() for column in curves.series(name)] == [[2, 5], [0.1, 0.2]]
    assert curves.series(name, 1)[0].tolist() == [5]
    assert curves.spans([name, "loss"]) == {}
    client.publish(StateLoaded(artifact_id="art-4", step=4))
    assert curves.spans([name, "loss"]) == {name: [(0, 1), (2, None)], "loss": [(0, 4), (6, None)]}


def test_a_page_is_told_once_which_points_a_loaded_state_has_given_up(client: FakeClient, wire: Wire) -> None:
    client.measure(loss=3.0)
    client.save("art-a", step=1)
    client.measure(loss=2.0)
    wire.mount()
    assert wire.flush_kind("spans") == []
    client.publish(StateLoaded(artifact_id="art-a", step=1))
    [told] = wire.flush_kind("spans")
    assert told["spans"]["loss"] == [(0, 1), (2, None)] == told["spans"]["~time"]
    assert wire.flush_kind("spans") == []
    wire.load()
    assert len(wire.flush_kind("spans")) == 1  # another page is told anew
