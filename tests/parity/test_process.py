"""A server in a process of its own, as it is run: `tensafe-nb serve`."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.cli import main as cli
from tests.parity.serving import registered

ROOT = Path(__file__).parents[2]
SERVE = [sys.executable, "-m", "tensafe_nb.cli", "serve", "--port", "0", "--json", "--print-token"]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Address and token of a server that ends when it is told to."""
    home = tmp_path_factory.mktemp("home")
    process = subprocess.Popen([*SERVE, "--home", str(home)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM)


@pytest.fixture
def services(where: dict[str, str]) -> Iterator[list[tn.ServiceClient]]:
    with tn.ServiceClient() as embedded, tn.ServiceClient(where["url"], where["token"]) as remote:
        yield [embedded, remote]
        for info in remote.list_training_clients():
            remote.get_training_client(info.training_client_id).close()


def supervised(service: tn.ServiceClient) -> Any:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=4, dropout=0.1), seed=3)
    rng = np.random.default_rng(0)
    tc.fit([tn.BatchData(rng.integers(3, 200, (4, 9))) for _ in range(6)], show=False).result()
    return tc.history["loss"].tolist(), tc.history["grad_norm"].tolist()


def reinforced(service: tn.ServiceClient) -> Any:
    tc = service.create_training_client(
        model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 3e-3}
    )
    algo = tn.rlvr.PPO("grpo", ppo_epochs=2, minibatches=2, kl_coef=0.05)
    prompts = tn.datasets.sums(20, seed=1)
    trainer = tn.rlvr.RLVRTrainer(
        tc, prompts, "exact_match", algo, prompts_per_step=4, max_new_tokens=4, seed=3
    )
    trainer.run(steps=3, show=False).result()
    names = [name for name in tc.history.names if not name.startswith("time/")]
    return {name: tc.history[name].tolist() for name in names}


def forked(service: tn.ServiceClient) -> Any:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=4), seed=3)
    batch = tn.BatchData([[5, 6, 7, 8]])
    tc.forward_backward(batch), tc.optim_step()
    child = tc.fork(optimizer={"learning_rate": 1e-3})
    child.forward_backward(batch), child.optim_step()
    scores = child.compute_logprobs(batch).result()
    return child.step, scores.logprobs.tolist(), child.sample("def", max_new_tokens=8, seed=1).texts


@pytest.mark.parametrize("work", [supervised, reinforced, forked])
def test_a_process_elsewhere_computes_the_same_bit_for_bit(
    services: list[tn.ServiceClient], work: Callable[[tn.ServiceClient], Any]
) -> None:
    here, there = (work(service) for service in services)
    assert here == there


def test_a_loss_that_is_registered_here_only_is_refused_with_the_reason(
    services: list[tn.ServiceClient],
) -> None:
    name = registered("only_here", lambda outputs, batch: outputs.logprobs.mean())
    tc = services[1].create_training_client(lora_config=tn.LoRAConfig(rank=2))
    with pytest.raises(
        tn.ValidationError, match="'only_here' is registered in this process only, and a server"
    ):
        tc.forward_backward(tn.BatchData([[5, 6]]), loss_fn=name)


def test_a_client_needs_no_torch(where: dict[str, str]) -> None:
    env = os.environ | {"TENSAFE_BASE_URL": where["url"], "TENSAFE_API_KEY": where["token"]}
    command = [sys.executable, "-m", "tests.parity.thin_client"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Did you mean 'token_ce'" in done.stdout


def test_a_thin_client_installs_everything_but_torch_and_what_stands_on_it() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    listed = (ROOT / "tensafe_nb/server/thin-requirements.txt").read_text().splitlines()
    thin = {line for line in listed if not line.startswith("#")}
    left_out = {re.split(r"[<>=]", spec)[0] for spec in set(needed) - thin}
    assert left_out == {"torch", "peft", "opacus", "tenseal", "gguf", "cryptography"} and thin < set(needed)


def test_a_server_for_others_needs_tokens_and_tokens_are_kept_by_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert cli.main([*arguments, "--tokens", str(tmp_path / "tokens")]) == 0
        return capsys.readouterr().out

    line = [sys.executable, "-m", "tensafe_nb.cli", "serve", "--host", "0.0.0.0", "--port", "0"]
    refused = subprocess.run(line, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "give --tokens FILE" in refused.stderr
    token = said("tokens", "new", "--tenant", "ada").strip()
    assert token.startswith("tsnb_") and token not in (tmp_path / "tokens").read_text()
    token_id, tenant, *_ = said("tokens", "list").split()
    assert tenant == "ada"
    assert "is revoked" in said("tokens", "revoke", token_id)
    assert said("tokens", "list") == ""
