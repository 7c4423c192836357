"""What stands above an engine works over a group as it is: forks, comparisons, a server that puts clients away."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tests.parity.serving import core_of, eventually, serving_thread
from tests.unit.cluster.groups import CONFIG, Threads

ROWS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(16)]
BATCH = tn.BatchData(np.random.default_rng(0).integers(3, 200, (6, 9)))


def steps(tc: tn.TrainingClient, count: int = 1) -> list[float]:
    told = []
    for _ in range(count):
        told.append(tc.forward_backward(BATCH).result().loss)
        told.append(tc.optim_step().result().param_delta_norm)
    return told


@pytest.fixture
def alone() -> Iterator[tn.ServiceClient]:
    with tn.ServiceClient() as service:
        yield service


def test_a_fork_of_a_client_on_a_cluster_has_replicas_of_its_own_and_goes_on_as_it_would(
    alone: tn.ServiceClient,
) -> None:
    cluster = Threads(2)
    with tn.ServiceClient(cluster=cluster) as service:
        forks, kept = [], []
        for where in (service, alone):
            tc = where.create_training_client(**CONFIG)
            steps(tc, 2)
            fork = tc.fork(optimizer={"learning_rate": 5e-3})
            steps(tc)  # which its fork knows nothing of
            forks.append(steps(fork))
            kept += [tc, fork]  # a client to which nobody refers ends
        assert [len(places.living) for places in cluster.made] == [2, 2]
        assert forks[0] == pytest.approx(forks[1], rel=1e-5)  # under Adam: tests/unit/cluster/test_losses.py


def test_ideas_are_compared_on_a_cluster_with_the_numbers_of_one_process(alone: tn.ServiceClient) -> None:
    def idea(service: tn.ServiceClient, seed: int, learning_rate: float) -> tn.TrainingRun:
        changes: dict[str, Any] = {"optimizer": {"learning_rate": learning_rate}, "seed": seed}
        tc = service.create_training_client(**CONFIG | changes)
        return tc.fit(tc.batches(ROWS, seed=seed), steps=1, show=False)

    tables = []
    cluster = Threads(2)
    with tn.ServiceClient(cluster=cluster) as service:
        for where in (service, alone):
            comparison = tn.compare(
                idea, seeds=1, vary={"learning_rate": [1e-3, 1e-2]}, service=where, show=False
            )
            tables.append(comparison.result().table().to_pandas())
        assert cluster.living == []  # each ended with its run
    one, other = (table.set_index("arm")["loss"] for table in tables)
    assert len(one) == 2
    assert list(one) == pytest.approx(list(other[one.index]), rel=1e-5)


def test_a_server_puts_a_client_on_a_cluster_away_and_its_next_operation_brings_replicas_back(
    tmp_path: Path, alone: tn.ServiceClient
) -> None:
    cluster = Threads(2)
    with (
        serving_thread(tmp_path / "server", engines=cluster) as serving,
        tn.ServiceClient(serving.url, serving.tokens.mint("one")) as service,
    ):
        one, other = (where.create_training_client(**CONFIG) for where in (service, alone))
        assert steps(one, 2) == pytest.approx(steps(other, 2), rel=1e-5)
        drawn = [tc.sample("a", max_new_tokens=4).result().sequences[0].tokens for tc in (one, other)]
        for tc in (one, other):
            tc.forward_backward(BATCH).result()  # a window that is open
        private = {"sampling": "poisson", "dataset_size": 100, "noise_multiplier": 1.0}
        with pytest.raises(tn.ValidationError, match="Private training runs in one process"):
            service.create_training_client(**CONFIG | {"dp_config": private})
        core = core_of(one)
        core.put_away()
        eventually(lambda: core.is_away and cluster.living == [])
        drawn += [tc.sample("a", max_new_tokens=4).result().sequences[0].tokens for tc in (one, other)]
        assert drawn[0::2] == drawn[1::2]  # without a seed: how many were drawn is remembered, too
        changed = [tc.optim_step().result().param_delta_norm for tc in (one, other)]
        assert changed[0] == pytest.approx(changed[1], rel=1e-5)
        assert len(cluster.living) == 2
        one.close()
