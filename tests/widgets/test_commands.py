"""Buttons: each does what it says, and says why it does not."""

from typing import Any

import pytest

from tensafe_nb.errors import DecryptionError
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.widgets.live import dashboard

from .conftest import FakeClient, FakeRun, Wire


def acks(wire: Wire) -> list[dict[str, Any]]:
    return [*wire.flush_kind("ack"), *wire.flush_kind("ack")]


def test_a_recording_has_nothing_to_steer(
    client: FakeClient, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "steerable", False)
    wire.load()
    assert wire.flush_kind("status")[0]["steer"] is False
    wire.page_says(t="do", do="checkpoint", n=1)
    wire.flush()
    assert "recording" in next(c["why"] for c, _ in wire.sent if c["t"] == "ack")


def test_each_button_of_a_checkpoint_does_what_it_says(client: FakeClient, wire: Wire) -> None:
    client.save("art-1")
    wire.mount()
    for number, command in enumerate(("rollback", "export", "delete"), start=1):
        wire.page_says(t="do", do=command, n=number, id="art-1")
    answers = acks(wire)
    assert [answer["why"] for answer in answers] == [None] * 3
    assert client.told == ["load_state art-1", "export art-1", "delete art-1"]
    assert "in the clear" in answers[1]["said"]
    wire.page_says(t="do", do="rollback", n=4, id="art-1")
    assert "no checkpoint 'art-1'" in acks(wire)[0]["why"]


def test_a_rollback_that_fails_later_is_told(client: FakeClient, wire: Wire) -> None:
    client.save("art-1")
    wire.mount()
    wire.page_says(t="do", do="rollback", n=1, id="art-1")
    assert acks(wire)[0]["why"] is None
    client.promises[0].start()
    client.promises[0].fail(DecryptionError("the key is gone"))
    assert wire.flush_kind("error")[0]["text"] == "rollback: the key is gone"


def test_a_checkpoint_under_way_is_seen_to_wait(client: FakeClient, wire: Wire) -> None:
    wire.mount()
    wire.page_says(t="do", do="checkpoint", n=1)
    told = [*wire.flush(), *wire.flush()]
    assert [content["saving"] for content in told if content["t"] == "rows"] == [1]
    client.promises[0].start()
    client.promises[0].cancel()
    assert wire.flush_kind("rows")[0]["saving"] == 0


def test_what_waits_of_a_client_without_a_run_can_be_cancelled(client: FakeClient, wire: Wire) -> None:
    wire.mount()
    wire.page_says(t="do", do="cancel", n=1)
    assert acks(wire)[0]["said"] == "3 waiting operations were cancelled."


def test_a_branch_has_a_panel_of_its_own_beneath(client: FakeClient, wire: Wire) -> None:
    client.save("art-1")
    wire.mount()
    wire.page_says(t="do", do="branch", n=1, id="art-1")
    told = [*wire.flush(), *wire.flush()]
    branch = next(content["branches"][0] for content in told if content["t"] == "branches")
    assert branch == {"client": "tc-2", "model": dashboard.panel_of(client.children[0]).model_id}
    assert 'service.get_training_client("tc-2")' in next(c["said"] for c in told if c["t"] == "ack")
    wire.load()
    assert wire.flush_kind("branches")[0]["branches"] == [branch]
    client.children[0].close()
    assert dashboard.panel_of(client.children[0]).feed.settle(10)


def test_a_run_that_ended_is_loaded_into_by_the_client(client: FakeClient, wire: Wire) -> None:
    run = client.start(FakeRun())
    client.turn(run, RunStatus.FINISHED)
    client.save("art-1")
    wire.mount()
    wire.page_says(t="do", do="rollback", n=1, id="art-1")
    assert acks(wire)[0]["why"] is None
    assert client.told == ["load_state art-1"]
