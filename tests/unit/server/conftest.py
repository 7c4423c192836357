"""A server on a thread, spoken to by plain requests, as curl or another language would."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tensafe_nb.privacy.encrypted import HEClient
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.operations import ForwardBackward
from tests.parity.serving import Gate, Serving, serving_thread

BATCH = {"input_ids": [[5, 6, 7, 8], [9, 10, 11, 12]]}


@pytest.fixture(scope="package")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving_thread(tmp_path_factory.mktemp("server")) as serving:
        yield serving


@pytest.fixture
def enter(serving: Serving) -> Iterator[Callable[..., httpx.Client]]:
    """Return a function that makes a client with a token for a tenant, a new one if none is named."""
    made: list[httpx.Client] = []

    def make(tenant: str | None = None, token: str | None = None) -> httpx.Client:
        tenant = tenant or f"t{uuid.uuid4().hex[:8]}"
        headers = {"authorization": f"Bearer {token or serving.tokens.mint(tenant)}"}
        client = httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30, verify=False)
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()
    serving.end()


@pytest.fixture
def http(enter: Callable[..., httpx.Client]) -> httpx.Client:
    return enter()


@pytest.fixture
def path(http: httpx.Client) -> str:
    """The path of a new training client."""
    return new_client(http)


def new_client(http: httpx.Client, **config: Any) -> str:
    made = http.post("/training_clients", json={"config": {"lora_config": {"rank": 2}, **config}})
    assert made.status_code == 201, made.text
    return f"/training_clients/{made.json()['info']['training_client_id']}"


def error_of(answer: httpx.Response) -> tuple[int, str]:
    """Return status and code of an error, which has the one form that errors have; beneath /v1, OpenAI's."""
    body, of_openai = answer.json(), answer.url.path.startswith("/v1/")
    form = {"message", "type", "param", "code"} if of_openai else {"code", "message", "details", "request_id"}
    assert set(body) == {"error"} and set(body["error"]) == form
    assert body["error"]["message"] and answer.headers["x-request-id"].startswith("req-")
    assert of_openai or body["error"]["request_id"]
    return answer.status_code, body["error"]["code"]


SHAPE = (160, 160, 2)  # of the adapter of one module of such a client


def open_encrypted(
    http: httpx.Client, path: str, client: HEClient | None = None, **asked: Any
) -> tuple[httpx.Response, HEClient]:
    """Open an encrypted connection for a module, with the fewest keys there can be."""
    client = client or HEClient(SHAPE, tokens=512)
    params = {"modules": "q_proj", "shape": list(SHAPE), "tokens": "512", **asked}
    return http.post(f"{path}/encrypted", params=params, content=client.public_bundle()), client


def submit(
    http: httpx.Client, path: str, operation: Any, number: int, submitter: str = "me"
) -> httpx.Response:
    """Submit an operation as a kernel does."""
    media_type, body = wire.pack(operation)
    headers = {
        "content-type": media_type,
        "x-submitter": submitter,
        "x-number": str(number),
        "x-future-id": f"fut-{submitter}-{number}",
        "x-verb": operation.verb,
    }
    return http.post(f"{path}/operations", content=body, headers=headers)


def outcome(http: httpx.Client, future_id: str) -> httpx.Response:
    """Return what came of an operation, however long it takes."""
    while (answer := http.get(f"/futures/{future_id}/result", params={"wait": 20})).status_code == 202:
        pass
    return answer


def submit_gate(http: httpx.Client, path: str, gate: Gate) -> None:
    """Let a training client run an operation that ends when the gate is opened."""
    batch = BatchData.of(BATCH)
    assert submit(http, path, ForwardBackward(batch, gate.name), 1, "gate").status_code == 202
    assert gate.reached.wait(20)
