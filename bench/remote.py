"""What a server adds: the latency and the CPU of an operation over loopback, pipelined steps, events, artifacts."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

import tensafe_nb as tn
from bench import workload
from bench.harness import LARGER, ROOT, Row, Taken, Target, paired

STEPS = 50
OPERATIONS = 300
SERVE = (
    "from tensafe_nb.cli.main import main; main(['serve', '--port', '0', '--json', '--print-token', *{more}])"
)
IDLE = "import tensafe_nb.core.engines as engines, bench.queue as queue; engines.Engine = queue.EngineThatDoesNothing; "
UNWRITTEN = (
    "from tensafe_nb.server.journal import Journal as J; J.submitted = J.ended = J.sync = lambda *_, **__: None; "
    "J.is_due = lambda *_, **__: False; J.known_to = lambda *_: frozenset(); "
)
ONE, LARGE = (1, 1), (8, 512)
MANY, EACH = 50, 2  # clients, and what each does in one measurement


@contextmanager
def served(*more: str, prelude: str = "", home: str | None = None) -> Iterator[tuple[tn.ServiceClient, int]]:
    """Start a server in a process of its own; give a client of it, and the server's process id."""
    with tempfile.TemporaryDirectory(prefix="tensafe-served-") as fresh:
        command = [sys.executable, "-c", prelude + SERVE.format(more=["--home", home or fresh, *more])]
        with (
            tempfile.TemporaryFile() as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT) as process,
        ):
            assert process.stdout is not None
            try:
                where = json.loads(process.stdout.readline())
                with tn.ServiceClient(where["url"], where["token"]) as service:
                    yield service, process.pid
            finally:
                process.terminate()


