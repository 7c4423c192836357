"""One reducer: whoever reads the same events, live or from the log, at once or in parts, is in the same state."""

import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe_nb.core.bus import EventBus
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import (
    Alarm,
    ArtifactDeleted,
    CheckpointSaved,
    ClientCreated,
    Event,
    Forked,
    LineChanged,
    LineState,
    Metrics,
    MockTookPart,
    OperationCancelled,
    OperationFailed,
    OperationFinished,
    OperationQueued,
    OperationStarted,
    PrivacySpent,
    Progress,
    Rollouts,
    RunState,
    RunStep,
    StateLoaded,
    StatusChanged,
)
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.state import ClientState, RunSoFar
from tensafe_nb.protocol.results import ClientStatus, RunStatus
from tensafe_nb.runs.record import records_of

HOME_0_1 = Path(__file__).parents[2] / "home_0_1"
OLD_RUNS = json.loads((HOME_0_1 / "expected.json").read_text())["runs"]

ids, steps = st.sampled_from(["a", "b", "c"]), st.integers(0, 9)
run_ids = st.sampled_from(["tc-1/1", "tc-1/2"])
operations = {"future_id": ids, "operation": st.just("forward")}
EVENTS = st.one_of(
    st.builds(ClientCreated, training_client_id=st.just("tc-1"), config=st.just({})),
    st.builds(StatusChanged, status=st.sampled_from(list(ClientStatus)), reason=st.none() | ids),
    st.builds(OperationQueued, **operations),
    st.builds(OperationStarted, **operations),
    st.builds(Progress, future_id=ids, done=steps, total=steps),
    st.builds(OperationFinished, **operations, duration=st.just(1.0)),
    st.builds(OperationFailed, **operations, code=ids, message=ids),
    st.builds(OperationCancelled, **operations),
    st.builds(
        Metrics,
        step=steps,
        values=st.dictionaries(st.sampled_from(["loss", "reward", "reward_version"]), st.floats(0, 3)),
        run_id=st.none() | run_ids,
    ),
    st.builds(
        RunState,
        run_id=run_ids,
        state=st.sampled_from(list(RunStatus)),
        step=steps,
        planned_steps=st.none() | steps,
        done=st.none() | steps,
        taken=st.none() | steps,
        curve=st.none() | st.just("loss"),
    ),
    st.builds(RunStep, run_id=run_ids, done=steps, duration=st.floats(0, 9)),
    st.builds(
        CheckpointSaved,
        artifact_id=ids,
        step=steps,
        size_bytes=steps,
        content_hash=ids,
        run_id=st.none() | run_ids,
    ),
    st.builds(StateLoaded, artifact_id=ids, step=steps),
    st.builds(ArtifactDeleted, artifact_id=ids),
    st.builds(Forked, parent=ids, artifact_id=ids, child=ids, step=steps),
    st.builds(Rollouts, run_id=run_ids, step=steps, rollouts=steps, path=ids),
    st.builds(MockTookPart),
    st.builds(Alarm, run_id=run_ids, step=steps, name=ids, level=ids, message=ids, remedy=ids),
    st.builds(
        PrivacySpent,
        step=steps,
        epsilon_spent=st.floats(0, 9),
        total_epsilon=st.floats(0, allow_nan=False),
        delta=st.just(1e-5),
        target_epsilon=st.none(),
        accountant=ids,
        adjacency=ids,
        refused=st.booleans(),
    ),
)


@contextmanager
def opened() -> Iterator[EventBus]:
    with tempfile.TemporaryDirectory() as folder:
        bus = EventBus(Path(folder) / "events.jsonl")
        yield bus
        bus.close()


def reduced(*events: Event) -> ClientState:
    state = ClientState()
    for event in events:
        state.apply(event)
    return state


