"""What is tried on a server beside a Ray that `ray start` has begun: prints {name: what was found} as JSON."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import tensafe_nb as tn
from tests.faults import loopback
from tests.faults.killing import Nursery, killed_server
from tests.faults.on_ray import SLOWLY, batch, changes, descendants, mark, step

# Ray gives its agents 15 s, in which a busy machine should start nothing that is not needed
HEAD = (
    "start --head --block --node-ip-address 127.0.0.1 --port 6379 --num-cpus 3 --include-dashboard false "
    "--no-monitor --include-log-monitor false"
)


def replicas() -> list[int]:
    """Return the processes of the actors, whoever they belong to."""
    return [pid for pid, args in descendants().items() if args.startswith("ray::RayReplica")]


def started(command: list[str], sign: Path) -> subprocess.Popen[bytes]:
    """Start Ray, again where a busy machine was too slow for it; return once the sign is there."""
    for _ in range(4):
        head = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
        while head.poll() is None:
            if sign.exists():
                return head
            time.sleep(0.1)
    raise RuntimeError("Ray did not start")


@contextmanager
def a_ray() -> Iterator[None]:
    """Run a Ray that is found by "auto"."""
    with tempfile.TemporaryDirectory(prefix="tsnb-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # sockets are there, whose names may be 107 characters long
        os.environ |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, *HEAD.split(), "--object-store-memory", str(200 << 20)]
        with started(command, Path(folder, "ray", "ray_current_cluster")) as head:
            try:
                yield
            finally:
                head.terminate()


def killed_under(tc: tn.TrainingClient, seed: int) -> list[float]:
    """Take a step under which a replica is killed that does not come to answer."""
    victim = replicas()[0]
    os.kill(victim, signal.SIGSTOP)
    handle = tc.forward_backward(batch(seed))
    os.kill(victim, signal.SIGKILL)
    result = handle.result()
    return [result.loss, result.grad_norm, tc.optim_step().result().param_delta_norm]


def main() -> None:
    loopback.bring_up()
    found: dict[str, Any] = {}
    home = Path(os.environ["TENSAFE_HOME"], "server")
    options = ["--cluster", "auto", "--engines", "2"]
    with (
        a_ray(),
        closing(Nursery()) as nursery,
        killed_server(nursery, home, options=options) as server,
        tn.ServiceClient(server.url, server.token) as service,
        tn.ServiceClient() as alone,
    ):
        mark("there is a server")
        one, two = (where.create_training_client(**SLOWLY) for where in (alone, service))
        two.ready().result()
        mark("and a client")
        found["one"] = [step(one, seed) for seed in range(4)]
        found["two"] = [step(two, 0), killed_under(two, 1), step(two, 2)]
        mark("a replica was killed")
        while "JOINED" not in changes(two):
            two.forward(batch(1)).result()
        mark("another one came")
        found["two"].append(step(two, 3))
        found["changes"] = changes(two)
        two.close()
        while replicas():  # they end by themselves
            pass
        found["left beside Ray"] = sorted(
            {args.split()[0] for args in descendants().values() if args.startswith("ray::Ray")}
        )
        mark("the client is closed")
    print(json.dumps(found), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
