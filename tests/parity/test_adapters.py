"""An adapter's tensors are read and loaded as they are, in their turn, over every transport."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tensafe_nb as tn

LORA = tn.LoRAConfig(rank=4)
QUICK = {"optimizer": {"learning_rate": 1e-2}, "dtype": "float32"}
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def step(tc: tn.TrainingClient, batch: tn.BatchData) -> float:
    return [tc.forward_backward(batch), tc.optim_step(), tc.forward(batch)][-1].loss


def assert_same(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_what_is_read_loads_into_another_client(service: tn.ServiceClient, batch: tn.BatchData) -> None:
    tc = service.create_training_client(lora_config=LORA, **QUICK)
    loss = step(tc, batch)
    read = tc.read_adapter().result()
    assert {values.dtype for values in read.tensors.values()} == {np.dtype(np.float32)}
    assert read.policy_version == tc.policy_version == 1
    other = service.create_training_client(lora_config=LORA, seed=1, **QUICK)
    before = other.forward(batch).loss
    loaded = other.load_adapter(read.tensors).result()
    assert (loaded.loaded, loaded.policy_version, other.step) == (len(read.tensors), 1, 0)
    assert other.policy_version == 1
    assert other.forward(batch).loss == pytest.approx(loss, rel=1e-6) != before
    assert_same(other.read_adapter().tensors, read.tensors)


@pytest.mark.transports("embedded")
def test_an_open_window_and_the_moments_start_anew(service: tn.ServiceClient, batch: tn.BatchData) -> None:
    tc, fresh = (service.create_training_client(lora_config=LORA, **QUICK) for _ in range(2))
    begun = tc.read_adapter().tensors
    step(tc, batch)
    tc.forward_backward(tn.BatchData([[5, 6, 7]]))
    tc.load_adapter(begun)
    with pytest.raises(tn.ValidationError, match=r"no gradient|nothing|accumulated"):
        tc.optim_step().result()
    assert step(tc, batch) == step(fresh, batch), "Adam begins as it began"
    assert (tc.step, fresh.step) == (2, 1)


@pytest.mark.transports("embedded")
@pytest.mark.parametrize(
    "more",
    [{"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "v_proj"]}],
    ids=str,
)
def test_biases_whole_modules_and_embeddings_are_part_of_it_as_of_an_export(
    service: tn.ServiceClient, batch: tn.BatchData, more: dict[str, Any], tmp_path: Path
) -> None:
    tc, other = (
        service.create_training_client(lora_config=LORA.replace(**more), seed=seed, **QUICK)
        for seed in (0, 1)
    )
    loss, tensors = step(tc, batch), tc.read_adapter().tensors
    folder = Path(service.export_adapter(tc.save_state().artifact_id, tmp_path / "adapter"))
    assert_same(load_file(folder / "adapter_model.safetensors"), tensors)
    other.load_adapter(tensors)
    assert other.forward(batch).loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.transports("embedded")
def test_with_a_frozen_a_the_bs_are_enough_and_a_reference_keeps_the_a_it_had(
    service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    frozen = LORA.replace(freeze_a=True)
    tc, same, other = (
        service.create_training_client(lora_config=frozen, seed=seed, **QUICK) for seed in (0, 0, 1)
    )
    loss = step(tc, batch)
    tensors = tc.read_adapter().tensors
    same.load_adapter({name: values for name, values in tensors.items() if "lora_B" in name})
    assert same.forward(batch).loss == pytest.approx(loss, rel=1e-6)
    step(other, batch)
    other.freeze_reference()
    scored = other.compute_logprobs(batch, reference=True).logprobs
    other.load_adapter(tensors)
    assert other.forward(batch).loss == pytest.approx(loss, rel=1e-6)
    assert np.array_equal(other.compute_logprobs(batch, reference=True).logprobs, scored)


@pytest.mark.transports("embedded")
def test_torch_tensors_are_taken_also_in_bfloat16_and_copied(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(lora_config=LORA, **QUICK)
    shape = tc.read_adapter().tensors[Q].shape
    given = torch.full(shape, 0.5, dtype=torch.bfloat16, requires_grad=True)
    array = np.full(shape, 0.25)
    handles = tc.load_adapter({Q: given}), tc.read_adapter(), tc.load_adapter({Q: array}), tc.read_adapter()
    array[:] = 9
    assert (handles[1].tensors[Q] == 0.5).all() and (handles[3].tensors[Q] == 0.25).all()


def test_what_does_not_fit_is_refused_and_nothing_is_loaded(
    service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    tc = service.create_training_client(lora_config=LORA, **QUICK)
    begun = tc.read_adapter().tensors
    for wrong, words in (
        ({}, "by name"),
        ("adapter/", r"load_file\(folder"),
        ([1.0], "by name"),
        ({1: begun[Q]}, "by name"),
        ({Q: "text"}, "no array of numbers"),
        ({Q: begun[Q] * np.nan}, "NaN"),
    ):
        with pytest.raises(tn.ValidationError, match=words):
            tc.load_adapter(wrong)  # type: ignore[arg-type]
    good = next(name for name in begun if name != Q)
    for wrong, words in (
        (
            {good: begun[good] + 1, Q.replace("lora_B", "lora_b"): begun[Q]},
            r"no tensor .*Did you mean '.*lora_B",
        ),
        ({good: begun[good] + 1, Q: begun[Q][:-1]}, r"here\. Nothing was loaded"),
    ):
        with pytest.raises(tn.ValidationError, match=words):
            tc.load_adapter(wrong).result()
    assert_same(tc.read_adapter().tensors, begun)
    whole = service.create_training_client(model_ref="builtin:sums", lora_config=None)
    for handle in (whole.read_adapter(), whole.load_adapter(begun)):
        with pytest.raises(tn.ValidationError, match="trains all weights, and has no adapter"):
            handle.result()


@pytest.mark.transports("embedded")
def test_a_private_client_takes_no_weights_without_an_account_and_gives_its_own(
    service: tn.ServiceClient,
) -> None:
    private = service.create_training_client(
        lora_config=LORA, dp_config=tn.DPConfig(sampling="worst_case", target_epsilon=None), **QUICK
    )
    tensors = private.read_adapter().tensors
    with pytest.raises(tn.ValidationError, match="trained without differential privacy"):
        private.load_adapter(tensors).result()
    private.forward_backward({"input_ids": [[5, 6, 7], [8, 9, 10]], "example_ids": ["a", "b"]})
    assert private.optim_step().result().dp_metrics is not None
