"""A request that is sent again to a server that was killed over it is not done again, and gets the first answer."""

import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tensafe_nb.errors import StorageError
from tensafe_nb.events import OperationQueued
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.codec import encode
from tensafe_nb.protocol.operations import VERBS
from tensafe_nb.server.door import once
from tensafe_nb.server.door.once import Answers
from tensafe_nb.store.keys.keyring import Keys
from tests.parity.serving import Gate, Serving, serving_thread
from tests.unit.server.conftest import BATCH, error_of, new_client, open_encrypted, outcome, submit_gate

ONE = "/training_clients/{training_client_id}"
FIELDS: dict[str, dict[str, Any]] = {  # of each operation, as its twin takes them
    "sample": {"prompts": ["ab"], "sampling": {"$": "sampling_config", "max_new_tokens": 1}},
    "load_state": {"artifact_id": "kept"},
    "load_adapter": {"tensors": {"none of its": encode(np.zeros(1, np.float32))}},
    "void_privacy": {"reason": "a test"},
    **{verb: {"batch": BATCH} for verb in ("forward", "forward_backward", "compute_logprobs")},
}
SAID_ANEW = (
    "created_at",
    "queue_position",
    "status",
    "encryption",
)  # what is so by now, as a key was rotated
MEASURED = ("estimate", "privacy_audit")  # asked again, they measure again, and change nothing
SAMPLES = {
    "POST /samples",
    "POST /v1/completions",
    "POST /v1/chat/completions",
}  # asked again, they draw again
DRAWN = ("number", "key")  # a process numbers its draws, and hashes their rows, anew


@dataclass
class Killed:
    """A server, and another one that begins where the first was killed: each request is sent to both."""

    first: httpx.Client
    again: Callable[[], httpx.Client]
    asked: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)
    answers: list[httpx.Response] = field(default_factory=list)

    def ask(self, route: str, path: str, **content: Any) -> httpx.Response:
        """Send a request to the first, under a name of its own."""
        content["headers"] = {"x-once": uuid.uuid4().hex} | content.get("headers", {})
        method = route.partition(" ")[0]
        self.asked.append((route, method, path, content))
        self.answers.append(self.first.request(method, path, **content))
        assert self.answers[-1].is_success, (route, self.answers[-1].text)
        return self.answers[-1]


def of_tenant(serving: Serving) -> httpx.Client:
    headers = {"authorization": f"Bearer {serving.tokens.mint('kim')}"}
    return httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=60)


@pytest.fixture(params=["it had answered", "it had not answered yet"])
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Killed]:
    with (
        serving_thread(tmp_path / "first") as first,
        of_tenant(first) as before,
        pytest.MonkeyPatch.context() as patched,
    ):
        if "not" in request.param:
            patched.setattr(Answers, "answered", lambda *_: None)

        opened: list[Any] = []

        def again() -> httpx.Client:
            shutil.copytree(tmp_path / "first", tmp_path / "second")
            running = serving_thread(tmp_path / "second")
            opened.append(running)
            second = of_tenant(running.__enter__())
            opened.append(second)
            return second

        yield Killed(before, again)
        if opened:
            opened[1].close()
            opened[0].__exit__(None, None, None)


def routes_that_change(http: httpx.Client) -> set[str]:
    paths = http.get(str(http.base_url.join("/openapi.json"))).json()["paths"]
    return {
        f"{method.upper()} {path.removeprefix('/api/v1')}"
        for path, methods in paths.items()
        for method in methods
        if method != "get"
    }


def done(home: Path, http: httpx.Client) -> dict[str, Any]:
    """Return how much has been done: what a second time would add to."""
    logs = [RunHistory.load(path) for path in sorted((home / "tenants/kim/runs").glob("*/events.jsonl"))]
    audit = Counter(e["operation"] for e in http.get("/audit_logs", params={"limit": 10_000}).json())
    audit.pop(
        "push_artifact"
    )  # the same file, taken in twice, is one artifact; that it came twice is on record
    audit.pop("rotate_keys")
    return {
        "clients": sorted(client["training_client_id"] for client in http.get("/training_clients").json()),
        "artifacts": sorted(artifact["artifact_id"] for artifact in http.get("/artifacts").json()),
        "operations": [sum(1 for _ in log.events(kinds=(OperationQueued,))) for log in logs],
        "events": [log.last_seq for log in logs],
        "audit": audit,
        "keys": (home / "keys" / "local-keys.json").read_text(),
    }


