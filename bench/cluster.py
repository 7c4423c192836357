"""What replicas gain and cost: two against one process, one against none, a call, a sum of gradients, a loss."""

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import tensafe_nb as tn
from bench import workload
from bench.harness import LARGER, Row, Taken, Target, as_it_says, paired
from tensafe_nb.cluster.clusters import Cluster
from tensafe_nb.cluster.group import EngineGroup
from tensafe_nb.config import TrainingConfig
from tensafe_nb.core.engines import InThisProcess
from tensafe_nb.engine.accumulation import no_tick
from tensafe_nb.losses import resolve_loss
from tensafe_nb.store.home import Home

ROWS, TOKENS = 16, 64
LOADS = 2  # where its weights happen to lie in memory makes a model faster or slower: load it anew
WIDTH, LAYERS = 384, 6  # of a model of 12 million parameters
WIDTH_OF_20_MB, LAYERS_OF_20_MB = 256, 5
LORA = tn.LoRAConfig(rank=workload.RANK, alpha=workload.ALPHA)
SETTINGS: dict[str, Any] = {
    "optimizer": {"name": "adamw", "learning_rate": workload.LEARNING_RATE},
    "dtype": "float32",
    "device": "cpu",
}


def make_model(folder: Path, width: int, layers: int) -> int:
    """Write a random Llama with the tiny one's tokenizer; return how many parameters it has."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tensafe_nb.engine.models.load import ASSETS

    torch.manual_seed(0)
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=workload.VOCABULARY, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / name, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def cpu_of(pid: int) -> float:
    """Return the CPU seconds that a process has taken, to the nanosecond: clock_getcpuclockid(3) of Linux."""
    return time.clock_gettime((~pid << 3) | 2)


def replicas_of(group: EngineGroup) -> list[int]:
    """Return the process ids of a group's replicas."""
    return [int(re.findall(r"process (\d+)", place.name)[0]) for place in group._members]


@contextmanager
def client_on(
    cluster: tn.LocalCluster | None, model: str, lora: tn.LoRAConfig | None
) -> Iterator[tuple[tn.TrainingClient, list[int]]]:
    """Give a client of a model, and the processes of its replicas."""
    with tn.ServiceClient(cluster=cluster) as service:
        tc = service.create_training_client(model_ref=model, lora_config=lora, **SETTINGS)
        tc.ready().result()
        channel: Any = tc._channel
        yield tc, [] if cluster is None else replicas_of(channel._executor.engine)


def watched(step: Callable[[], object], pids: list[int]) -> Callable[[], tuple[float, float]]:
    """Return a step that says how long it took, and the CPU seconds of this process and its slowest replica."""

    def turn() -> tuple[float, float]:
        before, here, started = [cpu_of(pid) for pid in pids], time.process_time(), time.perf_counter()
        step()
        seconds, spent = time.perf_counter() - started, time.process_time() - here
        theirs = [cpu_of(pid) - was for pid, was in zip(pids, before, strict=True)]
        return seconds, spent + max(theirs, default=0.0)

    return turn


def pairs(engines: int, width: int, layers: int, batch: tn.BatchData, seconds: float) -> tuple[Taken, int]:
    """Take pairs of a step on a cluster and one in this process; say how large the model is."""
    with tempfile.TemporaryDirectory() as folder:
        size = make_model(Path(folder), width, layers)
        cluster = tn.LocalCluster(engines=engines, cpus=1)
        with client_on(cluster, folder, LORA) as (ours, pids), client_on(None, folder, LORA) as (peer, _):
            many, one = workload.step_through(ours, batch), workload.step_through(peer, batch)
            assert abs(many() - one()) < 1e-4, "the two sides do not compute the same loss"
            return paired(watched(many, pids), watched(one, []), seconds=seconds, watch=as_it_says), size


def two() -> Row:
    """Issue 23: at least 1.6, by CPU."""
    parts = [pairs(2, WIDTH, LAYERS, workload.full(ROWS, TOKENS), 4) for _ in range(LOADS)]
    return Row(
        what="forward_backward + optim_step over two replicas; in brackets by the CPU seconds on the longest way: this "
        "process's and the slower replica's",
        peer="one process, with as many threads as each replica",
        precision="fp32",
        sizes=f"a Llama of {parts[0][1] / 1e6:.0f} million parameters, LoRA r{workload.RANK}, {ROWS}×{TOKENS}",
        taken=reduce(add, (taken for taken, _ in parts)),
        target=Target("≥", 1.6, "cpu"),
    )


