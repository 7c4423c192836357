"""What is tried on a real Ray, in one process with a network of its own: prints {name: what was found} as JSON.

A program, not a test: Ray listens for other machines, so it gets a namespace in which there is nothing but loopback.
Once it has printed, it waits to be killed, with a training client on a Ray of its own.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import tensafe_nb as tn
from tensafe_nb import rlvr
from tensafe_nb.events import Progress, ReplicasChanged
from tensafe_nb.rlvr import Trajectory
from tests.faults import loopback

CONFIG: dict[str, Any] = {
    "lora_config": {"rank": 4},
    "optimizer": {"learning_rate": 1e-2},
    "device": "cpu",
    "dtype": "float32",
}
# At 1e-2 what rounding differs grows to another way of training, whether a node is lost or not.
SLOWLY = {**CONFIG, "optimizer": {"learning_rate": 1e-4}}
FOUND: dict[str, Any] = {}


def descendants() -> dict[int, str]:
    """Return the processes that this one has started, and those that they have, with their commands."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()[1:]]
    found: dict[int, str] = {}
    parents = {os.getpid()}
    while parents:
        of_these = {
            int(pid): args for pid, parent, args in rows if int(parent) in parents and args[:3] != "ps "
        }
        found |= of_these
        parents = set(of_these)
    return found


def members(tc: tn.TrainingClient) -> list[int]:
    """Return the processes of a client's actors."""
    group = tc._channel._executor.engine  # type: ignore[attr-defined]
    return [int(re.findall(r"process (\d+)", place.name)[0]) for place in group._members]


def batch(seed: int, rows: int = 8, width: int = 12) -> tn.BatchData:
    return tn.BatchData(np.random.default_rng(seed).integers(3, 200, (rows, width)))


def step(tc: tn.TrainingClient, seed: int) -> list[float]:
    result = tc.forward_backward(batch(seed)).result()
    return [result.loss, result.grad_norm, tc.optim_step().result().param_delta_norm]


def drawn(tc: tn.TrainingClient) -> list[list[int]]:
    result = tc.sample(["a", "b", "a"], num_samples=3, max_new_tokens=6, seed=5).result()
    return [list(sequence.tokens) for sequence in result.sequences]


def changes(tc: tn.TrainingClient) -> list[str]:
    return [event.change for event in tc.history.events(kinds=[ReplicasChanged])]


def grow(tc: tn.TrainingClient) -> None:
    """Go on until the group is whole again."""
    while len(members(tc)) < 2:
        tc.forward(batch(1)).result()


def kill_under(tc: tn.TrainingClient, submit: Any) -> Any:
    """Return what an operation gives whose first actor does not come to answer, and is killed."""
    victim = members(tc)[0]
    os.kill(victim, signal.SIGSTOP)
    handle = submit()
    os.kill(victim, signal.SIGKILL)
    return handle.result()


def losses(one: tn.TrainingClient, two: tn.TrainingClient) -> None:
    """Compare one engine with two actors, also while one of these is killed."""
    FOUND["one"], FOUND["two"] = ([step(tc, seed) for seed in range(2)] for tc in (one, two))
    FOUND["drawn by one"], FOUND["drawn by two"] = drawn(one), drawn(two)
    asked = one.forward_backward(batch(7)).result(), kill_under(two, lambda: two.forward_backward(batch(7)))
    FOUND["asked"] = [[result.loss, result.grad_norm] for result in asked]
    grow(two)
    told = one.optim_step().result(), kill_under(two, two.optim_step)
    FOUND["told"] = [[result.step, result.param_delta_norm] for result in told]
    FOUND["afterwards"] = [step(tc, 11) for tc in (one, two)]
    FOUND["changes"] = changes(two)


def cancelled(tc: tn.TrainingClient) -> None:
    """Cancel what runs."""
    progress = queue.SimpleQueue[Any]()
    end = tc.subscribe(lambda event: progress.put(event) if isinstance(event, Progress) else None)
    handle = tc.forward_backward(batch(9, rows=4096, width=64))
    progress.get()
    FOUND["cancelled"] = [handle.cancel(), handle.state.value]
    end()
    FOUND["goes on"] = tc.forward(batch(1)).result().loss > 0


