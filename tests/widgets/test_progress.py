"""Bars and lines, where no panel can be."""

import io

import pytest

from tensafe_nb.events import Metrics, RunStep
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.widgets import progress

from .conftest import FakeClient, FakeRun


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def run(client: FakeClient) -> FakeRun:
    run = client.start(FakeRun(planned_steps=100))
    run.client = client  # type: ignore[attr-defined]
    return run


def test_a_log_gets_a_line_for_every_5_percent_and_one_at_the_end(client: FakeClient, run: FakeRun) -> None:
    stream = io.StringIO()
    progress.show(run, stream)  # type: ignore[arg-type]
    for _ in range(100):
        client.advance(run, loss=2.0)
    client.turn(run, RunStatus.FINISHED)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[0] == "tc-1/1 step 5/100 loss=2"
    assert lines[-1] == "tc-1/1 step 100/100 loss=2 finished"


def test_slow_steps_get_a_line_every_ten_seconds(client: FakeClient) -> None:
    run, stream, clock = client.start(FakeRun(planned_steps=None)), io.StringIO(), Clock()
    progress.Lines(run, stream, clock).follow(client)  # type: ignore[arg-type]
    for clock.time in (4.0, 8.0, 12.0, 16.0):
        client.advance(run)
    assert stream.getvalue().splitlines() == ["tc-1/1 step 3/? loss=1"]


def test_a_failure_is_the_last_line_with_its_reason(client: FakeClient, run: FakeRun) -> None:
    stream = io.StringIO()
    progress.show(run, stream)  # type: ignore[arg-type]
    client.turn(run, RunStatus.FAILED, reason="batch 3 is empty")
    assert stream.getvalue() == "tc-1/1 step 0/100 failed (batch 3 is empty)\n"


def test_other_runs_of_the_client_do_not_show(client: FakeClient, run: FakeRun) -> None:
    stream = io.StringIO()
    progress.show(run, stream)  # type: ignore[arg-type]
    client.publish(Metrics(step=1, values={"loss": 9.0}, run_id="tc-1/2"))
    client.publish(RunStep(run_id="tc-1/2", done=50, duration=1.0))
    client.turn(FakeRun(run_id="tc-1/2"), RunStatus.FINISHED)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_that_counts_and_closes(client: FakeClient, run: FakeRun) -> None:
    stream = Terminal()
    progress.show(run, stream)  # type: ignore[arg-type]
    for _ in range(100):
        client.advance(run, loss=2.5)
    client.publish(Metrics(step=100, values={"eval/loss": 2.25}))
    client.turn(run, RunStatus.FINISHED)
    last = stream.getvalue().rsplit("\r", 1)[-1]
    assert "run 1: 100%" in last
    assert "100/100" in last
    assert "loss=2.5 eval/loss=2.25" in last
    assert last.endswith("\n")


def test_a_bar_says_when_a_run_was_stopped(client: FakeClient, run: FakeRun) -> None:
    stream = Terminal()
    progress.show(run, stream)  # type: ignore[arg-type]
    client.turn(run, RunStatus.STOPPED)
    assert "run 1 stopped" in stream.getvalue()


def test_a_bar_ends_with_the_reason_of_a_failure(client: FakeClient, run: FakeRun) -> None:
    stream = Terminal()
    progress.show(run, stream)  # type: ignore[arg-type]
    client.turn(run, RunStatus.FAILED, reason="batch 3 is empty")
    assert stream.getvalue().endswith("\ntc-1/1 failed: batch 3 is empty\n")


def test_nothing_listens_after_the_end(client: FakeClient, run: FakeRun) -> None:
    progress.show(run, io.StringIO())  # type: ignore[arg-type]
    client.turn(run, RunStatus.FINISHED)
    assert client.bus._subscribers == []


def test_closing_the_client_ends_the_line_too(client: FakeClient, run: FakeRun) -> None:
    stream = io.StringIO()
    progress.show(run, stream)  # type: ignore[arg-type]
    client.close()
    assert stream.getvalue() == "tc-1/1 step 0/100 closed\n"


def test_an_output_that_was_closed_does_not_reach_the_run(client: FakeClient, run: FakeRun) -> None:
    stream = io.StringIO()
    progress.show(run, stream)  # type: ignore[arg-type]
    stream.close()
    for _ in range(10):
        client.advance(run)
    assert client.bus._subscribers == []