@given(st.lists(EVENTS, max_size=40))
def test_a_log_read_back_gives_the_state_reached_live(events: list[Event]) -> None:
    with opened() as bus:
        for event in events:
            bus.publish(event)
        live = bus.history.state
        assert RunHistory.load(bus.history.path).state == live
        assert reduced(*bus.history.events()) == live


@given(st.lists(EVENTS, max_size=40), st.integers(0, 60))
def test_a_log_read_in_two_halves_gives_the_state_of_one_that_is_read_at_once(
    events: list[Event], middle: int
) -> None:
    with opened() as bus:
        for event in events:
            bus.publish(event)
        halves = ClientState()
        for event in bus.history.events():
            if event.seq <= middle:
                halves.apply(event)
        for event in bus.history.events(after=middle):
            halves.apply(event)
        assert halves == bus.history.state


@given(st.lists(st.lists(EVENTS, max_size=10), min_size=2, max_size=4))
def test_however_threads_interleave_the_log_tells_the_state_they_reached(threads: list[list[Event]]) -> None:
    with opened() as bus:

        def publish(events: list[Event]) -> None:
            for event in events:
                bus.publish(event)

        working = [threading.Thread(target=publish, args=(events,)) for events in threads]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
        assert RunHistory.load(bus.history.path).state == bus.history.state


def test_what_a_subscriber_publishes_in_between_comes_in_the_order_of_the_log() -> None:
    with opened() as bus:
        alarm = Alarm(run_id="tc-1/1", step=1, name="nan", level="red", message="m", remedy="r")
        bus.subscribe(lambda event: bus.publish(alarm) if isinstance(event, Metrics) else None)
        bus.publish(Metrics(step=1, values={"loss": float("nan")}))
        assert [found.seq for found in bus.history.state.alarms] == [2]
        assert RunHistory.load(bus.history.path).state == bus.history.state


def test_progress_is_known_while_its_operation_runs_and_counts_as_no_event() -> None:
    state = reduced(
        OperationQueued(future_id="a", operation="sample", seq=1),
        OperationStarted(future_id="a", operation="sample", seq=2),
        Progress(future_id="a", done=3, total=8, seq=3),
        Progress(future_id="b", done=1, total=1, seq=4),
    )
    assert (state.queue.progress, state.seq, state.status) == ((3, 8), 2, ClientStatus.INITIALIZING)
    state.apply(OperationFinished(future_id="a", operation="sample", duration=1.0, seq=5))
    assert (state.queue.progress, state.queue.running, state.queue.depth) == (None, {}, 0)


def test_a_line_that_broke_off_is_known_until_it_is_there_again_and_counts_as_no_event() -> None:
    broke = LineChanged(state="RECONNECTING", reason="nobody answers", seq=7)
    state = reduced(StatusChanged(status="READY", seq=1), broke)
    assert (state.line, state.seq, state.status) == (broke, 1, ClientStatus.READY)
    assert state == reduced(StatusChanged(status="READY", seq=1)), (
        "a log that is read back knows nothing of it"
    )
    state.apply(LineChanged(state=LineState.OPEN))
    assert state.line is None


def test_a_client_is_busy_while_anything_waits_or_runs_and_has_nothing_left_when_it_is_closed() -> None:
    state = reduced(StatusChanged(status="READY"), OperationQueued(future_id="a", operation="forward"))
    assert state.status is ClientStatus.BUSY
    state.apply(StatusChanged(status="TERMINATED"))
    assert (state.status, state.queue.depth, state.closed) == (ClientStatus.TERMINATED, 0, True)


def test_the_reason_of_an_error_outlives_the_end() -> None:
    state = reduced(StatusChanged(status="ERROR", reason="no such model"), StatusChanged(status="TERMINATED"))
    assert (state.status, state.reason) == ("TERMINATED", "no such model")


