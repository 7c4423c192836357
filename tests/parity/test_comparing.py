"""A comparison raced on a server: its numbers are those of one raced here; a fork that changes nothing changes none."""

from typing import Any

import pytest

import tensafe_nb as tn

ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(6)]
RECIPE = {"training": {"steps": 3, "checkpoint_every": 1}, "lora": {"rank": 1}, "batch": {"batch_size": 1}}


def race(service: tn.ServiceClient) -> Any:
    """Race one arm, and two that leave it after its first step: one as it was, one with another learning rate."""
    comparison = tn.compare(
        RECIPE, data=ROWS, seeds=1, vary={"learning_rate": [1e-3]}, service=service, name="rates", show=False
    )
    for rate in (1e-3, 1e-2):
        comparison.fork("learning_rate=0.001", step=1, learning_rate=rate)
    comparison.result()
    return comparison


def curves(one: Any) -> list[Any]:
    return [(t.arm, t.state, t.steps.tolist(), t.values.tolist()) for t in one.standings().tracks]


@pytest.mark.transports("http")
def test_a_race_on_a_server_is_the_same_race(
    service: tn.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = race(service)
    assert service.list_training_clients() == []  # those it made are closed
    assert curves(tn.load_comparison("rates")) == curves(there)
    parent, same, other = curves(there)
    assert same[1:] == ("FINISHED", parent[2][1:], parent[3][1:]) and other[3] != same[3]
    monkeypatch.delenv("TENSAFE_BASE_URL")
    with tn.ServiceClient() as embedded:
        assert curves(race(embedded)) == curves(there)
