"""Who may enter a server, and what each sees of it."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import tensafe_nb as tn
from tensafe_nb.server.door.tokens import Tokens
from tests.parity.serving import Serving
from tests.unit.server.conftest import error_of, new_client

Enter = Callable[..., httpx.Client]


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic {token}", "{token}", "Bearer {token}x"]
)
def test_no_token_and_a_wrong_one_are_refused(serving: Serving, header: str | None) -> None:
    token = serving.tokens.mint("someone")
    headers = {} if header is None else {"authorization": header.format(token=token).strip() or "x"}
    answer = httpx.get(f"{serving.url}/api/v1/training_clients", headers=headers)
    assert error_of(answer) == (401, "unauthorized") and answer.headers["www-authenticate"] == "Bearer"
    assert token not in answer.text


def test_a_revoked_token_opens_nothing_more(serving: Serving, enter: Enter) -> None:
    http = enter("revoked")
    assert http.get("/artifacts").status_code == 200
    serving.tokens.revoke(serving.tokens.all()[-1].token_id)
    assert error_of(http.get("/artifacts")) == (401, "unauthorized")


def test_what_another_tenant_has_is_not_there(enter: Enter) -> None:
    mine, other = enter(), enter()
    path = new_client(mine)
    queued = mine.post(f"{path}/save_state", json={}).json()["future_id"]
    saved = mine.get(f"/futures/{queued}/result", params={"wait": 20}).json()["artifact_id"]
    assert mine.get("/audit_logs").json() != [] == other.get("/audit_logs").json()
    for address in (path, f"{path}/stream", f"{path}/ready", f"{path}/privacy_statement"):
        assert error_of(other.get(address)) == (404, "training_client_not_found")
    for verb in ("forward", "operations", "events", "cancel", "draws"):
        body = {"future_ids": []} if verb == "cancel" else {"unit": "example"} if verb == "draws" else {}
        answer = other.post(f"{path}/{verb}", json=[] if verb == "events" else body)
        assert error_of(answer) == (404, "training_client_not_found"), verb
    assert error_of(other.delete(path)) == (404, "training_client_not_found")
    assert error_of(other.get(f"/futures/{queued}")) == (404, "not_found")
    assert error_of(other.get(f"/artifacts/{saved}")) == (404, "artifact_not_found")
    assert error_of(other.get(f"/artifacts/{saved}/content")) == (404, "artifact_not_found")
    assert other.get("/training_clients").json() == other.get("/artifacts").json() == []
    stolen = {"config": {}, "source": {"$": "state_source", "artifact_id": saved}}
    made = other.post("/training_clients", json=stolen).json()
    ready = other.get(f"/training_clients/{made['info']['training_client_id']}/ready")
    assert error_of(ready) == (404, "artifact_not_found")


def test_probes_need_no_token_and_tell_no_secret(serving: Serving) -> None:
    for probe in ("health", "live", "ready", "version"):
        answer = httpx.get(f"{serving.url}/{probe}")
        assert answer.status_code == 200
        assert not [word for word in (str(serving.home), "tenant", "tc-") if word in answer.text]


def test_figures_are_for_who_has_a_token_and_name_no_tenant(serving: Serving, enter: Enter) -> None:
    assert error_of(httpx.get(f"{serving.url}/metrics")) == (401, "unauthorized")
    http = enter("figures")
    path = new_client(http)
    text = http.get(f"{serving.url}/metrics").text
    assert "tensafe_nb_training_clients 1\n" in text and "# TYPE tensafe_nb_queue_depth gauge" in text
    assert "figures" not in text and "tc-" not in text
    (written,) = [
        line.split()[1] for line in text.splitlines() if line.startswith("tensafe_nb_journal_bytes")
    ]
    (journal,) = serving.home.rglob(f"{path.rpartition('/')[2]}/journal")
    assert int(written) == sum(file.stat().st_size for file in journal.iterdir() if file.is_file())


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example"])
def test_a_server_is_called_by_its_names_only(enter: Enter, host: str) -> None:
    assert error_of(enter().get("/artifacts", headers={"host": host})) == (421, "wrong_host")


def test_pages_of_other_sites_may_not_call(serving: Serving, enter: Enter) -> None:
    http = enter()
    for origin in ("http://evil.example", "null", "https://127.0.0.1"):
        assert error_of(http.get("/artifacts", headers={"origin": origin})) == (403, "foreign_origin")
    assert http.get("/artifacts", headers={"origin": serving.url}).status_code == 200


def test_tokens_are_kept_as_digests_and_a_change_of_the_file_counts_at_once(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "tokens.json"
    tokens, elsewhere = Tokens(file), Tokens(file)
    secret = tokens.mint("ada")
    assert elsewhere.tenant_of(secret) == "ada" and elsewhere.tenant_of(secret[:-1]) is None
    assert secret not in file.read_text() and (file.stat().st_mode & 0o777) == 0o600
    tokens.revoke(tokens.all()[0].token_id)
    assert elsewhere.tenant_of(secret) is None
    with pytest.raises(tn.ValidationError, match=r"no token 'none'"):
        tokens.revoke("none")
    for wrong in ("", "../up", "a/b", ".hidden", "x" * 65):
        with pytest.raises(tn.ValidationError, match="folders are named after it"):
            tokens.mint(wrong)


@pytest.mark.parametrize("content", ["", "[]", '{"tokens": [{"a": 1}]}', json.dumps({"tokens": 3})])
def test_a_file_that_holds_no_tokens_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens").write_text(content)
    with pytest.raises(tn.errors.StorageError, match="is no file of tokens"):
        Tokens(tmp_path / "tokens")


def test_a_client_with_a_wrong_key_says_so(serving: Serving) -> None:
    for key in (None, "wrong"):
        with pytest.raises(tn.errors.AuthenticationError, match="A valid token is needed"):
            tn.ServiceClient(serving.url, key)
