"""Runs: watched, awaited, paused, stepped, stopped, and read back after the process died."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.events import RunState, RunStep
from tests.forking import Forker


def endless(batch: tn.BatchData) -> Iterator[tn.BatchData]:
    while True:
        yield batch


def until_step(tc: tn.TrainingClient, count: int) -> threading.Event:
    reached = threading.Event()
    tc.subscribe(lambda e: reached.set() if isinstance(e, RunStep) and e.done >= count else None, after=0)
    return reached


def until_state(tc: tn.TrainingClient, state: str) -> threading.Event:
    reached = threading.Event()
    tc.subscribe(lambda e: reached.set() if isinstance(e, RunState) and e.state == state else None)
    return reached


def test_a_run_trains_evaluates_and_is_awaited(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    run = tc.fit([batch, batch], epochs=3, eval_batches=[batch], eval_every=2, show=False)
    result = asyncio.run(await_it(run))
    assert (result.state, result.steps, run.state, tc.step) == ("FINISHED", 6, "FINISHED", 6)
    assert tc.history.series("eval/loss")[0].tolist() == [0, 2, 4, 6]
    assert tc.history["eval/loss"][-1] < tc.history["eval/loss"][0]
    assert len(tc.history["loss"]) == 6


async def await_it(run: Any) -> Any:
    return await run


def test_steps_repeat_the_batches_and_accumulation_takes_several(
    service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    tc = service.create_training_client(gradient_accumulation_steps=3)
    assert tc.fit([batch, batch], steps=4, show=False).result().steps == 4
    finished = [e.operation for e in tc.history.events() if type(e).__name__ == "OperationFinished"]
    assert finished == [*["forward_backward"] * 3, "optim_step"] * 4


@pytest.mark.parametrize("where", ["claim", "start"])
def test_a_run_that_is_interrupted_before_it_begins_has_ended_and_makes_way(
    tc: tn.TrainingClient, batch: tn.BatchData, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: tn.TrainingRun) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tn.TrainingRun, where, interrupted)
        tc.fit([batch], steps=2, show=False)
    (given_up,) = tc.runs
    assert (given_up.state, given_up.result(timeout=5).reason) == (
        "STOPPED",
        "It was interrupted before it began.",
    )
    assert tc.fit([batch], steps=2, show=False).result().steps == 2
    tc.close()


def test_a_generator_that_ends_ends_the_run(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    run = tc.fit((batch for _ in range(3)), steps=10, show=False)
    assert run.result().steps == 3


def test_pause_lets_the_step_finish_and_step_takes_a_few_more(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    paused = until_state(tc, "PAUSED")
    run = tc.fit(endless(batch), show=False)
    assert until_step(tc, 2).wait()
    run.pause()
    assert paused.wait()
    at = tc.step
    assert (run.state, tc.status, run.steps_done) == ("PAUSED", "READY", at)
    again = until_state(tc, "PAUSED")
    run.step(3)
    assert again.wait()
    assert tc.step == at + 3
    run.resume()
    assert until_step(tc, at + 5).wait()
    run.stop()
    assert run.result().state == "STOPPED"


def test_stop_tears_no_step_and_leaves_the_client_usable(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    run = tc.fit(endless(batch), show=False)
    assert until_step(tc, 2).wait()
    run.stop()
    result = run.result()
    assert result.state == "STOPPED"
    assert result.steps == tc.step == len(tc.history["loss"])
    tc.forward_backward(batch)
    assert tc.optim_step().step == result.steps + 1


def test_a_paused_run_can_be_stopped(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    paused = until_state(tc, "PAUSED")
    run = tc.fit(endless(batch), show=False)
    run.pause()
    assert paused.wait()
    run.stop()
    assert run.result().state == "STOPPED"


def test_an_exception_in_the_users_data_ends_the_run_with_that_error(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    def broken() -> Iterator[tn.BatchData]:
        yield batch
        raise KeyError("column 'text'")

    run = tc.fit(broken(), show=False)
    with pytest.raises(tn.FutureFailedError, match="KeyError") as caught:
        run.result()
    assert isinstance(caught.value.__cause__, KeyError)
    assert run.state == "FAILED"
    assert tc.forward(batch).loss > 0
    assert "column 'text'" in tn.load_run(run.run_id).reason


def test_a_failed_operation_ends_the_run_with_its_own_error(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    run = tc.fit([batch, tn.BatchData([[1, 999_999]]), batch], show=False)
    with pytest.raises(tn.ValidationError, match="999999"):
        run.result()


def test_no_batches_and_bad_numbers_are_refused(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    with pytest.raises(tn.ValidationError, match="no batches"):
        tc.fit([], show=False).result()
    with pytest.raises(tn.ValidationError, match="steps=0 must be a whole number, at least 1"):
        tc.fit([batch], steps=0)


def test_closing_the_client_stops_its_run(service: tn.ServiceClient, batch: tn.BatchData) -> None:
    tc = service.create_training_client()
    run = tc.fit(endless(batch), show=False)
    tc.close()
    assert run.state == "STOPPED"


def test_a_timeout_while_waiting_for_a_run_leaves_it_going(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    run = tc.fit(endless(batch), show=False)
    with pytest.raises(tn.FutureTimeoutError, match="call stop"):
        run.result(timeout=0.05)
    assert run.state == "RUNNING"
    run.stop()


def test_runs_are_listed_and_loaded_with_their_curves(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    first = tc.fit([batch], steps=2, show=False)
    first.result()
    tc.fit([batch], steps=1, show=False).result()
    assert [(r.run_id, r.state, r.step) for r in tn.list_runs()] == [
        (f"{tc.training_client_id}/1", "FINISHED", 2),
        (f"{tc.training_client_id}/2", "FINISHED", 3),
    ]
    assert tn.load_run(first.run_id).history["loss"].tolist() == tc.history["loss"].tolist()
    with pytest.raises(tn.RunNotFoundError, match="no run 'tc-x/1'"):
        tn.load_run("tc-x/1")


def test_the_history_of_a_process_that_was_killed_is_whole_and_marked_interrupted(forker: Forker) -> None:
    code = """