def ended(tc: tn.TrainingClient) -> list[str]:
    """Go on until nothing goes any more; return how the client stands then, and why."""
    while True:
        try:
            tc.forward(batch(1)).result()
        except tn.ClusterError as error:
            if tc.status is tn.ClientStatus.ERROR:
                return [str(tc.status), str(error)]


def all_lost(tc: tn.TrainingClient) -> None:
    for pid in members(tc):
        os.kill(pid, signal.SIGKILL)
    FOUND["all lost"] = ended(tc)


def awkward(prompt: str, response: str, meta: dict[str, Any]) -> float:
    """Score, or do what a reward should not."""
    match response:
        case "start":
            subprocess.Popen(["sleep", "600"])
        case "raise":
            raise KeyError("missing")
        case "die":
            os._exit(3)
        case "lose the machine" if not Path(meta["lost"]).exists():
            Path(meta["lost"]).touch()
            os.kill(os.getppid(), signal.SIGKILL)  # its actor
        case "hang":
            while True:
                pass
    return float(len(response))


def scored(cluster: tn.RayCluster) -> None:
    """Score on the cluster; it keeps nothing of that."""
    responses = ["start", "raise", "die", "lose the machine", "fine", "hang"]
    calls = [Trajectory("q", response, meta={"lost": str(Path.home() / "lost")}) for response in responses]
    with rlvr.Scorer(awkward, timeout=2.5, processes=1, cluster=cluster) as scorer:
        report = scorer.score(calls)
    FOUND["scored"] = {call.response: [call.reward, call.reward_error] for call in calls}
    FOUND["errors"] = [report.scored, report.errors, report.timeouts]
    while any(re.search(r"child\.py|sleep 600|ray::RayScoring", args) for args in descendants().values()):
        pass  # they end by themselves


def first() -> None:
    """What a service does from its beginning to its end."""
    before = signal.getsignal(signal.SIGTERM)
    os.environ["TENSAFE_API_KEY"] = "not for actors"
    cluster = tn.RayCluster("local", engines=2)
    with tn.ServiceClient() as alone, tn.ServiceClient(cluster=cluster) as service:
        one, two = (where.create_training_client(**CONFIG) for where in (alone, service))
        two.ready().result()
        mark("two actors are there")
        FOUND["the handler of SIGTERM is ours"] = signal.getsignal(signal.SIGTERM) == before
        FOUND["ray is imported here"] = "ray" in sys.modules
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in descendants()]
        FOUND["who knows the key"] = sum(b"not for actors" in environment for environment in environments)
        listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=False).stdout
        FOUND["listens at"] = sorted({line.split()[3].rpartition(":")[0] for line in listening.splitlines()})
        losses(one, two)
        mark("actors were killed")
        cancelled(two)
        all_lost(two)
        mark("all of them")
        scored(cluster)
        mark("rewards were scored")
    FOUND["left by a closed service"] = list(descendants().values())
    FOUND["left on the disk"] = [str(path) for path in Path("/tmp").glob("tsnb-ray-*")]
    FOUND["token left"] = Path.home().joinpath(".ray").exists()


def second(service: tn.ServiceClient) -> tn.TrainingClient:
    """Let the driver be killed: the cluster is gone, and a client that is made then gets another."""
    tc = service.create_training_client(**CONFIG)
    tc.ready().result()
    (driver,) = [pid for pid, args in descendants().items() if "ray_driver" in args and "ray::" not in args]
    os.kill(driver, signal.SIGKILL)
    FOUND["without its driver"] = ended(tc)
    mark("the driver was killed")
    again = service.create_training_client(**CONFIG)
    again.ready().result()
    mark("and is there again")
    return again


def mark(what: str) -> None:
    print(f"{time.monotonic() - START:5.1f} s: {what}", file=sys.stderr, flush=True)


START = time.monotonic()


def main() -> None:
    loopback.bring_up()
    first()
    with tn.ServiceClient(cluster=tn.RayCluster("local", engines=1)) as service:
        tc = second(service)
        print(json.dumps({**FOUND, "alive": descendants()}), flush=True)
        sys.stdin.read()
        tc.close()


if __name__ == "__main__":
    main()