def finished(http: httpx.Client, answer: httpx.Response) -> None:
    """Wait for an operation; nobody minds whether it failed."""
    outcome(http, answer.json()["future_id"])


def ask_everything(killed: Killed) -> None:
    """Send a request to every route that changes something."""
    http, gate = killed.first, Gate()
    path, private = (
        new_client(http),
        new_client(http, dp_config={"dataset_size": 10, "expected_batch_size": 2}),
    )
    names = ("kept", "kept", "gone", "gone")
    queued = [http.post(f"{path}/save_state", json={"name": name}).json()["future_id"] for name in names]
    saved = [outcome(http, future_id).json()["artifact_id"] for future_id in queued]
    sealed = http.get(f"/artifacts/{saved[2]}/content").content
    lane = new_client(http)
    submit_gate(http, lane, gate)
    pending = [http.post(f"{lane}/forward", json={"batch": BATCH}).json()["future_id"] for _ in range(3)]
    cancelled = killed.ask(f"POST {ONE}/cancel", f"{lane}/cancel", json={"future_ids": pending[:2]})
    assert cancelled.json() == {"cancelled": 2}
    cancelled = killed.ask("POST /futures/{future_id}/cancel", f"/futures/{pending[2]}/cancel")
    assert cancelled.json() == {"cancelled": True}
    gate.opened.set()
    outcome(http, "fut-gate-1")
    small = {"config": {"lora_config": {"rank": 2}}}
    killed.ask("POST /training_clients", "/training_clients", json={"key": "mine", **small})
    killed.ask("POST /training_clients", "/training_clients", json=small)
    for verb in sorted(VERBS):
        fields = FIELDS.get(verb, {})
        finished(http, killed.ask(f"POST {ONE}/{verb}", f"{path}/{verb}", json=fields))
    record = {"$": "optim_step"}
    finished(http, killed.ask(f"POST {ONE}/operations", f"{path}/operations", json=record))
    number = {"x-submitter": "me", "x-number": "1", "x-future-id": "fut-me-1", "x-verb": "optim_step"}
    finished(http, killed.ask(f"POST {ONE}/operations", f"{path}/operations", json=record, headers=number))
    told = [{"$": "metrics", "step": 1, "values": {"loss": 1.0}, "run_id": "tc/1"}]
    killed.ask(f"POST {ONE}/events", f"{path}/events", json=told)
    killed.ask(
        f"POST {ONE}/events", f"{path}/events", json=told, headers={"x-submitter": "me", "x-number": "1"}
    )
    killed.ask(f"POST {ONE}/draws", f"{private}/draws", json={"unit": "row"})
    killed.ask(f"POST {ONE}/draws", f"{private}/draws", json={"unit": "row", "key": "mine"})
    killed.ask(f"POST {ONE}/estimate", f"{path}/estimate", json={"batch_size": 1, "length": 8})
    killed.ask(f"POST {ONE}/privacy_audit", f"{private}/privacy_audit", json={"canaries": 100, "steps": 1})
    killed.ask("DELETE /artifacts/{artifact_id}", "/artifacts/gone")  # the newer one of this name
    http.delete(f"/artifacts/{saved[2]}")
    killed.ask("POST /keys/rotate", "/keys/rotate")
    killed.ask("PUT /artifacts", "/artifacts", content=sealed)
    ended = new_client(http)
    finished(http, http.post(f"{ended}/forward", json={"batch": BATCH}))
    killed.ask("DELETE " + ONE, ended)


