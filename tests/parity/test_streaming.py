"""Pieces of what is sampled come while it is drawn, and add up to it."""

import asyncio
from collections.abc import Sequence

import pytest

import tensafe_nb as tn
from tensafe_nb.protocol.results import SampledPiece, SampledSequence
from tests.parity.serving import Gate, eventually


def joined(pieces: list[SampledPiece], count: int) -> list[str]:
    texts = [""] * count
    for piece in pieces:
        texts[piece.sequence] += piece.text
    return texts


def check_whole(pieces: Sequence[SampledPiece], sequence: SampledSequence) -> None:
    """Hold the pieces of a sequence against it: text, tokens, their logprobs, and why it ended."""
    assert "".join(piece.text for piece in pieces) == sequence.text
    for name in ("tokens", "logprobs", "raw_logprobs"):
        assert sum((getattr(piece, name) for piece in pieces), ()) == getattr(sequence, name)
    ends = [piece.finish_reason for piece in pieces]
    assert ends == [None] * (len(ends) - 1) + [sequence.finish_reason]


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
    for number, sequence in enumerate(handle.sequences):
        check_whole([piece for piece in pieces if piece.sequence == number], sequence)
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


def test_pieces_end_with_the_error_of_an_operation_that_failed_and_without_stream_are_refused(
    tc: tn.TrainingClient,
) -> None:
    with pytest.raises(tn.ValidationError, match="vocabulary"):
        list(tc.sample([1, 2, 999_999], stream=True).pieces())
    for whole in (tc.sample("def ", max_new_tokens=2), tc.forward({"input_ids": [[5, 6]]})):
        with pytest.raises(
            tn.ValidationError, match=r"not told in pieces.*tc\.sample\(prompts, stream=True\)"
        ):
            whole.pieces()
    handle = tc.sample(["def "] * 8, stream=True, max_new_tokens=400, ignore_end=True)
    pieces = iter(handle.pieces())
    assert next(pieces).text
    assert handle.cancel()
    with pytest.raises(tn.FutureCancelledError):
        list(pieces)


def test_a_stream_draws_what_sample_draws_and_can_be_read_again(tc: tn.TrainingClient) -> None:
    async def read(pieces: tn.futures.Pieces) -> list[SampledPiece]:
        return [piece async for piece in pieces]

    stream = tc.stream("import ", max_new_tokens=12, seed=7)
    pieces = asyncio.run(read(stream))
    assert len(pieces) > 1 and pieces == list(stream)
    (sequence,) = tc.sample("import ", max_new_tokens=12, seed=7).sequences
    check_whole(pieces, sequence)
    assert stream.handle.sequences == (sequence,)
    chat = [{"role": "user", "content": "Hi"}]
    check_whole(
        list(tc.stream(chat, max_new_tokens=6, seed=2)),
        tc.sample(chat, max_new_tokens=6, seed=2).sequences[0],
    )


@pytest.mark.parametrize("way", ["async for", "for"])
def test_who_leaves_the_loop_ends_the_sampling(tc: tn.TrainingClient, way: str) -> None:
    stream = tc.stream("def ", max_new_tokens=500, ignore_end=True, seed=1)
    behind = tc.sample("def ", max_new_tokens=1)

    async def leave() -> None:
        async for piece in stream:
            assert piece.tokens
            break

    if way == "async for":
        asyncio.run(leave())
    else:
        for _piece in stream:
            break
    assert isinstance(stream.handle.exception(), tn.FutureCancelledError)
    assert behind.result().sequences, "what waited behind it goes on"


def test_a_task_that_is_cancelled_ends_its_sampling(tc: tn.TrainingClient) -> None:
    stream = tc.stream("def ", max_new_tokens=500, ignore_end=True)

    async def read(begun: asyncio.Event) -> None:
        async for _piece in stream:
            begun.set()

    async def give_up() -> None:
        begun = asyncio.Event()
        reading = asyncio.create_task(read(begun))
        await begun.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(give_up())
    assert isinstance(stream.handle.exception(), tn.FutureCancelledError)


def test_a_stream_waits_for_what_was_submitted_before(tc: tn.TrainingClient, gate: Gate) -> None:
    before = tc.forward({"input_ids": [[5, 6, 7, 8]]}, loss_fn=gate.name)
    stream = tc.stream("def ", max_new_tokens=2, ignore_end=True)
    assert gate.reached.wait(20)
    eventually(lambda: stream.handle.queue_position == 0)  # a client elsewhere is told
    assert not before.done()
    gate.opened.set()
    assert len(sum((piece.tokens for piece in stream), ())) == 2 and before.done()


def test_a_stream_is_of_one_completion(tc: tn.TrainingClient) -> None:
    with pytest.raises(tn.ValidationError, match="one completion of one prompt"):
        tc.stream(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(tn.ValidationError, match="one completion of one prompt"):
        tc.stream("a", tn.SamplingConfig(num_samples=2))
    with pytest.raises(tn.ValidationError, match="vocabulary"):
        list(tc.stream([1, 2, 999_999]))


@pytest.mark.transports("http")
def test_pieces_are_whole_where_a_proxy_holds_streams_back(tc: tn.TrainingClient) -> None:
    tc.ready().result()
    tc._channel.requests.streams_held_back = True  # type: ignore[attr-defined]
    with tn.ServiceClient() as other:
        polled = other.get_training_client(tc.training_client_id)
        polled._channel.requests.streams_held_back = True  # type: ignore[attr-defined]
        stream = polled.stream("import ", max_new_tokens=40, ignore_end=True, seed=7)
        pieces = list(stream)
        check_whole(pieces, stream.handle.sequences[0])