def test_after_a_rollback_a_run_stands_where_it_says_and_counts_what_it_gave_up() -> None:
    state = reduced(
        RunState(run_id="tc-1/1", state="RUNNING", step=0, done=0),
        *(
            event
            for n in range(1, 6)
            for event in (Metrics(step=n, values={}), RunStep(run_id="tc-1/1", done=n, duration=1.0))
        ),
        StateLoaded(artifact_id="a", step=3),
    )
    run = state.runs["tc-1/1"]
    assert (run.steps_done, run.steps_taken, state.step) == (5, 5, 3)
    state.apply(RunState(run_id="tc-1/1", state="PAUSED", step=3, done=3))
    assert (run.steps_done, run.steps_taken) == (3, 5)


def test_nothing_leads_back_from_the_end_of_a_run_not_even_a_client_that_has_not_heard_of_it() -> None:
    state = reduced(
        RunState(run_id="tc-1/1", state="PAUSED", step=4, done=4),
        RunState(
            run_id="tc-1/1", state="INTERRUPTED", step=4, reason="another client started a run", time=9.0
        ),
        RunState(run_id="tc-1/2", state="RUNNING", step=4),
        Metrics(step=6, values={}),
        RunState(run_id="tc-1/1", state="RUNNING", step=4, done=4, time=10.0),
    )
    run = state.runs["tc-1/1"]
    assert (run.state, run.reason, run.ended_at) == (
        RunStatus.INTERRUPTED,
        "another client started a run",
        9.0,
    )
    assert state.step == 6


def test_a_log_of_0_1_does_not_say_where_a_run_stands_and_its_steps_are_counted() -> None:
    state = reduced(
        RunState(run_id="tc-1/1", state="RUNNING", step=0),
        RunStep(run_id="tc-1/1", done=5, duration=1.0),
        StateLoaded(artifact_id="a", step=3),
    )
    assert state.runs["tc-1/1"].steps_done == 3


def test_the_time_left_is_judged_by_the_median_of_the_latest_steps() -> None:
    run = RunSoFar("tc-1/1", planned_steps=10, started_at=100.0)
    for done in range(1, 7):
        run.stepped(RunStep(run_id="tc-1/1", done=done, duration=2.0 if done < 6 else 100.0), step=done)
    assert run.eta == 8.0
    run.turned(RunState(run_id="tc-1/1", state="PAUSED", step=6, time=130.0))
    assert run.eta is None and run.elapsed(now=160.0) == 60.0
    run.turned(RunState(run_id="tc-1/1", state="STOPPED", step=6, time=140.0))
    assert run.elapsed(now=160.0) == 40.0


def test_what_was_spent_stays_spent() -> None:
    spent = PrivacySpent(
        step=4, epsilon_spent=0.1, total_epsilon=1.5, delta=1e-5, target_epsilon=8.0, accountant="rdp", adjacency="x"
    )  # fmt: skip
    assert reduced(spent, StateLoaded(artifact_id="a", step=0)).privacy == spent


@pytest.mark.parametrize(
    "make", [lambda: StatusChanged(status="FINE"), lambda: RunState(run_id="r", state="GOING", step=0)]
)
def test_a_status_that_no_reader_would_know_is_refused_before_it_is_written(make: Any) -> None:
    with pytest.raises(ValidationError, match="is none of"):
        make()


@pytest.mark.parametrize("old", OLD_RUNS, ids=lambda run: run["run_id"])
def test_a_log_of_0_1_reduces_to_what_it_did(old: dict[str, Any]) -> None:
    log = HOME_0_1 / "home" / "runs" / old["run_id"].partition("/")[0] / "events.jsonl"
    record = next(found for found in records_of(log) if found.run_id == old["run_id"])
    history = RunHistory.load(log)
    run = history.state.runs[old["run_id"]]
    assert (record.state, record.step, record.curve) == (old["state"], old["step"], old["curve"])
    assert (run.planned_steps, run.reason) == (old["planned_steps"], old["reason"])
    assert run.checkpoint == old["last_checkpoint"]
    counts = {kind.__name__: count for kind, count in history.state.counts.items()}
    assert counts == old["events"]
