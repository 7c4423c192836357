"""Who means ill: requests that no library would send, over a plain socket, while others are served."""

import contextlib
import gzip
import itertools
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tensafe_nb.protocol import wire
from tensafe_nb.server import process
from tensafe_nb.server.door import guard
from tests.parity.serving import Serving, eventually, serving_thread
from tests.unit.server.conftest import BATCH, error_of, new_client, outcome
from tests.unit.server.test_what_is_taken import bomb

Enter = Callable[..., httpx.Client]


@contextlib.contextmanager
def line_to(serving: Serving) -> Iterator[socket.socket]:
    url = httpx.URL(serving.url)
    with socket.create_connection((url.host, url.port), timeout=30) as line:
        yield line


def said(line: socket.socket) -> bytes:
    """Return all that a server says until it hangs up."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while more := line.recv(1 << 16):
            found += more
    return found


def head(serving: Serving, *headers: str, method: str = "GET", path: str = "/api/v1/artifacts") -> bytes:
    token = serving.tokens.mint("ill")
    host = httpx.URL(serving.url).netloc.decode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {token}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n"


def test_who_never_ends_the_headers_is_hung_up_on(
    serving: Serving, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "HEAD_SECONDS", 0.3)
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(line_to(serving)) for _ in range(30)]
        for number, line in enumerate(lines):
            line.sendall(
                b"" if number % 3 == 0 else b"\r\n" if number % 3 == 1 else b"GET /health HTTP/1.1\r\nX: "
            )
        assert http.get("/artifacts").status_code == 200
        assert {said(line)[:20] for line in lines} <= {b"HTTP/1.1 408 Request", b"HTTP/1.1 400 Bad Req"}


def test_who_never_ends_the_headers_of_a_later_request_is_hung_up_on_too(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "HEAD_SECONDS", 0.3)
    with line_to(serving) as line:
        line.sendall(head(serving) + b"\r\n")
        assert b"200 OK" in line.recv(1 << 16)
        line.sendall(b"\r\nGET /health HTTP/1.1\r\nX-More:")
        assert b"408 Request Timeout" in said(line)


def test_a_body_that_trickles_is_given_up(
    serving: Serving, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    for method, address in (("PUT", "/api/v1/artifacts"), ("POST", "/api/v1/training_clients")):
        with line_to(serving) as line:
            line.sendall(head(serving, "Content-Length: 1000", method=method, path=address) + b"\r\n{")
            assert b"408 Request Timeout" in line.recv(1 << 16)


TWO_READINGS = [
    ["Content-Length: 2", "Transfer-Encoding: chunked"],
    ["Transfer-Encoding: chunked", "Content-Length: 2"],
    ["Content-Length: 2", "Content-Length: 3"],
    ["Content-Length: 2, 3"],
    ["Content-Length: -1"],
    ["Content-Length: +2"],
    ["Content-Length: 0x2"],
    ["Content-Length : 2"],
    ["Transfer-Encoding: chunked, identity"],
    ["Transfer-Encoding: xchunked"],
    ["Host: evil.example"],
    ["Authorization: Bearer another"],
    ["Origin: http://127.0.0.1", "Origin: http://evil.example"],
    ["X\x00Y: 1"],
    ["X: a\x00b"],
]


@pytest.mark.parametrize("headers", TWO_READINGS, ids=str)
def test_a_request_that_two_readers_could_take_for_two_is_refused(
    serving: Serving, headers: list[str]
) -> None:
    behind = b"\r\n{}GET /api/v1/audit_logs HTTP/1.1\r\n\r\n"
    with line_to(serving) as line:
        line.sendall(head(serving, *headers, method="POST", path="/api/v1/training_clients") + behind)
        line.shutdown(socket.SHUT_WR)
        first, _, rest = said(line).partition(b"\r\n")
    assert first.split()[1] in (b"400", b"403", b"413"), first
    assert b"200 OK" not in rest


def test_headers_are_bounded_in_number_and_in_size(serving: Serving) -> None:
    for many in ([f"X-{number}: 1" for number in range(200)], [f"X: {'x' * 100_000}"]):
        with line_to(serving) as line:
            line.sendall(head(serving, *many) + b"\r\n")
            assert b"431 " in line.recv(1 << 16)
    with line_to(serving) as line:  # whose end never comes
        with contextlib.suppress(ConnectionError):
            for _ in range(1_000):
                line.sendall(b"GET /" + b"x" * 1_000)
        assert said(line)[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400", b"")


def test_a_packed_body_is_not_unpacked(serving: Serving, http: httpx.Client, path: str) -> None:
    packed = gzip.compress(b"{" + b" " * 1_000_000)
    answer = http.post(f"{path}/operations", content=packed, headers={"content-encoding": "gzip"})
    assert error_of(answer) == (415, "unsupported_encoding")


def test_a_socket_of_the_web_is_no_way_in(serving: Serving) -> None:
    upgrade = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: eA==",
    )
    with line_to(serving) as line:
        line.sendall(head(serving, *upgrade, path="/api/v1/training_clients") + b"\r\n")
        assert b"101 " not in line.recv(1 << 16)


@pytest.mark.parametrize("host", ["[::1]:80", "[::1]", "LOCALHOST", "127.0.0.1"])
def test_loopback_has_several_names(http: httpx.Client, host: str) -> None:
    assert http.get("/artifacts", headers={"host": host}).status_code == 200


DTYPES = ["F64", "I64", "U8", "BOOL", "F16", "C64", "F4", "", "O", "|O", "<U1000000000"]


SHAPES = [[1 << 31, 1 << 31], [1 << 62], [0, 1 << 62], [-1], [2, 2], [1] * 70, ["a"], 3]


def test_arrays_that_claim_to_be_what_they_are_not_cost_nothing(http: httpx.Client, path: str) -> None:
    record = json.dumps({"$": "forward", "batch": {"$": "batch_data", "input_ids": {"$tensor": "0"}}})
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        claim = {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}
        body = bomb(__metadata__={"record": record}, **{"0": claim}) + b"\0" * 8
        answer = http.post(f"{path}/operations", content=body, headers={"content-type": wire.TENSORS})
        assert error_of(answer) == (422, "validation_error"), (dtype, shape)


NESTED = '{"config": ' + "[" * 50_000 + "]" * 50_000 + "}"
WRONG = [
    NESTED,
    NESTED[:-10],
    '{"config": {"seed": ' + "9" * 5_000 + "}}",
    '{"config": {"seed": 1e999}}',
    "\ud800",
]


def test_json_that_is_too_much_is_refused(http: httpx.Client, path: str) -> None:
    headers = {"content-type": "application/json"}
    addresses = [
        "/training_clients",
        *(f"{path}/{name}" for name in ("operations", "forward", "events", "cancel")),
    ]
    for body, address in itertools.product(WRONG, addresses):
        answer = http.post(address, content=body.encode("utf-8", "surrogatepass"), headers=headers)
        assert error_of(answer)[0] in (400, 422), (address, answer.text[:200])


NAMES = [
    "../../up",
    "/etc/passwd",
    "..",
    ".",
    "a/../../b",
    "a\\..\\b",
    "%2e%2e%2fup",
    "~root",
    "\n",
    "a" * 5_000,
]


def outside(home: Path) -> set[Path]:
    return {path for path in home.parent.rglob("*") if not path.is_relative_to(home)}


def test_a_name_is_never_a_way_to_a_file(serving: Serving, http: httpx.Client, path: str) -> None:
    before = outside(serving.home)
    for name in NAMES:
        for body in ({"name": name}, {"metadata": {name: name}}):
            answer = http.post(f"{path}/save_state", json=body)
            if answer.status_code == 202:
                outcome(http, answer.json()["future_id"])
        quoted = quote(name, safe="")
        for kind in ("training_clients", "futures"):
            assert http.get(f"/{kind}/{quoted}").status_code in (404, 422) or name == ".", name
        for kind in ("artifacts", "artifacts/content", "artifacts/export"):
            address = "/".join([kind.partition("/")[0], quoted, *kind.split("/")[1:]])
            assert http.get(f"/{address}").status_code in (200, 404, 422), (
                name
            )  # it may be the name of what was saved
        loading = http.post(f"{path}/load_state", json={"artifact_id": name})
        assert outcome(http, loading.json()["future_id"]).status_code in (200, 404, 422)
        source = {"$": "state_source", "artifact_id": name, "parent": name}
        made = http.post("/training_clients", json={"config": {}, "source": source})
        assert made.status_code in (201, 404, 422)
        if made.status_code == 201:
            http.delete(f"/training_clients/{made.json()['info']['training_client_id']}")
        refused = http.post("/training_clients", json={"config": {"model_ref": name}})
        assert error_of(refused) == (422, "validation_error")
        number = {"x-future-id": name if name.isprintable() else "-"}
        assert http.post(f"{path}/operations", json={"$": "optim_step"}, headers=number).status_code == 422
    assert outside(serving.home) == before


def test_events_that_only_the_core_can_tell_are_refused_and_leave_no_trace(
    http: httpx.Client, path: str
) -> None:
    from tensafe_nb import events
    from tensafe_nb.protocol.codec import encode

    forged = {
        "status_changed": events.StatusChanged(status="ERROR"),
        "operation_finished": events.OperationFinished(
            future_id="fut-x", operation="optim_step", duration=0.0
        ),
        "operation_failed": events.OperationFailed(future_id="x", operation="forward", code="x", message="x"),
        "artifact_deleted": events.ArtifactDeleted(artifact_id="x"),
        "metrics of no run": events.Metrics(step=1, values={"loss": 0.0}),
    }
    before = http.get(f"{path}/poll", params={"after": 0, "wait": 0}).json()
    for what, event in forged.items():
        assert error_of(http.post(f"{path}/events", json=[encode(event)])) == (422, "validation_error"), what
    numbered = {**encode(events.Metrics(step=1, values={"loss": 0.0}, run_id="r")), "seq": 10**9}
    assert http.post(f"{path}/events", json=[numbered]).json()["seq"] < 10**6  # the core numbers, nobody else
    after = http.get(f"{path}/poll", params={"after": 0, "wait": 0}).json()
    assert len(after) <= len(before) + 3


def test_a_loss_of_the_operators_own_is_taken_by_exactly_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensafe_nb as tn

    (tmp_path / "house_losses.py").write_text(
        "def half(outputs, batch, factor=0.5):\n    return outputs.logits.mean() * factor\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with serving_thread(tmp_path / "server", losses=["house_losses:half"]) as serving:
        token = serving.tokens.mint("ada")
        with tn.ServiceClient(serving.url, token) as service:
            tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
            whole = tc.forward(BATCH, loss_fn="house_losses:half", loss_kwargs={"factor": 1.0}).result().loss
            assert tc.forward(BATCH, loss_fn="house_losses:half").result().loss == pytest.approx(whole / 2)
            with pytest.raises(tn.ValidationError, match="no keyword 'fator'"):
                tc.forward(BATCH, loss_fn="house_losses:half", loss_kwargs={"fator": 1.0})
        headers = {"authorization": f"Bearer {token}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30) as http:
            path = new_client(http)
            for name in (
                "house_losses:other",
                "house_losses:half.__globals__",
                "os:system",
                " house_losses:half",
            ):
                refused = http.post(f"{path}/forward", json={"batch": BATCH, "loss_fn": name})
                assert error_of(refused) == (403, "forbidden") and "serve --loss" in refused.text


SECRET = "s3cret-prompt"


def test_no_secret_is_in_a_log_or_in_an_answer_to_a_request_that_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    sampling = {"$": "sampling_config", "max_new_tokens": 1}
    with serving_thread(tmp_path / "server") as serving:
        token = serving.tokens.mint("ada")
        with httpx.Client(base_url=f"{serving.url}/api/v1", timeout=30) as http:
            http.headers["authorization"] = f"Bearer {token}"
            path = new_client(http)
            broken = [
                http.post(f"{path}/sample", json={"prompts": [SECRET], "sampling": {**sampling, "x": 1}}),
                http.post(f"{path}/sample", json={"prompts": [SECRET, 3.5], "sampling": sampling}),
                http.post(f"{path}/operations", content=SECRET.encode()),
                http.get("/artifacts", headers={"authorization": f"Bearer {token}x"}),
                http.get("/artifacts", headers={"authorization": f"Basic {token}"}),
                http.get("/artifacts", headers={"host": "evil.example"}),
            ]
            long = {"prompts": [SECRET * 2_000], "sampling": sampling}
            for body in (long, {"prompts": [SECRET], "sampling": sampling}):
                queued = http.post(f"{path}/sample", json=body).json()["future_id"]
                broken.append(outcome(http, queued))
            assert broken.pop().status_code == 200
            assert all(answer.status_code >= 400 for answer in broken)
        key_file = next(serving.home.rglob("*-keys.json"))
        keys = [value for value in strings_in(json.loads(key_file.read_text())) if len(value) > 30]
    told = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    text = "\n".join([*told, *(answer.text for answer in broken), *capfd.readouterr()])
    assert keys and not [secret for secret in (token, SECRET, *keys) if secret in text]


def strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_failure_of_the_server(
    serving: Serving, http: httpx.Client, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    for address in ("/api/v1/training_clients", f"/api/v1{path}/forward", f"/api/v1{path}/operations"):
        with line_to(serving) as line:
            line.sendall(head(serving, "Content-Length: 1000", method="POST", path=address) + b"\r\n{")
    eventually(lambda: http.get("/artifacts").status_code == 200)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
