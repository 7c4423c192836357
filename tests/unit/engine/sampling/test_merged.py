"""Sampling on merged copies: the same policy as the one that trains, and every weight back where it was."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.engine.sampling import decoding
from tensafe_nb.engine.sampling import merged as merging
from tensafe_nb.engine.sampling.merged import merged
from tensafe_nb.losses import resolve_loss
from tests.close import assert_close

SAMPLING = tn.SamplingConfig(max_new_tokens=20, seed=3, ignore_end=True)


@pytest.fixture(autouse=True)
def _no_model_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SMALL", 1)


@pytest.fixture
def engine(batch: tn.BatchData) -> Engine:
    engine = Engine(
        tn.TrainingConfig(
            device="cpu", lora_config=tn.LoRAConfig(rank=4), optimizer=tn.OptimizerConfig(learning_rate=1e-2)
        )
    )
    for _ in range(3):  # so that the adapter says something
        engine.forward_backward(batch, resolve_loss("token_ce"))
        engine.optim_step()
    return engine


def layer_of(engine: Engine) -> Any:
    return engine.model.causal.model.layers[0].self_attn.q_proj


def test_sampled_logprobs_are_those_of_the_training_path(engine: Engine) -> None:
    for sequence in engine.sample([[5, 6, 7], [8]], SAMPLING).sequences:
        ids = [*sequence.prompt_tokens, *sequence.tokens]
        labels, start = [-100] * len(ids), len(sequence.prompt_tokens) - 1
        labels[start:-1] = sequence.tokens
        scored = engine.compute_logprobs(tn.BatchData([ids], labels=[labels])).logprobs[0, start:-1]
        assert_close(scored, sequence.raw_logprobs, at_least=1)


def test_the_layers_come_back_bit_for_bit_also_when_sampling_is_stopped(engine: Engine) -> None:
    state = {name: t.clone() for name, t in engine.model.causal.state_dict().items()}
    modules, inside = dict(engine.model.causal.named_modules()), []

    def stop(done: int, total: int) -> None:
        inside.append(type(layer_of(engine)))
        if done == 3:
            raise tn.FutureCancelledError("enough")

    with pytest.raises(tn.FutureCancelledError):
        engine.sample([[5, 6, 7]], SAMPLING, stop)
    assert inside[1:] == [torch.nn.Linear] * 3  # of the first token, nothing was read yet
    after = engine.model.causal.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert dict(engine.model.causal.named_modules()) == modules


def test_it_stays_unmerged_where_it_would_not_pay_fit_or_be_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = type(layer_of(engine))
    with merged(engine.model, merging.PAYS_FROM_TOKENS - 1, 4):
        assert type(layer_of(engine)) is adapted
    with engine.model.peft.disable_adapter(), merged(engine.model, 64, 4):
        assert type(layer_of(engine)) is adapted
    monkeypatch.setattr(merging.memory, "available", lambda device: 1000)
    with merged(engine.model, 64, 4):
        assert type(layer_of(engine)) is adapted


def test_in_bf16_nothing_is_merged_as_a_small_adapter_would_be_rounded_away() -> None:
    engine = Engine(tn.TrainingConfig(device="cpu", dtype="bfloat16", lora_config=tn.LoRAConfig(rank=4)))
    adapted = type(layer_of(engine))
    with merged(engine.model, 64, 4):
        assert type(layer_of(engine)) is adapted


def test_for_a_small_model_fewer_tokens_pay_whatever_memory_there_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "SMALL", 8_000_000)
    monkeypatch.setattr(merging.memory, "available", lambda device: None)
    adapted, few = type(layer_of(engine)), merging.SMALL_PAYS_FROM_TOKENS
    assert few < merging.PAYS_FROM_TOKENS
    with merged(engine.model, few - 1, 4):
        assert type(layer_of(engine)) is adapted
    with merged(engine.model, few, 4):
        assert type(layer_of(engine)) is torch.nn.Linear


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_large_vocabulary_in_blocks_gives_the_heads_own_logits(tmp_path: Path, rows: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=decoding.LARGE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / name, tmp_path / name)
    model = Engine(tn.TrainingConfig(model_ref=str(tmp_path), device="cpu", dtype="float32")).model
    hidden = torch.randn(rows, 32)
    assert_close(decoding.head(model, hidden), model.head(hidden))


def test_for_a_single_row_wide_layers_lie_column_by_column_and_say_the_same(engine: Engine) -> None:
    with merged(engine.model, 64, rows=4):
        wide = engine.model.causal.model.layers[0].mlp.up_proj
        expected = wide(hidden := torch.randn(1, wide.in_features))
        assert wide.weight.is_contiguous()
    with merged(engine.model, 64, rows=1):
        layer = engine.model.causal.model.layers[0]
        assert layer.mlp.up_proj.weight.T.is_contiguous()
        assert layer.mlp.down_proj.weight.is_contiguous()  # narrower than its input
        assert engine.model.head.weight.T.is_contiguous()
        assert_close(layer.mlp.up_proj(hidden), expected)
    assert engine.model.head.weight is engine.model.causal.get_input_embeddings().weight
