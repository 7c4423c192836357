"""However a run ends, four accounts of it agree: its result, `list_runs()`, the panel, and the log on the disk."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.events import Metrics, RunState, RunStep
from tensafe_nb.widgets.feed.feed import feed_of
from tensafe_nb.widgets.feed.recording import Recording
from tests.forking import Forker

BATCHES = [tn.BatchData([[5, 6, 7, n]]) for n in range(8, 18)]


@dataclass
class End:
    """A run that has come to its end, and what is to be said of it."""

    client: tn.TrainingClient
    run: Any
    state: str
    done: int
    taken: int
    reason: str | None = None


def event(tc: tn.TrainingClient, of: Callable[[Any], bool]) -> threading.Event:
    happened = threading.Event()
    tc.subscribe(lambda e: happened.set() if of(e) else None)
    return happened


def client(service: tn.ServiceClient, **fields: Any) -> tn.TrainingClient:
    return service.create_training_client(lora_config=tn.LoRAConfig(rank=2), **fields)


def finished(service: tn.ServiceClient) -> End:
    tc = client(service)
    tc.fit(BATCHES, steps=2, show=False).result()
    return End(tc, tc.fit(BATCHES, steps=4, show=False), "FINISHED", 4, 4)


def accumulated(service: tn.ServiceClient) -> End:
    tc = client(service, gradient_accumulation_steps=3)
    return End(tc, tc.fit(BATCHES, epochs=1, show=False), "FINISHED", 4, 4)


def ended_early(service: tn.ServiceClient) -> End:
    tc = client(service)
    run = tc.fit((batch for batch in BATCHES[:3]), steps=10, show=False)
    return End(tc, run, "FINISHED", 3, 3, "The batches ended after 3 of 10 steps")


def stopped(service: tn.ServiceClient) -> End:
    tc = client(service)
    due = event(tc, lambda e: isinstance(e, RunStep) and e.done == 2)
    run = tc.fit(gated(due), steps=10, show=False)
    assert due.wait()
    run.stop()
    done = tc_done(run)
    return End(
        tc, run, "STOPPED", done, tc.step
    )  # a step that was on its way as it stopped is taken, not done


def gated(due: threading.Event) -> Iterator[tn.BatchData]:
    """Three batches, and the others once `due`: so the run cannot be over before it is stopped."""
    yield from BATCHES[:3]
    assert due.wait()
    yield from BATCHES


def tc_done(run: Any) -> int:
    run.result()
    return run.steps_done


def failed(service: tn.ServiceClient) -> End:
    tc = client(service)
    run = tc.fit(failing(), steps=10, show=False)
    return End(tc, run, "FAILED", 3, 3, "no column 'text'")  # the third step was under way, and ends


def failing() -> Iterator[tn.BatchData]:
    yield from BATCHES[:3]
    raise tn.ValidationError("no column 'text'")


def resumed(service: tn.ServiceClient) -> End:
    first = client(service)
    run = first.fit(BATCHES, steps=5, checkpoint_every=5, show=False)
    run.result()
    saved = tn.load_run(run.run_id).last_checkpoint
    tc = service.restore(saved)
    return End(tc, tc.fit(BATCHES, steps=8, resume_from=saved, show=False), "FINISHED", 8, 3)


def restored(service: tn.ServiceClient) -> End:
    first = client(service)
    first.fit(BATCHES, steps=5, show=False).result()
    tc = service.restore(first.save_state().artifact_id)
    return End(
        tc, tc.fit(BATCHES, steps=3, show=False), "FINISHED", 3, 3
    )  # at once: its step is not known yet


def resumed_at_the_end(service: tn.ServiceClient) -> End:
    first = client(service)
    run = first.fit(BATCHES, steps=5, checkpoint_every=5, show=False)
    run.result()
    saved = tn.load_run(run.run_id).last_checkpoint
    tc = service.restore(saved)
    run = tc.fit(BATCHES, steps=5, resume_from=saved, show=False)
    return End(tc, run, "FINISHED", 5, 0, "there was nothing left to do")


def rolled_back(service: tn.ServiceClient) -> End:
    tc = client(service)
    paused = event(tc, lambda e: isinstance(e, RunState) and e.state == "PAUSED")
    run = tc.fit(BATCHES, steps=8, show=False)
    run.step(3)
    assert paused.wait()
    done, saved = run.steps_done, run.checkpoint().artifact_id
    paused.clear()
    run.step(2)
    assert paused.wait()
    given_up = run.steps_done - done
    run.rollback(saved).result()
    assert (run.steps_done, feed_of(run).standing(run).step) == (done, done)
    run.resume()
    return End(tc, run, "FINISHED", 8, 8 + given_up)


def closed(service: tn.ServiceClient) -> End:
    tc = client(service)
    due = event(tc, lambda e: isinstance(e, RunStep) and e.done == 2)
    run = tc.fit(gated(due), show=False)
    assert due.wait()
    tc.close()
    return End(tc, run, "STOPPED", tc_done(run), tc_done(run))


ENDS = (
    finished, accumulated, ended_early, stopped, failed, resumed, restored, resumed_at_the_end, rolled_back, closed,
)  # fmt: skip


@pytest.mark.parametrize("provoke", ENDS, ids=lambda end: end.__name__)
def test_result_records_panel_and_files_agree(service: tn.ServiceClient, provoke: Any) -> None:
    end = provoke(service)
    run, tc = end.run, end.client
    if end.state == "FAILED":
        with pytest.raises(tn.TGTinkerError, match=end.reason):
            run.result()
    else:
        result = run.result()
        assert (result.state, result.steps_done, result.steps) == (end.state, end.done, end.taken)
        assert (end.reason or "") in (result.reason or "")
        assert (result.reason is None) is (end.reason is None)
    record = tn.load_run(run.run_id)
    facts = feed_of(run).standing(run)
    recording = Recording(record, "RECORDED")
    recording.tell_all()
    said = {(run.state, run.steps_done), (record.state, record.steps_done), (facts.state, facts.step)}
    said.add((recording.run.state, recording.run.steps_done))
    assert said == {(end.state, end.done)}
    assert record.steps == run.steps_taken == end.taken
    assert record.step == tc.step == recording.history.state.step
    assert (end.reason or "") in (record.reason or "") and (end.reason or "") in (facts.reason or "")
    listed = next(found for found in tn.list_runs() if found.run_id == run.run_id)
    assert (listed.state, listed.steps_done, listed.steps) == (record.state, record.steps_done, record.steps)
    written = [e for e in tc.history.events() if isinstance(e, RunState) and e.run_id == run.run_id][-1]
    assert (written.state, written.done, written.taken) == (end.state, end.done, end.taken)


def test_a_paused_run_is_the_same_in_all_accounts(service: tn.ServiceClient) -> None:
    tc = client(service)
    paused = event(tc, lambda e: isinstance(e, RunState) and e.state == "PAUSED")
    run = tc.fit(BATCHES, steps=9, show=False)
    run.step(3)
    assert paused.wait()
    record, facts = tn.load_run(run.run_id), feed_of(run).standing(run)
    assert {run.steps_done, record.steps_done, facts.step, tc.step, record.step} == {run.steps_done}
    assert (run.state, record.state, facts.state) == ("PAUSED", "PAUSED", "PAUSED")
    run.stop()


def at_three(service: tn.ServiceClient) -> tuple[tn.TrainingClient, Any, threading.Event]:
    """Return a client, its run, paused after three steps, and what is set whenever it is paused."""
    tc = client(service)
    paused = event(tc, lambda e: isinstance(e, RunState) and e.state == "PAUSED")
    run = tc.fit(BATCHES, steps=9, show=False)
    run.step(3)
    assert paused.wait()
    return tc, run, paused


def test_a_rollback_that_is_awaited_has_paused_its_run(service: tn.ServiceClient) -> None:
    tc, run, _ = at_three(service)
    saved, done = run.checkpoint().artifact_id, run.steps_done
    found: list[Any] = []
    run.step(4)
    back = run.rollback(saved)
    back.add_done_callback(
        lambda _: found.append((run.state, run.steps_done))
    )  # at once, on the run's thread
    back.result()
    assert found == [("PAUSED", done)] and feed_of(run).standing(run).state == "PAUSED"
    assert [e.state for e in tc.history.events() if isinstance(e, RunState)][-1] == "PAUSED"
    run.stop()
    assert run.result().state == "STOPPED"


def test_who_resumes_a_run_that_is_on_its_way_back_is_obeyed(service: tn.ServiceClient) -> None:
    _, run, paused = at_three(service)
    saved, done = run.checkpoint().artifact_id, run.steps_done
    paused.clear()
    back = run.rollback(saved)
    run.step(2)
    back.result()
    assert paused.wait() and run.steps_done == done + 2
    run.rollback(saved)
    run.resume()
    assert run.result().steps_done == 9


KILLED = """
import os, signal, sys, tensafe_nb as tn
from tensafe_nb.events import Metrics
tc = tn.ServiceClient().create_training_client(lora_config=tn.LoRAConfig(rank=2))
tc.subscribe(lambda e: os.kill(os.getpid(), signal.SIGKILL) if isinstance(e, Metrics) and e.step == 6 else None)
tc.fit([tn.BatchData([[5, 6, 7, n]]) for n in range(8, 18)], show=False).result()
"""


def test_a_killed_process_leaves_the_steps_that_were_taken(forker: Forker, tmp_path: Path) -> None:
    done = forker.run(KILLED, tmp_path)
    assert done.returncode == -9, done.stderr
    (record,) = tn.list_runs()
    recording = Recording(record, "RECORDED")
    recording.tell_all()
    measured = [e.step for e in record.history.events() if isinstance(e, Metrics)][-1]
    assert (record.state, record.step, record.steps, record.steps_done) == (
        "INTERRUPTED",
        measured,
        measured,
        measured,
    )
    assert (recording.run.state, recording.run.steps_done, recording.history.state.step) == (
        "INTERRUPTED",
        measured,
        measured,
    )