def test_a_request_is_done_once_and_gets_its_first_answer_though_the_server_was_killed_over_it(
    killed: Killed, tmp_path: Path
) -> None:
    ask_everything(killed)
    here = {route for route in routes_that_change(killed.first) if "/encrypted" not in route}
    assert {route for route, *_ in killed.asked} == here - SAMPLES  # a new one is to be asked above, too
    before = done(tmp_path / "first", killed.first)
    http = killed.again()
    assert done(tmp_path / "second", http) == before
    for (route, method, path, content), first in zip(killed.asked, killed.answers, strict=True):
        answer = http.request(method, path, **content)
        assert (answer.status_code, answer.headers.get("content-type")) == (
            first.status_code,
            first.headers.get("content-type"),
        ), (route, answer.text)
        if first.content and not route.endswith(MEASURED):
            said, said_first = answer.json(), first.json()
            if isinstance(said, dict):
                for name in (*SAID_ANEW, *(DRAWN if route.endswith("draws") else ())):
                    said.pop(name, None), said_first.pop(name, None)
            if route == "POST /training_clients":  # by now its model may be loaded
                said, said_first = (x["info"]["training_client_id"] for x in (said, said_first))
            assert said == said_first, route
        if route.endswith("draws"):
            drawn, private = answer.json(), path
    fresh = http.post(private, json={"unit": "row"}).json()
    assert (fresh["number"], fresh["key"]) == (drawn["number"] + 1, drawn["key"])  # those two are owed, once
    after = done(tmp_path / "second", http)
    assert {name: after[name] for name in before if name != "events"} == {
        name: before[name] for name in before if name != "events"
    }


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys", "file", tenant="kim")


def said(body: bytes) -> list[Any]:
    begin = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
    return [begin, {"type": "http.response.body", "body": body}]


def test_answers_are_kept_for_an_hour_and_so_many_and_a_new_key_takes_them_over(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "MOST_RECORDS", 10)
    answers = Answers(tmp_path / "answers", keys)
    for number in range(40):
        answers.begun(f"r{number}")
        answers.note(f"r{number}", {"n": number})
        answers.answered(f"r{number}", said(f"{number}".encode()))
    assert len(list((tmp_path / "answers").iterdir())) == 2
    answers.close()
    old = keys.primary_id()
    keys.new()
    again = Answers(tmp_path / "answers", keys)
    known, found = again.recall("r39")
    assert known is not None and known.noted == {"n": 39} and found is not None and found == said(b"39")
    assert again.recall("r5") == (None, None)
    paths = list((tmp_path / "answers").iterdir())
    assert not any(old.encode() in path.read_bytes() for path in paths)
    assert all(keys.primary_id().encode() in path.read_bytes() for path in paths)
    monkeypatch.setattr(once, "KEPT_SECONDS", -1.0)
    assert again.recall("r39") == (None, None)
    again.close()


def test_what_cannot_be_read_any_more_is_given_up_and_nothing_else(tmp_path: Path, keys: Keys) -> None:
    answers = Answers(tmp_path / "answers", keys)
    answers.answered("one", said(b"1"))
    answers.close()
    (path,) = (tmp_path / "answers").iterdir()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert answers.recall("one") == (None, None)
    answers.answered("two", said(b"2"))
    assert answers.recall("two")[1] == said(b"2")
    answers.close()


def test_a_full_disk_keeps_nobody_from_deleting_something(
    serving: Serving, http: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = outcome(http, http.post(f"{path}/save_state", json={}).json()["future_id"]).json()["artifact_id"]

    def full(*_: Any, **__: Any) -> Any:
        raise StorageError("full")

    monkeypatch.setattr(Answers, "_append", full)
    headers = {"x-once": "1"}
    assert http.delete(f"/artifacts/{saved}", headers=headers).status_code == 204
    assert http.delete(f"/artifacts/{saved}", headers=headers).status_code == 204  # known to this process
    assert error_of(http.delete(f"/artifacts/{saved}"))[0] == 404


def test_what_is_said_of_a_connection_ends_with_it(killed: Killed) -> None:
    path = new_client(killed.first)
    killed.first.headers["x-once"] = "me"
    made, _ = open_encrypted(killed.first, path)
    assert made.status_code == 201
    http = killed.again()
    http.headers["x-once"] = "me"
    again, _ = open_encrypted(http, path)
    assert again.json()["connection_id"] != made.json()["connection_id"]
    assert error_of(http.delete(f"{path}/encrypted/{made.json()['connection_id']}"))[0] == 404


def test_a_name_stands_for_one_request_to_one_address(http: httpx.Client, path: str) -> None:
    headers, verbs = {"x-once": "the same"}, ("optim_step", "save_state")
    made = [http.post(f"{path}/{verb}", json={}, headers=headers).json()["operation"] for verb in verbs]
    assert made == ["optim_step", "save_state"]
