"""Users of a JupyterHub, as the server takes them; the hub is a mock here, and a real one in tests/soak/test_hub.py."""

import asyncio
import importlib.util
from typing import Any

import httpx
import pytest
from tornado.web import HTTPError

import tensafe_nb as tn
from tensafe_nb.cli.main import main
from tensafe_nb.server.door import hub
from tensafe_nb.server.door.hub import HubUsers, tenant_of_user
from tensafe_nb.server.door.tokens import Tokens
from tests.parity.serving import serving_thread
from tests.unit.server.conftest import error_of

SCOPE = "access:services!service=tensafe"


class MockHub:
    """Answers as JupyterHub's HubAuth does."""

    access_scopes = frozenset({SCOPE})

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails: HTTPError | None = None
        ada = {"kind": "user", "name": "Ada", "scopes": [SCOPE]}
        self.users: dict[str, Any] = {
            "token-of-ada": ada,
            "token-without-scope": {**ada, "scopes": ["read:users!user"]},
            "token-of-service": {**ada, "kind": "service"},
        }

    def user_for_token(self, token: str, *, use_cache: bool, sync: bool) -> Any:
        assert sync and not use_cache
        self.asked.append(token)
        if self.fails is not None:
            raise self.fails
        return self.users.get(token)

    def check_scopes(self, required: frozenset[str], user: Any) -> set[str]:
        return set(required) & set(user["scopes"])


def test_a_users_token_opens_the_users_tenant_and_no_other_token_opens_one() -> None:
    mock, tokens = MockHub(), Tokens()
    users = HubUsers(tokens, mock)

    async def ask() -> None:
        assert await users.whose("token-of-ada") == "hub-_41da"
        for other in (
            "token-without-scope",
            "token-of-service",
            "token-of-nobody",
            "a",
            "x" * 1_000,
            "so\nso so",
            "",
        ):
            assert await users.whose(other) is None
        minted = tokens.mint("operator")
        assert await users.whose(minted) == "operator" and await users.whose(minted + "x") is None

    asyncio.run(ask())
    assert not [asked for asked in mock.asked if not asked.startswith("token-")]


def test_an_answer_of_the_hub_counts_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    mock = MockHub()
    users = HubUsers(Tokens(), mock)

    async def ask() -> list[str | None]:
        return [await users.whose("token-of-ada") for _ in range(3)]

    asyncio.run(ask())
    assert len(mock.asked) == 1 and hub.KEPT_SECONDS <= 60
    users._known = type(users._known)({key: (0.0, tenant) for key, (_, tenant) in users._known.items()})
    mock.users.clear()
    assert asyncio.run(ask()) == [None] * 3 and len(mock.asked) == 2
    monkeypatch.setattr(hub, "KEPT_ANSWERS", 10)
    for number in range(20):
        asyncio.run(users.whose(f"token-number-{number}"))
    assert len(users._known) <= 11


def test_a_hub_that_does_not_answer_is_503_and_nobody_is_told_that_a_token_is_wrong(tmp_path: Any) -> None:
    mock = MockHub()
    with serving_thread(
        tmp_path / "server", identity=HubUsers(Tokens(), mock), root_path="/services/x"
    ) as serving:
        headers = {"authorization": "token token-of-ada"}
        for prefix in ("", "/services/x"):  # a proxy may leave its path in, or take it away
            assert httpx.get(f"{serving.url}{prefix}/api/v1/artifacts", headers=headers).json() == []
            assert httpx.get(f"{serving.url}{prefix}/health").status_code == 200
        mock.fails = HTTPError(502)
        refused = httpx.get(
            f"{serving.url}/api/v1/artifacts", headers={"authorization": "Bearer token-of-another"}
        )
        assert error_of(refused) == (503, "hub_unavailable") and refused.headers["retry-after"] == "2"
        mock.fails = HTTPError(403)
        refused = httpx.get(
            f"{serving.url}/api/v1/artifacts", headers={"authorization": "Bearer token-of-another"}
        )
        assert error_of(refused) == (401, "unauthorized")


def test_no_two_users_have_one_tenant() -> None:
    names = ["ada", "Ada", "a.da", "a_da", "ä", "a" * 300, "a" * 301, "hub-ada", "../up", "a/b", "", " "]
    tenants = [tenant_of_user(name) for name in names]
    assert len({tenant.lower() for tenant in tenants}) == len(names)
    for tenant in tenants:
        Tokens().limit(tenant)  # its name can be that of a folder


@pytest.mark.skipif(importlib.util.find_spec("jupyterhub") is not None, reason="there is a JupyterHub")
def test_without_jupyterhub_the_message_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--hub"]) != 0
    assert "pip install 'tensafe_nb[hub]'" in capsys.readouterr().err


def test_a_client_never_takes_the_token_that_jupyter_put_into_its_environment(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "token-of-ada")
    mock = MockHub()
    with (
        serving_thread(tmp_path / "server", identity=HubUsers(Tokens(), mock)) as serving,
        pytest.raises(tn.errors.AuthenticationError),
    ):
        tn.ServiceClient(serving.url)
    assert mock.asked == []
