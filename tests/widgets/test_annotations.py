"""What a panel is told besides curves: marks, alarms, privacy, checkpoints."""

import time
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.config import DPConfig
from tensafe_nb.events import Alarm, Forked, Metrics, MockTookPart, PrivacySpent
from tensafe_nb.widgets import (
    PrivacyMeter,
)
from tensafe_nb.widgets.feed.feed import Feed

from .conftest import FakeClient, HandFlusher, Wire

SPENT: dict[str, Any] = {
    "epsilon_spent": 0.1, "total_epsilon": 1.5, "delta": 1e-5, "target_epsilon": 8.0, "accountant": "rdp",
    "adjacency": "add/remove one", "projected_step": 400,
}  # fmt: skip


def test_a_checkpoint_is_a_mark_and_a_row_whose_seal_is_looked_up(client: FakeClient, wire: Wire) -> None:
    wire.mount()
    client.save("art-1", step=4)
    told = {content["t"]: content for content in wire.flush()}
    assert told["marks"]["marks"] == [(4, "c", "art-1")]
    assert told["rows"]["rows"][0] | {"at": 0} == {
        "id": "art-1", "step": 4, "at": 0, "size": 2_000, "hash": "1" * 64, "name": None, "run": None,
        "enc": "AES-256-GCM", "meta": {"note": "<b>"},
    }  # fmt: skip


def test_a_panel_that_comes_late_is_told_all_that_happened(client: FakeClient, flusher: HandFlusher) -> None:
    client.save("art-1")
    client.publish(Alarm(run_id="tc-1/1", step=3, name="nan", level="red", message="m", remedy="r"))
    feed = Feed(client, flusher)
    assert list(feed.state.checkpoints) == ["art-1"]
    assert [alarm.step for alarm in feed.state.alarms] == [3]


def test_forks_are_marked_on_both_sides(client: FakeClient, feed: Feed) -> None:
    client.publish(Forked(parent="tc-1", artifact_id="art-1", child="tc-2", step=5))
    client.publish(Forked(parent="tc-0", artifact_id="art-0", child="tc-1", step=0))
    assert feed.annotations.marks() == [(5, "f", "to tc-2"), (0, "f", "from tc-0")]


def test_a_change_of_the_reward_is_a_mark_at_the_first_step_it_scored(client: FakeClient, wire: Wire) -> None:
    wire.mount()
    for step, version in ((1, 1.0), (2, 1.0), (3, 2.0)):
        client.publish(Metrics(step=step, values={"reward": 0.5, "reward_version": version}))
    assert wire.flush_kind("marks")[0]["marks"] == [(3, "v", "2")]


def test_alarms_are_told_with_reason_and_remedy(client: FakeClient, wire: Wire) -> None:
    wire.mount()
    client.publish(Alarm(run_id="tc-1/1", step=3, name="kl", level="amber", message="far", remedy="lower it"))
    [alarm] = wire.flush_kind("alarms")[0]["alarms"]
    assert (alarm["level"], alarm["text"], alarm["remedy"], alarm["step"]) == ("amber", "far", "lower it", 3)


def test_the_account_is_told_and_a_rollback_does_not_move_it(client: FakeClient, wire: Wire) -> None:
    wire.mount()
    client.publish(PrivacySpent(step=9, **SPENT))
    [told] = wire.flush_kind("privacy")
    assert (told["spent"], told["target"], told["projected"], told["refused"]) == (1.5, 8.0, 400, None)
    client.step = 2
    assert wire.flush_kind("privacy") == []
    client.publish(PrivacySpent(step=10, **SPENT | {"epsilon_spent": 0.0}, refused=True))
    assert wire.flush_kind("privacy")[0]["refused"] == 10
    client.publish(PrivacySpent(step=11, **SPENT | {"total_epsilon": float("inf")}, void="no noise"))
    [told] = wire.flush_kind("privacy")
    assert (told["spent"], told["void"]) == ("∞", "no noise")


def test_a_private_training_is_marked_as_an_operators_view(
    client: FakeClient, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    dp = DPConfig.model_construct()
    monkeypatch.setattr(client, "config", client.config.model_copy(update={"dp_config": dp}))
    wire.load()
    assert wire.flush_kind("status")[0]["dp"] is True


def test_marks_are_told_and_a_mock_is_remembered(
    client: FakeClient, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "marks", ("REPLAY",))
    client.publish(MockTookPart())
    wire.load()
    assert wire.flush_kind("status")[0]["marks"] == ("REPLAY", "MOCK")


def test_the_sliders_of_the_meter_are_answered_and_nothing_is_spent(
    service: tn.ServiceClient, flusher: HandFlusher
) -> None:
    dp = DPConfig(dataset_size=1000, noise_multiplier=1.2)
    tc = service.create_training_client(model_ref="builtin:sums", batch_size=20, dp_config=dp)
    tc.freeze_reference().result()
    wire = Wire(PrivacyMeter(Feed(tc, flusher)))
    wire.mount()
    [told] = [content for content, _ in wire.sent if content["t"] == "privacy"]
    assert told["plan"] == {"sigma": 1.2, "batch": 20, "size": 1000}
    wire.page_says(t="plan", n=1, sigma=1.2, batch=20, epochs=3)
    [there] = settled(wire, "plan")
    assert there["epsilon"] == pytest.approx(tc.what_if(epochs=3).epsilon) and there["steps"] == 150
    wire.page_says(t="plan", n=2, epsilon=there["epsilon"], batch=20, epochs=3)
    [back] = settled(wire, "plan")
    assert back["n"] == 2 and back["sigma"] == pytest.approx(1.2, rel=0.01)
    wire.page_says(t="plan", n=3, sigma=1.2, batch=20, epochs=-1)
    [refused] = settled(wire, "plan")
    assert "epochs is a positive number" in refused["why"]
    assert tc.privacy_statement().epsilon == 0


def settled(wire: Wire, kind: str) -> list[dict[str, Any]]:
    """Return the messages of a kind, once there are any: another thread prepares them."""
    while not (found := wire.flush_kind(kind)):
        time.sleep(0.02)
    return found


def test_a_client_without_a_declared_size_has_nothing_to_plan(client: FakeClient, wire: Wire) -> None:
    client.config = client.config.replace(dp_config=DPConfig(sampling="worst_case"))
    wire.mount()
    client.publish(PrivacySpent(step=9, **SPENT))
    assert [told["plan"] for told in wire.flush_kind("privacy")] == [None]
