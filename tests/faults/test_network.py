"""Whatever the network does to what a client sends and is answered: the clean run's results, and nothing twice."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tensafe_nb as tn
from tensafe_nb.server.door.tokens import Tokens
from tensafe_nb.transports import http_channel, http_requests
from tests.faults.killing import KilledServer, Nursery, killed_server
from tests.faults.programs import Program, same
from tests.faults.proxy import BadNetwork
from tests.faults.trained import by_rewards, supervised, what_came_of
from tests.parity.serving import eventually

PATIENCE = 600.0  # s: what is late by more than a second counts as lost here, and on a busy machine much is
SEVERAL, AT_A_TIME = 40, 4  # seeds on one server, each a tenant of its own: most of a seed is waiting


@pytest.fixture
def server(nursery: Nursery, tmp_path: Path) -> Iterator[KilledServer]:
    with killed_server(nursery, tmp_path / "server") as server:
        yield server


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take for lost sooner what gets no answer: nothing else differs from how a user has it."""
    monkeypatch.setattr(http_requests, "ANSWER", 1.0)
    monkeypatch.setattr(
        http_requests, "FIRST_CONTACT", 60.0
    )  # on a busy machine no answer comes in five such
    monkeypatch.setattr(http_channel, "SILENCE", 0.7)
    monkeypatch.setattr(http_channel, "FIRST_SIGN", 0.7)
    monkeypatch.setattr(http_channel, "LONGEST_PAUSE", 0.4)


def undergo(server: KilledServer, seed: int, folder: Path, token: str) -> Counter[str]:
    """Do the same in this process and on a server behind a bad network; return what befell the requests."""
    with (
        BadNetwork(server.url, seed, holds_streams=seed % 5 == 4, harm=False) as network,
        tn.ServiceClient(network.url, token, patience=PATIENCE) as service,
        tn.ServiceClient() as embedded,
    ):
        network.harm = True  # from here on: a wrong address, and a page to log in, are told at once
        far = Program(service, seed, 2)
        far.run()
        near = Program(embedded, seed, 2, far.cancelled)
        near.run()
        same(near, far)
        work = by_rewards if seed % 2 else supervised
        found = {}
        for where in (embedded, service):
            network.harm = True
            tc, run_id = work(where, seed)
            found[where] = what_came_of(where, tc, run_id, folder / f"{seed}")
            network.harm = False
            tc.close()
        for name, here in found[embedded].items():
            assert found[service][name] == here, name
        far.tc.close()
        # none was made twice; and one whose end was not answered in time ends all the same
        eventually(lambda: service.list_training_clients() == [])
        saves = [h for h in far.handles if h.operation == "save_state" and h.exception() is None]
        names = [artifact.name for artifact in service.list_artifacts(far.tc.training_client_id)]
        assert len(names) == len(saves) == len(set(names))
        assert service.verify_audit_log().ok
    print(f"seed {seed}: {sum(network.befell.values())} requests, {dict(network.befell)}", flush=True)
    return network.befell


@pytest.mark.faults
def test_behind_a_bad_network_everything_comes_to_the_same_bit_for_bit(
    server: KilledServer, tmp_path: Path
) -> None:
    tokens = Tokens(server.tokens)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        ran = [
            pool.submit(undergo, server, seed, tmp_path, tokens.mint(f"seed-{seed}")) for seed in range(1, 6)
        ]
    for one in ran:
        one.result()


@pytest.mark.soak
@pytest.mark.timeout(14_400)
def test_behind_five_hundred_bad_networks_everything_comes_to_the_same_bit_for_bit(
    nursery: Nursery, tmp_path: Path
) -> None:
    """What a seed takes is 2.4 s of CPU, and as much again of waiting for what the network has swallowed."""
    first, wanted = int(os.environ.get("TSNB_FIRST", "1_000")), int(os.environ.get("TSNB_NETWORKS", "500"))
    failed: dict[int, Exception] = {}

    def one(server: KilledServer, seed: int, token: str) -> None:
        try:
            undergo(server, seed, tmp_path, token)
        except Exception as error:  # noqa: BLE001  # the others go on: each says what came of it
            failed[seed] = error
            print(f"seed {seed} failed: {error}", flush=True)

    for begin in range(first, first + wanted, SEVERAL):
        with (
            killed_server(nursery, tmp_path / f"server-{begin}") as server,
            ThreadPoolExecutor(AT_A_TIME) as pool,
        ):
            tokens = Tokens(server.tokens)
            for seed in range(begin, min(begin + SEVERAL, first + wanted)):
                pool.submit(one, server, seed, tokens.mint(f"seed-{seed}"))
    if failed:
        raise ExceptionGroup(f"seeds {sorted(failed)}", list(failed.values()))
