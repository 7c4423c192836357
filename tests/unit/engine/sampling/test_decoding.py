"""Decoding with a cache where it can be relied on, and without one where it cannot."""

from pathlib import Path

import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.engine.sampling import decoding
from tests.unit.engine.models.test_reading import CONFIGS, load, saved

BATCH = {"input_ids": [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]}


@pytest.mark.parametrize("shape", ["mamba", "mamba2"])
def test_state_space_models_are_sampled_as_they_are_scored(
    shape: str, service: tn.ServiceClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "m", CONFIGS[shape]())
    tc = service.create_training_client(
        model_ref=str(folder), dtype="float32", lora_config=tn.LoRAConfig(rank=2)
    )
    assert tc.forward_backward(BATCH).result().loss > 0
    tc.optim_step()
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    drawn = tc.sample(prompts, max_new_tokens=4, num_samples=2, seed=3).result().sequences
    assert "sampled without a cache" in caplog.text
    for row in drawn:
        ids = [*row.prompt_tokens, *row.tokens]
        scored = tc.compute_logprobs({"input_ids": [ids]}).result().logprobs[0]
        ours = torch.tensor(row.raw_logprobs)
        expected = torch.tensor(scored[len(row.prompt_tokens) - 1 : len(ids) - 1])
        assert torch.allclose(ours, expected, atol=1e-4)
    alone = tc.sample([prompts[1]], max_new_tokens=4, num_samples=2, seed=3).result().sequences
    assert [row.tokens for row in alone] == [row.tokens for row in drawn if row.prompt_tokens == (9,)]


@pytest.mark.parametrize("shape", [name for name in CONFIGS if not name.startswith("mamba")])
def test_other_shapes_keep_their_cache(shape: str, tmp_path: Path) -> None:
    model = load(saved(tmp_path / "m", CONFIGS[shape]()))
    assert decoding.cache_works(model)
