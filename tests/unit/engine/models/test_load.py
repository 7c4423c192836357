"""Loaded models: folders of every shape that is promised, weights that stay tied, a hub that does not answer."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tensafe_nb as tn
from tensafe_nb.engine.models.load import ASSETS
from tests.close import assert_close
from tests.unit.engine.models.test_gguf import load

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SHAPES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 64}),
    "phi": ("PhiConfig", {"num_key_value_heads": 2}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2, "sliding_window": None}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in several shards, as large ones are stored, with the tiny tokenizer."""
    import transformers

    name, fields = SHAPES[request.param]
    config = getattr(transformers, name)(**(SHAPE | fields))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="100KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / file, folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.mark.parametrize("lora", [None, tn.LoRAConfig(rank=2)], ids=["all weights", "LoRA"])
def test_a_folder_of_every_shape_trains_samples_and_comes_back_from_a_checkpoint(
    service: tn.ServiceClient, folder: Path, lora: tn.LoRAConfig | None, batch: tn.BatchData
) -> None:
    def client() -> tn.TrainingClient:
        return service.create_training_client(
            model_ref=str(folder), lora_config=lora, optimizer={"learning_rate": 1e-2}, dtype="float32"
        )

    tc = client()
    losses = []
    for _ in range(4):
        losses.append(tc.forward_backward(batch).result().loss)
        tc.optim_step().result()
    assert losses[-1] < losses[0] - 0.05
    saved = tc.save_state().result()
    again = client()
    again.load_state(saved.artifact_id).result()
    greedy = [
        each.sample("def", max_new_tokens=6, temperature=0).result().sequences[0] for each in (tc, again)
    ]
    assert greedy[0].tokens == greedy[1].tokens
    assert again.forward(batch).result().loss == tc.forward(batch).result().loss


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own business
def test_an_adapter_on_every_shape_is_read_by_plain_peft(
    service: tn.ServiceClient, folder: Path, batch: tn.BatchData, tmp_path: Path
) -> None:
    import peft

    tc = service.create_training_client(
        model_ref=str(folder),
        lora_config=tn.LoRAConfig(rank=2),
        optimizer={"learning_rate": 1e-2},
        dtype="float32",
    )
    tc.forward_backward(batch)
    tc.optim_step()
    ours = tc.forward(batch, return_logprobs=True).result().logprobs
    exported = service.export_adapter(tc.save_state().result().artifact_id, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(base, exported).eval()
    with torch.no_grad():
        scores = torch.log_softmax(plain(torch.from_numpy(batch.input_ids)).logits, -1)
    labels = torch.from_numpy(np.where(batch.labels < 0, 0, batch.labels))
    expected = scores.gather(2, labels.unsqueeze(2)).squeeze(2).numpy() * (batch.labels >= 0)
    assert_close(ours, expected)


def test_tied_weights_stay_one_tensor_when_all_weights_are_trained(random_model: Any) -> None:
    model = load(ASSETS / "tiny")
    assert model.causal.config.tie_word_embeddings
    assert model.causal.get_output_embeddings().weight is model.causal.get_input_embeddings().weight
    assert [name for name, _ in model.trainable].count("lm_head.weight") == 0


@pytest.mark.alone  # it measures time
def test_a_hub_id_without_network_fails_within_six_seconds() -> None:
    began = time.perf_counter()
    with pytest.raises(tn.ModelLoadError, match=r"hub cannot be reached"):
        load("some-org/some-model")
    assert time.perf_counter() - began < 6
