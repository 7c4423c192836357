"""What is tried on a real Ray, in one process with a network of its own: prints {name: what was found} as JSON.

A program, not a test: Ray listens on all addresses, so it gets a namespace in which there is nothing but loopback.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1

FOUND: dict[str, Any] = {}


def bring_up_loopback() -> None:
    with socket.socket() as some:
        fcntl.ioctl(some, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def batch(tn: Any, seed: int, rows: int = 8, width: int = 12) -> Any:
    import numpy as np

    return tn.BatchData(np.random.default_rng(seed).integers(3, 200, (rows, width)))


def trained(tn: Any, tc: Any, at: Callable[[int], None] = lambda step: None, steps: int = 4) -> list[float]:
    told = []
    for step in range(steps):
        handle = tc.forward_backward(batch(tn, step))
        at(step)
        told += [handle.result().loss, handle.result().grad_norm]
        told.append(tc.optim_step().result().param_delta_norm)
    return told


def processes() -> list[int]:
    """Return the ids of the actors' processes."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::RayReplica" in line]


def main() -> None:
    bring_up_loopback()
    import tensafe_nb as tn

    before = signal.getsignal(signal.SIGTERM)
    os.environ["TENSAFE_API_KEY"] = "not for actors"
    config = {
        "lora_config": {"rank": 4},
        "optimizer": {"learning_rate": 1e-2},
        "device": "cpu",
        "dtype": "float32",
    }
    alone = tn.ServiceClient()
    service = tn.ServiceClient(cluster=tn.RayCluster("local", engines=2))
    with alone, service:
        one, two = (where.create_training_client(**config) for where in (alone, service))
        FOUND["ready"] = two.ready().result().trained_parameters
        FOUND["the handler of SIGTERM is ours"] = signal.getsignal(signal.SIGTERM) == before
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in processes()]
        FOUND["an actor knows the key"] = [b"not for actors" in environment for environment in environments]
        FOUND["one"], FOUND["two"] = trained(tn, one), trained(tn, two)
        prompts = ["a", "b", "a"]
        FOUND["drawn by one"], FOUND["drawn by two"] = (
            [
                list(s.tokens)
                for s in tc.sample(prompts, num_samples=3, max_new_tokens=6, seed=5).result().sequences
            ]
            for tc in (one, two)
        )

        def kill(step: int) -> None:
            if step == 1:
                os.kill(min(set(processes()) - others), signal.SIGKILL)

        others = set(processes())
        saved = two.save_state().result()
        three, four = (where.restore(saved.artifact_id) for where in (alone, service))
        four.ready().result()
        FOUND["undisturbed"], FOUND["killed"] = trained(tn, three), trained(tn, four, kill)
        events = [event for event in four.history.events() if type(event).__name__ == "ReplicasChanged"]
        FOUND["changes"] = [event.change for event in events]
        handle = two.forward_backward(batch(tn, 9, rows=512, width=64))
        FOUND["cancelled"] = handle.cancel() or handle.state.value
        FOUND["goes on"] = two.forward(batch(tn, 1)).result().loss > 0
        for pid in processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            two.forward_backward(batch(tn, 3)).result()
        except tn.ClusterError as error:
            FOUND["all lost"] = str(error)
        FOUND["status"] = str(two.status)
    FOUND["left"] = processes()
    json.dump(FOUND, sys.stdout)


if __name__ == "__main__":
    main()
