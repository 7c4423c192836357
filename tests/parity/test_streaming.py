"""Pieces of what is sampled come while it is drawn, and add up to it."""

import asyncio

import pytest

import tensafe_nb as tn
from tensafe_nb.protocol.results import SampledPiece


def joined(pieces: list[SampledPiece], count: int) -> list[str]:
    texts = [""] * count
    for piece in pieces:
        texts[piece.sequence] += piece.text
    return texts


@pytest.mark.parametrize(
    "fields",
    [{"num_samples": 3}, {"stop": ["e", "return"]}, {"ignore_end": True}, {"temperature": 0.0}],
    ids=lambda fields: next(iter(fields)),
)
def test_the_pieces_of_a_sample_add_up_to_its_texts(tc: tn.TrainingClient, fields: dict[str, object]) -> None:
    prompts = ["def add(a, b):", "import ", "Grüße, 世界: "]
    handle = tc.sample(prompts, stream=True, max_new_tokens=12, seed=5, **fields)
    pieces = list(handle.pieces())
    assert joined(pieces, len(handle.texts)) == handle.texts
    assert len(pieces) > len(handle.texts), "more than one piece each"
    assert list(handle.pieces()) == pieces, "each loop begins with the first"
    assert tc.sample(prompts, max_new_tokens=12, seed=5, **fields).texts == handle.texts


def test_pieces_can_be_awaited_while_the_loop_does_other_things(tc: tn.TrainingClient) -> None:
    async def both() -> tuple[list[SampledPiece], int]:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        handle = tc.sample("def ", stream=True, max_new_tokens=20)
        pieces = [piece async for piece in handle.pieces()]
        counting.cancel()
        assert joined(pieces, 1) == handle.texts
        return pieces, turns

    pieces, turns = asyncio.run(both())
    assert len(pieces) > 1 and turns > 1


def test_pieces_end_with_the_error_of_an_operation_that_failed_and_without_stream_there_are_none(
    tc: tn.TrainingClient,
) -> None:
    with pytest.raises(tn.ValidationError, match="vocabulary"):
        list(tc.sample([1, 2, 999_999], stream=True).pieces())
    assert list(tc.sample("def ", max_new_tokens=2).pieces()) == []
    handle = tc.sample(["def "] * 8, stream=True, max_new_tokens=400, ignore_end=True)
    pieces = iter(handle.pieces())
    assert next(pieces).text
    assert handle.cancel()
    with pytest.raises(tn.FutureCancelledError):
        list(pieces)
