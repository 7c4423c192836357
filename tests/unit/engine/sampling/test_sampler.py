"""Our decode loop against transformers' generate, and the laws of its random streams."""

from typing import Any

import numpy as np
import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.engine.sampling import sampler
from tensafe_nb.engine.sampling.drawn import Piece
from tests.close import assert_close
from tests.conftest import ARCHITECTURES

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tn.TrainingConfig(device="cpu", lora_config=tn.LoRAConfig(rank=4)))


def draw(engine: Engine, prompts: Any = PROMPTS, **fields: Any) -> list[Any]:
    return list(
        engine.sample(prompts, tn.SamplingConfig(**{"max_new_tokens": 12, "seed": 7, **fields})).sequences
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_generates_one_by_one(random_model: Any, architecture: str) -> None:
    engine = Engine(tn.TrainingConfig(model_ref=random_model(architecture), device="cpu", dtype="float32"))
    model = engine.model.causal
    for ours in draw(engine, temperature=0):
        ids = torch.tensor([list(ours.prompt_tokens)])
        theirs = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=2)
        assert list(ours.tokens) == theirs[0, ids.shape[1] :].tolist()
        uncached = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=2)
        assert list(ours.tokens) == uncached[0, ids.shape[1] :].tolist()


def test_greedy_tokens_asked_for_in_turns_are_those_of_one_call(engine: Engine) -> None:
    (whole,) = draw(engine, [PROMPTS[0]], temperature=0, ignore_end=True)
    ids = list(PROMPTS[0])
    for _ in range(3):
        ids += draw(engine, [ids], temperature=0, max_new_tokens=4, ignore_end=True)[0].tokens
    assert ids[3:] == list(whole.tokens)


def test_a_row_is_the_same_whatever_its_batch_mates(engine: Engine) -> None:
    together = draw(engine, num_samples=2)
    for index, prompt in enumerate(PROMPTS):
        alone = draw(engine, [prompt], num_samples=2)
        for a, b in zip(alone, together[2 * index : 2 * index + 2], strict=True):
            assert a.tokens == b.tokens
            assert_close(a.logprobs, b.logprobs, at_least=1)


def test_sampler_and_training_logprobs_agree(engine: Engine) -> None:
    for sequence in draw(engine, temperature=1.0):
        ids = [*sequence.prompt_tokens, *sequence.tokens]
        labels = [-100] * len(ids)
        start = len(sequence.prompt_tokens) - 1
        labels[start:-1] = sequence.tokens
        scored = engine.compute_logprobs(tn.BatchData([ids], labels=[labels])).logprobs[0, start:-1]
        assert_close(scored, sequence.raw_logprobs, at_least=1)


def test_no_hidden_top_k_narrows_what_is_drawn() -> None:
    logits = torch.zeros(5000, 1000)
    uniforms = torch.from_numpy(np.random.default_rng(0).random((5000, 1)))
    tokens, logprobs, _, entropy = sampler.draw(logits, tn.SamplingConfig(), uniforms)
    assert len(tokens.unique()) > 900
    assert torch.allclose(entropy, torch.tensor(np.log(1000), dtype=torch.float32))
    assert torch.allclose(logprobs, torch.tensor(-np.log(1000), dtype=torch.float32))


