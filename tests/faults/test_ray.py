"""A training client on a real Ray: the numbers of one engine, also when its actors are killed under it."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.loopback import found_by

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]  # a busy machine starts Ray slowly
RELATIVE = 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program has found, before it was killed."""
    return found_by("tests.faults.on_ray", tmp_path_factory.mktemp("home"))


def test_actors_compute_what_one_engine_computes(found: dict[str, Any]) -> None:
    for one, two in zip(found["one"], found["two"], strict=True):
        assert two == pytest.approx(one, rel=RELATIVE)
    assert found["drawn by two"] == found["drawn by one"]


@pytest.mark.parametrize("phase", ["asked", "told", "afterwards"])
def test_an_actor_that_is_killed_costs_nothing_but_time(found: dict[str, Any], phase: str) -> None:
    one, two = found[phase]
    assert two == pytest.approx(one, rel=RELATIVE)


def test_a_group_that_has_lost_an_actor_grows_again(found: dict[str, Any]) -> None:
    assert found["changes"][:4] == ["STARTED", "LOST", "JOINED", "LOST"]


def test_a_cancelled_operation_ends_on_all_actors_and_the_client_goes_on(found: dict[str, Any]) -> None:
    assert found["cancelled"] == [True, "CANCELLED"]
    assert found["goes on"]


def test_without_any_actor_the_client_fails_and_says_how_to_go_on(found: dict[str, Any]) -> None:
    status, said = found["all lost"]
    assert status == "ERROR" and "service.restore" in said


def test_a_reward_that_is_called_on_ray_costs_its_own_call_and_a_machine_that_is_lost_costs_none(
    found: dict[str, Any],
) -> None:
    assert found["scored"] == {
        "start": [5.0, None],
        "raise": [None, "KeyError: 'missing' (line 7 of awkward: raise KeyError(\"missing\"))"],
        "die": [None, "the process that scores ended during this call"],
        "lose the machine": [16.0, None],
        "fine": [4.0, None],
        "hang": [None, "took longer than 2.5 s and was ended"],
    }
    assert found["errors"] == [3, 3, 1]


def test_ray_gets_no_secret_no_signal_and_no_address_but_loopback(found: dict[str, Any]) -> None:
    assert found["who knows the key"] == 0
    assert found["the handler of SIGTERM is ours"] and not found["ray is imported here"]
    assert all("127.0.0.1" in address or address == "[::1]" for address in found["listens at"])


def test_a_closed_service_leaves_no_process_no_file_and_no_token(found: dict[str, Any]) -> None:
    assert found["left by a closed service"] == []
    assert found["left on the disk"] == []
    assert not found["token left"]


def test_a_driver_that_is_killed_takes_its_cluster_along_and_not_the_notebook(found: dict[str, Any]) -> None:
    status, reason = found["without its driver"]
    assert status == "ERROR" and "service.restore" in reason


def test_nothing_outlives_a_kernel_that_was_killed(found: dict[str, Any]) -> None:
    assert any("ray::RayReplica" in command for command in found["alive"].values())
    left = {int(pid) for pid in found["alive"]}
    while left:  # they end by themselves
        left = {pid for pid in left if Path(f"/proc/{pid}/stat").exists()}
