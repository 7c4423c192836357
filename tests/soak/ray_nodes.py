"""What is tried on a Ray of several nodes, all of them on this machine: prints {name: what was found} as JSON."""

import json
import queue
import sys
from collections.abc import Callable
from typing import Any

import ray
from ray.cluster_utils import Cluster

import tensafe_nb as tn
from tensafe_nb import rlvr
from tensafe_nb.cluster.ray_driver import patient
from tensafe_nb.events import OperationFinished, ReplicasChanged
from tests.faults import loopback
from tests.faults.on_ray import CONFIG, SLOWLY, changes, ended, mark

ROWS = [{"prompt": f"{n}+{m}=", "completion": str(n + m)} for n in range(8) for m in range(8)]
STEPS = 30
NODE: dict[str, Any] = {
    "node_ip_address": "127.0.0.1",
    "num_cpus": 1,
    "object_store_memory": 200 * 1024 * 1024,
    "include_log_monitor": False,
}


def begun(start: Callable[[], Any]) -> Any:
    """Start a node, again where a busy machine was too slow for it: Ray gives its agents 15 s."""
    for _ in range(4):
        try:
            return start()
        except Exception as error:  # noqa: BLE001  # Ray raises plain ones
            mark(f"Ray did not start: {error}")
    raise RuntimeError("Ray did not start")


def fitted(tc: tn.TrainingClient) -> tn.TrainingRun:
    return tc.fit(tc.batches(ROWS), steps=STEPS, show=False)


def sevens(prompt: str, response: str) -> float:
    return response.count("7") - len(response) / 10


def rewarded(tc: tn.TrainingClient, where: Any) -> list[float]:
    """Learn by a reward that is called in processes of a cluster, or of this machine."""
    trainer = rlvr.RLVRTrainer(
        tc,
        ["1", "2", "3"],
        sevens,
        prompts_per_step=3,
        group_size=4,
        max_new_tokens=5,
        reward_timeout=60,
        reward_processes=2,
        reward_cluster=where,
    )
    run = trainer.run(steps=2, show=False)
    run.result()
    return [float(reward) for reward in run.history["reward"]]


def compared(service: tn.ServiceClient) -> dict[str, float]:
    """Compare two learning rates; return the last losses."""

    def idea(service: tn.ServiceClient, seed: int, learning_rate: float) -> tn.TrainingRun:
        tc = service.create_training_client(
            **{**CONFIG, "optimizer": {"learning_rate": learning_rate}, "seed": seed}
        )
        return tc.fit(tc.batches(ROWS, seed=seed), steps=2, show=False)

    vary = {"learning_rate": [1e-4, 1e-3]}
    comparison = tn.compare(idea, seeds=1, vary=vary, service=service, side_by_side=1, show=False)
    table = comparison.result().table().to_pandas().set_index("arm")
    return {str(arm): float(loss) for arm, loss in table["loss"].items()}


def main() -> None:
    loopback.bring_up()
    ray._private.services.get_node = patient(ray._private.services.get_node)
    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "no_monitor": True}
    cluster = begun(lambda: Cluster(initialize_head=True, head_node_args=head))
    nodes = [begun(lambda: cluster.add_node(**NODE)) for _ in range(2)]
    mark("there are nodes")
    found: dict[str, Any] = {}
    on_ray = tn.RayCluster(cluster.address, engines=2)
    with tn.ServiceClient() as alone, tn.ServiceClient(cluster=on_ray) as service:
        one, two = (where.create_training_client(**SLOWLY) for where in (alone, service))
        two.ready().result()
        mark("and a client")
        told = queue.SimpleQueue[Any]()
        two.subscribe(told.put)
        first, second = fitted(one), fitted(two)
        while not (isinstance(told.get(), OperationFinished) and two.step >= 5):
            pass
        cluster.remove_node(nodes[0], allow_graceful=False)
        second.result()
        first.result()
        mark("a node was killed")
        found["one"], found["two"] = one.history["loss"].tolist(), two.history["loss"].tolist()
        batch = tn.BatchData([[5, 6, 7, 8]])
        while (
            "WAITING" not in changes(two)[changes(two).index("LOST") :]
        ):  # one that begins slowly waits, too
            two.forward(batch).result()
        waits = [e for e in two.history.events(kinds=[ReplicasChanged]) if e.change == "WAITING"]
        found["waiting"] = waits[-1].reason
        begun(lambda: cluster.add_node(**NODE))
        while "JOINED" not in changes(two):
            two.forward(batch).result()
        mark("another one came")
        found["changes"] = changes(two)
        found["again"] = [tc.forward(batch).result().loss for tc in (one, two)]
        begun(lambda: cluster.add_node(**{**NODE, "num_cpus": 4}))
        with (
            alone.create_training_client(**SLOWLY) as here,
            service.create_training_client(**SLOWLY) as there,
        ):
            found["rewarded"] = [rewarded(here, None), rewarded(there, on_ray)]
        mark("rewards were called there")
        found["compared"] = [compared(alone), compared(service)]
        mark("and ideas compared")
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        found["without a head"] = ended(two)
        mark("the head was killed")
        found["alone"] = one.forward(batch).result().loss
    print(json.dumps(found), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
