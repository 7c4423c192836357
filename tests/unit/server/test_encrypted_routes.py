"""Encrypted calls by plain requests: what is too large is not read, what is not meant for a connection not computed."""

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tensafe_nb.core.encrypted import EncryptedSide
from tensafe_nb.privacy.encrypted import HEClient
from tensafe_nb.server.door.limits import Limits
from tests.parity.serving import Serving, serving_thread
from tests.unit.server.conftest import SHAPE, error_of, new_client, open_encrypted, outcome

X = np.random.default_rng(0).normal(size=(2, SHAPE[0]))
BAD = (422, "encryption_context")


def opened(http: httpx.Client, path: str) -> tuple[str, HEClient]:
    answer, client = open_encrypted(http, path)
    assert answer.status_code == 201, answer.text
    return f"{path}/encrypted/{answer.json()['connection_id']}", client


def asked(client: HEClient, x: Any = X) -> bytes:
    return client.encrypt(x, "3:q_proj")


def test_a_call_is_answered_once_and_only_as_it_was_sealed(http: httpx.Client, path: str) -> None:
    there, client = opened(http, path)
    first, second, third = (asked(client) for _ in range(3))
    reply = http.post(f"{there}/apply", content=second)
    assert reply.headers["content-type"] == "application/octet-stream"
    assert client.decrypt(reply.content).shape == (2, SHAPE[1])
    flipped = third[:-1] + bytes([third[-1] ^ 1])
    elsewhere, other = opened(http, path)
    for what, body in {
        "replayed": second,
        "reordered": first,
        "altered": flipped,
        "cut": third[:100],
        "empty": b"",
        "another connection's": asked(other),
        "the reply to another": reply.content,
        "a part that is not served": client.encrypt(X, "2:q_proj"),
    }.items():
        assert error_of(http.post(f"{there}/apply", content=body)) == BAD, what
    assert http.post(f"{elsewhere}/apply", content=asked(other)).status_code == 200


def test_what_is_larger_than_its_parameters_allow_is_refused_before_it_is_read(
    http: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, client = opened(http, path)
    monkeypatch.setattr(EncryptedSide, "apply", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(EncryptedSide, "open", lambda *_: pytest.fail("it was read"))
    most = len(client.public_bundle()) * 4

    def unending() -> Any:
        for _ in range(most >> 16):
            yield b"x" * (1 << 16)

    query = {"modules": "q_proj", "shape": list(SHAPE), "tokens": "512"}
    for content in (b"x" * most, unending()):
        answer = http.post(f"{path}/encrypted", params=query, content=content)
        assert error_of(answer) == (413, "too_large") and "It was not parsed" in answer.text
    monkeypatch.setattr("tensafe_nb.privacy.encrypted.server.HEServer.most_bytes", 1_000)
    assert error_of(http.post(f"{there}/apply", content=asked(client))) == (413, "too_large")


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({"params": "n4096-d2"}, BAD),
        ({"tokens": "7"}, (422, "validation_error")),
        ({"tokens": "all"}, (422, "validation_error")),
        ({"layers": [4]}, (422, "validation_error")),
        ({"layers": [10_000]}, (422, "validation_error")),
        ({"modules": "q"}, (422, "validation_error")),
        ({"shape": [160, 160]}, (422, "validation_error")),
        ({"shape": [160, 160, 3]}, (422, "validation_error")),
        ({"shape": [1 << 40, 160, 2]}, (422, "validation_error")),
    ],
    ids=str,
)
def test_a_bundle_is_taken_for_what_there_is_only(
    http: httpx.Client, path: str, query: dict[str, Any], error: tuple[int, str], bundle_of: HEClient
) -> None:
    assert error_of(open_encrypted(http, path, bundle_of, **query)[0]) == error


@pytest.fixture(scope="module")
def bundle_of() -> HEClient:
    return HEClient(SHAPE, tokens=512)


