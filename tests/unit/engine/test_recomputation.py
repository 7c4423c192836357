"""Layers that compute their activations again give what they give when they keep them, and keep less."""

from typing import Any

import numpy as np
import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.engine import estimate as estimate_of
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.estimate import Estimator
from tensafe_nb.engine.models.load import load
from tensafe_nb.engine.recomputation import layers_of
from tests.close import assert_close

from .private import TOKEN_CE, clipped_sum, examples, private_engine

BATCH = examples([9, 4, 7])
PLAIN = {
    "an adapter with dropout": {"lora_config": {"rank": 4, "dropout": 0.2}},
    "all weights": {"model_ref": "builtin:sums"},
    "an adapter in bf16": {"lora_config": {"rank": 4}, "dtype": "bfloat16"},
}


def batch_for(fields: dict[str, Any]) -> tn.BatchData:
    if fields.get("model_ref") != "builtin:sums":
        return BATCH
    return tn.BatchData(BATCH.input_ids % 14, BATCH.attention_mask)


@pytest.mark.parametrize("name", PLAIN)
def test_training_is_bit_for_bit_the_same_when_activations_are_computed_again(name: str) -> None:
    def trained(again: bool) -> tuple[list[float], list[torch.Tensor]]:
        engine = Engine(tn.TrainingConfig(device="cpu", gradient_checkpointing=again, **PLAIN[name]))
        losses = []
        for _ in range(2):  # the second step's dropout goes on where the first one's ended
            losses.append(engine.forward_backward(batch_for(PLAIN[name]), TOKEN_CE).loss)
            engine.optim_step()
        return losses, [parameter.detach() for parameter in engine.parameters]

    (losses, weights), (expected, others) = trained(True), trained(False)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_clipped_sum_of_private_training_is_the_same_and_its_rows_are_told_apart(dropout: float) -> None:
    def summed(again: bool) -> torch.Tensor:
        engine = private_engine(
            lora=tn.LoRAConfig(rank=4, dropout=dropout),
            gradient_checkpointing=again,
            dp={"max_grad_norm": 0.01},
        )
        engine.training_step.gradients.secrets = lambda batch: np.arange(len(batch))  # type: ignore[union-attr]
        found = clipped_sum(engine, BATCH)
        assert engine.training_step.gradients.ways == ("book-keeping",)  # type: ignore[union-attr]
        return found

    assert_close(summed(True), summed(False))


def test_rows_of_all_weights_are_told_apart_too() -> None:
    engine, other = (
        private_engine(
            lora=False, model_ref="builtin:sums", gradient_checkpointing=again, dp={"max_grad_norm": 0.01}
        )
        for again in (True, False)
    )
    rows = batch_for({"model_ref": "builtin:sums"}).labelled_with(example_ids=np.arange(3))
    assert_close(clipped_sum(engine, rows), clipped_sum(other, rows))
    assert engine.training_step.gradients.ways == ("book-keeping",)  # type: ignore[union-attr]


def test_less_is_kept_and_the_estimate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_of, "AT_LEAST", 1)
    monkeypatch.setattr(estimate_of, "SECONDS", 0)
    fields = {"lora_config": {"rank": 4}, "device": "cpu"}
    again, kept = (Engine(tn.TrainingConfig(gradient_checkpointing=on, **fields)) for on in (True, False))
    assert again.estimate(4, 64).activation_bytes < 0.8 * kept.estimate(4, 64).activation_bytes
    held = [Estimator(engine).probe(4, 64, timed=False).forward_bytes for engine in (again, kept)]
    assert held[0] < 0.5 * held[1]


def test_scoring_and_a_failed_pass_leave_the_layers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tn.TrainingConfig(lora_config={"rank": 4}, gradient_checkpointing=True, device="cpu"))
    layers, engine.forward_pass.fused = engine.forward_pass.forgets, False
    engine.compute_logprobs(BATCH)
    monkeypatch.setattr(type(layers[1]), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.forward_backward(BATCH, TOKEN_CE)
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_a_model_without_layers_of_its_own_is_refused() -> None:
    model = load(tn.TrainingConfig(device="cpu"))
    assert len(layers_of(model, "builtin:tiny")) == model.causal.config.num_hidden_layers
    model.causal.model.layers = torch.nn.ModuleList()
    with pytest.raises(
        tn.ValidationError, match=r"has no layers that can be computed again.*micro_batch_tokens"
    ):
        layers_of(model, "builtin:tiny")
