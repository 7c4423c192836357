"""A server that is killed in the middle of anything goes on where it was: nothing is lost, nothing is done twice."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import tensafe_nb as tn
from tests.faults.killing import Killer, Nursery, killed_server
from tests.faults.programs import Program, same

OFTEN = {"MOST_OPERATIONS": 6, "SHARE": 0}  # automatic checkpoints in the middle of what little is done


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def undergo(nursery: Nursery, seed: int, steps: int, home: Path, most: int = 1_000) -> int:
    """Run a program on a server that is killed again and again, and beside it undisturbed; return the kills."""
    with (
        killed_server(nursery, home, bounds=OFTEN) as server,
        tn.ServiceClient(server.url, server.token) as service,
        tn.ServiceClient() as embedded,
    ):
        killed = Program(service, seed, steps)
        with Killer(server, killed.tc, seed, most) as killer:
            killed.run()
        undisturbed = Program(embedded, seed, steps, killed.cancelled)
        undisturbed.run()
        same(undisturbed, killed)
        names = [artifact.name for artifact in service.list_artifacts()]
        saves = [h for h in killed.handles if h.operation == "save_state" and h.exception() is None]
        assert len(names) == len(saves) == len(set(names))
        assert service.verify_audit_log().ok
    print(f"seed {seed}: {killer.kills} kills, ready again within {max(server.seconds[1:], default=0):.1f} s")
    return killer.kills


@pytest.mark.faults
def test_a_server_killed_in_the_middle_comes_to_the_same_bit_for_bit(
    nursery: Nursery, tmp_path: Path
) -> None:
    assert undergo(nursery, 1, 8, tmp_path / "server", most=3) == 3


@pytest.mark.soak
@pytest.mark.timeout(7_200)
def test_a_server_killed_two_hundred_times_comes_to_the_same_bit_for_bit(
    nursery: Nursery, tmp_path: Path
) -> None:
    kills = 0
    wanted = int(os.environ.get("TSNB_KILLS", "200"))
    for seed in itertools.count(100):
        kills += undergo(nursery, seed, 12, tmp_path / str(seed))
        print(f"seed {seed}: {kills} kills so far", flush=True)
        if kills >= wanted:
            return
