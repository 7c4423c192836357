"""Decoding with copies: packed ones say what the model says, rough ones guess, and what is drawn stays the same."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.engine.sampling import copies, native, products, sampler
from tensafe_nb.engine.sampling.decoding import LARGE, Decoder
from tensafe_nb.losses import resolve_loss
from tests.close import assert_close

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama with a vocabulary that is large, for which tokens race."""
    path = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=LARGE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=True,
        initializer_range=0.3,  # says something: some tokens are likely
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / name, path / name)
    return str(path)


def engine_of(folder: str, **fields: Any) -> Engine:
    lora = tn.LoRAConfig(rank=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    engine = Engine(
        tn.TrainingConfig(
            **{"model_ref": folder, "device": "cpu", "dtype": "float32", "lora_config": lora, **fields}
        )
    )
    torch.manual_seed(1)
    for name, weight in engine.model.trainable:
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return engine


@pytest.fixture(scope="module")
def engine(folder: str) -> Engine:
    return engine_of(folder)


@pytest.fixture(autouse=True)
def _pays_for_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "PAYS_FROM_NUMBERS", 1)
    monkeypatch.setattr(copies, "GUESSES_PAY_FROM_TOKENS", 1)
    monkeypatch.setattr(copies, "sums_int8", lambda: True)  # elsewhere they are only worse


def drawn(
    engine: Engine, config: tn.SamplingConfig, prompts: Any = PROMPTS[:1], *, plain: bool = False
) -> Any:
    """Return what is drawn and told, with copies or by the modules as they are."""
    told: list[Any] = []
    engine.copied = None
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(sampler, "copies_of", lambda *_, **__: None)
        sequences = engine.sample(prompts, config, tell=told.append).sequences
        assert plain or engine.copied.copies is not None
    return sequences, told


@settings(max_examples=12, deadline=None)
@given(
    prompt=st.lists(st.integers(3, 250), min_size=1, max_size=8),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([0, 50]),
    top_logprobs=st.sampled_from([0, 2]),
    stops=st.lists(st.integers(0, LARGE - 1), max_size=3),
)
def test_guessing_draws_what_is_drawn_token_by_token(
    engine: Engine, prompt: list[int], stops: list[int], **fields: Any
) -> None:
    config = tn.SamplingConfig(max_new_tokens=20, stop_tokens=stops, **fields)
    (ours,), told = drawn(engine, config, [prompt])
    (plain,), told_plainly = drawn(engine, config, [prompt], plain=True)
    assert (ours.tokens, ours.text, ours.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
    assert_close(ours.logprobs, plain.logprobs, at_least=1)
    assert_close(ours.raw_logprobs, plain.raw_logprobs, at_least=1)
    assert_close(ours.entropy, plain.entropy, at_least=1)
    assert [[t for t, _ in places] for places in ours.top_logprobs] == [
        [t for t, _ in places] for places in plain.top_logprobs
    ]
    assert [(piece.text, piece.tokens) for piece in told] == [(p.text, p.tokens) for p in told_plainly]


def test_some_guesses_come_true_and_some_do_not(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int]] = []
    add = sampler.Luck.add
    monkeypatch.setattr(
        sampler.Luck, "add", lambda self, true, made: (counted.append((true, made)), add(self, true, made))[1]
    )
    drawn(engine, tn.SamplingConfig(max_new_tokens=64, seed=1, ignore_end=True))
    true, made = np.sum(counted, 0)
    assert 0 < true < made


def test_several_rows_are_drawn_as_each_alone(engine: Engine) -> None:
    config = tn.SamplingConfig(max_new_tokens=16, seed=4, num_samples=2, ignore_end=True)
    together, _ = drawn(engine, config, PROMPTS)
    plain, _ = drawn(engine, config, PROMPTS, plain=True)
    assert [row.tokens for row in together] == [row.tokens for row in plain]
    (alone,), _ = drawn(engine, tn.SamplingConfig(max_new_tokens=16, seed=4, ignore_end=True), PROMPTS[1:2])
    assert alone.tokens == together[2].tokens


