"""What one tenant has is, for every other, not there: on every route there is, a new one too."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import tensafe_nb as tn
from tensafe_nb.protocol.codec import encode
from tensafe_nb.protocol.operations import Sample, SampleFrom
from tests.parity.serving import Serving
from tests.unit.server.conftest import BATCH, SHAPE, error_of, new_client, open_encrypted, outcome

Enter = Callable[..., httpx.Client]
UNKNOWN = {
    "training_client_id": "tc-000000000000",
    "future_id": "fut-000000000000",
    "artifact_id": f"art-{'0' * 32}",
    "connection_id": f"he-{'0' * 32}",
    "model": "tc-000000000000",
}
BODIES: dict[str, Any] = {  # of the routes that need one, by the end of their path
    "operations": {"$": "optim_step"},
    "forward_backward": {"batch": BATCH},
    "forward": {"batch": BATCH},
    "compute_logprobs": {"batch": BATCH},
    "sample": {"prompts": ["x"]},
    "load_state": {"artifact_id": "x"},
    "void_privacy": {"reason": "x"},
    "events": [],
    "cancel": {"future_ids": []},
    "draws": {"unit": "example"},
    "estimate": {"batch_size": 1, "length": 8},
    "privacy_audit": {"canaries": 100, "steps": 1},
}
QUERIES = {"encrypted": {"modules": "q_proj", "shape": list(SHAPE), "tokens": "512"}}
OF_A_TENANT = {  # routes without an id, and what they answer a tenant that has nothing
    ("get", "/api/v1/training_clients"): [],
    ("get", "/api/v1/artifacts"): [],
    ("get", "/api/v1/audit_logs"): [],
    ("post", "/api/v1/keys/rotate"): {"rewrapped": 0},
    ("get", "/v1/models"): {"object": "list", "data": []},
}
OF_ALL = {  # routes that are the same for everybody, or make something new
    *(("get", f"/{probe}") for probe in ("health", "live", "ready", "version", "metrics")),
    *(("get", f"/api/v1/{name}") for name in ("capabilities", "losses", "audit_logs/verify")),
    ("post", "/api/v1/training_clients"),
    ("put", "/api/v1/artifacts"),
    ("post", "/v1/completions"),  # what they sample from is named in the body: tests/unit/server/openai
    ("post", "/v1/chat/completions"),
    ("post", "/api/v1/samples"),
}


def routes(serving: Serving, http: httpx.Client) -> list[tuple[str, str]]:
    described = http.get(f"{serving.url}/openapi.json").json()["paths"]
    return [(method, path) for path, methods in described.items() for method in methods]


def without(ids: dict[str, str], text: str) -> str:
    for value in ids.values():
        text = text.replace(value, "ID")
    return re.sub(r"req-\w+", "req", text)


@pytest.fixture
def mine(http: httpx.Client, path: str) -> dict[str, str]:
    """Ids of something of each kind, of one tenant."""
    queued = http.post(f"{path}/save_state", json={"name": "mine"}).json()["future_id"]
    saved = outcome(http, queued).json()["artifact_id"]
    connection = open_encrypted(http, path)[0].json()["connection_id"]
    names = {"future_id": queued, "artifact_id": saved, "connection_id": connection}
    name = path.rpartition("/")[2]
    return {"training_client_id": name, "model": name, **names}


def test_every_route_answers_for_anothers_id_as_for_one_that_does_not_exist(
    serving: Serving, http: httpx.Client, path: str, mine: dict[str, str], enter: Enter
) -> None:
    other = enter()
    own = new_client(other)  # it has something itself: a list of what is known names that alone
    before, kept = http.get(path).json(), http.get(f"/artifacts/{mine['artifact_id']}").content
    tried = 0
    for method, route in routes(serving, http):
        if "{" not in route:
            continue
        answers = []
        for ids in (mine, UNKNOWN):
            address = f"{serving.url}{route.format(**ids)}"
            body = {"json": BODIES.get(route.rpartition("/")[2], {})} if method in ("post", "put") else {}
            query = QUERIES.get(route.rpartition("/")[2], {})
            answer = other.request(method, address, params=query, **body)
            assert answer.status_code == 404, (method, route, answer.status_code, answer.text)
            answers.append((error_of(answer), without(ids, answer.text)))
        assert answers[0] == answers[1], (method, route)
        assert not any(value in answers[0][1] for value in mine.values())
        tried += 1
    assert tried > 25
    assert http.get(path).json() == before and own not in before
    assert http.get(f"/artifacts/{mine['artifact_id']}").content == kept


def test_a_connection_of_another_is_none_of_ones_own_client(
    http: httpx.Client, path: str, mine: dict[str, str], enter: Enter
) -> None:
    other = enter()
    theirs = new_client(other)
    for method, end in (("post", "/apply"), ("post", "/refresh"), ("delete", "")):
        answers = []
        for ids in (mine, UNKNOWN):
            address = f"{theirs}/encrypted/{ids['connection_id']}{end}"
            answer = other.request(method, address, content=b"x" if end == "/apply" else b"")
            answers.append((error_of(answer), without(ids, answer.text)))
        assert answers[0] == answers[1] and answers[0][0] == (404, "not_found")
    assert http.post(f"{path}/encrypted/{mine['connection_id']}/refresh").status_code == 200


def test_routes_without_an_id_tell_nothing_of_another(
    serving: Serving, http: httpx.Client, mine: dict[str, str], enter: Enter
) -> None:
    other = enter()
    without_id = {(method, path) for method, path in routes(serving, http) if "{" not in path}
    assert without_id == OF_ALL | set(OF_A_TENANT), "say of a new route what it answers another tenant"
    for (method, path), nothing in OF_A_TENANT.items():
        assert other.request(method, f"{serving.url}{path}").json() == nothing
    for method, path in OF_ALL:
        if method == "get":
            answer = other.get(f"{serving.url}{path}")
            assert answer.status_code == 200
            assert not any(value in answer.text for value in mine.values())


@pytest.mark.parametrize("kind", ["artifact_id", "name", "future_id"])
def test_nothing_of_another_can_be_named_inside_a_request(
    http: httpx.Client, path: str, mine: dict[str, str], enter: Enter, kind: str
) -> None:
    other = enter()
    named = "mine" if kind == "name" else mine[kind]
    if kind != "future_id":
        loading = other.post(f"{new_client(other)}/load_state", json={"artifact_id": named}).json()
        assert error_of(outcome(other, loading["future_id"])) == (404, "artifact_not_found")
        asked = encode(SampleFrom(Sample(("x",), tn.SamplingConfig()), artifact_id=named))
        assert error_of(other.post("/samples", json=asked)) == (404, "artifact_not_found")
    field = "future_id" if kind == "future_id" else "artifact_id"
    refused = []
    for ids in ({**mine, "name": "mine"}, {**UNKNOWN, "name": "no-such-name"}):
        source = {"$": "state_source", field: ids[kind], "parent": ids["training_client_id"]}
        made = other.post("/training_clients", json={"config": {}, "source": source})
        if made.status_code == 201:
            made = other.get(f"/training_clients/{made.json()['info']['training_client_id']}/ready")
        refused.append((error_of(made), without(ids, made.text)))
    assert refused[0] == refused[1] and refused[0][0][0] in (404, 422)
    assert other.get("/artifacts").json() == []
    other_cancel = other.post(f"{new_client(other)}/cancel", json={"future_ids": [mine["future_id"]]})
    assert other_cancel.json() == {"cancelled": 0}


def test_one_submitters_name_counts_for_each_tenant_by_itself(enter: Enter) -> None:
    from tensafe_nb.protocol.operations import OptimStep
    from tests.unit.server.conftest import submit

    first, second = enter(), enter()
    paths = [(http, new_client(http)) for http in (first, second)]
    for (http, path), number in itertools.product(paths, (1, 2)):
        assert submit(http, path, OptimStep(), number).status_code == 202
        assert outcome(http, f"fut-me-{number}").status_code in (409, 422)
