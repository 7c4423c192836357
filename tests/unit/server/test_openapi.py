"""What the description says holds for whatever is sent: schemathesis makes requests of it, good ones and wrong ones."""

import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig

from tests.parity.serving import Serving
from tests.unit.server.conftest import new_client, open_encrypted, outcome

SETTINGS: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
EXPECTED = ["2xx", "401", "403", "404", "409", "413", "422", "429", "503"]  # 422: what no schema can say
OF_OPENAI = {  # whose clients are told so by a 400
    "include-path-regex": "^/v1/",
    "checks": {"positive_data_acceptance": {"expected-statuses": [*EXPECTED, "400"]}},
}


@pytest.fixture(autouse=True)
def gaps_that_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a submission wait for those before it less long than a request takes here at most."""
    monkeypatch.setattr("tensafe_nb.server.clients.LONGEST_GAP", 0.2)


def exercise(serving: Serving, examples: int) -> int:
    """Send so many requests of each kind to each route, with every check; return how many were sent."""
    token = serving.tokens.mint(f"fuzz-{uuid.uuid4().hex[:8]}")
    headers = {"authorization": f"Bearer {token}"}
    checks = {"positive_data_acceptance": {"expected-statuses": EXPECTED}}
    config = SchemathesisConfig.from_dict({"seed": 20, "checks": checks, "operations": [OF_OPENAI]})
    schema = schemathesis.openapi.from_url(f"{serving.url}/openapi.json", headers=headers, config=config)
    assert {"response_schema_conformance", "unsupported_method", "ignored_auth"} <= set(
        CHECKS.get_all_names()
    )
    sent, wrong = [], []
    with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=60) as http:
        for operation in (found.ok() for found in schema.get_all_operations()):
            asks_for_one = "{" in operation.path or operation.path.startswith("/v1/")
            ids = made(http) if asks_for_one and not operation.path.endswith("/stream") else {}
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                sending = sender(headers, ids if mode is GenerationMode.POSITIVE else {}, sent)
                strategy = operation.as_strategy(generation_mode=mode)
                try:
                    settings(max_examples=examples, **SETTINGS)(given(case=strategy)(sending))()
                except Unsatisfiable:  # nothing that is sent there can be wrong
                    assert mode is GenerationMode.NEGATIVE, operation.label
                except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  # told together, below
                    wrong.append(f"{operation.label} {mode}: {error!r} {error}")
            for client in http.get("/training_clients").json():
                http.delete(f"/training_clients/{client['training_client_id']}")
    assert not wrong, "\n\n".join(wrong)
    return len(sent)


def sender(headers: dict[str, str], ids: dict[str, str], sent: list[str]) -> Callable[..., None]:
    """Return what sends a request as it was made, and once more about something that is there."""

    def send(case: Any) -> None:
        sent.append(case.operation.label)
        if ids and "wait" in case.query:
            case.query["wait"] = 0.0  # a longer one is only longer
        case.call_and_validate(headers=headers, timeout=60)
        if ids:
            case.path_parameters = {name: ids[name] for name in case.path_parameters}
            if isinstance(case.body, dict) and "model" in case.body:
                case.body |= {"model": ids["model"], "max_tokens": 2}
                case.body.pop("max_completion_tokens", None)
            case.call_and_validate(headers=headers, timeout=60)

    return send


def made(http: httpx.Client) -> dict[str, str]:
    """Make something of each kind, and return the ids."""
    path = new_client(http)
    queued = http.post(f"{path}/save_state", json={}).json()["future_id"]
    saved = outcome(http, queued).json()["artifact_id"]
    name = path.rpartition("/")[2]
    ids = {"training_client_id": name, "model": name, "future_id": queued, "artifact_id": saved}
    connection = open_encrypted(http, path)[0].json()["connection_id"]
    return ids | {"connection_id": connection}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_route_keeps_what_it_says_long(serving: Serving) -> None:
    assert exercise(serving, 100) > 5_000


@pytest.mark.faults
def test_every_route_keeps_what_it_says(serving: Serving) -> None:
    assert exercise(serving, 2) > 100