def test_a_conversation_goes_on_from_what_was_kept_of_guessed_tokens(engine: Engine) -> None:
    config = tn.SamplingConfig(max_new_tokens=20, seed=5, ignore_end=True)
    (first,) = engine.sample([{"tokens": PROMPTS[0], "stream": 0}], config).sequences
    stop = tn.SamplingConfig(max_new_tokens=20, seed=5, stop_tokens=[first.tokens[9]])
    answers = []
    for fresh in (False, True):
        engine.turns = None
        turn = engine.sample([{"tokens": PROMPTS[0], "stream": 0}], stop).sequences[0]
        assert turn.finish_reason == "stop"
        assert engine.turns is not None
        longer = [*PROMPTS[0], *turn.tokens, 17, 18]
        assert (
            engine.turns.known(tuple(longer)) == len(longer) - 3
        )  # all but the token drawn last, and what is new
        engine.turns = None if fresh else engine.turns
        answers.append(engine.sample([{"tokens": longer, "stream": 0}], config).sequences[0])
    assert answers[0].tokens == answers[1].tokens
    assert_close(answers[0].logprobs, answers[1].logprobs, at_least=1)


def test_others_join_a_row_that_guesses_and_leave_it_to_guess_again(engine: Engine) -> None:
    asked = [tn.SamplingConfig(max_new_tokens=most, seed=4, ignore_end=True) for most in (40, 6, 9)]
    engine.copied, calls = None, []
    with engine.together("exact") as together:
        for prompt, config in zip(PROMPTS, asked, strict=True):
            calls.append(engine.call([prompt], config))
            together.add(calls[-1])
            together.step()
        while together.calls:
            together.step()
    assert calls[0].luck.made > sampler.Luck().made
    for call, prompt, config in zip(calls, PROMPTS, asked, strict=True):
        (ours,), ((plain,), _) = call.sequences(), drawn(engine, config, [prompt], plain=True)
        assert ours.tokens == plain.tokens
        assert_close(ours.raw_logprobs, plain.raw_logprobs, at_least=1)


def test_sampled_logprobs_are_those_of_training_also_after_a_step(folder: str, batch: tn.BatchData) -> None:
    engine = engine_of(folder, optimizer=tn.OptimizerConfig(learning_rate=1e-2))
    config = tn.SamplingConfig(max_new_tokens=20, seed=3, ignore_end=True)
    for _ in range(2):
        for sequence in engine.sample(PROMPTS[:1], config).sequences:
            ids, start = [*sequence.prompt_tokens, *sequence.tokens], len(sequence.prompt_tokens) - 1
            labels = [*([-100] * start), *sequence.tokens, -100]
            scored = engine.compute_logprobs(tn.BatchData([ids], labels=[labels])).logprobs[0, start:-1]
            assert_close(scored, sequence.raw_logprobs, at_least=1)
        engine.forward_backward(batch, resolve_loss("token_ce"))
        engine.optim_step()


