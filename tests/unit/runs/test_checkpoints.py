"""Retention: what a run keeps of its own checkpoints, and which one belongs to a step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.core.bus import EventBus
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import ArtifactDeleted, CheckpointSaved, Metrics
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.results import Encryption, SaveStateResult
from tensafe_nb.runs.checkpoints import Checkpoints, checkpoint_of


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[EventBus]:
    bus = EventBus(tmp_path / "events.jsonl")
    yield bus
    bus.close()


def saved(step: int) -> SaveStateResult:
    return SaveStateResult(
        f"art-{step}", "checkpoint", 1, "sha256:0", Encryption("AES-256-GCM", "key-1"), None, 0.0, None, step,
        "builtin:tiny", "tc-1",
    )  # fmt: skip


def event(artifact_id: str, step: int) -> CheckpointSaved:
    return CheckpointSaved(artifact_id=artifact_id, step=step, size_bytes=1, content_hash="sha256:0")


def kept(checkpoints: Checkpoints, history: RunHistory, steps: int) -> set[str]:
    """Save after each step; return what is left."""
    left: set[str] = set()
    for step in range(1, steps + 1):
        left.add(f"art-{step}")
        left -= set(checkpoints.keep(saved(step), None, history))
    return left


@pytest.mark.parametrize(
    ("name", "small"), [("eval/loss", True), ("policy/approx_kl", True), ("checklist", False)]
)
def test_a_metric_counts_as_small_is_better_by_its_words_not_its_letters(name: str, small: bool) -> None:
    assert (Checkpoints(1, keep_best=name)._signed(2.0) < 0) == small


def test_the_newest_are_kept_and_the_best_besides(bus: EventBus) -> None:
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 4.0), start=1):
        bus.publish(Metrics(step=step, values={"loss": loss}))
    assert kept(Checkpoints(1, keep_last=2, keep_best="loss"), bus.history, 5) == {"art-2", "art-4", "art-5"}
    assert kept(Checkpoints(1, keep_last=2), bus.history, 5) == {"art-4", "art-5"}
    assert kept(Checkpoints(1), bus.history, 5) == {f"art-{step}" for step in range(1, 6)}


def test_a_run_saves_every_so_many_steps_and_after_the_last(bus: EventBus) -> None:
    checkpoints = Checkpoints(3)
    assert [step for step in range(1, 8) if checkpoints.due(step, planned=7)] == [3, 6, 7]
    assert not checkpoints.missing(7)
    unplanned = Checkpoints(3)
    assert [step for step in range(1, 8) if unplanned.due(step, planned=None)] == [3, 6]
    assert unplanned.missing(7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "checkpoint_every=0 must be a whole number"),
        ({"every": 1, "keep_last": 1.5}, "keep_last=1.5"),
        ({"keep_last": 2}, "need checkpoint_every"),
        ({"every": 1, "keep_best": 7}, "name of a metric"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Checkpoints(**options)


def test_the_newest_checkpoint_of_a_step_is_found_as_long_as_it_is_there(bus: EventBus) -> None:
    for artifact_id, step in (("a", 1), ("b", 2), ("c", 2)):
        bus.publish(event(artifact_id, step))
    assert checkpoint_of(2, bus.history) == "c"
    bus.publish(ArtifactDeleted(artifact_id="c"))
    assert checkpoint_of(2, bus.history) == "b"
    bus.publish(ArtifactDeleted(artifact_id="b"))
    with pytest.raises(ValidationError, match=r"no checkpoint of step 2; there are those of \[1\]"):
        checkpoint_of(2, bus.history)
