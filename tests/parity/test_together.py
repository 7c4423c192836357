"""Samples that stand next to each other in a client's queue are drawn together, and stay operations of their own."""

from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.events import OperationCancelled, OperationFailed, OperationFinished, OperationStarted
from tests.parity.serving import Gate, core_of, eventually

ASKED: list[tuple[Any, dict[str, Any]]] = [
    ("def add(", {"max_new_tokens": 12, "ignore_end": True}),
    (["import ", "class "], {"temperature": 0.5, "num_samples": 2, "max_new_tokens": 8}),
    ("return ", {"temperature": 0.0, "top_logprobs": 2, "max_new_tokens": 6}),
    ([{"role": "user", "content": "Hi"}], {"stop": ["e"], "top_p": 0.9, "max_new_tokens": 10}),
]
LONG = {"max_new_tokens": 400, "ignore_end": True, "seed": 1}
ENDS = (OperationFinished, OperationFailed, OperationCancelled)


def held(tc: tn.TrainingClient, gate: Gate) -> Any:
    """Hold the queue: what is submitted now stands in it together."""
    first = tc.forward({"input_ids": [[5, 6, 7, 8]]}, loss_fn=gate.name)
    assert gate.reached.wait(20)
    return first


def told(tc: tn.TrainingClient, *handles: Any) -> list[tuple[type, int]]:
    """Return what the log tells of some operations' turns and ends, in its order."""
    numbers = {handle.future_id: number for number, handle in enumerate(handles)}
    eventually(
        lambda: (
            sum(isinstance(e, ENDS) and e.future_id in numbers for e in tc.history.events()) == len(handles)
        )
    )
    return [
        (type(event), numbers[event.future_id])
        for event in tc.history.events()
        if isinstance(event, (OperationStarted, *ENDS)) and event.future_id in numbers
    ]


def running(tc: tn.TrainingClient, **fields: Any) -> Any:
    """Return a long sample that is being drawn."""
    handle = tc.sample("def ", stream=True, **{**LONG, **fields})
    next(iter(handle.pieces()))
    return handle


def same(one: Any, other: Any) -> None:
    for mine, its in zip(one.sequences, other.sequences, strict=True):
        assert (mine.tokens, mine.text, mine.finish_reason) == (its.tokens, its.text, its.finish_reason)
        assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-4)


def test_neighbours_are_drawn_together_and_each_gets_what_it_gets_alone(
    tc: tn.TrainingClient, gate: Gate
) -> None:
    held(tc, gate)
    together = [tc.sample(prompts, seed=7, **fields) for prompts, fields in ASKED]
    streamed = tc.sample("def ", stream=True, max_new_tokens=5, seed=7)
    gate.opened.set()
    for handle, (prompts, fields) in zip(together, ASKED, strict=True):
        same(handle.result(), tc.sample(prompts, seed=7, **fields).result())
    assert "".join(piece.text for piece in streamed.pieces()) == streamed.texts[0]
    events = told(tc, *together, streamed)
    assert events[:5] == [(OperationStarted, number) for number in range(5)]
    assert {kind for kind, _ in events[5:]} == {OperationFinished}
    assert next(number for _, number in events[5:]) != 0, (
        "who has most to draw came first, and nobody waited for it"
    )


def test_who_comes_while_others_are_drawn_joins_them_and_may_end_first(tc: tn.TrainingClient) -> None:
    long = running(tc)
    short = tc.sample("import ", max_new_tokens=3, seed=2)
    short.result()
    assert not long.done()
    long.cancel()
    same(short.result(), tc.sample("import ", max_new_tokens=3, seed=2).result())


