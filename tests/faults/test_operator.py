"""What an operator's day does to a server under its users: a full disk, a restart, tokens that change."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tensafe_nb as tn
from tests.faults.killing import KilledServer, Nursery, killed_server
from tests.parity.serving import eventually

BATCH = tn.BatchData([[5, 6, 7, 8], [9, 10, 11, 12]])

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def server(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledServer]:
    with killed_server(nursery, tmp_path_factory.mktemp("server"), bounds={"MOST_OPERATIONS": 5}) as server:
        yield server


@pytest.fixture
def services(server: KilledServer) -> Iterator[list[tn.ServiceClient]]:
    with tn.ServiceClient(server.url, server.token) as remote, tn.ServiceClient() as embedded:
        yield [remote, embedded]


def adapter(service: tn.ServiceClient) -> tn.TrainingClient:
    return service.create_training_client(
        lora_config=tn.LoRAConfig(rank=2, dropout=0.1), optimizer={"learning_rate": 1e-2}, seed=3
    )


def trained(tc: tn.TrainingClient, steps: int = 1) -> list[float]:
    handles = [(tc.forward_backward(BATCH), tc.optim_step()) for _ in range(steps)]
    return [(loss.result(60).loss, step.result(60).grad_norm) for loss, step in handles]  # type: ignore[misc]


@contextmanager
def full_disk(server: KilledServer) -> Iterator[None]:
    """Let no file of the server's grow any more, for a while."""
    before = resource.prlimit(server.process, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(server.process, resource.RLIMIT_FSIZE, before)


def test_a_full_disk_fails_what_it_cannot_keep_and_when_there_is_room_everything_goes_on(
    server: KilledServer, services: list[tn.ServiceClient], caplog: pytest.LogCaptureFixture
) -> None:
    remote, embedded = services
    far, near = adapter(remote), adapter(embedded)
    assert trained(far) == trained(near)
    kept = far.save_state(name="before").result()
    caplog.clear()
    with full_disk(server):
        with pytest.raises(tn.errors.StorageError, match="Could not"):
            adapter(remote)
        refused = [far.forward_backward(BATCH), far.optim_step(), far.save_state(name="never")]
        eventually(lambda: not far._channel.unsent)  # type: ignore[attr-defined]
        assert caplog.text.count("cannot keep this") == len(
            refused
        )  # their turn comes when there is room again
    for handle in refused:
        with pytest.raises(tn.errors.StorageError, match="Could not write"):
            handle.result(60)
    assert trained(far, 3) == trained(near, 3)  # nothing of what had failed was done
    server.begin_again()
    assert trained(far, 3) == trained(near, 3)  # and everything else was kept
    assert [artifact.name for artifact in remote.list_artifacts(far.training_client_id)] == [kept.name]
    assert far.history["loss"].tolist() == near.history["loss"].tolist()
    assert remote.verify_audit_log().ok
    far.close()


def test_a_disk_that_fills_up_under_what_runs_loses_no_result(
    server: KilledServer, services: list[tn.ServiceClient]
) -> None:
    remote, embedded = services
    far, near = adapter(remote), adapter(embedded)
    far.ready().result()
    long = far.sample("abc", max_new_tokens=200, seed=1)
    eventually(lambda: long.state == "RUNNING")
    with full_disk(server):
        expected = near.sample("abc", max_new_tokens=200, seed=1).texts
    assert long.result(60).texts == expected
    assert trained(far, 2) == trained(near, 2)
    server.begin_again()
    assert trained(far, 2) == trained(near, 2)
    far.close()


def test_a_restart_for_an_update_is_waited_for_and_nothing_is_lost(
    server: KilledServer, services: list[tn.ServiceClient]
) -> None:
    remote, embedded = services
    far, near = adapter(remote), adapter(embedded)
    handles = [(far.forward_backward(BATCH), far.optim_step()) for _ in range(10)]
    handles[3][1].result(60)
    os.kill(server.process, signal.SIGTERM)
    handles += [(far.forward_backward(BATCH), far.optim_step()) for _ in range(10)]
    while Path(f"/proc/{server.process}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    server.begin_again()
    found = [(loss.result(60).loss, step.result(60).grad_norm) for loss, step in handles]
    assert found == trained(near, 20)
    assert far.step == 20
    far.close()


def test_a_token_that_was_taken_away_fails_what_waits_and_given_back_goes_on(
    server: KilledServer, services: list[tn.ServiceClient]
) -> None:
    remote, embedded = services
    far, near = adapter(remote), adapter(embedded)
    assert trained(far) == trained(near)
    content = server.tokens.read_text()
    server.tokens.write_text('{"tokens": []}')
    with pytest.raises(tn.errors.AuthenticationError, match=r"A valid token is needed"):
        far.forward_backward(BATCH).result(60)
    with pytest.raises(tn.errors.AuthenticationError):
        remote.list_artifacts()
    server.tokens.write_text(content)
    eventually(lambda: far.history.state.line is None)
    assert trained(far, 2) == trained(near, 2)
    far.close()
