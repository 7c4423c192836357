"""From how large a model on does a cluster pay? Predicts the step of N replicas, and measures 1, 2 and 3 beside it.

`python -m scripts.simulate_cluster` measures random Llamas with LoRA on this machine; `--latency` and `--megabytes`
say what a network between the machines would add. All times are CPU seconds on the longest way of a step, this
process's and the slowest replica's, which the load of others stretches least; so three replicas can be measured on two
cores. Its assumptions are printed.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # before torch

SIZES = {"small": (96, 2), "tiny": (160, 4), "medium": (384, 6)}  # name → (width, layers)
ROWS, TOKENS = 16, 64
SEVERAL = (1, 2, 3)  # replicas that are measured
FURTHER = (4, 8, 16)
CORES = os.cpu_count() or 1
STEPS = 5  # of which the median is taken
LITTLE = 4  # tokens of a row that costs next to nothing
CALLS = 3  # one after the other in a step: contribute, absorb, optim_step
ASSUMED = """\
Assumed: every replica has a core of its own, as fast as this one; rows are of equal length, and none is divided; a step
takes as long as the largest share, and then the sum; a share of t tokens takes s + t · c, as in one process; what this
process does for a sum grows with the number of replicas, what each of them does for it does not; a network adds {calls}
round trips, and carries every gradient to this process and the sum to every replica, over one line."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured of a model, in seconds.

    Attributes:
        start: Of a step of one process, however few its tokens.
        token: Of each token.
        here: That this process spends on two replicas, beside what it spends on itself.
        there: That a replica spends, beside its tokens.
        sums: Both, for each number of replicas that was measured: more of them than cores share caches and memory,
            so that what was measured of two need not hold of them.
        call: From a call to both replicas to their answers, on the clock.
        gradient: Bytes that each replica sends.
    """

    start: float
    token: float
    here: float
    there: float
    sums: dict[int, tuple[float, float]]
    call: float
    gradient: int

    def step(self, replicas: int, latency: float = 0.0, bandwidth: float = float("inf")) -> float:
        """Return what a step takes.

        Args:
            replicas: How many.
            latency: Of the network, in seconds for each round trip.
            bandwidth: Of the line to this process, in bytes a second.
        """
        share = self.start + self.token * TOKENS * -(-ROWS // replicas)
        if replicas == 1:  # it keeps its gradient to itself
            return share + CALLS * latency
        line = 2 * replicas * self.gradient / bandwidth
        return share + self.there + self.here * replicas / 2 + CALLS * latency + line

    @property
    def pays_from(self) -> float:
        """Tokens of a step from which on two replicas are faster: half of them take as long as the sum."""
        return 2 * (self.here + self.there) / self.token


def middle(turn: Callable[[], tuple[float, float]]) -> float:
    """Return the median CPU seconds of some steps."""
    turn()
    return median(turn()[1] for _ in range(STEPS))


def measure(folder: str, weights: str) -> tuple[Costs, dict[int, float], int]:
    """Measure a model in one process and over replicas; return also what steps took, and its trained weights."""
    import tensafe_nb as tn
    from bench import cluster, workload

    batch, little = workload.full(ROWS, TOKENS), workload.full(1, LITTLE)
    lora = None if weights == "all" else tn.LoRAConfig(rank=workload.RANK, alpha=workload.ALPHA)
    with cluster.client_on(None, folder, lora) as (tc, pids):
        turns = [
            cluster.watched(workload.step_through(tc, workload.full(rows, TOKENS)), pids)
            for rows in (ROWS, ROWS // 4)
        ]
        whole, part = map(middle, turns)
        alone = middle(cluster.watched(workload.step_through(tc, little), pids))
        trained = tc.refresh().trained_parameters or 0
    token = (whole - part) / (TOKENS * (ROWS - ROWS // 4))
    found: dict[int, float] = {}
    sums: dict[int, tuple[float, float]] = {}
    call = 0.0
    for replicas in SEVERAL:
        with cluster.client_on(tn.LocalCluster(engines=replicas, cpus=1), folder, lora) as (tc, pids):
            found[replicas] = middle(cluster.watched(workload.step_through(tc, batch), pids))
            if replicas > 1:
                step = workload.step_through(tc, workload.full(replicas, LITTLE))
                driver = middle(cluster.watched(step, []))
                sums[replicas] = driver, max(0.0, middle(cluster.watched(step, pids)) - driver - alone)
            if replicas == 2:
                call = called(tc)
    return (
        Costs(whole - token * ROWS * TOKENS, token, *sums[2], sums, call, 4 * trained),
        found,
        trained,
    )


def called(tc: Any) -> float:
    """Return the seconds of a call to all replicas that have nothing to do."""
    group, taken = tc._channel._executor.engine, []
    for _ in range(100):
        started = time.perf_counter()
        group.discard_gradients()
        taken.append(time.perf_counter() - started)
    return median(taken)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m scripts.simulate_cluster", description=__doc__)
    parser.add_argument(
        "sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}; all by default"
    )
    parser.add_argument("--weights", choices=["lora", "all"], default="lora", help="what is trained")
    parser.add_argument("--latency", type=float, default=0.0, metavar="MS", help="of a network, a round trip")
    parser.add_argument(
        "--megabytes", type=float, default=float("inf"), metavar="N", help="that it carries a second"
    )
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.sizes) - SIZES.keys()
    if unknown:
        parser.error(f"there is no size {', '.join(unknown)}; there are {', '.join(SIZES)}")
    print(ASSUMED.format(calls=CALLS))
    network = chosen.latency / 1e3, chosen.megabytes * 1e6
    with tempfile.TemporaryDirectory(prefix="tensafe-simulated-") as home:
        os.environ["TENSAFE_HOME"] = home
        for name in chosen.sizes:
            show(name, chosen.weights, *network)


def show(name: str, weights: str, latency: float, bandwidth: float) -> None:
    """Measure a size, and print what it costs and what was predicted beside what was measured."""
    from bench import cluster

    with tempfile.TemporaryDirectory() as folder:
        size = cluster.make_model(Path(folder), *SIZES[name])
        costs, found, trained = measure(folder, weights)
    print(
        f"\n{name}: {size / 1e6:.1f} million parameters, {trained / 1e6:.2f} trained, {ROWS}×{TOKENS} tokens\n"
        f"  one process {1e3 * costs.start:.1f} ms + {1e6 * costs.token:.0f} µs a token · a sum of "
        f"{costs.gradient / 1e6:.1f} MB: here {1e3 * costs.here:.1f} ms, each replica {1e3 * costs.there:.1f} ms · "
        f"a call {1e3 * costs.call:.1f} ms\n"
        f"  two replicas pay from {costs.pays_from:.0f} tokens a step on\n"
        f"  replicas   predicted    measured   times as fast as one process"
    )
    alone = costs.step(1)
    for replicas in SEVERAL:
        local = costs.step(replicas)
        print(
            f"  {replicas:8}{1e3 * local:9.0f} ms{1e3 * found[replicas]:9.0f} ms   "
            f"{alone / local:.2f} predicted, {alone / found[replicas]:.2f} measured"
        )
    for replicas, (here, there) in costs.sums.items():
        if replicas != 2:
            print(
                f"  a sum over {replicas} was assumed to take {1e3 * costs.here * replicas / 2:.1f} ms here and "
                f"{1e3 * costs.there:.1f} ms in each replica; measured {1e3 * here:.1f} and {1e3 * there:.1f}, "
                f"{replicas} replicas on {CORES} cores"
            )
    for replicas in FURTHER:
        print(
            f"  {replicas:8}{1e3 * costs.step(replicas):9.0f} ms           –   "
            f"{alone / costs.step(replicas):.2f} predicted"
        )
    if latency or bandwidth != float("inf"):
        over = ", ".join(
            f"{replicas}: {alone / costs.step(replicas, latency, bandwidth):.2f}"
            for replicas in (*SEVERAL, *FURTHER)
        )
        print(f"  over the network, times as fast as one process: {over}")


if __name__ == "__main__":
    main()
