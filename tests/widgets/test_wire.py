import json
import math
from typing import Any

import numpy as np
import pytest

from tensafe_nb.widgets.wire import CHUNK_POINTS, Outbox


class Curves:
    """A history in memory."""

    def __init__(self, **values: Any) -> None:
        self.values = {name: list(column) for name, column in values.items()}

    def series(self, name: str, start: int) -> tuple[Any, Any]:
        values = self.values.get(name, [])
        return np.arange(1, len(values) + 1)[start:], np.array(values, dtype=np.float64)[start:]


def told(outbox: Outbox, curves: Curves, *names: str) -> list[dict[str, Any]]:
    return [content for content, _ in outbox.messages(curves, names or ("loss",))]


def test_the_first_message_is_a_binary_column_that_replaces_what_the_page_holds() -> None:
    [(content, (steps, values))] = Outbox().messages(Curves(loss=[2.5, 1.5]), ["loss"])
    assert content == {"t": "full", "name": "loss", "o": 0, "new": True}
    assert np.frombuffer(steps, "<u4").tolist() == [1, 2]
    assert np.frombuffer(values, "<f4").tolist() == [2.5, 1.5]


def test_a_delta_carries_its_offset_and_only_the_new_points() -> None:
    outbox, curves = Outbox(), Curves(loss=[3.0, 2.0])
    told(outbox, curves)
    curves.values["loss"] += [1.0, 0.5]
    assert told(outbox, curves) == [{"t": "delta", "s": {"loss": [2, [3, 4], [1.0, 0.5]]}}]
    assert told(outbox, curves) == []


def test_a_series_that_appears_later_begins_at_zero() -> None:
    outbox, curves = Outbox(), Curves(loss=[3.0])
    told(outbox, curves, "loss", "eval/loss")
    curves.values["eval/loss"] = [2.0]
    assert told(outbox, curves, "loss", "eval/loss") == [{"t": "delta", "s": {"eval/loss": [0, [1], [2.0]]}}]


def test_after_starting_over_everything_is_told_again() -> None:
    outbox, curves = Outbox(), Curves(loss=[3.0, 2.0])
    told(outbox, curves)
    outbox.start_over()
    assert outbox.points == 0
    assert told(outbox, curves)[0]["new"] is True
    assert outbox.points == 2


def test_a_long_history_travels_in_chunks_of_256_kb_that_add_up() -> None:
    values = np.random.default_rng(0).normal(size=2 * CHUNK_POINTS + 5)
    messages = list(Outbox().messages(Curves(loss=values), ["loss"]))
    assert [content["o"] for content, _ in messages] == [0, CHUNK_POINTS, 2 * CHUNK_POINTS]
    assert [content.get("new", False) for content, _ in messages] == [True, False, False]
    assert max(len(steps) + len(column) for _, (steps, column) in messages) <= 256 * 1024
    received = np.concatenate([np.frombuffer(column, "<f4") for _, (_, column) in messages])
    np.testing.assert_allclose(received, values, rtol=1e-6)


def test_non_finite_values_travel_by_name_in_json_and_as_themselves_in_binary() -> None:
    outbox, curves = Outbox(), Curves(loss=[math.nan])
    [(_, (_, column))] = outbox.messages(curves, ["loss"])
    assert math.isnan(np.frombuffer(column, "<f4")[0])
    curves.values["loss"] += [math.nan, math.inf, -math.inf]
    [delta] = told(outbox, curves)
    assert json.loads(json.dumps(delta, allow_nan=False))["s"]["loss"][2] == ["nan", "inf", "-inf"]


@pytest.mark.parametrize("names", [["loss", "eval/loss", "reward"]])
def test_a_delta_of_three_series_is_below_200_bytes(names: list[str]) -> None:
    outbox, curves = Outbox(), Curves(**{name: [1.0] * 99_999 for name in names})
    told(outbox, curves, *names)
    for name in names:
        curves.values[name].append(-12345.678901)
    [delta] = told(outbox, curves, *names)
    assert len(json.dumps(delta | {"at": 1_784_000_000_000, "step": 100_000})) < 200
