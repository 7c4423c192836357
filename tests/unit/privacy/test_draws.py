"""Draws are numbered and vouched for: what is left out is charged, what is altered is refused, wherever it goes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.errors import DPBudgetExceededError, FutureFailedError, PrivacyUnitError
from tensafe_nb.privacy import tickets
from tensafe_nb.privacy.tickets import SEAL, DrawRegister, seals_of, ticket
from tensafe_nb.protocol.batch import TICKET, BatchData

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10, 20) for b in (3, 5)]
Create = Callable[..., tn.TrainingClient]


@pytest.fixture
def create(service: tn.ServiceClient) -> Create:
    def client(**dp: Any) -> tn.TrainingClient:
        return service.create_training_client(
            model_ref="builtin:sums",
            lora_config=tn.LoRAConfig(rank=2),
            batch_size=10,
            dp_config=tn.DPConfig(**{"dataset_size": len(ROWS), "target_epsilon": None} | dp),
        )

    return client


def take(tc: tn.TrainingClient, *draws: BatchData) -> None:
    for draw in draws:
        tc.forward_backward(draw), tc.optim_step().result()


def refused(tc: tn.TrainingClient, draw: BatchData, reason: str) -> None:
    with pytest.raises(PrivacyUnitError, match=reason):
        tc.forward_backward(draw).result()
    with pytest.raises(FutureFailedError):
        tc.optim_step().result()


def charged(tc: tn.TrainingClient) -> int:
    return tc.privacy_statement().steps


def test_draws_that_were_left_out_are_charged_with_the_next_that_is_used(create: Create) -> None:
    tc = create()
    draws = list(tc.dp_batches(ROWS, steps=8))
    take(tc, draws[0], draws[5])
    assert (tc.step, charged(tc)) == (2, 6)
    assert tc.privacy_statement().epsilon == pytest.approx(tc.what_if(steps=6).epsilon)
    evidence = {m.sampling: m.steps for m in tc.privacy_statement().mechanisms}
    assert evidence == {"toolkit sampler": 2, "toolkit sampler, not used by then": 4}
    take(tc, draws[6])
    assert charged(tc) == 7, "the last draw has no later one: nothing that was released depends on it"


def test_a_new_sampler_for_each_draw_hides_none(create: Create) -> None:
    tc = create()
    firsts = [next(iter(tc.dp_batches(ROWS, steps=1))) for _ in range(5)]
    take(tc, firsts[4])
    assert charged(tc) == 5


def test_a_draw_that_was_charged_as_left_out_may_still_be_used_and_is_not_charged_again(
    create: Create,
) -> None:
    tc = create()
    draws = list(tc.dp_batches(ROWS, steps=3))
    take(tc, draws[2], draws[0])
    assert (tc.step, charged(tc)) == (2, 3)
    refused(tc, draws[0], "used in an earlier step")


def test_draws_stay_numbered_over_save_load_and_fork(create: Create) -> None:
    tc = create()
    draws = list(tc.dp_batches(ROWS, steps=6))
    take(tc, draws[0])
    saved = tc.save_state().result()
    take(tc, draws[1])
    tc.load_state(saved.artifact_id).result()
    refused(tc, draws[1], "used in an earlier step")
    take(tc, draws[4])
    assert charged(tc) == 5
    fork = tc.fork()
    refused(fork, draws[5], "another training client's")
    take(fork, *fork.dp_batches(ROWS, steps=1))
    assert charged(fork) == charged(tc) == 7, (
        "what the parent drew and left out is charged with the fork's draw"
    )
    fork.close()


def test_draws_of_two_clients_of_one_account_are_each_charged_once(create: Create) -> None:
    one, other = create(dataset_id="letters"), create(dataset_id="letters")
    (first,), (second,) = list(one.dp_batches(ROWS, steps=1)), list(other.dp_batches(ROWS, steps=1))
    take(other, second)
    take(one, first)
    assert (one.step, other.step, charged(one)) == (1, 1, 2)
    stranger = create(dataset_id="others")
    take(stranger, *stranger.dp_batches(ROWS, steps=1))
    assert charged(stranger) == 1


def test_a_budget_counts_what_was_left_out_and_a_draw_it_refuses_is_not_owed(create: Create) -> None:
    tc = create()
    three = tc.what_if(steps=3).epsilon
    tc = create(target_epsilon=three * 1.0001)
    draws = list(tc.dp_batches(ROWS, steps=5))
    tc.forward_backward(draws[4])
    with pytest.raises(DPBudgetExceededError, match="4 draws that were left out"):
        tc.optim_step().result()
    assert charged(tc) == 0
    refused(tc, draws[4], "used in an earlier step")
    take(tc, draws[2])
    assert (tc.step, charged(tc)) == (1, 3)


def test_a_run_that_resumes_draws_nothing_to_throw_it_away(create: Create, service: tn.ServiceClient) -> None:
    tc = create()
    run = tc.fit(tc.dp_batches(ROWS, steps=6), steps=3, checkpoint_every=3, show=False)
    run.result()
    (saved,) = service.list_artifacts()
    again = tc.fit(tc.dp_batches(ROWS, steps=6), resume_from=saved.artifact_id, show=False)
    assert again.result().steps == 3
    assert (tc.step, charged(tc)) == (6, 6)


def changed(draw: BatchData, **fields: Any) -> BatchData:
    values = {
        "input_ids": draw.input_ids,
        "attention_mask": draw.attention_mask,
        "labels": draw.labels,
    } | fields
    return BatchData(**values, extras=dict(draw.extras))


def other_tokens(draw: BatchData) -> BatchData:
    return changed(draw, input_ids=np.where(draw.attention_mask == 1, 5, draw.input_ids))


def other_labels(draw: BatchData) -> BatchData:
    return changed(draw, labels=np.where(draw.labels == -100, -100, 7))


def fewer_labels(draw: BatchData) -> BatchData:
    labels = draw.labels.copy()
    labels[0, np.flatnonzero(labels[0] != -100)[0]] = -100
    return changed(draw, labels=labels)


def two_rows_swapped(draw: BatchData) -> BatchData:
    order = np.arange(len(draw))
    order[:2] = 1, 0
    moved = draw.take(order)
    return BatchData(moved.input_ids, moved.attention_mask, moved.labels, dict(draw.extras))


def added_targets(draw: BatchData) -> BatchData:
    return draw.labelled_with(targets=np.ones((len(draw), 2)))


def without_hashes(draw: BatchData) -> BatchData:
    return BatchData(
        draw.input_ids, draw.attention_mask, draw.labels, {TICKET: draw.extras[TICKET][:, :SEAL]}
    )


@pytest.mark.parametrize(
    ("swap", "reason"),
    [
        (other_tokens, "not the ones that were drawn"),
        (other_labels, "not the ones that were drawn"),
        (fewer_labels, "not the ones that were drawn"),
        (two_rows_swapped, "not the ones that were drawn"),
        (added_targets, "not the ones that were drawn"),
        (without_hashes, "is not a draw's"),
    ],
)
def test_rows_with_another_content_than_was_drawn_are_refused(
    create: Create, swap: Callable[[BatchData], BatchData], reason: str
) -> None:
    tc = create()
    draw = next(draw for draw in tc.dp_batches(ROWS, steps=50) if len(draw) > 2)
    with pytest.raises((PrivacyUnitError, tn.ValidationError), match=reason):
        tc.forward_backward(swap(draw), "mse" if swap is added_targets else None).result()
    with pytest.raises(tn.TGTinkerError):
        tc.optim_step().result()
    assert charged(tc) == 0
    take(tc, draw)
    assert tc.step == 1, "as it was drawn, it may come"


def test_padding_split_and_order_are_no_other_content(create: Create) -> None:
    tc = create()
    draw = next(draw for draw in tc.dp_batches(ROWS, steps=50) if len(draw) > 3)
    more = ((0, 0), (0, 3))
    padded = BatchData(
        np.pad(draw.input_ids, more),
        np.pad(draw.attention_mask, more),
        np.pad(draw.labels, more, constant_values=-100),
        dict(draw.extras),
    )
    backwards = padded.take(np.arange(len(draw))[::-1])
    tc.forward_backward(backwards.rows(0, 2)), tc.forward_backward(backwards.rows(2, len(draw)))
    assert tc.optim_step().result().step == 1


def test_a_seal_needs_the_key_and_covers_targets_and_the_place_in_the_draw() -> None:
    batch = BatchData([[5, 6, 7], [5, 6, 7]], targets=[[1.0, 2.0], [1.0, 3.0]])
    alike = BatchData([[5, 6, 7], [5, 6, 7]])
    columns = ticket("tc-1", 7, 1, np.array([0, 0]))
    same = columns[[0, 0]]
    assert len(set(seals_of(same, batch, b"k" * 32))) == 2
    assert len(set(seals_of(same, alike, b"k" * 32))) == 1
    assert len(set(seals_of(columns, alike, b"k" * 32))) == 2
    assert (seals_of(columns, batch, b"l" * 32) != seals_of(columns, batch, b"k" * 32)).all()
    assert DrawRegister().key != DrawRegister().key


@pytest.mark.parametrize("column", range(SEAL + 1))
def test_a_ticket_that_was_written_anew_is_refused(create: Create, column: int) -> None:
    tc = create()
    draw = next(draw for draw in tc.dp_batches(ROWS, steps=50) if len(draw) > 3)
    forged = draw.extras[TICKET].copy()
    forged[:, column] += 1
    with pytest.raises(PrivacyUnitError):
        tc.forward_backward(draw.labelled_with(**{TICKET: forged})).result()


def test_a_draw_that_says_it_had_fewer_rows_or_none_is_refused(create: Create) -> None:
    tc = create()
    draw = next(draw for draw in tc.dp_batches(ROWS, steps=50) if len(draw) > 3)
    fewer = draw.rows(0, len(draw) - 1)
    forged = fewer.extras[TICKET].copy()
    forged[:, tickets.ROWS] -= 1
    none = forged[:1].copy()
    none[:, tickets.ROWS] = 0
    for wrong in (fewer.labelled_with(**{TICKET: forged}), BatchData.nothing(none)):
        with pytest.raises(PrivacyUnitError, match="tickets differ"):
            tc.forward_backward(wrong).result()
