"""The same over actors of a Ray that is started for it, in a network in which there is nothing but loopback."""

import json
import shutil
import subprocess
import sys
from functools import cache
from typing import Any

import tensafe_nb as tn
from bench import cluster, workload
from bench.harness import ROOT, Row, Skipped, Taken, Target
from tests.faults import loopback


@cache
def found() -> dict[str, Any]:
    """Let a program measure all that has a network of its own: Ray listens for other machines, and starts slowly.

    Raises:
        Skipped: This machine gives it none.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        raise Skipped("Ray is measured only where it gets a network of its own: unshare, of util-linux")
    command = [unshare, "--map-root-user", "--net", sys.executable, "-m", "bench.on_ray"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    taken: dict[str, Any] = json.loads(done.stdout)
    return taken


def call() -> Row:
    """Issue 23: at most 5 ms."""
    return Row(
        what="a call to all of two actors, which have nothing to do, until both have answered",
        peer="",
        taken=Taken(found()["calls"]),
        target=Target("≤", 5e-3, "ours"),
    )


def gradients() -> Row:
    """Issue 23: at most 100 ms."""
    seconds, size = found()["sums"]
    return Row(
        what=f"to add up {4 * size / 1e6:.0f} MB of gradients of two actors, and hand each the sum: what a "
        f"forward_backward of two rows of 4 tokens takes longer than in one process",
        peer="",
        precision="fp32",
        sizes=f"all weights of a Llama of {size / 1e6:.1f} million parameters",
        taken=Taken(seconds),
        target=Target("≤", 0.1, "ours"),
    )


def regroup() -> Row:
    """Issue 23: less than 1 s."""
    return Row(
        what="from `kill -9` of one of two actors to the result of the forward_backward that follows",
        peer="",
        precision="fp32",
        sizes=f"{workload.MODEL}, 4×32",
        taken=Taken(found()["regroups"]),
        target=Target("≤", 1.0, "ours"),
    )


def main() -> None:
    """Measure, and print the seconds."""
    loopback.bring_up()
    ray = tn.RayCluster("local", engines=2, cpus=1)
    calls, (sums, size) = cluster.calls(ray), cluster.sums(ray)
    taken = {"calls": calls, "sums": [sums.ours, size], "regroups": cluster.regroups(ray)}
    ray.close()
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
