"""Calls whose rows are decoded together: each gets what it gets alone, whoever joins, ends or fails beside it."""

import math
from collections.abc import Callable
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.engine.accumulation import no_tick
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.sampling import decoding, sampler
from tests.close import assert_close

ASKED: list[tuple[list[list[int]], dict[str, Any]]] = [
    ([[5, 6, 7]], {"max_new_tokens": 14, "ignore_end": True}),
    ([[8], [9, 10, 11, 12, 13]], {"temperature": 0.7, "top_p": 0.9, "num_samples": 2}),
    ([[5, 6, 7]], {"temperature": 0.0, "max_new_tokens": 3}),
    ([[20, 21, 22, 23]], {"top_k": 5, "top_logprobs": 2, "stop": ("e", "a")}),
    ([[8]], {"temperature": 1.5, "stop_tokens": (30, 31, 32), "top_logprobs": 1, "prompt_logprobs": True}),
    ([[30, 31, 32, 33, 34, 35, 36]], {"ignore_end": True, "max_new_tokens": 5}),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tn.TrainingConfig(device="cpu", lora_config=tn.LoRAConfig(rank=4)))


def config(**fields: Any) -> tn.SamplingConfig:
    return tn.SamplingConfig(**{"max_new_tokens": 9, "seed": 3, **fields})


def joining(
    engine: Engine, asked: Any, every: int, told: dict[int, list[Any]] | None = None
) -> list[tn.engine.sampling.sampler.SampleCall]:
    """Let calls join one after the other, `every` so many tokens; return them in the order of their ends."""
    waiting, steps, ended = list(enumerate(asked)), 0, []
    with engine.together("exact") as together:
        while waiting or together.calls:
            if waiting and steps % every == 0:
                number, (prompts, fields) = waiting.pop(0)
                tell = None if told is None else told.setdefault(number, []).append
                together.add(engine.call(prompts, config(**fields), no_tick, tell))
            ended += together.step()
            steps += 1
    return ended


def same(ours: Any, alone: Any) -> None:
    assert [(one.tokens, one.text, one.finish_reason, one.seed) for one in ours] == [
        (one.tokens, one.text, one.finish_reason, one.seed) for one in alone
    ]
    for one, other in zip(ours, alone, strict=True):
        for name in ("logprobs", "raw_logprobs", "entropy"):
            assert_close(getattr(one, name), getattr(other, name), at_least=1)
        assert [[token for token, _ in place] for place in one.top_logprobs] == [
            [token for token, _ in place] for place in other.top_logprobs
        ]


def each_as_alone(engine: Engine, every: int) -> None:
    told: dict[int, list[Any]] = {}
    calls = joining(engine, ASKED, every, told)
    assert len(calls) == len(ASKED)
    for number, (prompts, fields) in enumerate(ASKED):
        (call,) = [call for call in calls if call.sampling == config(**fields)]
        alone: list[Any] = []
        expected = engine.sample(prompts, config(**fields), tell=alone.append)
        same(call.sequences(), expected.sequences)
        assert call.result().prompt_logprobs == expected.prompt_logprobs
        by_row = [
            [(piece.text, piece.tokens) for piece in pieces if piece.sequence == row]
            for pieces in (told[number], alone)
            for row in range(len(expected.sequences))
        ]
        assert by_row[: len(by_row) // 2] == by_row[len(by_row) // 2 :]


@pytest.mark.parametrize("every", [1, 3])
def test_each_call_is_drawn_as_if_it_were_alone_whenever_it_joins(engine: Engine, every: int) -> None:
    each_as_alone(engine, every)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_it_is_so_with_caches_of_transformers(random_model: Any, architecture: str) -> None:
    each_as_alone(
        Engine(tn.TrainingConfig(model_ref=random_model(architecture), device="cpu", dtype="float32")), 2
    )


def test_it_is_so_without_any_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoding._caches, engine.model.causal, False)
    each_as_alone(engine, 2)


def test_who_has_ended_leaves_at_once_and_who_joins_does_not_wait(engine: Engine) -> None:
    ends = [call.sampling.max_new_tokens for call in joining(engine, [ASKED[0], ASKED[5]], 1)]
    assert ends == [5, 14]