def test_training_waits_for_the_samples_before_it_and_nobody_joins_past_it(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    first = running(tc, max_new_tokens=40)
    trained = [tc.forward_backward(batch), tc.optim_step()]
    behind = [tc.sample("import ", max_new_tokens=2, seed=2) for _ in range(2)]
    assert [handle.result().policy_version for handle in (first, *behind)] == [0, 1, 1]
    finished = [number for kind, number in told(tc, first, *trained, *behind) if kind is OperationFinished]
    assert finished[:3] == [0, 1, 2]


def test_who_wants_the_same_to_the_last_bit_is_drawn_alone(tc: tn.TrainingClient, gate: Gate) -> None:
    held(tc, gate)
    asked = {"max_new_tokens": 6, "seed": 5, "alone": True}
    beside = [tc.sample("import ", max_new_tokens=9), tc.sample("def ", **asked), tc.sample("class ")]
    gate.opened.set()
    assert beside[1].result() == tc.sample("def ", **asked).result()
    events = told(tc, *beside)
    assert events.index((OperationFinished, 0)) < events.index((OperationStarted, 1))
    assert events.index((OperationFinished, 1)) < events.index((OperationStarted, 2))


def test_seeds_of_the_client_follow_the_order_of_submission(service: tn.ServiceClient, gate: Gate) -> None:
    one, other = (service.create_training_client(lora_config=tn.LoRAConfig(rank=2)) for _ in range(2))
    held(one, gate)
    asked = [{"prompts": "def ", "max_new_tokens": length} for length in (9, 2, 5)]
    together = [one.sample(**fields) for fields in asked]
    gate.opened.set()
    for handle, fields in zip(together, asked, strict=True):
        same(handle.result(), other.sample(**fields).result())


def test_a_bad_prompt_or_a_cancel_ends_that_sample_alone(tc: tn.TrainingClient, gate: Gate) -> None:
    held(tc, gate)
    good, bad, given_up = tc.sample("def ", seed=1), tc.sample([1, 999_999]), tc.sample("def ", **LONG)
    gate.opened.set()
    eventually(lambda: given_up.progress is not None and given_up.progress[0] > 0)
    assert given_up.cancel()
    with pytest.raises(tn.ValidationError, match="vocabulary"):
        bad.result()
    same(good.result(), tc.sample("def ", seed=1).result())
    kinds = dict.fromkeys((number, kind) for kind, number in told(tc, good, bad, given_up))
    assert {(0, OperationFinished), (1, OperationFailed), (2, OperationCancelled)} <= kinds.keys()


def test_each_is_on_record_in_the_audit_log(
    service: tn.ServiceClient, tc: tn.TrainingClient, gate: Gate
) -> None:
    held(tc, gate)
    handles = [
        tc.sample("def ", max_new_tokens=2),
        tc.sample([1, 999_999]),
        tc.sample("def ", max_new_tokens=3),
    ]
    gate.opened.set()
    for handle in handles:
        handle.exception()
    logged = service.get_audit_logs(tc.training_client_id, operation="sample")
    assert sorted(entry.success for entry in logged) == [False, True, True]
    assert service.verify_audit_log().ok


def test_closing_ends_all_that_are_drawn(tc: tn.TrainingClient) -> None:
    handles = [running(tc, seed=number) for number in range(3)]
    tc.close()
    assert all(isinstance(handle.exception(), tn.FutureCancelledError) for handle in handles)


@pytest.mark.transports("embedded")
def test_who_wants_to_look_at_the_model_gets_in_though_samples_keep_coming(tc: tn.TrainingClient) -> None:
    core, waiting = core_of(tc), [running(tc, max_new_tokens=20)]
    ask = core._next_sample

    def endless(kind: Any) -> Any:  # one more is there whenever the queue is looked at
        if core.waiting == 0 and len(waiting) < 200:
            waiting.append(tc.sample("def ", max_new_tokens=20, ignore_end=True))
        return ask(kind)

    core._next_sample = endless  # type: ignore[method-assign]
    assert core.factors([0], None)
    assert len(waiting) < 200
    for handle in waiting:
        handle.cancel()


@pytest.fixture
def saved(service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData) -> list[str]:
    """Two states of one adapter."""
    first = tc.save_state(name="before")
    tc.forward_backward(batch), tc.optim_step()
    return [handle.result().artifact_id for handle in (first, tc.save_state(name="after"))]


def test_requests_of_stored_weights_are_drawn_together_and_those_of_others_take_turns(
    service: tn.ServiceClient, saved: list[str]
) -> None:
    def ask(which: int, **fields: Any) -> Any:
        return service.sample(
            "import ", artifact_id=saved[which], **{"max_new_tokens": 3, "seed": 2, **fields}
        )

    alone = [ask(which).result() for which in (0, 1)]
    long = service.sample("def ", artifact_id=saved[0], **LONG)
    joined = ask(0)
    same(joined.result(), alone[0])
    assert not long.done()
    others, behind = [ask(1), ask(1, temperature=0.5)], ask(0)
    bad = service.sample([1, 999_999], artifact_id=saved[1])
    assert not others[0].done(), "other weights have to wait"
    assert long.cancel()
    same(behind.result(), alone[0])
    same(others[0].result(), alone[1])
    assert others[1].result().policy_version == alone[1].policy_version != alone[0].policy_version
    with pytest.raises(tn.ValidationError, match="vocabulary"):
        bad.result()
    logged = service.get_audit_logs(operation="sample", limit=50)
    assert len(logged) == 8 and sum(entry.success for entry in logged) == 6
    assert service.verify_audit_log().ok


@pytest.mark.transports("embedded")
def test_other_weights_have_their_turn_in_the_order_in_which_the_first_of_them_was_asked_for(
    service: tn.ServiceClient, saved: list[str]
) -> None:
    order: list[str] = []

    def ask(name: str, which: int) -> Any:
        handle = service.sample("import ", artifact_id=saved[which], max_new_tokens=2)
        handle.add_done_callback(lambda _: order.append(name))
        return handle

    long = service.sample("def ", artifact_id=saved[0], **LONG)
    eventually(lambda: long.progress is not None and long.progress[0] > 0)
    waiting = [ask("b", 1), ask("a", 0), ask("b", 1), ask("a", 0)]
    assert long.cancel()
    for handle in waiting:
        handle.result()
    eventually(lambda: len(order) == 4)
    assert order == ["b", "b", "a", "a"]
