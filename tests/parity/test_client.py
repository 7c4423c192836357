"""What a user does with a training client, on every transport there is."""

import asyncio
import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.events import OperationCancelled, OperationFailed, OperationFinished, Progress
from tests.forking import Forker
from tests.parity.serving import Gate, eventually, registered


def test_operations_are_queued_at_once_and_results_come_in_order(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    handles = [handle for _ in range(5) for handle in (tc.forward_backward(batch), tc.optim_step())]
    assert not handles[-1].done()
    assert [handle.step for handle in handles[1::2]] == [1, 2, 3, 4, 5]
    losses = [handle.loss for handle in handles[::2]]
    assert losses[-1] < losses[0]
    assert handles[0].tokens_processed == 6


def test_awaiting_and_blocking_give_the_same_result(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    async def main() -> None:
        handle = tc.forward_backward(batch)
        assert await handle == handle.result() == await handle
        loss, step = await asyncio.gather(tc.forward_backward(batch), tc.optim_step())
        assert step.step == 1 and loss.loss > 0

    asyncio.run(main())


def test_ready_is_a_handle_like_any_other(service: tn.ServiceClient, batch: tn.BatchData) -> None:
    tc, ended = service.create_training_client(), []
    handle = tc.ready()
    handle.add_done_callback(ended.append)

    async def main() -> None:
        info, loss, again = await asyncio.gather(handle, tc.forward(batch), asyncio.wait_for(tc.ready(), 60))
        assert info == again and loss.loss > 0

    asyncio.run(main())
    assert handle.result(timeout=0).training_client_id == tc.training_client_id
    assert handle.status in ("READY", "BUSY")
    assert (handle.done(), handle.state, handle.exception(), ended) == (True, "COMPLETED", None, [handle])
    assert (handle.operation, handle.training_client_id) == ("ready", tc.training_client_id)
    assert "ready" in repr(handle) and "COMPLETED" in handle._repr_html_()
    assert handle.cancel() is False


def test_dicts_and_batches_are_the_same(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    as_dict = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    assert tc.forward(batch).loss == tc.forward(as_dict).loss


def test_statuses_go_from_initializing_over_ready_and_busy_to_terminated(
    service: tn.ServiceClient, batch: tn.BatchData, gate: Gate
) -> None:
    tc = service.create_training_client()
    seen = [tc.status]
    tc.ready().result()
    seen.append(tc.status)
    handle = tc.forward_backward(batch, loss_fn=gate.name)
    gate.reached.wait()
    seen.append(tc.refresh().status)
    gate.opened.set()
    handle.result()
    tc.close()
    seen.append(tc.refresh().status)
    assert seen[:1] in (["INITIALIZING"], ["READY"])
    assert seen[1:] == ["READY", "BUSY", "TERMINATED"]


def test_a_model_that_cannot_be_loaded_fails_every_operation_with_the_reason(
    service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    tc = service.create_training_client(model_ref="builtin:none")
    early = tc.forward_backward(batch)
    for operation in (lambda: early, tc.optim_step):
        with pytest.raises(tn.ModelLoadError, match="no built-in model 'builtin:none'"):
            operation().result()
    assert tc.status == "ERROR"
    assert "no built-in" in tc.refresh().reason
    with pytest.raises(tn.ModelLoadError):
        _ = tc.tokenizer


def test_a_hub_id_without_network_says_so_at_once(service: tn.ServiceClient, batch: tn.BatchData) -> None:
    tc = service.create_training_client(model_ref="some-org/some-model")
    with pytest.raises(tn.ModelLoadError, match=r"hub cannot be reached.*spelling and the network"):
        tc.forward_backward(batch).result()


def test_a_failed_forward_backward_fails_its_step_and_the_next_window_is_clean(
    service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    tc = service.create_training_client(optimizer={"learning_rate": 1e-2})
    before = tc.forward(batch).loss
    broken = tc.forward_backward(tn.BatchData([[1, 999_999]]))
    after = tc.forward_backward(batch)
    step = tc.optim_step()
    with pytest.raises(tn.ValidationError, match="999999"):
        broken.result()
    with pytest.raises(
        tn.FutureFailedError, match=f"{broken.future_id} of the same step failed.*untouched"
    ) as caught:
        step.result()
    assert isinstance(caught.value.__cause__, tn.ValidationError)
    assert after.result().loss == before
    assert tc.forward(batch).loss == before
    reference = service.create_training_client(optimizer={"learning_rate": 1e-2})
    for client in (tc, reference):
        client.forward_backward(batch)
        client.optim_step()
    assert tc.forward(batch).loss == reference.forward(batch).loss
    assert tc.step == 1


def test_who_has_been_told_of_a_failure_begins_a_new_window(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    with pytest.raises(tn.ValidationError, match="999999"):
        tc.forward_backward(tn.BatchData([[1, 999_999]])).result()
    tc.forward_backward(batch)  # the cell, mended and run again
    assert tc.optim_step().result().step == 1


def test_what_a_failure_would_drop_is_not_dropped_though_one_was_told(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    tc.forward_backward(batch)  # accumulated, and part of the step
    broken = tc.forward_backward(tn.BatchData([[1, 999_999]]))
    assert broken.exception() is not None
    tc.forward_backward(batch)
    with pytest.raises(tn.FutureFailedError, match=f"{broken.future_id} of the same step failed"):
        tc.optim_step().result()
    tc.forward_backward(batch)
    assert tc.optim_step().result().step == 1


def test_a_step_that_was_queued_before_the_failure_was_told_still_fails(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    broken = tc.forward_backward(tn.BatchData([[1, 999_999]]))
    its_step = tc.optim_step()
    assert broken.exception() is not None
    tc.forward_backward(batch)
    with pytest.raises(tn.FutureFailedError, match=f"{broken.future_id} of the same step failed"):
        its_step.result()
    assert tc.optim_step().result().step == 1


def test_a_nan_loss_refuses_the_step_and_leaves_the_weights(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    before = tc.forward(batch).loss
    poisoned = tc.forward_backward(
        batch, registered("poison", lambda outputs, batch: outputs.logits.sum() * float("nan"))
    )
    step = tc.optim_step()
    with pytest.raises(tn.NonFiniteLossError, match="rows 0 to 1"):
        poisoned.result()
    with pytest.raises(tn.FutureFailedError):
        step.result()
    assert tc.forward(batch).loss == before


def test_a_step_without_gradients_is_refused(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    with pytest.raises(tn.ValidationError, match=r"found no gradients: call forward_backward"):
        tc.optim_step().result()
    tc.forward_backward(batch)
    assert tc.optim_step().step == 1


def test_what_is_pending_is_cancelled_and_never_runs(
    tc: tn.TrainingClient, batch: tn.BatchData, gate: Gate
) -> None:
    first = tc.forward_backward(batch, loss_fn=gate.name)
    gate.reached.wait()
    second, step = tc.forward_backward(batch), tc.optim_step()
    eventually(lambda: second.queue_position == 0)  # once the stream has told that the first one runs
    assert step.queue_position == 1
    assert second.cancel() is True
    assert second.state == "CANCELLED"
    gate.opened.set()
    assert first.result().loss
    assert first.cancel() is False
    with pytest.raises(tn.FutureCancelledError):
        second.result()
    with pytest.raises(tn.FutureFailedError, match="of the same step was cancelled"):
        step.result()


def test_a_cancelled_step_ends_its_window(service: tn.ServiceClient, batch: tn.BatchData, gate: Gate) -> None:
    clients = [service.create_training_client(optimizer={"learning_rate": 1e-2}) for _ in range(2)]
    tc = clients[0]
    tc.forward(batch, loss_fn=gate.name)
    tc.forward_backward(batch)
    assert tc.optim_step().cancel() is True
    gate.opened.set()
    for client in clients:
        client.forward_backward(batch)
        client.optim_step()
    assert tc.forward(batch).loss == clients[1].forward(batch).loss


def test_what_runs_stops_between_micro_batches_and_its_gradients_are_dropped(
    service: tn.ServiceClient, gate: Gate
) -> None:
    tc = service.create_training_client(micro_batch_tokens=4)
    batch = tn.BatchData(np.full((8, 4), 5))
    running = tc.forward_backward(batch, loss_fn=gate.name)
    gate.reached.wait()
    threading.Timer(0.05, gate.opened.set).start()
    assert running.cancel() is True
    done, total = running.progress or (0, 8)
    assert done < total == 8
    with pytest.raises(tn.FutureFailedError, match="was cancelled"):
        tc.optim_step().result()
    with pytest.raises(tn.ValidationError, match="no gradients"):
        tc.optim_step().result()


def test_sampling_stops_between_tokens(tc: tn.TrainingClient) -> None:
    drawing = threading.Event()
    tc.subscribe(lambda event: drawing.set() if isinstance(event, Progress) else None)
    sampling = tc.sample("def", max_new_tokens=200, num_samples=32, ignore_end=True)
    assert drawing.wait()
    assert sampling.cancel() is True
    assert sampling.progress[0] < 200


@pytest.fixture
def room_for_50(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensafe_nb.core.queue.MAX_PENDING", 50)


def test_one_operation_too_many_is_refused_and_nothing_is_lost(
    room_for_50: None, tc: tn.TrainingClient, batch: tn.BatchData, gate: Gate
) -> None:
    running = tc.forward_backward(batch, loss_fn=gate.name)
    gate.reached.wait()
    eventually(lambda: running.state == "RUNNING")
    waiting = [tc.forward_backward(batch) for _ in range(50)]
    with pytest.raises(tn.QueueFullError, match="50 operations of this training client are waiting"):
        tc.optim_step()
    for handle in waiting[1:]:
        assert handle.cancel()
    gate.opened.set()
    assert running.result() and waiting[0].result()


def test_what_can_be_known_at_the_call_raises_in_the_call(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    with pytest.raises(tn.ValidationError, match=r"no loss named 'token_cee'. Did you mean 'token_ce'"):
        tc.forward_backward(batch, loss_fn="token_cee")
    with pytest.raises(tn.ValidationError, match="no keyword 'smoothing'"):
        tc.forward_backward(batch, loss_kwargs={"smoothing": 0.1})
    with pytest.raises(tn.ValidationError, match="does not use the batch entry 'advantages'"):
        tc.forward_backward({"input_ids": [[1, 2]], "advantages": [[1.0, 1.0]]})
    with pytest.raises(tn.ValidationError, match="no prompt"):
        tc.sample([])
    with pytest.raises(tn.ValidationError, match="no field 'max_tokens'"):
        tc.sample("x", max_tokens=3)
    assert tc.forward_backward(batch).loss > 0


def test_a_client_can_have_a_loss_of_its_own(service: tn.ServiceClient, batch: tn.BatchData) -> None:
    smoothing = {"label_smoothing": 0.1}
    own = service.create_training_client(loss={"type": "token_ce", "kwargs": smoothing})
    plain = service.create_training_client()
    assert (
        own.forward(batch).loss
        == plain.forward(batch, loss_kwargs=smoothing).loss
        != plain.forward(batch).loss
    )
    assert own.forward(batch, loss_kwargs={"label_smoothing": 0.0}).loss == plain.forward(batch).loss
    with pytest.raises(tn.ValidationError, match="no loss named 'token_se'"):
        service.create_training_client(loss={"type": "token_se"})


def test_preferences_are_learnt_against_the_base_wherever_the_client_is(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(
        lora_config=tn.LoRAConfig(rank=2), optimizer={"learning_rate": 1e-2}, batch_size=2
    )
    rows = [{"prompt": f"{name}\n", "chosen": "Yes.", "rejected": "No."} for name in ("abs", "len")]
    fitted = tc.fit(tc.batches(rows), loss_fn="dpo", loss_kwargs={"beta": 0.5}, steps=3, show=False)
    assert fitted.result(60).metrics["accuracy"] == 1
    assert tc.history["loss"][0] == pytest.approx(0.693147, abs=1e-6)
    assert tc.history["reward_margin"][-1] > 1


def test_a_closed_client_refuses_and_closing_twice_is_fine(
    service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    tc = service.create_training_client()
    waiting = [tc.forward_backward(batch) for _ in range(20)]
    tc.close()
    tc.close()
    assert all(handle.done() for handle in waiting)
    with pytest.raises(tn.ClientClosedError, match=f"{tc.training_client_id} is closed"):
        tc.forward_backward(batch)
    assert tc.status == "TERMINATED"
    assert service.list_training_clients() == []


def test_what_belongs_to_this_process_is_neither_copied_nor_pickled(
    tc: tn.TrainingClient, service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    for ours in (tc, service, tc.fit([batch], steps=1, show=False)):
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(tn.ValidationError, match="neither copied nor pickled"):
                copied(ours)


def test_a_lack_of_memory_fails_the_operation_and_the_client_lives(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    import torch

    def greedy(outputs: Any, batch: Any) -> Any:
        return outputs.logits.sum() + torch.empty(2**52)

    with pytest.raises(tn.InsufficientMemoryError, match="still usable: lower micro_batch_tokens"):
        tc.forward_backward(batch, loss_fn=registered("greedy", greedy)).result()
    assert tc.forward_backward(batch).loss > 0


def test_a_loss_that_raises_fails_its_future_only(
    tc: tn.TrainingClient, batch: tn.BatchData, transport: str
) -> None:
    with pytest.raises(tn.FutureFailedError, match="ZeroDivisionError") as caught:
        tc.forward_backward(batch, loss_fn=registered("raising", lambda outputs, batch: 1 / 0)).result()
    if transport == "embedded":  # a server sends its name and its text
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert tc.forward_backward(batch).loss > 0


def test_samples_carry_what_rl_needs(tc: tn.TrainingClient) -> None:
    result = tc.sample(["def", "class"], max_new_tokens=4, num_samples=2, temperature=0.7, top_k=5).result()
    assert len(result.sequences) == len(result.texts) == 4
    assert result.policy_version == 0
    for sequence in result.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) == len(sequence.raw_logprobs) <= 4
        assert all(lp <= 0 for lp in sequence.logprobs)


def test_the_policy_version_counts_the_changes_of_the_weights(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    before = tc.sample("x", max_new_tokens=1)
    tc.forward_backward(batch)
    step = tc.optim_step()
    after = tc.sample("x", max_new_tokens=1)
    assert (before.policy_version, step.policy_version, after.policy_version) == (0, 1, 1)
    assert (tc.step, tc.policy_version) == (1, 1)


def test_events_tell_what_happened_to_every_operation(
    tc: tn.TrainingClient, batch: tn.BatchData, gate: Gate
) -> None:
    tc.forward_backward(batch, loss_fn=gate.name)
    cancelled = tc.forward(batch)
    cancelled.cancel()
    gate.opened.set()
    with pytest.raises(tn.FutureFailedError):
        tc.forward(batch, loss_fn=registered("raising", lambda outputs, batch: 1 / 0)).result()
    events = [
        e
        for e in tc.history.events()
        if isinstance(e, OperationCancelled | OperationFailed | OperationFinished)
    ]
    assert [(type(e).__name__, e.operation) for e in events] == [
        ("OperationCancelled", "forward"),
        ("OperationFinished", "forward_backward"),
        ("OperationFailed", "forward"),
    ]


def test_the_same_seed_gives_the_same_run_bit_for_bit(service: tn.ServiceClient) -> None:
    def losses(seed: int) -> list[float]:
        lora = tn.LoRAConfig(rank=4, dropout=0.1)
        tc = service.create_training_client(lora_config=lora, seed=seed, optimizer={"learning_rate": 1e-2})
        rng = np.random.default_rng(0)
        handles = []
        for _ in range(4):
            handles.append(tc.forward_backward(tn.BatchData(rng.integers(3, 200, (4, 9)))))
            tc.optim_step()
        return [handle.loss for handle in handles]

    assert losses(1) == losses(1) != losses(2)


def test_clients_are_listed_and_found_by_id(service: tn.ServiceClient) -> None:
    tc = service.create_training_client()
    assert [info.training_client_id for info in service.list_training_clients()] == [tc.training_client_id]
    assert service.get_training_client(tc.training_client_id) is tc
    with pytest.raises(tn.TrainingClientNotFoundError, match="no training client 'tc-x'"):
        service.get_training_client("tc-x")


def test_a_client_of_which_only_the_handle_is_kept_is_loaded_all_the_same(service: tn.ServiceClient) -> None:
    handle = service.create_training_client(lora_config=tn.LoRAConfig(rank=2)).forward(tn.BatchData([[5, 6]]))
    assert handle.result(60).loss > 0


def test_contexts_close_sync_and_async(batch: tn.BatchData) -> None:
    async def main() -> Any:
        async with tn.ServiceClient() as service, service.create_training_client() as tc:
            await tc.forward_backward(batch)
            return tc

    assert asyncio.run(main()).status == "TERMINATED"


def test_a_script_that_ends_in_mid_run_ends_quietly(forker: Forker, tmp_path: Path) -> None:
    code = """
import itertools, tensafe_nb as tn
tc = tn.ServiceClient().create_training_client()
run = tc.fit(itertools.repeat(tn.BatchData([[5, 6, 7, 8]])), show=False)
tc.forward({"input_ids": [[5, 6]]}).result()
"""
    ended = forker.run(code, tmp_path)
    told, *more = ended.stderr.splitlines()
    assert (ended.returncode, more) == (
        0,
        [],
    ) and "Keep a copy" in told  # the key of a new home, and nothing else


def test_one_chat_message_and_what_is_no_prompt_are_refused(tc: tn.TrainingClient) -> None:
    with pytest.raises(tn.ValidationError, match=r"put it in a list, \[message\]"):
        tc.sample({"role": "user", "content": "hello"})
    with pytest.raises(tn.ValidationError, match="not int"):
        tc.sample(5)
    assert tc.sample(np.array([5, 6]), max_new_tokens=1).sequences[0].prompt_tokens == (5, 6)


def test_a_subscriber_that_raises_harms_nobody(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    tc.subscribe(lambda event: 1 / 0)
    assert tc.forward_backward(batch).loss > 0
    assert tc.status == "READY"


def test_a_subscriber_that_would_wait_for_ever_is_told_so(
    tc: tn.TrainingClient, batch: tn.BatchData, caplog: pytest.LogCaptureFixture
) -> None:
    tc.subscribe(lambda event: tc.save_state().result())
    tc.subscribe(lambda event: tc.close())
    assert tc.forward_backward(batch).loss > 0
    assert "Submit it here, and wait elsewhere" in caplog.text
    assert "close() cannot be called in a subscriber" in caplog.text


def test_a_queued_batch_does_not_change_with_the_callers_buffer(tc: tn.TrainingClient) -> None:
    buffer = np.array([[5, 6, 7, 8]])
    before = tc.forward(tn.BatchData(buffer)).loss
    queued = tn.BatchData(buffer)
    buffer[:] = 9
    assert tc.forward(queued).loss == before


def test_a_closed_service_makes_no_more_clients(service: tn.ServiceClient) -> None:
    service.close()
    with pytest.raises(tn.ClientClosedError, match="Create a new one"):
        service.create_training_client()


@pytest.mark.transports("embedded")  # the loss is the user's own code
def test_waiting_on_the_clients_own_thread_is_refused(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    def waiting(outputs: Any, batch: Any) -> Any:
        tc.optim_step().result()

    with pytest.raises(tn.ValidationError, match="would wait for ever"):
        tc.forward_backward(batch, loss_fn=waiting).result()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (b"abc", "a prompt is a text"),
        ([[1.5, 2.0]], "a prompt is a text"),
        ([True, False], "a prompt is a text"),
        ([None], "a prompt is a text"),
        ([[]], "Prompt 0 is empty"),
        ([{"prompt": "hi", "answer": "ho"}], r"'answer' besides.*\[row\['prompt'\] for row in rows\]"),
    ],
)
def test_what_is_no_prompt_is_named(tc: tn.TrainingClient, prompts: Any, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        tc.sample(prompts)


def test_a_text_that_is_no_text_does_not_break_the_log(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    def failing(outputs: Any, batch: Any) -> Any:
        raise ValueError("half an emoji \ud83d")

    assert tc.forward_backward(batch, loss_fn=registered("failing", failing)).exception() is not None
    assert tc.forward_backward(batch).loss > 0


def test_a_home_that_cannot_be_written_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSAFE_HOME", str(tmp_path / "file"))
    with tn.ServiceClient() as service, pytest.raises(tn.ValidationError, match="Set TENSAFE_HOME"):
        service.create_training_client()


def test_a_forked_child_is_told_to_make_its_own_client(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    import os

    tc.forward(batch).result()
    child = os.fork()
    if child == 0:  # the child must not return into pytest
        try:
            tc.forward(batch)
        except tn.ClientClosedError:
            tc.close()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert tc.forward(batch).loss > 0


def test_an_address_where_nothing_answers_or_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        tn.ServerConnectionError, match=r"http://127.0.0.1:9 does not answer .*tensafe-nb serve"
    ):
        tn.ServiceClient("http://127.0.0.1:9")
    with pytest.raises(tn.ValidationError, match="must begin with http"):
        tn.ServiceClient("127.0.0.1:8000")
    monkeypatch.setenv("TENSAFE_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError):
        tn.ServiceClient()
    with pytest.raises(tn.ValidationError, match="keys of a remote core are the server's"):
        tn.ServiceClient(key_source="file")