def test_a_bundle_for_other_parameters_than_the_address_says_is_refused(
    http: httpx.Client, path: str
) -> None:
    other = HEClient((160, 160, 4), tokens=512)
    assert error_of(open_encrypted(http, path, other)[0]) == BAD


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A tenant of a server that lets it have two connections, and no weights leave."""
    options = {"limits": Limits(encrypted=2), "exports": False}
    with serving_thread(tmp_path_factory.mktemp("strict"), **options) as serving:
        headers = {"authorization": f"Bearer {serving.tokens.mint('ada')}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=120) as http:
            yield http


def test_a_tenant_has_so_many_connections_and_closing_one_makes_room(
    strict: httpx.Client, bundle_of: HEClient
) -> None:
    path, figures = new_client(strict), str(strict.base_url).replace("/api/v1/", "/metrics")
    ids = [open_encrypted(strict, path, bundle_of)[0].json()["connection_id"] for _ in range(2)]
    refused, _ = open_encrypted(strict, path, bundle_of)
    assert error_of(refused) == (429, "too_many") and "he.close()" in refused.text
    assert strict.delete(f"{path}/encrypted/{ids[0]}").status_code == 204
    assert error_of(strict.delete(f"{path}/encrypted/{ids[0]}")) == (404, "not_found")
    assert open_encrypted(strict, path, bundle_of)[0].status_code == 201
    assert "tensafe_nb_encrypted_connections 2" in strict.get(figures).text
    strict.delete(path)
    assert "tensafe_nb_encrypted_connections 0" in strict.get(figures).text, "they end with their client"


def test_an_operator_can_keep_weights_from_leaving_in_the_clear(
    strict: httpx.Client, bundle_of: HEClient
) -> None:
    path = new_client(strict)
    queued = strict.post(f"{path}/save_state", json={}).json()["future_id"]
    saved = outcome(strict, queued).json()["artifact_id"]
    for refused in (strict.get(f"/artifacts/{saved}/export"), strict.post(f"{path}/read_adapter", json={})):
        assert error_of(refused) == (403, "forbidden") and "serve --no-export" in refused.text
    assert strict.get(f"/artifacts/{saved}/content").content[:4] == b"TSNB", "which is sealed"
    assert open_encrypted(strict, path, bundle_of)[0].status_code == 201
    strict.delete(path)


def test_an_adapter_read_before_weights_were_to_stay_does_not_leave_later(
    serving: Serving, http: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = http.post(f"{path}/read_adapter", json={}).json()["future_id"]
    assert outcome(http, queued).status_code == 200
    monkeypatch.setattr(serving.service, "exports", False)
    assert error_of(outcome(http, queued)) == (403, "forbidden")


def test_idle_connections_are_dropped_and_used_ones_are_not(
    serving: Serving, http: httpx.Client, path: str
) -> None:
    there, client = opened(http, path)
    (served,) = [each for each in serving.service.live_clients() if each.channel.connections.open]
    served.channel.connections.expire(600.0)
    assert http.post(f"{there}/refresh").status_code == 200
    served.channel.connections.expire(-1.0)
    gone = http.post(f"{there}/apply", content=asked(client))
    assert error_of(gone) == (404, "not_found") and "was idle for too long" in gone.text


def test_figures_count_calls_and_bytes_and_the_audit_log_each_connection(
    serving: Serving, http: httpx.Client, path: str
) -> None:
    def figure(name: str) -> float:
        text = http.get(f"{serving.url}/metrics").text
        return float(
            next(line for line in text.splitlines() if line.startswith(f"tensafe_nb_{name}")).split()[-1]
        )

    there, client = opened(http, path)
    names = ['encrypted_calls_total{outcome="answered"}', 'encrypted_calls_total{outcome="refused"}']
    names += ['encrypted_bytes_total{direction="up"}', "encrypted_seconds_total"]
    before = [figure(name) for name in names]
    request = asked(client)
    for _ in range(2):
        http.post(f"{there}/apply", content=request)
    answered, refused, up, seconds = (figure(name) - was for name, was in zip(names, before, strict=True))
    assert (answered, refused, up) == (1, 1, 2 * len(request)) and seconds > 0
    open_encrypted(http, path, HEClient((160, 160, 4), tokens=512))
    log = http.get("/audit_logs", params={"operation": "he_open"}).json()
    assert [(entry["success"], entry["error_code"]) for entry in log] == [(False, BAD[1]), (True, None)]
