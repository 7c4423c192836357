"""Pieces of a batch: every row once, within the limit, and never more expensive than another way to divide it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb.engine import micro_batches
from tensafe_nb.engine.engine import Engine
from tensafe_nb.losses import resolve_loss
from tests.close import assert_close

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def padded(lengths: list[int], *, left: bool = False) -> np.ndarray:
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return mask[:, ::-1] if left else mask


def cost(divided: list[np.ndarray], lengths: list[int], overhead: int) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) + overhead for rows in divided)


@given(LENGTHS, st.integers(1, 100), st.integers(0, 50), st.booleans())
def test_every_row_is_in_one_piece_and_no_piece_holds_too_much(
    lengths: list[int], most: int, overhead: int, left: bool
) -> None:
    divided = micro_batches.by_length(padded(lengths, left=left), most, overhead)
    assert sorted(np.concatenate(divided)) == list(range(len(lengths)))
    for rows in divided:
        assert list(rows) == sorted(rows)
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= most


@given(LENGTHS, st.integers(1, 100), st.integers(0, 50))
def test_no_other_division_of_the_rows_costs_less(lengths: list[int], most: int, overhead: int) -> None:
    found = cost(micro_batches.by_length(padded(lengths), most, overhead), lengths, overhead)
    for labels in itertools.product(range(len(lengths)), repeat=len(lengths)):
        if len(lengths) > 5:
            return  # too many ways
        other = [np.flatnonzero(np.array(labels) == label) for label in set(labels)]
        if all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= most for rows in other):
            assert found <= cost(other, lengths, overhead)


@given(LENGTHS, st.integers(0, 50), st.integers(0, 9))
def test_packing_never_costs_more_and_packs_each_token_once(
    lengths: list[int], overhead: int, block: int
) -> None:
    mask = padded(lengths)

    def priced(divided: list[np.ndarray], packs: bool) -> int:
        return sum(price(rows, packs) + overhead for rows in divided)

    def price(rows: np.ndarray, packs: bool) -> int:
        own = [lengths[row] for row in rows]
        apart = sum(own) + block * len(set(own))
        return min(apart, len(own) * max(own)) if packs else len(own) * max(own)

    found = micro_batches.by_length(mask, 1_000, overhead, block)
    assert sorted(np.concatenate(found)) == list(range(len(lengths)))
    assert priced(found, True) <= priced(micro_batches.by_length(mask, 1_000, overhead), False)
    packed = micro_batches.blocks_of(mask, block)
    assert (packed is None) == (price(np.arange(len(lengths)), True) == len(lengths) * max(lengths))
    if packed is not None:
        order, blocks = packed
        assert [length for count, length in blocks for _ in range(count)] == [lengths[row] for row in order]


def test_rows_with_gaps_are_not_packed() -> None:
    assert micro_batches.blocks_of(np.array([[1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]), 0) is None


def test_rows_of_like_length_come_together_and_one_piece_is_kept_where_pieces_cost_more() -> None:
    mask = padded([4, 40, 5, 39])
    assert [list(rows) for rows in micro_batches.by_length(mask, 1_000, overhead=10)] == [[0, 2], [1, 3]]
    assert [list(rows) for rows in micro_batches.by_length(mask, 1_000, overhead=100)] == [[0, 1, 2, 3]]


def test_a_batch_padded_on_both_sides_is_divided_by_its_width() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
    assert [len(rows) for rows in micro_batches.by_length(mask, 8, overhead=0)] in ([1, 2], [2, 1], [1, 1, 1])


def test_the_further_piece_costs_a_large_model_few_tokens_and_an_accelerator_many() -> None:
    small, large = (micro_batches.overhead_in_tokens(n, accelerator=False) for n in (1_700_000, 135_000_000))
    assert 25 < large < small < 100 < micro_batches.overhead_in_tokens(1_700_000, accelerator=True)


# through the engine


@pytest.fixture
def engine() -> Engine:
    return Engine(tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=4), dtype="float32", device="cpu"))


def ragged() -> tn.BatchData:
    rng = np.random.default_rng(0)
    return tn.BatchData(rng.integers(3, 200, (6, 60)), padded([3, 60, 5, 58, 4, 9]))


def shapes(engine: Engine, loss: str, batch: tn.BatchData) -> list[tuple[int, ...]]:
    return [
        part.shape
        for _, part in engine.forward_pass.micro_batches(batch, resolve_loss(loss), lambda *_: None)
    ]


def test_a_ragged_batch_computes_little_padding_and_gives_the_same_loss_and_gradient(engine: Engine) -> None:
    batch, loss, found = ragged(), resolve_loss("token_ce"), []
    assert shapes(engine, "token_ce", batch) == [(6, 60)], "its rows are packed"
    engine.forward_pass.block = None
    assert shapes(engine, "token_ce", batch) == [(4, 9), (2, 60)]
    for overhead in (10**6, engine.forward_pass.overhead):
        engine.forward_pass.overhead = overhead
        result = engine.forward_backward(batch, loss)
        found.append((result, torch.cat([p.grad.flatten() for p in engine.parameters if p.grad is not None])))
        engine.discard_gradients()
    (whole, expected), (divided, gradient) = found
    assert divided.loss == pytest.approx(whole.loss, rel=1e-6)
    assert divided.weight == whole.weight
    assert_close(gradient, expected)


def test_logprobs_come_back_at_their_own_rows(engine: Engine) -> None:
    batch = ragged()
    apart = np.concatenate(
        [np.pad(engine.compute_logprobs(part).logprobs, ((0, 0), (0, 60 - part.shape[1])))
         for part in (batch.rows(row, row + 1) for row in range(6))]
    )  # fmt: skip
    assert_close(engine.compute_logprobs(batch).logprobs, apart)
    scored = engine.forward(batch, resolve_loss("token_ce"), return_logprobs=True)
    assert_close(scored.logprobs, apart)


def test_a_loss_that_does_not_say_that_it_sees_rows_one_by_one_gets_them_together_in_their_order(
    engine: Engine,
) -> None:
    seen = []

    def mean_of_what_is_there(outputs, batch):
        seen.append(batch["input_ids"].clone())
        return -outputs.logprobs.mean()

    batch = ragged()
    engine.forward_backward(batch, resolve_loss(mean_of_what_is_there))
    assert len(seen) == 1
    assert (seen[0].numpy() == batch.input_ids).all()
