"""Records of runs: what their logs say, however their process ended."""

import logging
from pathlib import Path

import pytest

import tensafe_nb as tn
from tensafe_nb.core.bus import EventBus
from tensafe_nb.events import CheckpointSaved, Event, Metrics, RunState, RunStep, StateLoaded
from tensafe_nb.runs.record import RunRecord, read_log, records_of
from tensafe_nb.store.home import Home


def written(path: Path, *events: Event) -> Path:
    """Write a log as a process that was killed leaves it."""
    bus = EventBus(path)
    for event in events:
        bus.publish(event)
    bus.close()
    return path


def record_of(path: Path, *events: Event) -> RunRecord:
    (record,) = records_of(written(path, *events))
    return record


BEGUN = RunState(run_id="tc-1/1", state="RUNNING", step=0, planned_steps=9, done=0, taken=0)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_a_run_that_ended_says_what_its_last_event_says(log: Path) -> None:
    record = record_of(
        log,
        BEGUN,
        Metrics(step=1, values={"loss": 1.0}),
        RunState(run_id="tc-1/1", state="FINISHED", step=1, reason="no more batches", done=1, taken=1),
        Metrics(step=2, values={"loss": 1.0}),
    )
    assert (record.state, record.step, record.steps, record.steps_done) == ("FINISHED", 1, 1, 1)
    assert (record.planned_steps, record.reason, record.curve, record.log) == (
        9,
        "no more batches",
        "loss",
        log,
    )


def test_a_log_that_nobody_writes_and_that_has_no_end_was_interrupted(log: Path) -> None:
    saved = CheckpointSaved(artifact_id="art-1", step=1, size_bytes=1, content_hash="x", run_id="tc-1/1")
    events = (BEGUN, Metrics(step=1, values={}), saved, Metrics(step=2, values={}))
    record = record_of(log, *events)
    assert (record.state, record.step, record.steps_done) == ("INTERRUPTED", 2, 2)
    assert record.way_on == "its process ended in the middle; last checkpoint art-1"
    assert repr(record) == "<RunRecord tc-1/1 INTERRUPTED at step 2, last checkpoint art-1>"


def test_a_log_that_is_being_written_has_a_run_under_way(log: Path) -> None:
    bus = EventBus(log)
    bus.publish(BEGUN)
    (record,) = records_of(log)
    assert record.state == "RUNNING"
    bus.close()
    (record,) = records_of(log)
    assert record.state == "INTERRUPTED"
    assert record.way_on.endswith("it had saved no checkpoint")


def test_with_rewards_an_optimiser_step_is_no_step_of_the_run(log: Path) -> None:
    record = record_of(
        log,
        BEGUN,
        *(Metrics(step=step, values={}) for step in range(1, 5)),
        Metrics(step=1, values={"reward": 0.5}, run_id="tc-1/1"),
        RunStep(run_id="tc-1/1", done=1, duration=1.0),
        Metrics(step=5, values={}),
    )
    assert (record.curve, record.step, record.steps, record.steps_done) == ("reward", 5, 5, 1)


def test_steps_that_a_rollback_gave_up_count_as_taken(log: Path) -> None:
    record = record_of(
        log,
        BEGUN,
        Metrics(step=3, values={}),
        StateLoaded(artifact_id="art-1", step=1),
        RunState(run_id="tc-1/1", state="PAUSED", step=1, done=1),
        Metrics(step=2, values={}),
    )
    assert (record.step, record.steps, record.steps_done) == (2, 4, 2)


def test_a_log_that_cannot_be_read_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    home = Home.of_environment()
    written(home.event_log("tc-1"), BEGUN)
    broken = home.event_log("tc-2")
    written(broken, BEGUN)
    broken.write_text('{"$": "run_state", "run_id": 7}\n')
    with caplog.at_level(logging.WARNING):
        assert [record.run_id for record in tn.list_runs()] == ["tc-1/1"]
    assert "tc-2" in caplog.text and "is left out" in caplog.text


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    for number, text in enumerate(('["run_state"]\n', '{"$": "run_state"}\n', '"metrics"\n')):
        other = tmp_path / f"{number}.jsonl"
        other.write_text(text)
        with pytest.raises(tn.ValidationError, match="cannot be read as an event log"):
            read_log(other)
    with pytest.raises(tn.ValidationError, match="no event log"):
        read_log(tmp_path / "none.jsonl")
