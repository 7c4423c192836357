"""Every test here runs on both transports: the core in this process, and one behind a server.

The server is a real one, on a thread of the test process: so a test registers a loss by name and both cores have it,
and `core_of` finds the core of a client wherever it is.
"""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tests.parity.serving import Gate, Serving, serving_thread


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving_thread(tmp_path_factory.mktemp("server")) as serving:
        yield serving


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses a service on both transports, unless it is marked.

    `transports("embedded")` is for what looks into the core in this process or brings code of its own;
    `transports("embedded", soak="http")` keeps what is long and much like others out of the fast suite.
    """
    if "service" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("transports")
        chosen = list(marker.args) if marker else ["embedded", "http"]
        late = marker.kwargs.get("soak") if marker else None
        soak = [pytest.param(late, marks=pytest.mark.soak)] if late else []
        metafunc.parametrize("transport", chosen + soak)


@pytest.fixture
def transport() -> str:
    return "embedded"


@pytest.fixture
def tenant() -> str:
    return f"t{uuid.uuid4().hex[:8]}"


@pytest.fixture
def service(
    transport: str, tenant: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tn.ServiceClient]:
    if transport == "embedded":
        with tn.ServiceClient() as service:
            yield service
        return
    serving: Serving = request.getfixturevalue("serving")
    monkeypatch.setenv("TENSAFE_BASE_URL", serving.url)
    monkeypatch.setenv("TENSAFE_API_KEY", serving.tokens.mint(tenant))
    with tn.ServiceClient() as service:
        yield service
    serving.end()


@pytest.fixture
def core_home(transport: str, tenant: str, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Where the core keeps its things."""
    from tensafe_nb.store.home import Home

    if transport == "embedded":
        return Home(tmp_path / "home")
    return Home(request.getfixturevalue("serving").home, tenant)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()
