"""What leaves the home: two neighbouring runs write the same bytes, but for the weights that carry the noise."""

import contextlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.data import poisson as draws
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.store.artifacts import artifacts as artifacts_of
from tensafe_nb.store.home import Home
from tensafe_nb.store.vault import Vault
from tensafe_nb.transports import embedded

WEIGHTS = {"model.safetensors", "optimizer.safetensors"}
ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10, 20) for b in (3, 5)]


@contextlib.contextmanager
def injected(home: Path) -> Iterator[None]:
    """The same keys, noise, draws, names and clock in every run: what differs then differs because the data does."""
    with pytest.MonkeyPatch.context() as patch:
        coins, artifacts = np.random.default_rng(0), itertools.count()
        patch.setenv("TENSAFE_HOME", str(home))
        patch.setattr(os, "urandom", lambda count: b"\7" * count)
        patch.setattr(time, "time", lambda: 1.8e9)
        patch.setattr(embedded, "uuid", SimpleNamespace(uuid4=lambda: uuid.UUID(int=5 << 64)))
        patch.setattr(
            artifacts_of, "secrets", SimpleNamespace(token_hex=lambda count: f"{next(artifacts):032x}")
        )
        patch.setattr(draws, "coins", lambda count, rate: coins.random(count) < rate)
        yield


def dp(**fields: Any) -> tn.DPConfig:
    return tn.DPConfig(**{"noise_multiplier": 50.0, "target_epsilon": None} | fields)


def poisson(service: tn.ServiceClient, changed: bool) -> tn.TrainingClient:
    """Neighbours: one row is another, longer one; and the draws are of other rows for it."""
    tc = service.create_training_client(
        model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2, dropout=0.1), batch_size=10,
        dp_config=dp(dataset_size=20),
    )  # fmt: skip
    rows = [*ROWS[1:], {"prompt": "98+99+97=", "completion": "2940000"} if changed else ROWS[0]]
    for draw in tc.dp_batches(rows, steps=3):
        half = len(draw) // 2
        for part in (draw.rows(0, half), draw.rows(half, len(draw))) if changed and half else (draw,):
            tc.forward_backward(part)
        tc.optim_step().result()
    return tc


def worst_case(service: tn.ServiceClient, changed: bool) -> tn.TrainingClient:
    tc = service.create_training_client(
        model_ref="builtin:sums",
        lora_config=tn.LoRAConfig(rank=2),
        batch_size=3,
        dp_config=dp(sampling="worst_case"),
    )
    people = np.array(["alice", "bob", "carol"])
    for _ in range(2):
        row = [5, 9, 9, 9, 9, 9] if changed else [5, 6, 7, 8, 0, 0]
        tokens = [row, [5, 6, 7, 8, 0, 0], [5, 6, 7, 8, 0, 0]]
        mask = [[int(token > 0) for token in one] for one in tokens]
        tc.forward_backward(BatchData(tokens, mask, unit_ids=people))
        tc.optim_step().result()
    return tc


def rlvr(service: tn.ServiceClient, changed: bool) -> tn.TrainingClient:
    known = {
        "12+34=": 0.0,
        "55+11=": float(changed),
    }  # a reward may know the answers: its version is a hash of them

    def earned(prompt: str, response: str) -> float:
        return known[prompt]

    tc = service.create_training_client(
        model_ref="builtin:sums", batch_size=2, dp_config=dp(sampling="worst_case", noise_multiplier=100.0)
    )
    trainer = tn.rlvr.RLVRTrainer(
        tc,
        [{"prompt": prompt} for prompt in known],
        earned,
        tn.rlvr.REINFORCE(baseline="rloo", mask_truncated=False),
        prompts_per_step=2,
        group_size=2,
        max_new_tokens=3,
        reward_timeout=None,
    )
    trainer.run(steps=2, checkpoint_every=2, show=False).result()
    return tc


def released(tc: tn.TrainingClient, service: tn.ServiceClient) -> dict[str, Any]:
    """Everything that leaves the home, opened, by name; weights and moments left out."""
    tc.save_state(name="the release", metadata={"for": "the hospital"}).result()
    found: dict[str, Any] = {}
    for number, saved in enumerate(reversed(service.list_artifacts())):
        with Vault(Home.of_environment()).artifacts.open(saved.artifact_id) as artifact:
            header = dict(artifact.header)
            found[f"{number}/header"] = header
            found[f"{number}/name"] = artifact.info.name
            found[f"{number}/metadata"] = dict(artifact.metadata)
            for name, size, stream in artifact.parts():
                data = stream.read(size)
                found[f"{number}/{name}"] = size if name in WEIGHTS else data
        found[f"{number}/pulled"] = len(service.pull_artifact(saved.artifact_id))
    found["statement"] = json.dumps(tc.privacy_statement().to_dict(), sort_keys=True, default=str)
    return found


@pytest.mark.parametrize("run", [poisson, worst_case, rlvr])
def test_two_neighbouring_runs_release_the_same_bytes_but_for_weights(run: Any, tmp_path: Path) -> None:
    releases = []
    for changed in (False, True):
        with injected(tmp_path / f"home-{changed}"), tn.ServiceClient() as service:
            releases.append(released(run(service, changed), service))
    one, other = releases
    assert one.keys() == other.keys() and any(name.endswith("ledger.json") for name in one)
    differing = sorted(name for name in one if one[name] != other[name])
    assert not differing, [(name, one[name], other[name]) for name in differing[:2]]
    (weights,) = (name for name in one if name == "0/model.safetensors")
    assert one[weights], "and there are weights"
