"""A panel asks the core nothing while it draws: what it shows is in the history, whoever else is still there."""

from collections.abc import Callable
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.config import SamplingConfig
from tensafe_nb.events import (
    Alarm,
    Forked,
    MockTookPart,
    OperationQueued,
    OperationStarted,
    PrivacySpent,
    Rollouts,
)
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup, Trajectory, TrajectoryBatch
from tensafe_nb.widgets.feed.feed import Feed, feed_of
from tensafe_nb.widgets.live.dashboard import Dashboard
from tensafe_nb.widgets.still.snapshot import Snapshot

from .conftest import FakeClient, HandFlusher, Wire

SEEN = ("training_client_id", "config", "history", "marks", "runs", "steerable", "watch", "tokenizer")
LOOKED_UP = ("get_checkpoint",)  # aside, once for each checkpoint: how it is sealed is in no event


class Mute:
    """A training client whose core fails at every question."""

    def __init__(self, client: FakeClient) -> None:
        self._answers = {name: getattr(client, name) for name in SEEN + LOOKED_UP}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._answers:
            raise AssertionError(f"the panel asked the core for {name}")
        return self._answers[name]


def train(client: FakeClient) -> None:
    """Publish something of everything that a panel shows."""
    run, folder = client.start(), client.history.path.parent / "rollouts" / "1"
    folder.mkdir(parents=True)
    for step in range(1, 8):
        client.advance(run, loss=1.0 / step)
    client.measure(reward=0.5, eval_loss=0.25, tokens=100.0)
    client.save("art-1", step=4)
    client.publish(
        Alarm(run_id=run.run_id, step=3, name="kl", level="amber", message="far", remedy="lower it")
    )
    client.publish(Forked(parent="tc-1", artifact_id="art-1", child="tc-2", step=4))
    rollouts = TrajectoryBatch(
        [RolloutGroup("p", "2+2=", [Trajectory("2+2=", "4", reward=1.0)])], SamplingConfig()
    )
    client.publish(
        Rollouts(
            run_id=run.run_id,
            step=7,
            rollouts=1,
            path=str(rollouts.save(folder / "r")),
        )
    )
    client.publish(
        PrivacySpent(
            step=7, epsilon_spent=0.1, total_epsilon=1.5, delta=1e-5, target_epsilon=8.0, accountant="rdp",
            adjacency="add/remove one",
        )
    )  # fmt: skip
    client.publish(MockTookPart())
    client.publish(OperationQueued(future_id="f", operation="forward_backward"))
    client.publish(OperationStarted(future_id="f", operation="forward_backward"))
    client.turn(run, RunStatus.PAUSED)


def drawn(source: Any, clock: Callable[[], float], flusher: HandFlusher) -> list[Any]:
    """Return every message of a panel that a page opens, and the table that stays in the file."""
    feed = Feed(source, flusher, clock)
    panel = Dashboard(feed)
    wire = Wire(panel)
    wire.load()
    messages = [*wire.flush(), *wire.flush()]
    panel.close()
    snapshot = Snapshot.take(feed, None)
    rows = snapshot.table()["text/html"].partition("<tbody>")[2]
    still = (rows, snapshot.sentence[:60], snapshot.picture() is not None)
    return [*messages, still]


def test_a_panel_of_a_client_whose_core_fails_at_every_question_draws_the_same(
    client: FakeClient, flusher: HandFlusher
) -> None:
    train(client)
    now = client.history.state.measured_at + 10
    shown = drawn(client, lambda: now, flusher)
    assert {"status", "full", "marks", "alarms", "privacy", "rows", "rollouts"} <= {
        message["t"] for message in shown[:-1]
    }
    assert drawn(Mute(client), lambda: now, flusher) == shown


def test_a_panel_without_pages_renews_what_stays_in_the_file_without_a_question(
    client: FakeClient, flusher: HandFlusher, outputs: list[Any]
) -> None:
    train(client)
    panel = Dashboard(Feed(Mute(client), flusher))
    panel.show()
    still = next(iter(panel._stills.values()))
    client.measure(loss=1.5)
    flusher.time += 60
    outputs.clear()
    still.flush(), still.flush()
    assert [next(iter(output.data)) for output in outputs] == ["text/html", "image/png"]
    panel.close()


def test_a_mute_client_fails_where_it_is_asked(client: FakeClient) -> None:
    with pytest.raises(AssertionError, match="asked the core for step"):
        _ = Mute(client).step


def test_a_recorded_log_draws_what_the_live_panel_drew(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    run = tc.fit([batch], steps=6, eval_batches=[batch], eval_every=3, checkpoint_every=3, show=False)
    run.result()
    live, told = feed_of(run), feed_of(tn.load_run(run.run_id))
    assert live.annotations.marks() == told.annotations.marks()
    assert live.annotations.rows() == told.annotations.rows()
    assert live.run(run.run_id) == told.run(run.run_id)
    was, seen = live.standing(), told.standing()
    for name in ("state", "run_id", "step", "planned", "elapsed", "eta", "reason"):
        assert getattr(was, name) == getattr(seen, name), name
    tc.close()
