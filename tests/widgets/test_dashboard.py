"""The panel without a browser: what it sends, when, and what it does with what it is told."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tensafe_nb.events import OperationQueued, OperationStarted, RunDescribed
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.widgets import renderer
from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.live.dashboard import Dashboard, panel_of

from .conftest import PLANNED, FakeClient, FakeRun, HandFlusher, Output, Wire


def from_here(call: Callable[[], None]) -> None:
    call()


def from_a_foreign_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def from_a_loop_on_another_thread(call: Callable[[], None]) -> None:
    async def main() -> None:
        call()

    from_a_foreign_thread(lambda: asyncio.run(main()))


def test_nothing_is_sent_before_a_page_says_hello(client: FakeClient, wire: Wire) -> None:
    client.measure(loss=1.0)
    assert wire.flush() == []


def test_hello_is_answered_by_the_badge_and_then_the_whole_history(client: FakeClient, wire: Wire) -> None:
    client.measure(loss=3.0, eval_loss=2.5)
    client.measure(loss=2.0)
    wire.load()
    assert [content["t"] for content in wire.flush()] == ["status", "full", "full", "full", "words"]
    columns = {
        content["name"]: np.frombuffer(buffers[1], "<f4").tolist() for content, buffers in wire.sent[1:-1]
    }
    assert columns["~time"][0] == 0
    assert columns | {"~time": []} == {"loss": [3.0, 2.0], "eval/loss": [2.5], "~time": []}


def test_a_run_that_is_given_a_name_bears_it_at_once(client: FakeClient, wire: Wire) -> None:
    run = client.start()
    wire.mount()
    client.publish(RunDescribed(run_id=run.run_id, name="first try"))
    wire.widget.feed.flusher.time += 1
    status = wire.flush_kind("status")[-1]
    assert status["name"] == "first try"


def test_what_follows_is_told_as_deltas_with_the_moment_and_the_step(client: FakeClient, wire: Wire) -> None:
    run = client.start()
    client.advance(run, loss=3.0)
    wire.mount()
    client.advance(run, loss=2.0)
    [delta] = wire.flush_kind("delta")
    assert delta["s"]["loss"] == [1, [2], [2.0]]
    assert delta["step"] == 2
    assert delta["at"] > 1_700_000_000_000


def test_a_page_that_found_a_gap_is_told_everything_anew(client: FakeClient, wire: Wire) -> None:
    client.measure(loss=3.0)
    wire.mount()
    wire.page_says(t="hello", v=1, n=0)
    [full, time] = wire.flush_kind("full")
    assert (full["o"], full["new"]) == (0, True)
    assert (time["name"], "new" in time) == ("~time", False)
    assert wire.widget.pages == 1


def test_the_reward_is_the_curve_once_there_is_one(client: FakeClient, wire: Wire) -> None:
    client.measure(loss=3.0)
    wire.mount()
    client.measure(reward=0.25, eval_reward=0.5)
    assert set(wire.flush_kind("delta")[0]["s"]) == {"reward", "eval/reward", "~time"}
    wire.widget.feed.flusher.time += 1
    assert wire.flush_kind("status")[0]["curve"] == "reward"


@pytest.mark.parametrize("call", [from_here, from_a_foreign_thread, from_a_loop_on_another_thread])
def test_a_handler_only_notes_and_wakes_whatever_thread_it_is_on(
    client: FakeClient, wire: Wire, flusher: HandFlusher, call: Callable[[Callable[[], None]], None]
) -> None:
    run = client.start()
    wire.mount()
    flusher.woken.clear()
    wire.sent.clear()
    call(lambda: wire.page_says(t="do", do="pause", n=1))
    assert (run.told, wire.sent, flusher.woken) == ([], [], [wire.widget])
    assert {"t": "ack", "n": 1, "why": None, "said": None} in wire.flush()
    assert run.told == ["pause"]
    assert run.threads == [threading.current_thread().name]


def test_each_button_does_what_it_says(client: FakeClient, wire: Wire) -> None:
    run = client.start()
    wire.mount()
    for number, command in enumerate(("pause", "resume", "stop"), start=1):
        wire.page_says(t="do", do=command, n=number)
    assert [content["n"] for content in wire.flush_kind("ack")] == [1, 2, 3]
    assert run.told == ["pause", "resume", "stop"]


def test_a_command_is_refused_with_its_reason(client: FakeClient, wire: Wire) -> None:
    wire.mount()
    wire.page_says(t="do", do="pause", n=1)
    assert wire.flush_kind("ack")[0]["why"] == "There is no run to pause."
    run = client.start()
    client.turn(run, RunStatus.FINISHED)
    wire.page_says(t="do", do="pause", n=2)
    assert wire.flush_kind("ack")[0]["why"] == "The run has ended: FINISHED."
    wire.page_says(t="do", do="delete everything", n=3)
    assert "delete everything" in wire.flush_kind("ack")[0]["why"]
    assert run.told == []


def test_a_run_that_another_client_has_started_is_steered_there(client: FakeClient, wire: Wire) -> None:
    client.start()
    client.runs = ()
    wire.page_says(t="do", do="pause", n=1)
    assert "Another client of tc-1 has started this run" in wire.flush_kind("ack")[0]["why"]


def test_of_a_run_that_another_client_drives_the_page_is_told_for_how_long_it_has_been_silent(
    client: FakeClient, wire: Wire
) -> None:
    run = client.start()
    wire.mount()
    assert wire.widget.status()["foreign"] is False
    assert wire.widget.status()["silent"] is None
    client.runs = ()
    assert wire.widget.status()["foreign"] is True
    assert wire.widget.status()["silent"] >= 0.0
    client.turn(run, RunStatus.PAUSED)
    assert wire.widget.status()["silent"] is None
    client.turn(run, RunStatus.FINISHED)
    assert wire.widget.status()["foreign"] is False


def test_a_command_that_breaks_is_answered_too(
    client: FakeClient, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = client.start()
    wire.mount()
    monkeypatch.setattr(run, "pause", lambda: 1 / 0)
    wire.page_says(t="do", do="pause", n=1)
    assert wire.flush_kind("ack")[0]["why"] == "ZeroDivisionError: division by zero"


def test_a_change_of_state_is_told_at_once_and_of_the_rest_twice_a_second_at_most(
    client: FakeClient, wire: Wire, flusher: HandFlusher
) -> None:
    run = client.start()
    wire.mount()
    client.advance(run)
    assert wire.flush_kind("status") == []
    assert wire.again == 0.5
    flusher.time += 0.5
    assert wire.flush_kind("status")[0]["step"] == 1
    client.turn(run, RunStatus.PAUSING)
    assert wire.flush_kind("status")[0]["state"] == "PAUSING"


def test_a_running_run_gives_a_sign_of_life_every_five_seconds(
    client: FakeClient, wire: Wire, flusher: HandFlusher
) -> None:
    client.start()
    wire.mount()
    flusher.time += 4.9
    assert wire.flush() == []
    flusher.time += 0.2
    assert len(wire.flush_kind("status")) == 1


def test_a_resting_client_is_silent(client: FakeClient, wire: Wire, flusher: HandFlusher) -> None:
    wire.mount()
    flusher.time += 60
    assert wire.flush() == []
    assert wire.again is None


def test_a_status_is_below_600_bytes_and_what_is_unknown_is_null(client: FakeClient, wire: Wire) -> None:
    client.start(FakeRun(planned_steps=None))
    for future_id in ("f", "g", "h"):
        client.publish(OperationQueued(future_id=future_id, operation="forward_backward"))
    client.publish(OperationStarted(future_id="f", operation="forward_backward"))
    wire.load()
    status = wire.flush_kind("status")[0]
    assert len(json.dumps(status)) < 600
    assert (status["of"], status["eta"], status["reason"]) == (None, None, None)
    assert (status["queue"], status["op"], status["run"]) == (3, "forward_backward", "1")


def test_the_time_left_is_told_after_five_steps_from_the_median_step(client: FakeClient, feed: Feed) -> None:
    run = client.start()
    for _ in range(5):
        client.advance(run, duration=2.0)
    assert feed.standing().eta is None
    client.advance(run, duration=100.0)
    assert feed.standing().eta == 2.0 * (PLANNED - 6)
    client.turn(run, RunStatus.PAUSED)
    assert feed.standing().eta is None


def test_a_failure_is_told_with_its_reason(client: FakeClient, wire: Wire) -> None:
    run = client.start()
    wire.mount()
    client.turn(run, RunStatus.FAILED, reason="batch 3 holds <b>nothing</b>")
    status = wire.flush_kind("status")[0]
    assert (status["state"], status["reason"], status["ended"]) == (
        "FAILED",
        "batch 3 holds <b>nothing</b>",
        True,
    )


def test_an_error_of_our_own_appears_in_the_panel(
    client: FakeClient, wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wire.mount()
    monkeypatch.setattr(wire.widget.feed, "standing", lambda: 1 / 0)
    with caplog.at_level(logging.CRITICAL):
        [error] = wire.flush_kind("error")
    assert "ZeroDivisionError" in error["text"]


def test_the_state_of_the_widget_does_not_grow_with_the_training(client: FakeClient, wire: Wire) -> None:
    before = set(wire.widget.get_state())
    size = len(str(wire.widget.get_state()))
    run = client.start()
    for _ in range(500):
        client.advance(run)
    wire.mount()
    assert set(wire.widget.get_state()) == before
    assert len(str(wire.widget.get_state())) == size


def test_few_traits_are_to_be_set_from_outside(wire: Wire) -> None:
    own = {name for name in wire.widget.keys if not name.startswith("_")} - {"layout", "tabbable", "tooltip"}
    assert own == {"smoothing", "log_scale", "x_axis", "selected_step", "sections", "title"}


def test_there_is_one_panel_per_training_client_until_it_is_closed(client: FakeClient) -> None:
    first, again = panel_of(client), panel_of(client)
    assert first is again
    first.close()
    second = panel_of(client)
    assert second is not first
    second.close()
    client.close()
    assert first.feed.settle(10)


def test_a_panel_is_shown_with_what_stays_in_the_file_above_it(
    client: FakeClient, wire: Wire, outputs: list[Output]
) -> None:
    wire.widget.show(client.start())
    picture, table, live = (output.data for output in outputs)
    assert "tsnb-frozen-picture" in picture["text/html"]
    assert 'class="tsnb-frozen"' in table["text/html"]
    assert live["application/vnd.jupyter.widget-view+json"]["model_id"] == wire.widget.model_id
    assert "run 1 of tc-1: open in Jupyter" in live["text/html"]


def test_a_cell_that_shows_the_panel_already_is_known_by_its_number(
    wire: Wire, outputs: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = 7
    monkeypatch.setattr(renderer, "execution_count", lambda: cell)
    assert not wire.widget.is_shown_here
    wire.widget._repr_mimebundle_()
    assert wire.widget.is_shown_here
    cell = 8
    assert not wire.widget.is_shown_here


def test_a_retired_panel_is_one_line_of_text(client: FakeClient, wire: Wire, outputs: list[Output]) -> None:
    wire.widget.show(client.start())
    live = outputs[-1]
    wire.widget.retire()
    assert outputs[-1].update
    assert outputs[-1].display_id == live.display_id
    assert list(outputs[-1].data) == ["text/plain"]


def test_a_page_loaded_again_learns_that_the_picture_in_the_file_is_old(
    client: FakeClient, wire: Wire, outputs: list[Output]
) -> None:
    run = client.start()
    wire.widget.show(run)
    wire.mount()
    assert wire.widget.status()["hint"] is None
    wire.load()
    assert wire.flush_kind("status")[0]["hint"] == {"last": None}
    wire.widget.show(run)
    wire.page_says(t="hello", v=1, n=0)
    hints: list[Any] = [status["hint"] for status in wire.flush_kind("status")]
    assert hints == [None]


def test_a_page_that_asks_again_is_no_other_page(
    client: FakeClient, wire: Wire, outputs: list[Output]
) -> None:
    wire.widget.show(client.start())
    wire.mount()
    wire.page_says(t="hello", v=1, n=0, mount="page 1")
    assert wire.flush_kind("status")[0]["hint"] is None
    assert wire.widget.pages == 1


def test_an_output_that_was_placed_since_the_last_page_was_loaded_is_within_reach(
    client: FakeClient, wire: Wire, outputs: list[Output]
) -> None:
    wire.widget.show(client.start())
    wire.mount()  # and now the page is loaded again, before the file was ever saved
    wire.widget.show()
    wire.load()
    assert wire.flush_kind("status")[0]["hint"] is None
    wire.load()
    assert wire.flush_kind("status")[0]["hint"] is not None


def test_the_panel_says_its_last_when_the_client_is_closed(client: FakeClient, wire: Wire) -> None:
    wire.mount()
    assert wire.widget.live
    client.close()
    assert wire.flush_kind("status")[0]["state"] == "TERMINATED"
    assert not wire.widget.live


def test_a_page_that_comes_after_the_end_is_told_everything(client: FakeClient, wire: Wire) -> None:
    client.measure(loss=1.0)
    client.close()
    wire.load()
    assert wire.widget.live
    assert [content["t"] for content in wire.flush()][:2] == ["status", "full"]
    assert not wire.widget.live


def test_closing_the_panel_stops_no_run(client: FakeClient, feed: Feed) -> None:
    run = client.start()
    Dashboard(feed).close()
    assert run.told == []


def test_a_panel_whose_line_was_cut_is_kept_by_nobody(client: FakeClient, wire: Wire) -> None:
    run = client.start()
    wire.mount()
    assert wire.widget.live
    wire.widget.comm.close()  # as marimo does with the cell that is run again
    client.advance(run)
    wire.flush()
    assert wire.widget.comm is None and not wire.widget.live
    assert wire.widget not in wire.widget.feed._members
