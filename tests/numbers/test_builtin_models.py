"""Pinned figures of the built-in models. Sources: this file's own token batches; recipe.json beside the weights."""

import json

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.engine.models.load import ASSETS, BUILTINS

TOKENS = np.arange(3, 3 + 5 * 16).reshape(5, 16) * 7 % 2000 + 3


def test_the_loss_series_of_tiny_is_pinned(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(
        lora_config=tn.LoRAConfig(rank=4, alpha=8), optimizer={"learning_rate": 1e-3}, seed=0
    )
    handles = []
    for row in TOKENS:
        handles.append(tc.forward_backward(tn.BatchData([row])))
        tc.optim_step()
    pinned = [9.977275, 18.985970, 9.111905, 10.885645, 14.147156]  # torch 2.13, CPU, fp32
    assert [handle.loss for handle in handles] == pytest.approx(pinned, rel=1e-3)


def test_lora_lowers_the_heldout_docstring_loss_by_a_tenth_within_50_steps(
    service: tn.ServiceClient,
) -> None:
    tc = service.create_training_client(
        lora_config=tn.LoRAConfig(rank=8, alpha=16), optimizer={"learning_rate": 2e-3}, batch_size=8
    )
    heldout = tn.data.batches(tn.datasets.docstring_pairs("heldout")[:160], tc.tokenizer, batch_size=32)
    batches = tc.batches(tn.datasets.docstring_pairs("train"))
    tc.fit(batches, steps=50, eval_batches=heldout, show=False).result()
    before, after = tc.history["eval/loss"]
    assert after <= 0.9 * before


@pytest.mark.parametrize("model_ref", BUILTINS)
def test_plain_transformers_loads_a_built_in_and_its_recipe_lies_beside_it(model_ref: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ASSETS / model_ref.removeprefix("builtin:")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["seed"] == 0 and recipe["metrics"]
    assert model.num_parameters() <= 2_000_000
    assert tokenizer.eos_token_id is not None


def test_the_built_in_models_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 10_000_000


def test_sums_has_something_left_to_learn(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(model_ref="builtin:sums")
    rows = tn.datasets.sums(300, seed=1, split="heldout")

    def right(temperature: float) -> float:
        texts = tc.sample(
            [row["prompt"] for row in rows], max_new_tokens=4, temperature=temperature, seed=0
        ).texts
        return float(np.mean([text == row["answer"] for text, row in zip(texts, rows, strict=True)]))

    assert 0.25 <= right(1.0) <= 0.55
    assert right(0.0) <= 0.8
