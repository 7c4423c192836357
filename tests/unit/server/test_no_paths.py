"""No answer of a server names a path of its machine: whatever says one, and wherever it would leave."""

import ast
import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tensafe_nb as tn
from tensafe_nb.errors import FutureFailedError, StorageError, TGTinkerError
from tensafe_nb.events import OperationFailed, StatusChanged
from tensafe_nb.server import answers
from tensafe_nb.server.answers import SOME_PATH, error_of, told, without_paths
from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.disk import disk_errors
from tests.parity.serving import Serving, core_of, registered
from tests.unit.server.conftest import BATCH, new_client, outcome

PACKAGE = Path(tn.__file__).parent
OURS = "/srv/class room/home"
FILES = (
    f"{OURS}/runs/tc-1/journal/operations-00000001.tsnj",
    f"{OURS}/artifacts",
    "/var/tmp/x.tsnb",
    "/srv/kim",
)
RAISING = ("error", "refused", "missing", "refuse")


def texts_of_errors() -> Iterator[tuple[str, ast.JoinedStr]]:
    """Yield every text with something put into it that is given to an error, or to what makes one."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                if name.lower().endswith(RAISING) or name == "disk_errors":
                    for given in [*node.args, *(keyword.value for keyword in node.keywords)]:
                        for text in ast.walk(given):
                            if isinstance(text, ast.JoinedStr):
                                yield f"{file.relative_to(PACKAGE)}:{text.lineno}", text


def with_path(text: ast.JoinedStr, path: str) -> str:
    """Return a text as it reads when everything that is put into it is a path."""
    parts = []
    for part in text.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        else:
            assert isinstance(part, ast.FormattedValue)
            glued = parts and re.search(
                r"[\w.\]*]$", parts[-1]
            )  # hints and endings are put there, paths never
            parts += [" "] if glued else []
            parts.append(repr(path) if part.conversion == ord("r") else path)
    return "".join(parts)


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_places", set())
    answers.hide(OURS, "/var/tmp")


def test_every_text_of_an_error_that_could_hold_a_path_is_told_without_it(hidden: None) -> None:
    texts = list(texts_of_errors())
    assert len(texts) > 300
    for where, text in texts:
        for path in FILES:
            said = error_of(TGTinkerError(with_path(text, path)))["message"]
            for part in ("class room", "operations-0000", "/srv", "/var", ".tsn"):
                assert part not in said.replace(".tsnb)", "").replace("'.tsnb'", ""), f"{where}: {said}"


@pytest.mark.parametrize(
    "text",
    [
        "and/or, 4/5 of them, tokens/s, ./run/x and ../run/x",
        "https://example.org/a/b?c=/d is no tensafe-nb server",
        "meta-llama/Llama-3-8B, runs/best, tc.fit(batches)/step",
        "a regular expression such as .*/mlp/.*",
    ],
)
def test_what_is_no_path_of_this_machine_stays(hidden: None, text: str) -> None:
    assert without_paths(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "could not read /root/.cache/huggingface/hub: no",
        "FileNotFoundError: [Errno 2] No such file or directory: '/srv/kim/model.bin'",
        "OSError: '/opt/my models/root/x y.bin' cannot be read",
        "see file:///opt/models/a.gguf.",
        r"C:\Users\kim\home\x.tsnb is full",
        "~/tensafe/keys is not there",
    ],
)
def test_paths_of_others_are_left_out_too(hidden: None, text: str) -> None:
    said = without_paths(text)
    assert said.count(SOME_PATH) == 1
    assert not any(word in said for word in ("root", "cache", "kim", "opt", "Users", "keys"))


def test_details_events_and_states_are_told_without_paths_and_the_log_keeps_them(
    hidden: None, caplog: pytest.LogCaptureFixture
) -> None:
    error = TGTinkerError(
        f"{FILES[0]} is full", details={"where": [FILES[0]], "by": {"name": FILES[1]}, "n": 3}
    )
    said = error_of(error)
    assert said["details"] == {"where": [SOME_PATH], "by": {"name": SOME_PATH}, "n": 3}
    assert FILES[0] in caplog.text
    failed = told(OperationFailed(future_id="fut-1", operation="forward", code="x", message=FILES[0]))
    changed = told(StatusChanged(status="ERROR", reason=FILES[0]))
    assert failed["message"] == changed["reason"] == SOME_PATH
    caplog.clear()
    assert error_of(TGTinkerError("no path"))["message"] == "no path" and not caplog.text


def test_what_the_caller_gave_stays_and_whether_it_is_there_makes_no_difference(http: httpx.Client) -> None:
    for name in ("/etc/passwd", "/no/such/folder", "../../etc"):
        refused = http.post("/training_clients", json={"config": {"model_ref": name}}).json()["error"]
        assert refused["message"].startswith(f"The model '{name}' is not offered by this server")


def test_a_full_disk_of_the_server_tells_a_tenant_what_a_tenant_can_do() -> None:
    with pytest.raises(StorageError) as full, disk_errors("save the artifact"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/srv/kim/home/x.tsnb")
    said = error_of(full.value)["message"]
    assert "TENSAFE_HOME" in full.value.message and "TENSAFE_HOME" not in said
    assert "The disk is the server's" in said and "service.delete_artifact" in said and "/srv" not in said


def test_what_fails_on_the_way_through_a_server_leaves_it_without_paths(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    home = str(serving.home)

    def refuse(*_: Any, **__: Any) -> Any:
        with disk_errors(f"write {home}/artifacts/x.tsnb"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(outputs: Any) -> Any:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", f"{home}/table.csv")

    loss = registered("reads_a_file", lambda outputs, batch: broken(outputs))
    with tn.ServiceClient(serving.url, serving.tokens.mint("kim")) as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        monkeypatch.setattr(ArtifactStore, "save", refuse)
        monkeypatch.setattr(ArtifactStore, "list", refuse)
        handles = [tc.save_state(name="never"), tc.forward(BATCH, loss)]
        errors = [handle.exception() for handle in handles]
        assert isinstance(errors[0], StorageError) and isinstance(errors[1], FutureFailedError)
        with pytest.raises(StorageError) as refused:
            service.list_artifacts()
        said = [*map(str, errors), str(refused.value), *map(str, tc.history.events())]
        assert sum(SOME_PATH in text for text in said) >= 5  # the events tell of both, too
        assert not any(home in text for text in said)
        assert f"{home}/artifacts/x.tsnb" in caplog.text and f"{home}/table.csv" in caplog.text
        monkeypatch.undo()
        assert tc.save_state(name="then").result().name == "then"
        assert core_of(tc).status == "READY"
        tc.close()


def test_a_state_in_error_is_told_without_paths(
    serving: Serving, http: httpx.Client, enter: Callable[..., httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise tn.errors.ModelLoadError(f"{serving.home}/models/x.safetensors lacks a weight")

    monkeypatch.setattr("tensafe_nb.core.worker.models.load", fail)
    path = new_client(http)
    failed = outcome(http, http.post(f"{path}/forward", json={"batch": BATCH}).json()["future_id"])
    answers = [failed, *(http.get(p) for p in (path, f"{path}/ready", "/training_clients"))]
    answers.append(http.get(f"{path}/poll", params={"after": 0, "wait": 5}))
    assert all(SOME_PATH in answer.text for answer in answers)
    assert not any(str(serving.home) in answer.text for answer in answers)