def test_copies_are_kept_until_something_else_is_computed_and_int8_ones_of_frozen_weights_for_good(
    folder: str, batch: tn.BatchData, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, config = engine_of(folder), tn.SamplingConfig(max_new_tokens=16, seed=3)
    engine.sample(PROMPTS[:1], config)
    assert engine.copied is not None
    first = engine.copied.copies
    monkeypatch.setitem(copies.FAST, "int8", (None, 0.5))  # nothing is quantised any more
    engine.sample(PROMPTS[:1], config)
    assert engine.copied.copies is first
    engine.forward_backward(batch, resolve_loss("token_ce"))
    assert engine.copied is None
    monkeypatch.setattr(copies, "works", lambda *_: True)
    engine.sample(PROMPTS[:1], config)
    assert engine.copied.copies is not first


def test_there_are_none_where_they_would_not_pay_fit_or_be_the_same(
    engine: Engine, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(model: Any = engine.model, tokens: int = 64, rows: int = 1) -> copies.Copies | None:
        return copies.copies_of(model, tokens, rows)

    compiled = native.library()
    monkeypatch.setattr(native, "library", lambda: None)  # without it a single row is quicker by columns
    assert found() is not None
    assert found(tokens=copies.PAYS_FROM_TOKENS - 1) is None
    with engine.model.peft.disable_adapter():
        assert found() is None
    assert found(engine_of(folder, dtype="bfloat16").model) is None
    several, trained = found(rows=2), engine_of(folder, lora_config=None).model
    assert several is not None
    assert several.rough is None  # many guesses at once cost more than they bring
    assert found(trained) is None  # would be quantised anew for each call
    assert found(trained, rows=2) is not None
    for name, instead in {
        "works": lambda of, _: of is products.in_float32,  # a torch that no longer quantises
        "sums_int8": lambda: False,
        "GUESSES_PAY_FROM_TOKENS": 65,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(copies, name, instead)
            assert found() is None
            assert found(rows=2) is not None
            if compiled is not None:
                patch.setattr(native, "library", lambda: compiled)
                exact = found()
                assert exact is not None
                assert exact.rough is None
    monkeypatch.setattr(copies.memory, "available", lambda device: 1000)
    assert found() is None


@pytest.mark.parametrize("name", ["in_float32", "in_int8"])
def test_what_this_torch_lacks_or_multiplies_otherwise_is_not_used(name: str) -> None:
    def lacking(weight: torch.Tensor, bias: Any) -> Any:
        raise AttributeError(name)

    assert not products.works(lacking, 1.0)
    assert not products.works(lambda weight, bias: lambda x: x @ weight.T + 1, 1e-4)


def test_guesses_are_rough_and_know_the_adapter(engine: Engine) -> None:
    with torch.no_grad():
        decoder = Decoder(engine.model, PROMPTS[:1], [1], 8, None, copies.copies_of(engine.model, 64, 1))
        guessed = decoder.guess(4)
        decoder.verify(1, [4])
        exact = decoder.logits
        with engine.model.peft.disable_adapter():
            bare = Decoder(engine.model, [[*PROMPTS[0], 4]], [1], 8).logits
    off = [float((logits - exact).abs().mean()) for logits in (guessed, bare)]
    assert 0 < off[0] < off[1]


def test_guesses_that_never_come_true_are_given_up_and_good_ones_grow_longer() -> None:
    good, bad = sampler.Luck(), sampler.Luck()
    for _ in range(20):
        good.add(5, 5)
        bad.add(0, 5)
    assert bad.worth == 0
    assert 0 < sampler.Luck().worth < good.worth


def test_winners_of_the_race_follow_the_distribution_and_hardly_change_with_it() -> None:
    generator = np.random.default_rng(0)
    places = torch.tensor([0, 255, 256, 9_000, LARGE - 1])
    uniforms = torch.from_numpy(generator.random((4_000, sampler.lanes_of(torch.empty(1, LARGE)))))

    def tokens_of(*shares: float) -> torch.Tensor:
        probabilities = torch.zeros(250, LARGE)
        probabilities[:, places] = torch.tensor(shares)
        return torch.cat([sampler.pick(probabilities, part) for part in uniforms.split(250)])

    tokens = tokens_of(0.1, 0.2, 0.3, 0.15, 0.25)
    found = torch.stack([(tokens == place).double().mean() for place in places])
    assert (found - torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])).abs().max() < 0.03
    others = tokens_of(0.12, 0.19, 0.28, 0.15, 0.26)  # 0.03 of it lies elsewhere
    assert 0 < (others != tokens).double().mean() < 0.09


def test_few_numbers_of_rows_are_ever_multiplied_and_few_rows_in_vain() -> None:
    taken = {rows: rows + products.rows_more(rows) for rows in range(1, 513)}
    assert len(set(taken.values())) == 32
    assert all(1 <= whole / rows <= 1.25 for rows, whole in taken.items())
    weight, rows = torch.randn(8, 4), torch.randn(11, 1, 4)
    assert torch.allclose(products.in_float32(weight, None)(rows), rows @ weight.T, atol=1e-5)


@pytest.mark.parametrize("others", [1, 3])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("most", [8, 20])
def test_what_is_drawn_alone_depends_on_no_copies_that_others_have_left(
    engine: Engine, rows: int, most: int, others: int
) -> None:
    def alone() -> list[tuple[float, ...]]:
        config = tn.SamplingConfig(max_new_tokens=most, seed=3, ignore_end=True, alone=True, num_samples=rows)
        return [sequence.logprobs for sequence in engine.sample(PROMPTS[:1], config).sequences]

    engine.copied = None
    before = alone()
    engine.copied = None
    engine.sample(PROMPTS[:1], tn.SamplingConfig(max_new_tokens=40, ignore_end=True, num_samples=others))
    assert engine.copied is not None
    assert alone() == before
