"""Training clients that are put away and brought back, and those that a server finds when it begins.

A copy of a home folder, taken while a server works in it, is what `kill -9` would leave at that moment.
"""

import errno
import os
import shutil
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.errors import StorageError, ValidationError
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.operations import (
    Forward,
    ForwardBackward,
    LoadAdapter,
    OptimStep,
    ReadAdapter,
    SaveState,
)
from tensafe_nb.server.journal import Journal
from tensafe_nb.server.service import Service
from tensafe_nb.store.home import Home
from tensafe_nb.transports.embedded import EmbeddedTransport
from tests.parity.serving import Gate, Serving, core_of, engine_of, eventually, serving_thread
from tests.unit.server.conftest import BATCH, error_of, new_client, outcome, submit

ROWS = BatchData.of(BATCH)


def weights(tc: tn.TrainingClient) -> list[Any]:
    return [parameter.detach().clone().tolist() for parameter in engine_of(tc).parameters]


def steps(tc: tn.TrainingClient, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(tc.forward_backward(ROWS).loss)
        tc.optim_step()
    tc.sample("abc", max_new_tokens=3).result()
    return found


@pytest.fixture
def service(serving: Serving) -> Iterator[tn.ServiceClient]:
    with tn.ServiceClient(serving.url, serving.tokens.mint("idle")) as service:
        yield service
        for info in service.list_training_clients():
            service.get_training_client(info.training_client_id).close()


def test_a_client_that_nobody_uses_is_put_away_and_the_next_operation_brings_it_back(
    service: tn.ServiceClient,
) -> None:
    lora = tn.LoRAConfig(rank=2, dropout=0.2)
    one, other = (service.create_training_client(lora_config=lora, seed=4) for _ in range(2))
    assert steps(one, 3) == steps(other, 3)
    one.forward_backward(ROWS).result()  # with a window that is open
    model = weakref.ref(engine_of(one).model.causal)
    core = core_of(one)
    core.put_away()
    eventually(lambda: core.is_away and model() is None)
    (listed,) = [i for i in service.list_training_clients() if i.training_client_id == one.training_client_id]
    assert (listed.away, listed.status, listed.step) == (True, "READY", 3)
    other.forward_backward(ROWS).result()
    assert one.optim_step().result().grad_norm == other.optim_step().result().grad_norm
    assert steps(one, 3) == steps(other, 3) and weights(one) == weights(other)
    assert not one.refresh().away and one.step == 7
    core.put_away()
    eventually(lambda: core.is_away)
    assert one.estimate().micro_batches == 1 and one.tokenizer is not None  # they need the model as well


def test_who_is_idle_is_put_away_by_the_server_itself_and_who_works_is_not(tmp_path: Path) -> None:
    gate = Gate()
    with (
        serving_thread(tmp_path / "server", idle_after=0.0) as serving,
        tn.ServiceClient(serving.url, serving.tokens.mint("a")) as service,
    ):
        idle, busy = (service.create_training_client(lora_config=tn.LoRAConfig(rank=2)) for _ in range(2))
        waiting = busy.forward_backward(ROWS, loss_fn=gate.name)
        idle.ready().result()
        eventually(lambda: core_of(idle).is_away)
        assert gate.reached.wait(20) and not core_of(busy).is_away
        gate.opened.set()
        waiting.result()
        assert steps(idle, 1) == steps(service.create_training_client(lora_config=tn.LoRAConfig(rank=2)), 1)


def test_a_training_client_that_is_asked_for_twice_with_one_key_is_made_once(http: httpx.Client) -> None:
    asked = {"config": {"lora_config": {"rank": 2}}, "key": "mine"}
    first, again = (http.post("/training_clients", json=asked).json() for _ in range(2))
    assert first["info"]["training_client_id"] == again["info"]["training_client_id"]
    assert len(http.get("/training_clients").json()) == 1
    assert error_of(http.post("/training_clients", json={"key": "k" * 65})) == (422, "validation_error")


def test_an_id_names_one_operation(http: httpx.Client, path: str) -> None:
    assert submit(http, path, OptimStep(), 1).status_code == 202
    headers = {"x-future-id": "fut-me-1", "x-verb": "optim_step"}
    refused = http.post(f"{path}/operations", json={"$": "optim_step"}, headers=headers)
    assert error_of(refused) == (422, "validation_error")


class Left:
    """A home folder as a server left it that was killed, and the way in to the next one."""

    def __init__(self, home: Path, copy: Path) -> None:
        shutil.copytree(home, copy)
        self.home = copy
        self.folder = next(copy.rglob("journal"))

    def enter(self, serving: Serving) -> httpx.Client:
        headers = {"authorization": f"Bearer {serving.tokens.mint('a')}"}
        return httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A home folder where three operations have ended and one runs, and the path of its client."""
    gate, home = Gate(), tmp_path_factory.mktemp("left")
    with serving_thread(home / "server") as serving:
        headers = {"authorization": f"Bearer {serving.tokens.mint('a')}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30) as http:
            path = new_client(http)
            submit(http, path, ForwardBackward(ROWS), 1), submit(http, path, OptimStep(), 2)
            submit(http, path, SaveState(name="mine"), 3)
            outcome(http, "fut-me-3")
            submit(http, path, ForwardBackward(ROWS, gate.name), 4), submit(http, path, OptimStep(), 5)
            assert gate.reached.wait(20)
            shutil.copytree(home / "server", home / "copy")
            gate.opened.set()
    return home / "copy", path


def test_a_journal_that_was_cut_off_at_any_byte_of_its_end_brings_back_what_is_whole(
    left: tuple[Path, str], tmp_path: Path
) -> None:
    found = Left(left[0], tmp_path / "copy")
    keys = EmbeddedTransport(Home(found.home, "a"), "file").vault.keys
    last = max(found.folder.glob("operations-*"))
    whole = last.read_bytes()
    journal = Journal(found.folder, keys, "a")
    names = [f"fut-me-{number}" for number in range(1, 6)]
    assert list(journal.waiting) == names and list(journal.results) == names[:3]
    before = journal._operations._places[-1]
    journal.close()
    for end in range(before, len(whole)):
        last.write_bytes(whole[:end])
        journal = Journal(found.folder, keys, "a")
        assert list(journal.waiting) == names[:4] and journal.submitters["me"].next == 5
        journal.close()


def test_a_journal_that_was_altered_stops_its_client_with_a_clear_error_and_keeps_what_is_there(
    left: tuple[Path, str], tmp_path: Path
) -> None:
    found = Left(left[0], tmp_path / "copy")
    file = max(found.folder.glob("operations-*"))
    content = bytearray(file.read_bytes())
    content[-2_000 % len(content)] ^= 1
    file.write_bytes(content)
    for _ in range(2):  # it stays so, however often the server begins again
        with serving_thread(found.home) as serving, found.enter(serving) as http:
            info = http.get(left[1]).json()["info"]
            assert info["status"] == "ERROR" and "journal-damaged-" in info["reason"]
            refused = http.post(f"{left[1]}/optim_step", json={}).json()["future_id"]
            assert "damaged" in outcome(http, refused).json()["error"]["message"]
            assert [artifact["name"] for artifact in http.get("/artifacts").json()] == ["mine"]
    assert list(found.folder.parent.glob("journal-damaged-*"))


@pytest.fixture
def journal(left: tuple[Path, str], tmp_path: Path) -> Iterator[Journal]:
    """A journal with something that the next `sync` puts on the disk."""
    found = Left(left[0], tmp_path / "copy")
    journal = Journal(found.folder, EmbeddedTransport(Home(found.home, "a"), "file").vault.keys, "a")
    journal._dirty = True
    yield journal
    journal.close()


def test_who_puts_a_journal_on_the_disk_as_another_does_waits_for_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    second, waited = threading.Thread(target=journal.sync), []
    put = journal._results.sync

    def slow() -> None:
        second.start()
        second.join(0.1)  # it has no end before this one's
        waited.append(second.is_alive())
        put()

    monkeypatch.setattr(journal._results, "sync", slow)
    journal.sync()
    second.join()
    assert waited == [True]


def test_what_a_disk_has_refused_is_put_there_by_the_next_and_only_then_is_the_old_removed(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = journal._new("operations", 900)
    journal._superseded.append(old)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError):
            journal.sync()
    assert old.path.exists()
    journal.sync()
    assert not old.path.exists()


def test_routes_are_made_before_a_client_comes_back_whose_thread_sets_the_filters_of_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = Service.resume

    def resumed(service: Service) -> None:
        resume(service)
        # which warnings are silent is one setting of all threads: a model that loads puts back what FastAPI has set
        monkeypatch.setattr(warnings, "simplefilter", lambda *_, **__: None)

    monkeypatch.setattr(Service, "resume", resumed)
    with serving_thread(tmp_path) as serving:
        headers = {"authorization": f"Bearer {serving.tokens.mint('first')}"}
        asked = httpx.get(f"{serving.url}/api/v1/training_clients", headers=headers)
        assert (asked.status_code, asked.json()) == (200, [])


def test_what_ran_as_a_server_was_killed_runs_again_and_its_kernel_is_answered_as_before(
    left: tuple[Path, str], tmp_path: Path
) -> None:
    found, gate = Left(left[0], tmp_path / "copy"), Gate()
    gate.opened.set()
    with serving_thread(found.home) as serving, found.enter(serving) as http:
        assert outcome(http, "fut-me-5").json()["step"] == 2
        assert outcome(http, "fut-me-3").json()["name"] == "mine"
        assert [artifact["name"] for artifact in http.get("/artifacts").json()] == ["mine"]
        again = submit(http, left[1], OptimStep(), 5)
        assert (again.status_code, again.json()["future_id"]) == (202, "fut-me-5")
        assert submit(http, left[1], ForwardBackward(ROWS), 6).status_code == 202
        assert outcome(http, "fut-me-6").status_code == 200
        items = http.get(f"{left[1]}/poll", params={"after": 0}).json()
        kinds = [item["event"]["$"] for item in items]
        assert kinds.count("operation_started") == 6 == kinds.count("operation_queued")
        assert kinds.count("metrics") == 2 and kinds.count("checkpoint_saved") == 1
        ended = {item["outcome"]["future_id"] for item in items if "outcome" in item}
        assert ended >= {f"fut-me-{number}" for number in range(1, 6)}  # also what ended before
        http.delete(left[1])
    with serving_thread(found.home) as serving, found.enter(serving) as http:
        assert http.get("/training_clients").json() == []  # what was closed stays closed


def test_an_adapter_that_was_loaded_is_loaded_again_by_a_server_that_was_killed(tmp_path: Path) -> None:
    gate, name = Gate(), "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    half = np.full((160, 2), 0.5, np.float32)
    with serving_thread(tmp_path / "server") as serving:
        headers = {"authorization": f"Bearer {serving.tokens.mint('a')}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30) as http:
            path = new_client(http)
            (
                submit(http, path, LoadAdapter({name: half}), 1),
                submit(http, path, ForwardBackward(ROWS, gate.name), 2),
            )
            submit(http, path, Forward(ROWS), 3), submit(http, path, ReadAdapter(), 4)
            assert gate.reached.wait(20)
            shutil.copytree(tmp_path / "server", tmp_path / "copy")
            gate.opened.set()
            expected = outcome(http, "fut-me-3").json()["loss"]
    with serving_thread(tmp_path / "copy") as serving:
        headers = {"authorization": f"Bearer {serving.tokens.mint('a')}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30) as http:
            assert outcome(http, "fut-me-3").json()["loss"] == expected
            read = outcome(http, "fut-me-4")
            assert read.status_code == 200
            tensors = wire.unpack(read.headers["content-type"], read.content).tensors
            assert np.array_equal(tensors[name], half)


def test_a_key_is_not_forgotten_before_the_journals_have_gone_over_to_the_new_one(tmp_path: Path) -> None:
    from tensafe_nb.store.vault import Vault

    home = tmp_path / "server"
    vault = Vault(Home(home, "a"), "file")
    with (
        serving_thread(home) as serving,
        tn.ServiceClient(serving.url, serving.tokens.mint("a")) as service,
    ):
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        tc.forward_backward(ROWS).result()
        core, named = core_of(tc), f"{tc.training_client_id}/journal"
        core.put_away()  # which makes an automatic checkpoint
        eventually(lambda: core.is_away)
        old = vault.keys.primary_id()
        states = [*home.rglob("states/*.tsnb")]
        assert len(states) == 1 and service.rotate_keys() == 0
        new = vault.keys.primary_id()
        assert [info.encryption.key_id for _, store in vault._journals() for info in store.list()] == [new]
        assert vault.needing(old) == [named]
        with pytest.raises(ValidationError, match=f"needed by .*{named}.* next automatic checkpoint"):
            vault.forget(old)
        step = tc.optim_step().result()
        core.put_away()
        eventually(lambda: core.is_away and not vault.needing(old))
        vault.forget(old)
        loss = tc.forward(ROWS).result().loss
        shutil.copytree(home, tmp_path / "killed")
    found = next((tmp_path / "killed").rglob("journal"))
    journal = Journal(found, vault.keys, "a")
    assert [record["verb"] for record in journal.results.values()] == [
        "forward_backward",
        "optim_step",
        "forward",
    ]
    journal.close()
    with (
        serving_thread(tmp_path / "killed") as serving,
        tn.ServiceClient(serving.url, serving.tokens.mint("a")) as service,
    ):
        back = service.get_training_client(tc.training_client_id)
        back.ready().result()
        assert (back.step, back.forward(ROWS).result().loss) == (step.step, loss)