def cpu_of(pid: int) -> float:
    """Return the CPU seconds that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def usual_latency() -> Row:
    """Issue 18: at most 5 ms."""
    return _latency("median", median, 5e-3)


def worst_latency() -> Row:
    """Issue 18: at most 15 ms, 95th percentile."""
    return _latency("95th percentile", p95, 15e-3)


def p95(values: Any) -> float:
    """Return what 95 % of the values do not exceed."""
    return quantiles(values, n=20, method="inclusive")[18]


def _latency(words: str, figure: Callable[[Any], float], limit: float) -> Row:
    return Row(
        what=f"an operation that does nothing, over loopback, from submit to result(): {words}",
        peer="",
        sizes="`forward` of one token on an engine that does nothing; a server in a process of its own",
        taken=Taken(_measured()["small"]),
        figure=figure,
        target=Target("≤", limit, "ours"),
    )


def large_batch() -> Row:
    """Issue 18: within 1 ms of a small one."""
    found = _measured()
    return Row(
        what="the same with a large batch: what it takes longer",
        peer="",
        sizes="`forward` of 8×512 tokens beside one of one token",
        taken=Taken([large - small for large, small in zip(found["large"], found["small"], strict=True)]),
        target=Target("≤", 1e-3, "ours"),
    )


def cpu() -> Row:
    """Issue 18: at most 5 ms, both sides together."""
    return Row(
        what="the CPU of both processes for one pipelined operation that does nothing",
        peer="",
        sizes=f"{OPERATIONS} `forward` of one token, all queued first",
        taken=Taken(_measured()["cpu"]),
        target=Target("≤", 5e-3, "ours"),
    )


def event_delay() -> Row:
    """Issue 18: at most 20 ms, 95th percentile."""
    return Row(
        what="from the server's publishing an event to a subscriber here, 95th percentile",
        peer="",
        sizes="the events of operations that do nothing, one after the other",
        taken=Taken(_measured()["delay"]),
        figure=p95,
        target=Target("≤", 20e-3, "ours"),
    )


@cache
def _measured() -> dict[str, list[float]]:
    """Measure everything that needs a server whose engine does nothing."""
    small, large = workload.full(*ONE), workload.full(*LARGE)
    delays: list[float] = []
    with served(prelude=IDLE) as (service, pid):
        tc = service.create_training_client()
        tc.ready().result()
        for _ in range(50):
            tc.forward(small).result(), tc.forward(large).result()
        stop = tc.subscribe(lambda event: delays.append(time.time() - event.time))
        taken = paired(
            lambda: tc.forward(small).result(), lambda: tc.forward(large).result(), seconds=5, at_least=200
        )
        stop()
        spent = []
        for _ in range(4):
            before = time.process_time() + cpu_of(pid)
            handles = [tc.forward(small) for _ in range(OPERATIONS)]
            [handle.result() for handle in handles]
            spent.append((time.process_time() + cpu_of(pid) - before) / OPERATIONS)
        tc.close()
    return {"small": list(taken.ours), "large": list(taken.peer), "cpu": spent, "delay": delays}


def pipelined_small_steps() -> Row:
    """Issue 18: at most 1.15."""
    return _pipelined(4, 32, 1.15)


def pipelined_steps() -> Row:
    """Issue 18: at most 1.10."""
    return _pipelined(8, 64, 1.10)


def _pipelined(rows: int, tokens: int, limit: float) -> Row:
    with tn.ServiceClient() as embedded, served() as (remote, _):
        ours, peer = (
            all_queued_first(workload.tiny_client(service), rows, tokens) for service in (remote, embedded)
        )
        taken = paired(ours, peer, seconds=5, at_least=2, warmup=1)
        for info in remote.list_training_clients():
            remote.get_training_client(info.training_client_id).close()
    return Row(
        what=f"{STEPS} pipelined steps against a server, all queued first, to the last result",
        peer="the same steps embedded",
        precision="fp32",
        sizes=f"{workload.MODEL}, {rows}×{tokens}",
        taken=Taken(taken.ours, taken.peer),  # the CPU of the server is another process's
        compares=LARGER,
        target=Target("≤", limit),
    )


def all_queued_first(tc: tn.TrainingClient, rows: int, tokens: int) -> Callable[[], None]:
    """Return what queues all steps, and waits for the last result."""
    batch = workload.full(rows, tokens)

    def run() -> None:
        handles = [handle for _ in range(STEPS) for handle in (tc.forward_backward(batch), tc.optim_step())]
        [handle.result() for handle in handles]

    return run


def journal() -> Row:
    """Issue 20: at most 5 % of a step."""
    with served() as (writes, _), served(prelude=UNWRITTEN) as (does_not, _):
        ours, peer = (
            all_queued_first(workload.tiny_client(service), 8, 64) for service in (writes, does_not)
        )
        taken = paired(ours, peer, seconds=5, at_least=2, warmup=1)
        for service in (writes, does_not):
            for info in service.list_training_clients():
                service.get_training_client(info.training_client_id).close()
    return Row(
        what=f"{STEPS} pipelined steps against a server, with its journal and automatic checkpoints",
        peer="the same against a server that writes neither",
        precision="fp32",
        sizes=f"{workload.MODEL}, 8×64",
        taken=Taken(taken.ours, taken.peer),
        compares=LARGER,
        target=Target("≤", 1.05),
    )


def restart() -> Row:
    """Issue 20: ready at most 30 s after `kill -9`."""
    seconds = []
    with tempfile.TemporaryDirectory(prefix="tensafe-killed-") as home:
        killed: list[str] = []
        for round in range(3):
            started = time.perf_counter()
            with served(home=home) as (service, pid):
                if round:
                    clients = [service.get_training_client(name) for name in killed]
                    [tc.forward(workload.full(*ONE)).result() for tc in clients]
                    seconds.append(time.perf_counter() - started)
                else:
                    clients = [workload.tiny_client(service) for _ in range(4)]
                    killed = [tc.training_client_id for tc in clients]
                handles = [tc.forward_backward(workload.full(4, 32)) for _ in range(20) for tc in clients]
                [handle.result() for handle in handles[: len(handles) // 2]]
                os.kill(pid, signal.SIGKILL)
    return Row(
        what="from the start of a server that was killed with `kill -9` to the first results of its clients",
        peer="",
        precision="fp32",
        sizes=f"a cold process, 4 clients of {workload.MODEL} with some 20 open operations each",
        taken=Taken(seconds),
        target=Target("≤", 30.0, "ours"),
    )


def many_empty() -> Row:
    """Issue 20: at least 200 operations a second."""
    return Row(
        what=f"an operation that does nothing, of {MANY} clients at once, all queued first",
        peer="",
        sizes="`forward` of one token on an engine that does nothing; one kernel, one server",
        taken=Taken([seconds for seconds, _, _ in _many(empty=True)]),
        target=Target("≤", 1 / 200, "ours"),
    )


def many_steps() -> Row:
    """Issue 20: at least 0.6 of the embedded core."""
    found = _many(empty=False)
    return Row(
        what=f"a step of {MANY} clients at once against a server, all queued first",
        peer="the same embedded",
        precision="fp32",
        sizes=f"{workload.MODEL}, 4×32",
        taken=Taken([seconds for seconds, _, _ in found], [embedded for _, embedded, _ in found]),
        compares=LARGER,
        target=Target("≤", 1 / 0.6),
    )


def slowest_of_many() -> Row:
    """Issue 20: at most twice the median."""
    found = [latencies for _, _, latencies in _many(empty=False)]
    return Row(
        what=f"how long an operation of the slowest of {MANY} clients takes, on average",
        peer="of the client in the middle",
        precision="fp32",
        sizes=f"{workload.MODEL}, 4×32, {EACH} steps each, all queued first",
        taken=Taken([max(latencies) for latencies in found], [median(latencies) for latencies in found]),
        compares=LARGER,
        target=Target("≤", 2.0),
    )


@cache
def _many(*, empty: bool) -> list[tuple[float, float, list[float]]]:
    """Measure, a few times, seconds of an operation remote and embedded, and the mean latency of each client."""
    batch = workload.full(*ONE) if empty else workload.full(4, 32)

    def made(service: tn.ServiceClient) -> list[tn.TrainingClient]:
        clients = [workload.tiny_client(service) for _ in range(MANY)]
        [client.ready().result() for client in clients]
        return clients

    def run(clients: list[tn.TrainingClient]) -> tuple[float, list[float]]:
        took: list[list[float]] = [[] for _ in clients]
        started, handles = time.perf_counter(), []
        for _ in range(EACH):
            for client, times in zip(clients, took, strict=True):
                for submit in [client.forward] if empty else [client.forward_backward, client.optim_step]:
                    handle, at = submit(*[batch] * (submit != client.optim_step)), time.perf_counter()
                    handle.add_done_callback(
                        lambda _, times=times, at=at: times.append(time.perf_counter() - at)
                    )
                    handles.append(handle)
        [handle.result() for handle in handles]
        seconds = time.perf_counter() - started
        while sum(map(len, took)) < len(handles):
            time.sleep(0.001)
        return seconds / len(handles), [sum(times) / len(times) for times in took]

    with (
        served("--max-clients", "100", "--max-queued", "1M", prelude=IDLE if empty else "") as (remote, _),
        tn.ServiceClient() as embedded,
    ):
        there, here = made(remote), [] if empty else made(embedded)
        [client.forward(batch).result() for client in there]
        found = []
        for _ in range(2):
            seconds, latencies = run(there)
            found.append((seconds, run(here)[0] if here else 0.0, latencies))
        [client.close() for client in (*there, *here)]
    return found


def further_client() -> Row:
    """Issue 20: at most its adapter, its optimiser and 20 MiB."""
    with tempfile.TemporaryDirectory() as folder:
        _make_model(Path(folder) / "models" / "llama")
        with served("--models", str(Path(folder) / "models")) as (service, pid):
            clients, used = [], []
            for _ in range(6):
                tc = service.create_training_client(model_ref="llama", lora_config=tn.LoRAConfig(rank=8))
                for _ in range(3):
                    tc.forward_backward(workload.full(2, 32)), tc.optim_step().result()
                clients.append(tc)
                used.append(psutil.Process(pid).memory_full_info().uss / 2**20)
            own = (
                3 * 4 * (clients[0].refresh().trained_parameters or 0) / 2**20
            )  # with Adam's two moments, fp32
            [tc.close() for tc in clients]
    return Row(
        what="what a further LoRA client of a model takes on a server, beside its adapter and its optimiser",
        peer="",
        precision="bf16 where the processor has it",
        sizes=f"a model of 150 MB, rank 8: adapter and optimiser take {own:.0f} MiB",
        unit="MiB",
        taken=Taken([after - before - own for before, after in pairwise(used)]),
        target=Target("≤", 20.0, "ours"),
    )


def download() -> Row:
    """Issue 18: at least 200 MB/s."""
    with tempfile.TemporaryDirectory() as folder:
        _make_model(Path(folder) / "models" / "llama")
        with served("--models", str(Path(folder) / "models")) as (service, _):
            tc = service.create_training_client(model_ref="llama")
            saved = tc.save_state(include_optimizer=False).result()
            seconds = []
            for _ in range(5):
                started = time.perf_counter()
                service.pull_artifact(saved.artifact_id, to=Path(folder) / "state")
                seconds.append((time.perf_counter() - started) * 1e8 / saved.size_bytes)
            tc.close()
    return Row(
        what="to download 100 MB of an artifact into a file",
        peer="",
        sizes=f"an artifact of {saved.size_bytes / 1e6:.0f} MB",
        taken=Taken(seconds),
        target=Target("≤", 0.5, "ours"),
    )


def _make_model(folder: Path) -> None:
    """Write a random model of some 150 MB, with the tiny one's tokenizer."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tensafe_nb.engine.models.load import ASSETS

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=workload.VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=5,
        num_attention_heads=12, num_key_value_heads=12, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / name, folder)
