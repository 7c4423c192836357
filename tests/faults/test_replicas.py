"""Replicas in processes: one that is killed under a step costs nothing but time, and none outlives whose they are."""

import json
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from jupyter_client.manager import start_new_kernel

import tensafe_nb as tn
from tensafe_nb.events import ReplicasChanged
from tests.faults.killing import ROOT, Nursery, killed_server

pytestmark = pytest.mark.faults
CONFIG: dict[str, Any] = {
    "lora_config": tn.LoRAConfig(rank=4),
    "optimizer": {"learning_rate": 1e-2},
    "device": "cpu",
    "dtype": "float32",
}


def batch(seed: int) -> tn.BatchData:
    return tn.BatchData(np.random.default_rng(seed).integers(3, 200, (8, 24)))


def test_a_process_that_is_killed_under_a_step_changes_no_number_and_none_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TENSAFE_API_KEY", "not for replicas")
    monkeypatch.setenv("TENSAFE_KEK", "bm90IGZvciByZXBsaWNhcywgbm90IGZvciByZXBsaWM=")
    with tn.ServiceClient() as alone, tn.ServiceClient(cluster=tn.LocalCluster(engines=2)) as service:
        one, two = (where.create_training_client(**CONFIG) for where in (alone, service))
        pids: list[int] = []
        two.subscribe(lambda event: None)
        two.ready().result()
        group = two._channel._executor.engine  # type: ignore[attr-defined]
        pids = [place.pid for place in group._members]
        for pid in pids:
            with open(f"/proc/{pid}/environ", "rb") as environment:  # noqa: PTH123
                assert not any(secret in environment.read() for secret in (b"API_KEY", b"TENSAFE_KEK"))
        for step in range(3):
            for tc in (one, two):
                handle = tc.forward_backward(batch(step))
                if step == 1 and tc is two:
                    os.kill(pids[0], signal.SIGKILL)
                handle.result()
            changed = [tc.optim_step().result().param_delta_norm for tc in (one, two)]
            assert changed[1] == pytest.approx(changed[0], rel=1e-6)
        told = [event.change for event in two.history.events(kinds=[ReplicasChanged])]
        assert told[:2] == ["STARTED", "LOST"]
        pids += [place.pid for place in [*group._members, *group._coming]]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@contextmanager
def seen_to_end(pids: list[int]) -> Iterator[None]:
    """Wait until processes have ended that what is done here has ended."""
    ends = [os.pidfd_open(pid) for pid in pids]
    try:
        yield
        for end in ends:
            assert select.select([end], [], [], 60)[0]
    finally:
        for end in ends:
            os.close(end)


SETUP = """
import json, numpy as np, tensafe_nb as tn
service = tn.ServiceClient(cluster=tn.LocalCluster(engines=2))
tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=4), micro_batch_tokens=64)
tc.ready().result()
rows = tn.BatchData(np.full((4000, 64), 7))
pids = [place.pid for place in tc._channel._executor.engine._members]
print(json.dumps(pids))
"""
WAIT = "handle = tc.forward(rows); print('waiting', flush=True); handle.result()"
GO_ON = """
went_on, cancelled = not handle.done(), handle.cancel()
tc.forward_backward(tn.BatchData([[5, 6, 7]] * 2))
step = tc.optim_step().result().step
print(json.dumps([went_on, cancelled, step, pids == [place.pid for place in tc._channel._executor.engine._members]]))
"""


def test_an_interrupt_ends_the_wait_and_not_the_replicas_and_the_kernels_death_ends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    manager, client = start_new_kernel(kernel_name="python3")
    try:

        def run(code: str) -> Any:
            said: list[dict[str, str]] = []
            answer = client.execute_interactive(
                code, output_hook=lambda message: said.append(message["content"])
            )
            assert answer["content"]["status"] == "ok", answer["content"]
            return json.loads("".join(one["text"] for one in said if one.get("name") == "stdout"))

        pids = run(SETUP)
        client.execute(WAIT)
        while client.get_iopub_msg(timeout=60)["content"].get("text", "") != "waiting\n":
            pass
        manager.interrupt_kernel()
        answer = client.get_shell_msg(timeout=60)["content"]
        assert (answer["status"], answer["ename"]) == ("error", "KeyboardInterrupt")
        assert run(GO_ON) == [True, True, 1, True]
        with seen_to_end(pids):
            manager.shutdown_kernel(now=True)  # kill -9
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.soak
def test_a_server_on_a_cluster_that_is_killed_takes_its_replica_along_and_comes_back_with_another(
    nursery: Nursery, tmp_path: Path
) -> None:
    options = ["--cluster", "processes", "--engines", "1", "--engine-cpus", "1"]
    with (
        killed_server(nursery, tmp_path / "server", options=options) as server,
        tn.ServiceClient(server.url, server.token) as service,
        tn.ServiceClient() as embedded,
    ):
        two, one = (where.create_training_client(**CONFIG) for where in (service, embedded))
        for step in range(2):
            for tc in (one, two):
                tc.forward_backward(batch(step)).result()
            if step == 1:  # with a window that is open
                pids = [child.pid for child in psutil.Process(server.process).children()]
                assert len(pids) == 1
                with seen_to_end(pids):
                    server.kill()
                server.begin()
            changed = [tc.optim_step().result().param_delta_norm for tc in (one, two)]
            assert changed[1] == pytest.approx(changed[0], rel=1e-6)
        two.close()
