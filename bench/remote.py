"""What a server adds: the latency and the CPU of an operation over loopback, pipelined steps, events, artifacts."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

import tensafe_nb as tn
from bench import workload
from bench.harness import LARGER, ROOT, Row, Taken, Target, paired

STEPS = 100
OPERATIONS = 300
SERVE = (
    "from tensafe_nb.cli.main import main; main(['serve', '--port', '0', '--json', '--print-token', *{more}])"
)
IDLE = "import tensafe_nb.core.worker as worker, bench.queue as queue; worker.Engine = queue.EngineThatDoesNothing; "
NO_JOURNAL = (
    "import tensafe_nb.store.sealed.log as log; log.SealedLog.append = lambda self, content: 0; "
    "import tensafe_nb.server.journal as journal; journal.Journal.is_due = lambda self, whole: False; "
)
ONE, LARGE = (1, 1), (8, 512)


@contextmanager
def served(*more: str, prelude: str = "") -> Iterator[tuple[tn.ServiceClient, int]]:
    """Start a server in a process of its own; give a client of it, and the server's process id."""
    with tempfile.TemporaryDirectory(prefix="tensafe-served-") as home:
        command = [sys.executable, "-c", prelude + SERVE.format(more=["--home", home, *more])]
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


def all_queued_first(tc: tn.TrainingClient, batch: tn.BatchData) -> Callable[[], None]:
    """Return what takes steps, all of them queued at once."""

    def run() -> None:
        handles = [handle for _ in range(STEPS) for handle in (tc.forward_backward(batch), tc.optim_step())]
        [handle.result() for handle in handles]

    return run


def journal() -> Row:
    """Issue 20: at most 5 % of a step."""
    batch = workload.full(8, 64)
    with served() as (remote, _), served(prelude=NO_JOURNAL) as (other, _):
        ours, peer = (all_queued_first(workload.tiny_client(service), batch) for service in (remote, other))
        taken = paired(ours, peer, seconds=20, at_least=8, warmup=1)
        for service in (remote, other):
            for info in service.list_training_clients():
                service.get_training_client(info.training_client_id).close()
    return Row(
        what=f"{STEPS} pipelined steps against a server that keeps its journal and makes automatic checkpoints",
        peer="the same against one that does neither",
        precision="fp32",
        sizes=f"{workload.MODEL}, 8×64",
        taken=Taken(taken.ours, taken.peer),
        compares=LARGER,
        target=Target("≤", 1.05),
    )


def restart() -> Row:
    """Issue 20: at most 30 s."""
    seconds, batch = [], workload.full(8, 64)
    with (
        tempfile.TemporaryDirectory(prefix="tensafe-killed-") as folder,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        port = free.getsockname()[1]
        free.close()
        line = [
            sys.executable,
            "-m",
            "tensafe_nb.cli",
            "serve",
            "--json",
            "--home",
            folder,
            "--port",
            str(port),
        ]
        line += ["--tokens", f"{folder}/tokens"]
        server = subprocess.Popen([*line, "--print-token"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert server.stdout is not None
            where = json.loads(server.stdout.readline())
            with tn.ServiceClient(where["url"], where["token"]) as service:
                clients = [workload.tiny_client(service) for _ in range(4)]
                for _ in range(3):
                    handles = [
                        h
                        for tc in clients
                        for _ in range(25)
                        for h in (tc.forward_backward(batch), tc.optim_step())
                    ]
                    handles[len(handles) // 2].result()
                    server.kill(), server.wait()
                    began = time.perf_counter()
                    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
                    while not _is_ready(where["url"]):
                        time.sleep(0.02)
                    seconds.append(time.perf_counter() - began)
                    [handle.result() for handle in handles]
        finally:
            server.kill(), server.wait()
    return Row(
        what="from the start of a server that was killed (`kill -9`) until it is ready",
        peer="",
        sizes="4 training clients in the midst of 50 operations each",
        taken=Taken(seconds),
        figure=max,
        target=Target("≤", 30.0, "ours"),
    )


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.TransportError:
        return False


def _pipelined(rows: int, tokens: int, limit: float) -> Row:
    batch = workload.full(rows, tokens)
    with tn.ServiceClient() as embedded, served() as (remote, _):
        ours, peer = (
            all_queued_first(workload.tiny_client(service), batch) for service in (remote, embedded)
        )
        taken = paired(ours, peer, seconds=10, at_least=4, warmup=1)
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
