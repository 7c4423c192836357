"""A disk that is full for one file at a time: nothing half-written is left, the error says what to do, work goes on."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tensafe_nb as tn
from tensafe_nb.errors import StorageError
from tensafe_nb.events import RunDescribed
from tensafe_nb.protocol.operations import ForwardBackward, OptimStep, SaveState
from tensafe_nb.runs.description import keep, kept
from tensafe_nb.store import disk
from tests.parity.serving import Serving, core_of, eventually
from tests.unit.server.conftest import error_of, new_client, outcome, submit
from tests.unit.store.faults import FullDisk

BATCH = tn.BatchData([[5, 6, 7, 8], [9, 10, 11, 12]])
FULL = r"No space left on device.* What was stored before is intact\. "


@pytest.fixture(params=["embedded", "remote"])
def service(request: pytest.FixtureRequest, serving: Serving) -> Iterator[tn.ServiceClient]:
    where = () if request.param == "embedded" else (serving.url, serving.tokens.mint("full"))
    with tn.ServiceClient(*where) as service:
        yield service
        for artifact in service.list_artifacts():
            service.delete_artifact(artifact.artifact_id)


@pytest.fixture
def tc(service: tn.ServiceClient) -> Iterator[tn.TrainingClient]:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    tc.ready().result()
    yield tc
    tc.close()


def steps(tc: tn.TrainingClient) -> int:
    tc.forward_backward(BATCH)
    return tc.optim_step().result(60).step


def drafts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.match(disk.DRAFTS) or path.suffix in (".part", ".new")]


@pytest.mark.parametrize("at", [0, 1, 3])  # at its making, at its first bytes, further on
def test_a_state_that_cannot_be_written_fails_alone_and_the_next_is_saved(
    tc: tn.TrainingClient, at: int
) -> None:
    store = core_of(tc)._vault.artifacts
    kept = tc.save_state(name="kept").result()
    before, store._folder.files = store._folder.files, FullDisk(at)
    try:
        refused = tc.save_state(name="refused")
        with pytest.raises(StorageError, match=f"{FULL}(Free some space|The disk is the server's)"):
            refused.result(60)
        assert steps(tc) == 1  # training goes on
    finally:
        store._folder.files = before
    assert [artifact.name for artifact in store.list()] == [kept.name] and drafts(store._folder.path) == []
    assert tc.save_state(name="then").result().step == 1
    assert tc.load_state("kept").result().step == 0


def test_an_automatic_checkpoint_that_cannot_be_written_is_tried_again_and_stops_nothing(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tensafe_nb.server.journal.MOST_OPERATIONS", 1)
    monkeypatch.setattr("tensafe_nb.server.journal.SHARE", 0)
    path = new_client(http)
    (client,) = [one for one in serving.service.live_clients() if one.channel.training_client_id in path]
    states = client.journal.states
    before, states._folder.files = states._folder.files, FullDisk(1)

    def step() -> None:
        for verb, body in (("forward_backward", {"batch": {"input_ids": [[5, 6, 7]]}}), ("optim_step", {})):
            assert (
                outcome(http, http.post(f"{path}/{verb}", json=body).json()["future_id"]).status_code == 200
            )

    step()
    step()
    assert "no automatic checkpoint of" in caplog.text and states.list() == []
    states._folder.files = before
    step()
    http.get(f"{path}/ready")
    client.channel.put_away()  # behind the checkpoint
    eventually(lambda: client.channel.is_away)
    client.journal.sync()  # what it made superfluous goes with the next
    assert len(states.list()) == 1 and drafts(states._folder.path) == []


def test_a_checkpoint_behind_what_a_full_disk_kept_out_of_the_journal_covers_all_before_it(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_client(http)
    (client,) = [one for one in serving.service.live_clients() if one.channel.training_client_id in path]
    submit(http, path, ForwardBackward(BATCH), 1), submit(http, path, OptimStep(), 2)
    assert outcome(http, "fut-me-2").status_code == 200 and len(client.journal.waiting) == 2
    monkeypatch.setattr("tensafe_nb.server.journal.MOST_OPERATIONS", 1)
    monkeypatch.setattr("tensafe_nb.server.journal.SHARE", 0)
    monkeypatch.setattr(client.journal, "_enter", refuse_in_our_words)
    assert submit(http, path, SaveState(), 3).status_code == 507
    assert outcome(http, "fut-me-3").status_code == 507
    eventually(lambda: client.journal.base is not None)
    assert not client.journal.waiting, "the step is in the checkpoint, and would be taken again"


def refuse_in_our_words(*_: Any) -> Any:
    raise StorageError("Could not write.")


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_pushed_pulled_or_exported_on_a_full_disk_is_507_and_nothing_is_left(
    http: httpx.Client, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = outcome(http, http.post(f"{path}/save_state", json={}).json()["future_id"]).json()["artifact_id"]
    sealed = http.get(f"/artifacts/{saved}/content").content
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    asked: dict[str, tuple[str, Callable[[], httpx.Response]]] = {
        "push": ("shutil.copyfileobj", lambda: http.put("/artifacts", content=sealed)),
        "pull": ("shutil.copyfileobj", lambda: http.get(f"/artifacts/{saved}/content")),
        "export": ("tarfile.TarFile.add", lambda: http.get(f"/artifacts/{saved}/export")),
    }
    for what, (call, ask) in asked.items():
        with monkeypatch.context() as full:
            full.setattr(call, refuse)
            answer = ask()
        assert error_of(answer) == (507, "storage_error"), what
        assert "The disk is the server's" in answer.text, what
        assert list((tmp_path / "temporary").iterdir()) == [], what
        assert ask().is_success, what  # there is room again
    assert [artifact["artifact_id"] for artifact in http.get("/artifacts").json()] == [saved]


def test_rollouts_that_cannot_be_written_are_a_storage_error_and_leave_no_file(
    tc: tn.TrainingClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tn.rlvr.PolicySampler(tc, 2, 2, seed=0, chat="never").generate_trajectories(["12+34="])
    with monkeypatch.context() as full:
        full.setattr(disk, "Files", lambda: FullDisk(1))
        with pytest.raises(
            StorageError, match=r"could not be written \(No space left on device\)\. Make room"
        ):
            batch.save(tmp_path / "step-000001.jsonl")
    assert list(tmp_path.glob("*.jsonl")) == drafts(tmp_path) == []
    assert batch.save(tmp_path / "step-000001.jsonl").stat().st_size > 0


def test_what_is_said_of_a_run_on_a_full_disk_leaves_no_half_line_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "events.jsonl"
    descriptions = [RunDescribed(run_id=f"tc-1/{number}", name="a", tags=(), notes="") for number in range(3)]
    keep(log, descriptions[0])
    with monkeypatch.context() as full:
        full.setattr("tensafe_nb.runs.description.write_all", half)
        with pytest.raises(
            StorageError, match="Could not keep what is said of the run tc-1/1: No space left"
        ):
            keep(log, descriptions[1])
    keep(log, descriptions[2])
    assert list(kept(log)) == ["tc-1/0", "tc-1/2"]


def half(file: Any, data: bytes) -> None:
    file.write(data[: len(data) // 2])
    refuse()
