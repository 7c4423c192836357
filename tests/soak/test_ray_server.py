"""`tensafe-nb serve --cluster auto` beside a Ray that somebody has started: trained over HTTP, a replica is killed."""

from typing import Any

import pytest

from tests.faults.loopback import found_by

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("tests.soak.ray_server", tmp_path_factory.mktemp("home"))


def test_a_client_of_a_server_on_ray_trains_as_in_one_process_though_a_replica_is_killed(
    found: dict[str, Any],
) -> None:
    for one, two in zip(found["one"], found["two"], strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    assert [change for change in found["changes"] if change != "WAITING"] == ["STARTED", "LOST", "JOINED"]


def test_a_client_that_is_closed_leaves_nothing_on_a_ray_that_goes_on(found: dict[str, Any]) -> None:
    assert found["left beside Ray"] == []