import os, signal, tensafe_nb as tn
tc = tn.ServiceClient().create_training_client(optimizer={"learning_rate": 1e-2})
batch = tn.BatchData([[5, 6, 7, 8]])
tc.fit([batch], steps=3, show=False).result()
def killer():
    for _ in range(4):
        yield batch
    tc.forward(batch).result()
    os.kill(os.getpid(), signal.SIGKILL)
tc.fit(killer(), show=False).result()
"""
    assert forker.status_of(forker.begin(code)) == -9
    finished, interrupted = tn.list_runs()
    assert (finished.state, interrupted.state) == ("FINISHED", "INTERRUPTED")
    assert interrupted.step == 7
    assert len(interrupted.history["loss"]) == 7


def test_going_on_while_the_pause_is_still_coming_is_not_lost(
    service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    tc = service.create_training_client()
    started, opened = threading.Event(), threading.Event()

    def slow() -> Iterator[tn.BatchData]:
        yield batch
        started.set()
        assert opened.wait()
        while True:
            yield batch

    run = tc.fit(slow(), show=False)
    assert started.wait()
    run.pause()
    assert run.state == "PAUSING"
    run.resume()
    assert run.state == "RUNNING"
    opened.set()
    assert until_step(tc, 4).wait()
    run.stop()
    assert run.result().state == "STOPPED"


def test_a_run_whose_data_exits_the_interpreter_ends_visibly(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    def leaving() -> Iterator[tn.BatchData]:
        yield batch
        raise SystemExit(3)

    run = tc.fit(leaving(), show=False)
    with pytest.raises(tn.FutureFailedError, match="SystemExit"):
        run.result()
    assert run.state == "FAILED"


def test_when_the_data_ends_early_the_last_step_is_evaluated(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    tc.fit((batch for _ in range(3)), eval_batches=[batch], show=False).result()
    assert tc.history.series("eval/loss")[0].tolist() == [0, 3]


def test_a_generator_cannot_serve_several_epochs_and_says_so(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    run = tc.fit((batch for _ in range(2)), epochs=3, show=False)
    with pytest.raises(tn.ValidationError, match="epochs=3, but the batches could be iterated only once"):
        run.result()


def test_a_step_whose_second_batch_is_broken_leaves_no_gradient_behind(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(gradient_accumulation_steps=2)
    good, broken = {"input_ids": [[5, 6, 7]]}, {"input_ids": [[1, 2], [3]]}
    with pytest.raises(tn.ValidationError, match="pad them"):
        tc.fit([good, broken], show=False).result()
    with pytest.raises(tn.ValidationError, match="no gradients"):
        tc.optim_step().result()


def test_a_run_stopped_by_closing_its_client_is_recorded_so(
    service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    tc = service.create_training_client()
    run = tc.fit(endless(batch), show=False)
    assert until_step(tc, 1).wait()
    tc.close()
    assert (run.state, tn.load_run(run.run_id).state) == ("STOPPED", "STOPPED")
    with pytest.raises(tn.ClientClosedError):
        tc.fit([batch], show=False)


def test_a_second_run_waits_for_the_first_to_end(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    run = tc.fit(endless(batch), eval_batches=[batch], show=False)
    with pytest.raises(tn.ValidationError, match=f"{run.run_id} is still under way"):
        tc.fit([batch], show=False)
    run.stop()
    run.result()
    metrics = tc.fit([batch], show=False).result().metrics
    assert "loss" in metrics and "eval/loss" not in metrics, "a run reports its own figures only"


@pytest.fixture
def room_for_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensafe_nb.core.queue.MAX_PENDING", 80)  # 1,000 would take nine seconds


@pytest.mark.transports("embedded", soak="http")
def test_more_held_out_batches_than_the_queue_holds_are_fine(
    room_for_80: None, tc: tn.TrainingClient
) -> None:
    tiny = tn.BatchData([[5, 6]])
    assert tc.fit([tiny], eval_batches=[tiny] * 100, show=False).result().steps == 1


def test_a_run_stuck_in_the_users_code_does_not_hold_up_closing(
    service: tn.ServiceClient,
    batch: tn.BatchData,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tensafe_nb.client.JOIN_SECONDS", 0.2)
    stuck, freed = threading.Event(), threading.Event()

    def sleepy() -> Iterator[tn.BatchData]:
        stuck.set()
        freed.wait(30)
        yield batch

    tc = service.create_training_client()
    run = tc.fit(sleepy(), show=False)
    assert stuck.wait()
    tc.close()
    assert run.result(0).state == "STOPPED"
    assert "still inside your data or reward function" in caplog.text
    freed.set()
