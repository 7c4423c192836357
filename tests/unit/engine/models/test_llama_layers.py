"""Layers with fewer passes, and rows packed behind each other, say and learn what transformers' own do one by one."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import llama_layers
from tensafe_nb.engine.models.load import ASSETS, load
from tensafe_nb.losses import resolve_loss
from tests.close import assert_close
from tests.unit.engine.private import clipped_sum, examples, private_engine

CONFIGS: dict[str, Any] = {
    "an adapter": {"lora_config": {"rank": 4}},
    "an adapter, activations computed again": {"lora_config": {"rank": 4}, "gradient_checkpointing": True},
    "all weights": {"model_ref": "builtin:sums"},
}
RAGGED = examples([9, 3, 40, 3], vocabulary=14)


def engine_of(fields: dict[str, Any], *, ours: bool) -> Engine:
    engine = Engine(tn.TrainingConfig(device="cpu", **fields))
    assert engine.forward_pass.fused and engine.forward_pass.block is not None
    if not ours:
        engine.forward_pass.fused, engine.forward_pass.block = False, None
    if engine.config.lora_config is not None:  # B starts at zero, and then A has no gradient
        with torch.no_grad():
            torch.manual_seed(1)
            for parameter in engine.parameters:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return engine


def learnt(engine: Engine, batches: list[tn.BatchData]) -> tuple[float, list[torch.Tensor]]:
    """Return the summed loss of some batches, and the gradient that they add up to."""
    losses = [engine.forward_backward(batch, resolve_loss("token_ce")) for batch in batches]
    return sum(found.loss * found.weight for found in losses), [
        p.grad for p in engine.parameters if p.grad is not None
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_learn_what_they_learn_one_by_one_from_transformers_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = engine_of(CONFIGS[name], ours=True)
    shapes: list[Any] = []
    attended = llama_layers.attended
    monkeypatch.setattr(
        llama_layers,
        "attended",
        lambda *args: (shapes.append((args[0].shape[:2], args[3])), attended(*args))[1],
    )
    loss, gradients = learnt(packs, [RAGGED])
    monkeypatch.undo()
    alone = [RAGGED.take(np.array([row])) for row in range(4)]
    expected, others = learnt(engine_of(CONFIGS[name], ours=False), alone)
    assert all(shape == ((1, 55), [(2, 3), (1, 9), (1, 40)]) for shape in shapes) and shapes
    assert_close(loss, expected, within=1e-6)
    assert_close(gradients, others)


def test_rows_padded_in_front_are_packed_too_and_each_row_is_scored_as_alone() -> None:
    ids, mask = (np.array([row[::-1] for row in part]) for part in (RAGGED.input_ids, RAGGED.attention_mask))
    front = tn.BatchData(ids, mask)
    scores = engine_of(CONFIGS["an adapter"], ours=True).compute_logprobs(front)
    other = engine_of(CONFIGS["an adapter"], ours=False)
    for row in range(4):
        alone = front.take(np.array([row]))
        width = alone.shape[1]
        found = other.compute_logprobs(alone)
        assert_close(scores.logprobs[row, -width:], found.logprobs[0], at_least=1.0)
        assert_close(scores.entropy[row, -width:], found.entropy[0], at_least=1.0)


def test_private_rows_are_never_packed_and_clip_to_the_same_sum() -> None:
    ours, other = (private_engine(dp={"max_grad_norm": 0.01}) for _ in range(2))
    other.forward_pass.fused = False
    assert ours.forward_pass.fused and ours.forward_pass.block is None
    assert_close(clipped_sum(ours, RAGGED), clipped_sum(other, RAGGED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_gives_what_the_chain_gives_bit_for_bit_and_keeps_its_two_inputs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, dtype=dtype, requires_grad=True) for _ in range(2)]
    gradient, kept = torch.randn(3, 5, dtype=dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one), one)[1], lambda one: one):
        ours = llama_layers.Gated.apply(*inputs)
    assert [one.data_ptr() for one in kept] == [one.data_ptr() for one in inputs]
    chain = torch.nn.functional.silu(inputs[0]) * inputs[1]
    assert torch.equal(ours, chain)
    expected = torch.autograd.grad(chain, inputs, gradient)
    assert all(map(torch.equal, torch.autograd.grad(ours, inputs, gradient), expected))


def test_in_bfloat16_the_layers_are_as_near_as_rounding_lets_them() -> None:
    fields = {"lora_config": {"rank": 4}, "dtype": "bfloat16"}
    (loss, gradients), (expected, others) = (
        learnt(engine_of(fields, ours=ours), [RAGGED]) for ours in (True, False)
    )
    assert_close(loss, expected, within=1e-2)
    assert_close(gradients, others, within=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4},
        {"layer_types": ["sliding_attention"] * 4},
        {"_attn_implementation": "eager"},
    ],
)
def test_what_these_layers_do_not_do_is_left_to_transformers(change: dict[str, Any]) -> None:
    model = load(tn.TrainingConfig(device="cpu", model_ref="builtin:sums"))
    assert llama_layers.fits(model)
    for name, value in change.items():
        setattr(model.causal.config, name, value)
    assert not llama_layers.fits(model)
    assert not any("forward" in layer.__dict__ for layer in model.causal.model.layers)


def test_a_deep_model_in_bfloat16_is_taken_and_no_further_from_float32_than_transformers_own(
    tmp_path: Path,
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=24, initializer_range=0.2, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "sums" / file, tmp_path)
    exact, half = (
        load(
            tn.TrainingConfig(
                model_ref=str(tmp_path),
                lora_config=tn.LoRAConfig(target_modules=("q_proj",)),
                dtype=dtype,
                device="cpu",
            )
        )
        for dtype in ("float32", "bfloat16")
    )
    assert llama_layers.fits(half)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = exact.body(input_ids=ids, use_cache=False).last_hidden_state
        with half.autocast():
            theirs = half.body(input_ids=ids, use_cache=False).last_hidden_state
            with llama_layers.in_place(half, None):
                ours = half.body(input_ids=ids, use_cache=False).last_hidden_state
    assert float((ours - expected).norm()) <= 1.2 * float((theirs - expected).norm())
