"""Nodes of a Ray cluster that are killed under a run: it ends with the numbers of one engine."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.loopback import found_by

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home: Path = tmp_path_factory.mktemp("home")
    return found_by("tests.soak.ray_nodes", home)


def test_a_run_whose_node_is_killed_ends_as_it_does_in_one_process(found: dict[str, Any]) -> None:
    assert len(found["one"]) == len(found["two"])
    assert found["two"] == pytest.approx(found["one"], rel=1e-6)


def test_a_replica_without_a_machine_says_what_it_waits_for_and_joins_once_there_is_one(
    found: dict[str, Any],
) -> None:
    assert [change for change in found["changes"] if change != "WAITING"] == ["STARTED", "LOST", "JOINED"]
    assert "1 CPU" in found["waiting"]
    assert found["again"][1] == pytest.approx(found["again"][0], rel=1e-6)


def test_a_run_whose_reward_is_called_on_the_cluster_gets_the_rewards_of_this_machine(
    found: dict[str, Any],
) -> None:
    here, there = found["rewarded"]
    assert len(here) == 2 and there == pytest.approx(here, rel=1e-6)


def test_ideas_are_compared_on_the_cluster_with_the_numbers_of_one_process(found: dict[str, Any]) -> None:
    here, there = found["compared"]
    assert len(here) == 2 and there == pytest.approx(here, rel=1e-6)


def test_a_head_that_is_killed_costs_the_training_client_and_not_the_kernel(found: dict[str, Any]) -> None:
    status, said = found["without a head"]
    assert status == "ERROR" and "service.restore" in said
    assert found["alone"] == found["again"][0]
