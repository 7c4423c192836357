"""Every answer has its form: errors of the framework too; and the description of it all is complete."""

import httpx
import pytest

from tensafe_nb.protocol.operations import VERBS
from tests.parity.serving import Serving
from tests.unit.server.conftest import error_of


def test_errors_of_the_framework_have_the_form_of_all_errors(http: httpx.Client, path: str) -> None:
    assert error_of(http.get("/nothing/here")) == (404, "not_found")
    assert error_of(http.patch("/training_clients")) == (405, "method_not_allowed")
    assert error_of(http.post("/training_clients", content=b"{")) == (422, "validation_error")
    assert error_of(http.post("/training_clients", json=[])) == (422, "validation_error")
    assert error_of(http.post("/training_clients", json={"config": 3})) == (422, "validation_error")
    assert error_of(http.get(f"{path}/stream", params={"after": "x"})) == (422, "validation_error")
    assert error_of(http.get("/audit_logs", params={"limit": -1})) == (422, "validation_error")
    assert error_of(http.get("/futures/fut-none/result")) == (404, "not_found")


def test_a_failure_of_the_server_itself_tells_nothing_of_its_insides(
    serving: Serving, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"in {serving.home}")

    monkeypatch.setattr("tensafe_nb.transports.embedded.EmbeddedTransport.list_artifacts", broken)
    answer = http.get("/artifacts")
    assert error_of(answer) == (500, "server_error")
    assert str(serving.home) not in answer.text and "RuntimeError" not in answer.text
    assert answer.headers["x-tensafe-request"] == answer.json()["error"]["request_id"]  # no proxy has said it


def test_the_description_names_every_route_with_its_errors(serving: Serving, http: httpx.Client) -> None:
    described = http.get(f"{serving.url}/openapi.json").json()
    assert httpx.get(f"{serving.url}/openapi.json").status_code == 401
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            assert route["summary"] and route["description"], (path, method)
            if path.startswith(("/api", "/v1")):
                wrong, form = (
                    ("422", "/ErrorAnswer") if path.startswith("/api") else ("400", "/OpenAIErrorAnswer")
                )
                assert {"401", "404", wrong, "429", "500"} <= set(route["responses"]), path
                error = route["responses"]["401"]["content"]["application/json"]["schema"]
                assert error["$ref"].endswith(form)
            if method in ("post", "put") and not path.endswith(
                ("/keys/rotate", "/cancel", "/refresh", "/artifacts")
            ):
                assert "requestBody" in route, path
    one = "/api/v1/training_clients/{training_client_id}"
    assert {f"{one}/{verb}" for verb in VERBS} < set(described["paths"])
