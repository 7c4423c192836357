"""What a panel is told besides curves: marks, alarms, privacy, checkpoints, rollouts; and what its buttons do."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.config import DPConfig, SamplingConfig
from tensafe_nb.errors import DecryptionError, ValidationError
from tensafe_nb.events import Alarm, Forked, Metrics, MockTookPart, PrivacySpent, Rollouts
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup, Trajectory, TrajectoryBatch
from tensafe_nb.widgets import (
    CheckpointTable,
    Dashboard,
    LossCurve,
    PrivacyMeter,
    RewardHistory,
    RolloutInspector,
)
from tensafe_nb.widgets.feed import rollouts
from tensafe_nb.widgets.feed.curves import RATE, TOKENS, Curves, names_of
from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.live import dashboard
from tensafe_nb.widgets.live.base import LiveWidget

from .conftest import FakeClient, FakeRun, HandFlusher, Wire

ALONE = (CheckpointTable, LossCurve, PrivacyMeter, RewardHistory, RolloutInspector)
SPENT: dict[str, Any] = {
    "epsilon_spent": 0.1, "total_epsilon": 1.5, "delta": 1e-5, "target_epsilon": 8.0, "accountant": "rdp",
    "adjacency": "add/remove one", "projected_step": 400,
}  # fmt: skip


def beside(client: FakeClient) -> Path:
    """Return where the rollouts of the client's first run lie."""
    return client.history.path.parent / "rollouts" / "1"


def rollouts_of(path: Path, answers: dict[str, float | None], **fields: Any) -> Path:
    """Write the rollouts of one prompt and return where they lie."""
    made = [
        Trajectory("2+2=", text, reward=reward, tokens=[ord(c) for c in text], policy_version=7, **fields)
        for text, reward in answers.items()
    ]
    rewards = [t.reward for t in made if t.reward is not None]
    for trajectory in made:
        if trajectory.reward is not None:
            trajectory.advantage = trajectory.reward - sum(rewards) / len(rewards)
    batch = TrajectoryBatch([RolloutGroup("p", "2+2=", made)], SamplingConfig())
    path.parent.mkdir(parents=True, exist_ok=True)
    return batch.save(path)


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.__name__)
def test_each_part_stands_alone_and_answers_its_page(client: FakeClient, feed: Feed, kind: Any) -> None:
    client.measure(loss=1.0, reward=0.5)
    client.save("art-1", step=1)
    widget = kind(feed)
    wire = Wire(widget)
    wire.page_says(t="hello", v=1, n=0, mount=True)
    told = wire.flush()
    assert told[0]["t"] == "status"
    assert isinstance(widget, LiveWidget)
    widget.close()


def test_a_widget_without_a_source_says_what_it_needs() -> None:
    with pytest.raises(TypeError, match="shows a training client or a run"):
        LossCurve()


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
    wire.page_says(t="hello", v=1, n=0, mount=True)
    assert wire.flush_kind("status")[0]["dp"] is True


def test_marks_are_told_and_a_mock_is_remembered(
    client: FakeClient, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "marks", ("REPLAY",))
    client.publish(MockTookPart())
    wire.page_says(t="hello", v=1, n=0, mount=True)
    assert wire.flush_kind("status")[0]["marks"] == ("REPLAY", "MOCK")


def test_a_recording_has_nothing_to_steer(
    client: FakeClient, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "steerable", False)
    wire.page_says(t="hello", v=1, n=0, mount=True)
    assert wire.flush_kind("status")[0]["steer"] is False
    wire.page_says(t="do", do="checkpoint", n=1)
    wire.flush()
    assert "recording" in next(c["why"] for c, _ in wire.sent if c["t"] == "ack")


def acks(wire: Wire) -> list[dict[str, Any]]:
    return [*wire.flush_kind("ack"), *wire.flush_kind("ack")]


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
    wire.page_says(t="hello", v=1, n=0, mount=True)
    assert wire.flush_kind("branches")[0]["branches"] == [branch]
    client.children[0].close()
    assert dashboard.panel_of(client.children[0]).feed.settle(10)


def test_sections_are_chosen_by_name(client: FakeClient) -> None:
    widget = dashboard.panel_of(client, ["loss", "privacy"])
    assert widget.sections == ["loss", "privacy"]
    assert widget is not dashboard.panel_of(client)
    with pytest.raises(ValidationError, match=r"no section 'losses'.*loss"):
        Dashboard(client, ["losses"])
    client.close()
    assert widget.feed.settle(10)


