"""Steps of our own through Llama-shaped bodies: what transformers says, for the models they fit, and for no others."""

import inspect
import itertools
from typing import Any

import pytest
import torch
import transformers

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.sampling import llama
from tensafe_nb.engine.sampling.decoding import Decoder, Recomputed
from tests.close import assert_close

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
FITTING = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "llama, wide heads": transformers.LlamaConfig(**SHAPE, head_dim=16, attention_bias=True, mlp_bias=True),
    "llama, scaled positions": transformers.LlamaConfig(**SHAPE, rope_parameters=ROPE),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=None),
}
OTHERS = {
    "a sliding window": transformers.MistralConfig(**SHAPE, sliding_window=8),
    "normalised queries": transformers.Qwen3Config(**SHAPE),
    "gemma": transformers.GemmaConfig(**SHAPE),
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
}


def loaded(config: Any, dtype: torch.dtype = torch.float32) -> models.LoadedModel:
    torch.manual_seed(0)
    causal = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    for name, weight in causal.named_parameters():
        if weight.dim() == 1 and "bias" in name:
            torch.nn.init.normal_(weight)  # zeros would hide a bias left out
    return models.LoadedModel(causal, None, None, torch.device("cpu"), dtype, split=True)


@torch.no_grad()
def decoded(model: models.LoadedModel, *, samples: int, steps: int = 5) -> tuple[Decoder, torch.Tensor]:
    """Return a decoder, and the logits of each step: a row is dropped on the way, then the longest; others join."""
    return rows_and_logits(Decoder, model, samples, steps)


def rows_and_logits(kind: Any, model: models.LoadedModel, samples: int, steps: int = 5) -> tuple[Any, Any]:
    rows, found = kind(model, [[5, 6, 7], [8], [9, 10]], [samples, samples, 2], steps), []
    for step in range(steps):
        found.append(rows.logits)
        tokens = torch.arange(len(rows.logits)) + 10 * step
        if step in (2, 3):
            going = torch.tensor([0, *range(2, len(tokens))] if step == 2 else range(samples, len(tokens)))
            rows.keep(going)
            tokens = tokens[going]
        rows.feed(tokens)
        if step != 2 and rows.joinable:
            rows.join(kind(model, [[3], [4, 5, 6, 7, 8, 9, 10][: 3 + step]], [1, 2], 3))
    return rows, torch.cat(found)


def by_transformers(
    model: models.LoadedModel, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(llama, "fits", lambda *_: False)
        return decoded(model, **options)[1]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", FITTING)
def test_padded_rows_get_the_logits_of_transformers(
    name: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(FITTING[name])
    decoder, found = decoded(model, samples=samples)
    assert decoder._steps is not None
    assert_close(found, by_transformers(model, monkeypatch, samples=samples))


def test_in_bfloat16_they_agree_to_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(FITTING["llama"], torch.bfloat16)
    decoder, found = decoded(model, samples=2)
    assert decoder._steps is not None
    expected = by_transformers(model, monkeypatch, samples=2)
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_architectures_are_left_to_transformers(name: str) -> None:
    model = loaded(OTHERS[name])
    decoder, found = decoded(model, samples=2)
    assert decoder._steps is None
    anew, expected = rows_and_logits(Recomputed, model, 2)
    assert not decoder.joinable or len(decoder.logits) == len(anew.logits)
    if decoder.joinable:
        assert_close(found, expected)


def test_a_body_that_says_something_else_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(FITTING["llama"])
    forward = type(model.causal.model.norm).forward
    calls = itertools.count()
    monkeypatch.setattr(  # its norms differ from call to call: no two ways agree
        type(model.causal.model.norm), "forward", lambda self, x: forward(self, x) * (1 + next(calls))
    )
    assert decoded(model, samples=1)[0]._steps is None


def test_a_body_without_the_parts_that_are_asked_for_is_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without(self: llama.Steps, body: Any, *rest: Any) -> torch.Tensor:
        return body.embedding(*rest)  # as it may be called in another version

    monkeypatch.setattr(llama.Steps, "__call__", without)
    assert decoded(loaded(FITTING["llama"]), samples=1)[0]._steps is None


def test_a_model_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(llama, "says_the_same", lambda model: bool(tried.append(model)))
    model = loaded(FITTING["llama"])
    decoded(model, samples=1), decoded(model, samples=1)
    assert len(tried) == 1


def test_the_built_in_models_take_the_steps() -> None:
    for ref in models.BUILTINS:
        model = Engine(
            tn.TrainingConfig(model_ref=ref, lora_config=tn.LoRAConfig(rank=2), device="cpu")
        ).model
        with torch.no_grad():
            assert Decoder(model, [[3, 4]], [1], 1)._steps is not None


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_given_under_the_name_that_the_architecture_takes(name: str) -> None:
    source = f"def forward(self, input_ids=None, {name}=None, use_cache=None): ..."
    members: dict[str, Any] = {}
    exec(source, members)
    assert llama.cache_argument(type("Body", (torch.nn.Module,), members)()) == name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_transformers_that_is_here_takes_it_under_that_name(random_model: Any, name: str) -> None:
    causal = transformers.AutoModelForCausalLM.from_pretrained(random_model(name))
    for reader in (causal, causal.get_decoder()):
        assert llama.cache_argument(reader) in inspect.signature(reader.forward).parameters