def test_frequencies_follow_the_distribution_cut_by_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(20_000, 1)
    uniforms = torch.from_numpy(np.random.default_rng(0).random((20_000, 1)))
    for config, expected in [
        (tn.SamplingConfig(top_k=2), [0.625, 0.375, 0, 0]),
        (tn.SamplingConfig(top_p=0.6), [0.625, 0.375, 0, 0]),
        (tn.SamplingConfig(top_p=0.5), [1, 0, 0, 0]),
        (tn.SamplingConfig(temperature=0.5), np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
    ]:
        tokens, logprobs, raw, entropy = sampler.draw(logits, config, uniforms)
        kept = np.array([p for p in expected if p > 0])
        assert np.allclose(entropy.numpy(), -(kept * np.log(kept)).sum(), atol=1e-5)
        shares = torch.bincount(tokens, minlength=4) / len(tokens)
        assert np.abs(shares.numpy() - expected).max() < 0.02
        assert_close(logprobs.exp(), np.array(expected)[tokens.numpy()])
        assert_close(raw.exp(), np.array([0.5, 0.3, 0.15, 0.05])[tokens.numpy()])


def test_uniforms_look_uniform_and_independent_of_their_neighbours() -> None:
    seeds = np.arange(2000, dtype=np.uint64)
    columns = np.stack(
        [sampler.uniforms_at(seeds, np.full(2000, position), 1)[:, 0].numpy() for position in range(20)]
    )
    assert abs(columns.mean() - 0.5) < 0.01
    assert abs(columns.var() - 1 / 12) < 0.005
    assert abs(np.corrcoef(columns[:-1].ravel(), columns[1:].ravel())[0, 1]) < 0.02
    assert (columns < 1).all()


def test_a_stream_takes_the_place_of_a_prompts_number_among_equal_ones(engine: Engine) -> None:
    def seeds(*streams: int, tokens: tuple[int, ...] = (5, 6, 7)) -> list[int]:
        prompts = [{"tokens": tokens, "stream": stream} for stream in streams]
        return [sequence.seed for sequence in draw(engine, prompts, seed=1, max_new_tokens=2)]

    assert seeds(1, 2, 3) == [*seeds(1), *seeds(2), *seeds(3)]
    assert len({*seeds(1, 2), *seeds(1, tokens=(5, 6))}) == 3


def test_equal_prompts_are_read_once_and_drawn_as_if_each_had_been_read(engine: Engine) -> None:
    prompts = [{"tokens": (5, 6, 7 + number % 2), "stream": number} for number in range(6)]
    together = draw(engine, prompts, seed=1, max_new_tokens=4)
    apart = [one for prompt in prompts for one in draw(engine, [prompt], seed=1, max_new_tokens=4)]
    assert [one.tokens for one in together] == [one.tokens for one in apart]
    assert_close([one.logprobs for one in together], [one.logprobs for one in apart])


def test_several_samples_of_one_prompt_differ_and_are_counted(engine: Engine) -> None:
    sequences = draw(engine, num_samples=4)
    assert [s.prompt_index for s in sequences] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({s.tokens for s in sequences[:4]}) > 1
    assert len({s.seed for s in sequences}) == 12


def test_without_a_seed_every_call_draws_anew_and_every_client_alike() -> None:
    config = tn.SamplingConfig(max_new_tokens=8)
    first, second = (Engine(tn.TrainingConfig(device="cpu")) for _ in range(2))
    one, two = first.sample([[5, 6]], config), first.sample([[5, 6]], config)
    assert one.sequences[0].tokens != two.sequences[0].tokens
    assert second.sample([[5, 6]], config).sequences == one.sequences


def test_finish_reasons_are_recorded_by_the_loop(engine: Engine) -> None:
    text = draw(engine, [[5, 6, 7]], temperature=0, max_new_tokens=12)[0].text
    stop = text[len(text) // 2]
    stopped = draw(engine, [[5, 6, 7]], temperature=0, stop=[stop])[0]
    assert (stopped.finish_reason, stopped.text) == ("stop_string", text[: text.index(stop)])
    assert draw(engine, [[5, 6]], max_new_tokens=1)[0].finish_reason in ("length", "stop")
    fixed = draw(engine, ignore_end=True, max_new_tokens=5)
    assert {(s.finish_reason, len(s.tokens)) for s in fixed} == {("fixed", 5)}


def test_the_end_token_is_kept_in_the_tokens_and_cut_from_the_text(random_model: Any) -> None:
    engine = Engine(tn.TrainingConfig(model_ref="builtin:sums", device="cpu"))
    sequence = draw(engine, ["12+34="], temperature=0)[0]
    assert sequence.finish_reason == "stop"
    assert sequence.tokens[-1] in engine.model.end_tokens
    assert sequence.text.isdigit() and len(sequence.text) == 3


def told_one_by_one(engine: Engine, text: str, **fields: Any) -> list[str]:
    """Return the texts of the pieces of a completion that is drawn so: those of each token."""
    sampling = tn.SamplingConfig(max_new_tokens=200, **fields)
    row, pieces = sampler.Completion(0, (5,), 1), []
    for token in engine.tokenizer.encode(text, add_special_tokens=False):
        row.add(Piece([token], [-1.0], [-1.0]))
        row.finish(engine.model, sampling, by_token=token in engine.model.end_tokens, last=False)
        sampler.tell_news(engine.model, sampling, [row], pieces.append)
    assert sum((piece.tokens for piece in pieces), ()) == tuple(row.tokens[: row.told_tokens])
    return [piece.text for piece in pieces]


def test_no_piece_breaks_a_character_of_several_bytes(engine: Engine) -> None:
    text = "Grüße, 世界 🎉👩‍🔬!"
    pieces = told_one_by_one(engine, text)
    assert "".join(pieces) == text and len(pieces) < len(engine.tokenizer.encode(text))
    assert sampler.UNFINISHED not in "".join(pieces)


def test_a_piece_holds_back_what_may_become_a_stop_string_and_nothing_else(engine: Engine) -> None:
    pieces = told_one_by_one(engine, "one\nQ\nQuest\nQuestion: no", stop=["\nQuestion:"])
    assert "".join(pieces) == "one\nQ\nQuest"
    assert "".join(told_one_by_one(engine, "one two", stop=["\nQuestion:"])) == "one two"


def test_a_tick_can_stop_between_tokens(engine: Engine) -> None:
    def tick(done: int, total: int) -> None:
        if done >= 3:
            raise tn.FutureCancelledError("enough")

    with pytest.raises(tn.FutureCancelledError):
        engine.sample(PROMPTS, tn.SamplingConfig(max_new_tokens=8), tick)


def test_chat_messages_go_through_the_chat_template(engine: Engine) -> None:
    messages = ({"role": "user", "content": "What is a list?"},)
    sequence = draw(engine, [messages], max_new_tokens=2)[0]
    expected = engine.model.tokenizer.apply_chat_template(
        [dict(m) for m in messages], add_generation_prompt=True, return_dict=False
    )
    assert list(sequence.prompt_tokens) == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5], []], "Prompt 1 is empty"),
        ([[999_999]], "outside 0 to"),
        ([[5] * 600], "more than the model's context"),
    ],
)
def test_prompts_that_do_not_fit_are_named(engine: Engine, prompts: Any, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        draw(engine, prompts)


def test_a_text_the_tokenizer_cannot_read_is_named() -> None:
    engine = Engine(tn.TrainingConfig(model_ref="builtin:sums", device="cpu"))
    with pytest.raises(tn.ValidationError, match="tokenizer cannot read the prompt 'hello'"):
        draw(engine, ["hello"])


def test_prompts_that_take_turns_get_the_same_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    together = draw(engine, num_samples=2)
    monkeypatch.setattr(sampler, "TOKENS_AT_ONCE", 1)
    assert [s.tokens for s in draw(engine, num_samples=2)] == [s.tokens for s in together]


# what ends an answer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def of_a_base_model(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A model whose tokenizer ends texts with one token, and whose chat template ends turns with another."""

    import transformers

    folder = tmp_path_factory.mktemp("base")
    assets = ASSETS / "tiny"
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Engine(tn.TrainingConfig(model_ref=str(folder), device="cpu", dtype="float32"))


def says(engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let a model say a text, token by token, whatever it is asked."""
    tokens = engine.model.tokenizer(text, add_special_tokens=False)["input_ids"]
    drawn = iter(tokens)

    def draw(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        token = torch.full((len(logits),), next(drawn))
        return token, *[torch.zeros(len(logits))] * 3  # their logprobs, and the entropy

    monkeypatch.setattr(sampler, "draw", draw)


def test_an_answer_stops_at_the_templates_end_of_turn_and_a_text_goes_on(
    of_a_base_model: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "yes<|im_end|>\n<|im_start|>user"
    question = [{"role": "user", "content": "hi"}]
    says(of_a_base_model, monkeypatch, said)
    (answer,) = draw(of_a_base_model, [question], max_new_tokens=32)
    assert (answer.text, answer.finish_reason) == ("yes", "stop")
    assert answer.tokens[-1] == of_a_base_model.model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    says(of_a_base_model, monkeypatch, said)
    longer = len(of_a_base_model.model.tokenizer(said, add_special_tokens=False)["input_ids"])
    (text,) = draw(of_a_base_model, ["hi"], max_new_tokens=longer)
    assert (text.text, text.finish_reason) == (said, "length")


@pytest.mark.parametrize(
    ("stop", "left"), [("<|im_end|>", "yes"), ("<|im_start|>", "yes<|im_end|>\n"), ("es<|im", "y")]
)
def test_a_special_token_can_be_a_stop_string_or_part_of_one(
    of_a_base_model: Engine, monkeypatch: pytest.MonkeyPatch, stop: str, left: str
) -> None:
    says(of_a_base_model, monkeypatch, "yes<|im_end|>\n<|im_start|>user")
    (text,) = draw(of_a_base_model, ["hi"], max_new_tokens=32, stop=[stop])
    assert (text.text, text.finish_reason) == (left, "stop_string")


def test_a_turn_that_ends_in_plain_text_ends_there_and_without_it(
    of_a_base_model: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        of_a_base_model.model.tokenizer, "chat_template", CHATML.replace("<|im_end|>", " [over]")
    )
    says(of_a_base_model, monkeypatch, "yes [over]\nno")
    (answer,) = draw(of_a_base_model, [[{"role": "user", "content": "hi"}]], max_new_tokens=32)
    assert (answer.text.rstrip(), answer.finish_reason) == ("yes", "stop")