def test_the_newest_rollouts_are_pushed_once_in_two_seconds_at_most(
    client: FakeClient, wire: Wire, flusher: HandFlusher
) -> None:
    wire.mount()
    for step in (1, 2):
        path = rollouts_of(beside(client) / f"{step}", {"4": 1.0, "5": 0.0})
        client.publish(Rollouts(run_id="tc-1/1", step=step, rollouts=2, path=f"1/{path.name}"))
        told = [*wire.flush(), *wire.flush()]
        assert [content["step"] for content in told if content["t"] == "rollouts"] == [1] * (step == 1)
    assert wire.again == 2.0
    flusher.time += 2.0
    told = [*wire.flush(), *wire.flush()]
    assert [content["step"] for content in told if content["t"] == "rollouts"] == [2]


def test_an_older_step_is_shown_on_request_and_a_missing_one_with_the_reason(
    client: FakeClient, wire: Wire, tmp_path: Path
) -> None:
    path = rollouts_of(beside(client) / "1", {"4": 1.0, "5": 0.0})
    client.publish(Rollouts(run_id="tc-1/1", step=1, rollouts=2, path=str(path)))  # as 0.1 wrote it
    client.publish(Rollouts(run_id="tc-1/1", step=2, rollouts=2, path="1/gone"))
    wire.mount()
    for step in (1, 2, 3):
        wire.page_says(t="show", step=step)
    told = [*wire.flush_kind("rollouts"), *wire.flush_kind("rollouts")]
    shown = {content["step"]: content for content in told}
    assert [rollout["text"] for rollout in shown[1]["groups"][0]["r"]] == ["4", "5"]
    assert "cannot be read" in shown[2]["why"]
    assert "No rollouts were recorded for step 3" in shown[3]["why"]


def test_rollouts_are_told_with_everything_there_is_to_know(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    path = rollouts_of(tmp_path / "r", {evil: 1.0, "5": 0.0}, finish_reason="stop")
    told = rollouts.message(3, path, lambda ids: [chr(i) for i in ids], rollouts.PUSHED)
    [first, second] = told["groups"][0]["r"]
    assert first["text"] == evil
    assert (first["reward"], first["adv"], first["end"], first["policy"]) == (1.0, 0.5, "stop", 7)
    assert second["tok"] == [["5", None]]
    assert "why" not in first
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    ("answers", "fields", "words"),
    [
        ({"a": 1.0, "b": 1.0}, {}, "scored the same"),
        ({"a": 0.0, "b": 1.0, "c": 0.5}, {}, None),
        ({"a": None, "b": 1.0}, {"reward_error": "boom"}, "not scored"),
        ({"a": 0.0, "b": 1.0}, {"finish_reason": "length"}, "cut at max_new_tokens"),
    ],
)
def test_why_zero_is_answered(
    tmp_path: Path, answers: dict[str, float | None], fields: dict[str, Any], words: str | None
) -> None:
    told = rollouts.message(1, rollouts_of(tmp_path / "r", answers, **fields), None, 10_000)
    why = told["groups"][0]["r"][0].get("why")
    assert (words in why) if words else why is None


def test_long_texts_are_cut_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    groups = [
        RolloutGroup(str(i), "p" * 5_000, [Trajectory("p", "x" * 5_000, reward=1.0)]) for i in range(100)
    ]
    path = TrajectoryBatch(groups, SamplingConfig()).save(tmp_path / "r")
    told = rollouts.message(1, str(path), None, rollouts.PUSHED)
    assert len(json.dumps(told)) <= rollouts.PUSHED
    assert told["left_out"] == 100 - len(told["groups"]) > 0
    assert "3000 more characters" in told["groups"][0]["prompt"]


def test_samples_in_the_file_are_escaped_and_show_what_is_invisible(tmp_path: Path) -> None:
    path = rollouts_of(tmp_path / "r", {"<b>\u202e": 1.0, "5": 0.0})
    html = rollouts.frozen(3, path, prompts=1)["text/html"]
    assert "&lt;b&gt;⟨U+202E⟩" in html


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
    wire.page_says(t="hello", v=1, n=0, mount=True)
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


def test_a_run_that_ended_is_loaded_into_by_the_client(client: FakeClient, wire: Wire) -> None:
    run = client.start(FakeRun())
    client.turn(run, RunStatus.FINISHED)
    client.save("art-1")
    wire.mount()
    wire.page_says(t="do", do="rollback", n=1, id="art-1")
    assert acks(wire)[0]["why"] is None
    assert client.told == ["load_state art-1"]


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