def one() -> Row:
    """Issue 23: at most 1.03."""
    parts = [pairs(1, WIDTH, LAYERS, workload.full(ROWS, TOKENS), 4) for _ in range(LOADS)]
    return Row(
        what="the same over a group of one replica",
        peer="one process",
        precision="fp32",
        sizes=f"a Llama of {parts[0][1] / 1e6:.0f} million parameters, LoRA r{workload.RANK}, {ROWS}×{TOKENS}",
        taken=reduce(add, (taken for taken, _ in parts)),
        compares=LARGER,
        target=Target("≤", 1.03),
    )


@contextmanager
def group_of_two(cluster: Cluster, **config: Any) -> Iterator[EngineGroup]:
    """Give a group without a service around it."""
    home = Home.of_environment()
    group = cluster.make(
        TrainingConfig(**SETTINGS | config), home, None, lambda event: None, no_tick, served=False
    )
    try:
        yield group
    finally:
        group.close()


def two_processes() -> Cluster:
    return tn.LocalCluster(engines=2, cpus=1)


def calls(cluster: Cluster) -> list[float]:
    """Return the seconds of calls to all replicas of two."""
    seconds = []
    with group_of_two(cluster, lora_config={"rank": workload.RANK}) as group:
        for _ in range(300):
            started = time.perf_counter()
            group.discard_gradients()
            seconds.append(time.perf_counter() - started)
    return seconds[50:]


def call() -> Row:
    """Issue 23: at most 5 ms."""
    return Row(
        what="a call to all of two replicas, which have nothing to do, until both have answered",
        peer="",
        taken=Taken(calls(two_processes())),
        target=Target("≤", 5e-3, "ours"),
    )


def sums(cluster: Cluster) -> tuple[Taken, int]:
    """Take what a step with little to compute takes longer over two replicas; return the model's size, too."""
    loss, rows = resolve_loss("token_ce"), workload.full(2, 4)
    with tempfile.TemporaryDirectory() as folder:
        size = make_model(Path(folder), WIDTH_OF_20_MB, LAYERS_OF_20_MB)
        with group_of_two(cluster, model_ref=folder) as group:
            alone = InThisProcess().make(
                group.config, Home.of_environment(), None, lambda event: None, no_tick, served=False
            )

            def step(engine: Any) -> Callable[[], None]:
                def run() -> None:
                    engine.forward_backward(rows, loss, no_tick)
                    engine.discard_gradients()

                return run

            turns = watched(step(group), replicas_of(group)), watched(step(alone), [])
            taken = paired(*turns, seconds=5, at_least=20, watch=as_it_says)
    return Taken(longer(taken), cpu=taken.cpu and Taken(longer(taken.cpu))), size


def gradients() -> Row:
    """Issue 23: at most 100 ms."""
    taken, size = sums(two_processes())
    return Row(
        what=f"to add up {4 * size / 1e6:.0f} MB of gradients of two replicas, and hand each the sum: what a "
        f"forward_backward of two rows of 4 tokens takes longer than in one process",
        peer="",
        precision="fp32",
        sizes=f"all weights of a Llama of {size / 1e6:.1f} million parameters",
        taken=taken,
        target=Target("≤", 0.1, "ours"),
    )


def longer(taken: Taken) -> list[float]:
    """Return what ours took longer than the peer, pair by pair."""
    return [ours - peer for ours, peer in zip(taken.ours, taken.peer, strict=True)]


def regroups(cluster: Cluster) -> list[float]:
    """Return the seconds until a group that has lost a replica has computed what was asked of it then."""
    loss, rows, seconds = resolve_loss("token_ce"), workload.full(4, 32), []
    with group_of_two(cluster, lora_config={"rank": workload.RANK}) as group:
        for _ in range(3):
            while len(replicas_of(group)) < 2:
                time.sleep(0.1)
                group.streams()
            group.forward_backward(rows, loss, no_tick)
            started = time.perf_counter()
            os.kill(replicas_of(group)[0], signal.SIGKILL)
            group.forward_backward(rows, loss, no_tick)
            seconds.append(time.perf_counter() - started)
    return seconds


def regroup() -> Row:
    """Issue 23: less than 1 s."""
    return Row(
        what="from `kill -9` of one of two replicas to the result of the forward_backward that follows",
        peer="",
        precision="fp32",
        sizes=f"{workload.MODEL}, 4×32",
        taken=Taken(regroups(two_processes())),
        target=Target("≤", 1.0, "ours"),
    )