@pytest.mark.parametrize("how", ["tick", "tell", "read"])
def test_what_ends_a_call_before_its_end_ends_no_other(
    engine: Engine, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("enough")

    def breaks_later(done: int, total: int) -> None:
        if done == 2:
            breaks()

    original = sampler.rows_of

    def out_of_memory(model: Any, prompts: Any, *rest: Any) -> Any:
        return breaks() if (8,) in prompts else original(model, prompts, *rest)

    if how == "read":
        monkeypatch.setattr(sampler, "rows_of", out_of_memory)
    with engine.together("exact") as together:
        others = [engine.call([[5, 6, 7]], config()), engine.call([[9, 10]], config())]
        tick, tell = breaks_later if how == "tick" else no_tick, breaks if how == "tell" else None
        doomed = engine.call([[8]], config(), tick, tell)
        for call in (others[0], doomed, others[1]):
            together.add(call)
        together.run()
    with pytest.raises(RuntimeError, match="enough"):
        doomed.result()
    monkeypatch.undo()
    for call, prompt in zip(others, ([5, 6, 7], [9, 10]), strict=True):
        same(call.sequences(), engine.sample([prompt], config()).sequences)


def test_where_a_token_of_all_breaks_each_goes_on_by_itself_and_who_breaks_it_again_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    original = sampler.draw

    def breaks(logits: Any, sampling: tn.SamplingConfig, uniforms: Any) -> Any:
        if sampling.temperature == 0.5:
            raise MemoryError("too much")
        return original(logits, sampling, uniforms)

    asked = [
        ([[5, 6], [7, 8, 9]], {"num_samples": 2, "ignore_end": True}),
        ([[5, 6]], {"temperature": 0.5}),
        ([[9, 10, 11]], {"top_logprobs": 2, "stop": ("e",), "max_new_tokens": 14}),
    ]
    with engine.together("exact") as together:
        calls = [engine.call(prompts, config(**fields)) for prompts, fields in asked]
        calls[2].tell = told.append
        for call in calls:
            together.add(call)
        together.step()
        monkeypatch.setattr(sampler, "draw", breaks)
        together.run()
    monkeypatch.undo()
    with pytest.raises(MemoryError, match="too much"):
        calls[1].result()
    for number in (0, 2):
        prompts, fields = asked[number]
        same(calls[number].sequences(), engine.sample(prompts, config(**fields)).sequences)
    assert sum((piece.tokens for piece in told), ()) == calls[2].sequences()[0].tokens


def test_where_each_breaks_by_itself_all_fail_and_the_next_are_drawn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise MemoryError("too much")

    ended: list[Any] = []
    with engine.together("exact") as together:
        calls = [engine.call([[5, 6]], config()) for _ in range(2)]
        for call in calls:
            together.add(call)
        together.step()
        monkeypatch.setattr(sampler, "draw", breaks)
        together.run(ended=ended.append)
        assert ended == calls and all(isinstance(call.failure, MemoryError) for call in calls)
        monkeypatch.undo()
        together.add(after := engine.call([[5, 6]], config()))
        together.run()
    same(after.sequences(), engine.sample([[5, 6]], config()).sequences)


def rows_inside(monkeypatch: pytest.MonkeyPatch, note: Callable[[sampler.Together], None]) -> None:
    step = sampler.Together._draw

    def noted(self: sampler.Together, logits: Any) -> None:
        note(self)
        step(self, logits)

    monkeypatch.setattr(sampler.Together, "_draw", noted)


def test_no_more_rows_are_inside_than_there_is_room_for_and_each_call_has_its_share(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "TOKENS_AT_ONCE", 60)
    inside: list[list[int]] = []
    calls: list[sampler.SampleCall] = []
    rows_inside(
        monkeypatch,
        lambda here: inside.append([sum(row in call.rows for row in here._rows) for call in calls]),
    )
    with engine.together("exact") as together:
        for prompt, samples in (([5], 20), ([6], 3)):
            calls.append(engine.call([[*prompt]], config(num_samples=samples, ignore_end=True)))
            together.add(calls[-1])
        together.run()
    assert max(map(sum, inside)) == 6, "of ten tokens each"
    assert inside[0] == [3, 3] and inside[-1][1] == 0
    for call in calls:
        alone = engine.sample([call.rows[0].prompt], config(num_samples=len(call.rows), ignore_end=True))
        same(call.sequences(), alone.sequences)


def test_seeds_that_the_client_gives_out_follow_the_order_of_the_calls() -> None:
    one, other = (Engine(tn.TrainingConfig(device="cpu")) for _ in range(2))
    asked = config(seed=None)
    with one.together("exact") as together:
        calls = [one.call([[5, 6, number]], asked) for number in range(8, 12)]
        for call in reversed(calls):
            together.add(call)
        together.run()
    for number, call in enumerate(calls):
        same(call.sequences(), other.sample([[5, 6, 8 + number]], asked).sequences)


def test_weights_that_are_no_numbers_draw_no_sample(engine: Engine) -> None:
    weight = engine.parameters[0]
    before = weight.detach().clone()
    told: list[Any] = []
    try:
        weight.detach().fill_(math.nan)
        with pytest.raises(tn.NonFiniteLossError, match=r"NaN or infinite.*load_state\(\)"):
            engine.sample([[5, 6, 7], [8]], config(), tell=told.append)
    finally:
        weight.detach().copy_(before)
    assert told == []
    assert engine.sample([[5, 6, 7]], config()).sequences[0].tokens
