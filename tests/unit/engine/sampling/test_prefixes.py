"""Conversations that go on: what was read of them is not read again, and what is drawn is what it would have been."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.sampling import decoding, prefixes, sampler
from tests.close import assert_close

STARTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 7]]
BATCH = tn.BatchData([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tn.TrainingConfig(device="cpu", lora_config=tn.LoRAConfig(rank=4)))


@pytest.fixture
def read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """How many rows and tokens were read at once, call by call; nothing is known yet."""
    forget(engine)
    shapes: list[tuple[int, ...]] = []
    original = decoding.Decoder._read

    def noted(self: Any, ids: Any, positions: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return original(self, ids, positions)

    monkeypatch.setattr(decoding.Decoder, "_read", noted)
    yield shapes


def talk(
    engine: Engine, between: Callable[[Engine], object] = lambda engine: None, turns: int = 3, **fields: Any
) -> list[Any]:
    """Let conversations go on, each told another number of tokens after each turn; return all that was said."""
    asked, said = [tuple(start) for start in STARTS], []
    for turn in range(turns):
        prompts = [{"tokens": ids, "stream": number} for number, ids in enumerate(asked)]
        config = tn.SamplingConfig(**{"max_new_tokens": 6, "seed": 7, **fields})
        drawn = engine.sample(prompts, config).sequences
        going = [(ids, one) for ids, one in zip(asked, drawn, strict=True) if one.finish_reason != "length"]
        said += drawn
        asked = [ids + one.tokens + (20, 21, 22)[: 1 + (turn + n) % 3] for n, (ids, one) in enumerate(going)]
        between(engine)
    return said


def forget(engine: Engine) -> None:
    engine.prefixes = engine.turns = None


@pytest.mark.parametrize(
    "fields",
    [
        {"ignore_end": True},
        {"temperature": 2.0, "stop": ("a", "e")},
        {"temperature": 0.0, "ignore_end": True},
    ],
)
def test_what_is_drawn_is_what_reading_all_of_it_again_gives(engine: Engine, fields: dict[str, Any]) -> None:
    kept, anew = talk(engine, **fields), talk(engine, forget, **fields)
    assert [one.tokens for one in kept] == [one.tokens for one in anew]
    assert [one.finish_reason for one in kept] == [one.finish_reason for one in anew]
    for a, b in zip(kept, anew, strict=True):
        assert_close(a.raw_logprobs, b.raw_logprobs, at_least=1)


def test_a_turn_reads_what_is_new_alone(engine: Engine, read: list[tuple[int, ...]]) -> None:
    talk(engine, ignore_end=True)
    assert read == [(3, 5), (4, 4), (4, 4)], "the last token of the turn before, and what it was told"
    forget(engine), read.clear()
    talk(engine, forget, ignore_end=True)
    assert read == [(3, 5), (4, 14), (4, 21)]


def test_conversations_that_take_turns_are_kept_as_well(
    engine: Engine, read: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = talk(engine, ignore_end=True)
    forget(engine), read.clear()
    monkeypatch.setattr(sampler, "TOKENS_AT_ONCE", 60)
    apart = talk(engine, ignore_end=True)
    assert [one.tokens for one in apart] == [one.tokens for one in together]
    assert len(read) > 3 and max(width for _, width in read) == 5


@pytest.mark.parametrize(
    "between",
    [
        lambda engine: (
            engine.forward_backward(BATCH, tn.losses.resolve_loss("token_ce")),
            engine.optim_step(),
        ),
        lambda engine: engine.compute_logprobs(BATCH),
        lambda engine: engine.load_adapter(engine.read_adapter().tensors),
        lambda engine: engine.restore(engine.capture(True)),
    ],
    ids=["a step", "a score", "an adapter", "a state"],
)
def test_it_is_read_anew_once_something_else_was_computed_or_loaded(
    between: Callable[[Engine], object], read: list[tuple[int, ...]]
) -> None:
    own = Engine(tn.TrainingConfig(device="cpu", lora_config=tn.LoRAConfig(rank=4)))
    talk(own, between, turns=2, ignore_end=True)
    assert read[-1] == (4, 14)


def test_what_does_not_go_on_from_it_is_read_anew(engine: Engine, read: list[tuple[int, ...]]) -> None:
    config = tn.SamplingConfig(max_new_tokens=4, seed=7, ignore_end=True)
    (said,) = engine.sample([{"tokens": [5, 6], "stream": 1}], config).sequences
    engine.sample([[30, 31]], config)  # somebody else's call takes nothing away
    engine.sample([{"tokens": [5, 9, *said.tokens, 8], "stream": 1}], config)
    engine.sample([{"tokens": [5, 9], "stream": 1}], config)
    engine.sample([{"tokens": [5, 9, 3, 4, 5], "stream": 2}], config)
    assert read == [(1, 2), (1, 2), (1, 7), (1, 2), (1, 5)]


def test_no_more_is_kept_than_there_is_room_for(
    engine: Engine, read: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "MOST_BYTES", 1000)
    talk(engine, turns=2, ignore_end=True)
    assert read == [(3, 5), (4, 14)]


def test_other_architectures_read_all_of_it_again(random_model: Any, read: list[tuple[int, ...]]) -> None:
    talk(Engine(tn.TrainingConfig(model_ref=random_model("gpt2"), device="cpu")), turns=2, ignore_end=True)
    assert (4, 14) in read


BEGINNING = [3 + (7 * place) % 200 for place in range(40)]


def asked(*rests: list[int], **fields: Any) -> tuple[list[list[int]], tn.SamplingConfig]:
    config = tn.SamplingConfig(**{"max_new_tokens": 6, "seed": 7, "ignore_end": True, **fields})
    return [[*BEGINNING, *rest] for rest in rests], config


def drawn(engine: Engine, prompts: Any, config: tn.SamplingConfig) -> Any:
    """Draw as it is done for those who may have others beside them."""
    with engine.together("exact") as together:
        together.add(call := engine.call(prompts, config))
        together.run()
    return call.sequences()


def test_a_long_beginning_that_prompts_share_is_read_once_and_not_again(
    engine: Engine, read: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "PAYS_FROM", 80)
    prompts, config = asked([5], [6, 7, 8], [9, 10], num_samples=2)
    together = drawn(engine, prompts, config)
    assert read == [(1, 40), (3, 3)]
    read.clear()
    drawn(engine, asked([20], [21])[0], config)
    assert read == [(2, 1)], "another call knows it"
    alone = [one for prompt in prompts for one in engine.sample([prompt], config).sequences]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    for a, b in zip(together, alone, strict=True):
        assert_close(a.raw_logprobs, b.raw_logprobs, at_least=1)


def test_a_question_that_goes_on_from_an_answer_reads_what_is_new(
    engine: Engine, read: list[tuple[int, ...]]
) -> None:
    (prompt,), config = asked([5])
    (said,) = drawn(engine, [prompt], config)
    longer = [*prompt, *said.tokens, 30, 31]
    (again,) = drawn(engine, [longer], config)
    assert read == [(1, 41), (1, 3)], "the last token that was said nobody has read"
    (anew,) = engine.sample([longer], config).sequences
    assert again.tokens == anew.tokens
    assert_close(again.raw_logprobs, anew.raw_logprobs, at_least=1)


def test_what_is_drawn_alone_is_the_same_to_the_last_bit_whatever_was_read_before(
    engine: Engine, read: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "PAYS_FROM", 40)
    prompts, config = asked([5], [6, 7], alone=True)
    first = engine.sample(prompts, config)
    drawn(engine, prompts, config.replace(alone=False))
    assert engine.sample(prompts, config) == first
    assert read == [(1, 40), (2, 2)] * 3, "what they share is read once all the same"


def test_who_joins_others_goes_on_from_what_they_have_read(
    engine: Engine, read: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "PAYS_FROM", 40)
    prompts, config = asked([5], [6])
    with engine.together("exact") as together:
        calls = [engine.call([prompt], config) for prompt in prompts]
        together.add(calls[0])
        together.step()
        for call in (calls[1], third := engine.call([[*BEGINNING, 50]], config)):
            together.add(call)
        together.run()
    assert read == [(1, 41), (2, 1)]
    forget(engine)
    alone = engine.sample([*prompts, [*BEGINNING, 50]], config).sequences
    assert [call.sequences()[0].tokens for call in (*calls, third)] == [one.tokens for one in alone]


def read_of(*lengths: int) -> prefixes.Read:
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    values = (mask.cumsum(1) * 1.0)[:, None, :, None]  # the place of each token in its row
    return prefixes.Read([(values, -values)], mask)


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(kept=st.lists(sequences, max_size=6), prompts=sequences)
def test_of_each_prompt_as_much_is_known_as_any_that_was_kept_has_in_common_with_it(
    kept: list[list[tuple[int, ...]]], prompts: list[tuple[int, ...]]
) -> None:
    known = prefixes.Prefixes((0, "exact"), torch.device("cpu"))
    for few in kept:
        known.keep(few, read_of(*map(len, few)))
    lengths = []
    for prompt in prompts:
        shared = [prefixes.common(prompt, tokens) for few in kept for tokens in few]
        lengths.append(min(max(shared, default=0), len(prompt) - 1))
        assert known.known(prompt) == lengths[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "SAVES_FROM", 1)
        taken = known.take(prompts)
    if taken is not None:
        expected = read_of(*lengths)
        assert torch.equal(taken.mask, expected.mask)
        assert torch.equal(taken.layers[0][0], expected.layers[0][0])


def test_what_was_used_longest_ago_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MOST_BYTES", 3 * read_of(8).size)
    known = prefixes.Prefixes((0, "exact"), torch.device("cpu"))
    rows = [tuple(range(start, start + 8)) for start in (10, 20, 30, 40)]
    for row in rows[:3]:
        known.keep([row], read_of(8))
    known.take([(*rows[0], 1)])
    known.keep([rows[3]], read_of(8))
    assert [known.known((*row, 1)) for row in rows] == [8, 0, 8, 8]
    known.keep([(*rows[0], 1)], read_of(9))  # in place of what it goes on from
    assert [known.known((*row, 2)) for row in rows] == [8, 0, 0, 8]
