"""A training client on a real Ray: the numbers of one engine, also when its actors are killed under it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults
RELATIVE = 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program has found: it runs once."""
    alone = [shutil.which("unshare") or "", "--map-root-user", "--net"]
    if not alone[0] or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip(
            "Ray listens on all addresses: it is tried only where it gets a network of its own (unshare)"
        )
    program = Path(__file__).with_name("on_ray.py")
    home = tmp_path_factory.mktemp("home")
    ended = subprocess.run(
        [*alone, sys.executable, "-m", f"tests.faults.{program.stem}"],
        cwd=program.parents[2],
        env={"PATH": "/usr/bin:/bin", "TENSAFE_HOME": str(home), "HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4_000:]
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def test_actors_compute_what_one_engine_computes(found: dict[str, Any]) -> None:
    assert found["two"] == pytest.approx(found["one"], rel=RELATIVE)
    assert found["drawn by two"] == found["drawn by one"]


def test_an_actor_that_is_killed_costs_nothing_but_time(found: dict[str, Any]) -> None:
    assert found["killed"] == pytest.approx(found["undisturbed"], rel=RELATIVE)
    assert found["changes"][:2] == ["STARTED", "LOST"]


def test_a_cancelled_operation_ends_on_all_actors_and_the_client_goes_on(found: dict[str, Any]) -> None:
    assert found["cancelled"] in (True, "COMPLETED")
    assert found["goes on"]


def test_without_any_actor_the_client_fails_and_says_how_to_go_on(found: dict[str, Any]) -> None:
    assert "service.restore" in found["all lost"]
    assert found["status"] == "ERROR"


def test_actors_know_no_secret_and_none_outlives_the_service(found: dict[str, Any]) -> None:
    assert found["an actor knows the key"] == [False, False]
    assert found["the handler of SIGTERM is ours"]
    assert found["left"] == []
