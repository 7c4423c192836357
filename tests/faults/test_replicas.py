"""Replicas in processes: one that is killed under a step costs nothing but time, and none outlives its service."""

import os
import signal
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.events import ReplicasChanged

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
    with tn.ServiceClient() as alone, tn.ServiceClient(cluster=tn.LocalCluster(engines=2)) as service:
        one, two = (where.create_training_client(**CONFIG) for where in (alone, service))
        pids: list[int] = []
        two.subscribe(lambda event: None)
        two.ready().result()
        group = two._channel._executor.engine  # type: ignore[attr-defined]
        pids = [place.pid for place in group._members]
        for pid in pids:
            with open(f"/proc/{pid}/environ", "rb") as environment:  # noqa: PTH123
                assert b"not for replicas" not in environment.read()
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
