"""Quotas of a tenant: what is too much is refused before it is anywhere, and a client waits and goes on."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import httpx
import pytest

import tensafe_nb as tn
from tensafe_nb.cli.main import main
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.operations import Forward
from tensafe_nb.server.door import limits
from tensafe_nb.server.door.limits import ASIDE, Limits
from tensafe_nb.server.door.tokens import Tokens
from tests.parity.serving import Gate, Serving, eventually, serving_thread
from tests.unit.server.conftest import BATCH, error_of, new_client, outcome, submit, submit_gate

Enter = Callable[..., httpx.Client]


def test_a_full_queue_of_a_tenant_refuses_without_taking_the_turn_and_its_client_goes_on(
    tmp_path: Path,
) -> None:
    gate = Gate()
    with serving_thread(tmp_path / "server", limits=Limits(queued=2)) as serving:
        token = serving.tokens.mint("ada")
        headers = {"authorization": f"Bearer {token}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30) as http:
            path, beside = new_client(http), new_client(http)
            submit_gate(http, path, gate)
            forward = Forward(BatchData.of(BATCH))
            assert [submit(http, path, forward, number).status_code for number in (1, 2)] == [202, 202]
            refused = submit(http, path, forward, 3)
            assert error_of(refused) == (429, "too_many_waiting") and refused.headers["retry-after"] == "1"
            assert error_of(http.post(f"{beside}/optim_step", json={})) == (429, "too_many_waiting")
            assert http.get("/futures/fut-me-3").status_code == 404
            with tn.ServiceClient(serving.url, token) as service:
                tc = service.get_training_client(path.rpartition("/")[2])
                handles = [tc.forward(BATCH) for _ in range(3)]  # nothing more may wait yet
                gate.opened.set()
                assert len({handle.result(60).loss for handle in handles}) == 1
            assert submit(http, path, forward, 3).status_code == 202  # its number was not used up
            assert outcome(http, "fut-me-3").status_code == 200
        figures = httpx.get(f"{serving.url}/metrics", headers=headers).text
        assert 'tensafe_nb_rejected_requests_total{code="too_many_waiting"}' in figures


def test_a_submission_that_others_are_held_for_is_let_in_though_the_queue_is_full(tmp_path: Path) -> None:
    gate = Gate()
    with (
        serving_thread(tmp_path / "server", limits=Limits(queued=1)) as serving,
        ThreadPoolExecutor(1) as threads,
    ):
        headers = {"authorization": f"Bearer {serving.tokens.mint('ada')}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=60) as http:
            path = new_client(http)
            submit_gate(http, path, gate)
            forward = Forward(BatchData.of(BATCH))
            second = threads.submit(submit, http, path, forward, 2)
            (client,) = serving.service.live_clients()
            eventually(lambda: client.held == 1)
            assert submit(http, path, forward, 1, "another").status_code == 202  # now it is full
            assert error_of(submit(http, path, forward, 2, "another")) == (429, "too_many_waiting")
            assert submit(http, path, forward, 1).status_code == second.result().status_code == 202
            gate.opened.set()


def test_a_client_that_asked_too_often_waits_as_long_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MINUTE", 1.0)
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: 0.0))
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(serving_thread(tmp_path / "server", limits=Limits(requests=8)))
        service = stack.enter_context(tn.ServiceClient(serving.url, serving.tokens.mint("ada")))
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        handles = [tc.forward(BATCH) for _ in range(8)]
        eventually(lambda: serving.service.quotas.rejected.get("too_many_requests", 0) > 0)
        assert not handles[-1].done()
        monkeypatch.setattr(limits, "MINUTE", -1.0)  # the minute is over
        assert len({handle.result(60).loss for handle in handles}) == 1


def test_clients_that_are_asked_for_at_once_are_counted_at_once(tmp_path: Path) -> None:
    with (
        serving_thread(tmp_path / "server", limits=Limits(clients=2)) as serving,
        ThreadPoolExecutor(8) as threads,
    ):
        headers = {"authorization": f"Bearer {serving.tokens.mint('ada')}"}
        address = f"{serving.url}/api/v1/training_clients"
        ask = [threads.submit(httpx.post, address, json={}, headers=headers, timeout=60) for _ in range(8)]
        answers = [asked.result() for asked in ask]
        assert sorted(answer.status_code for answer in answers) == [201] * 2 + [429] * 6
        assert {error_of(a) for a in answers if a.status_code == 429} == {(429, "too_many")}


def test_limits_of_a_tenant_stand_in_the_file_of_tokens_and_count_at_once(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    tokens = Tokens(file)
    tokens.mint("ada")
    assert tokens.limit("ada", clients=1, stored_bytes=5) == {"clients": 1, "stored_bytes": 5}
    assert Tokens(file).limits() == {"ada": {"clients": 1, "stored_bytes": 5}}
    assert tokens.limit("ada", clients=None) == {"stored_bytes": 5}
    tokens.revoke(tokens.all()[0].token_id)
    assert Tokens(file).limits() == {"ada": {"stored_bytes": 5}}  # they are the tenant's, not the token's
    with pytest.raises(tn.ValidationError, match=r"no limit 'client'.*clients"):
        tokens.limit("ada", client=1)
    with pytest.raises(tn.ValidationError, match="whole number"):
        tokens.limit("ada", clients=-1)
    file.write_text('{"tokens": [], "limits": {"ada": {"clients": "many"}}}')
    with pytest.raises(tn.errors.StorageError, match="is no file of tokens"):
        Tokens(file)


def test_who_holds_all_the_threads_it_may_holds_up_nobody_else(
    serving: Serving, enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = [Event() for _ in range(ASIDE)], Event()
    begun = iter(reached)

    def long(*_: object) -> None:
        next(begun).set()
        assert go.wait(60)
        raise tn.ValidationError("enough")

    monkeypatch.setattr("tensafe_nb.core.worker.audit", long)
    greedy, other = enter(), enter()
    path = new_client(greedy)
    with ThreadPoolExecutor(ASIDE + 80) as threads:
        asked = [
            threads.submit(
                httpx.post,
                f"{serving.url}/api/v1{path}/privacy_audit",
                json={"canaries": 100, "steps": 1},
                headers=greedy.headers,
                timeout=60,
            )
            for _ in range(ASIDE + 70)  # more than the server has threads
        ]
        try:
            assert all(event.wait(60) for event in reached)
            assert other.get("/artifacts").json() == []
            monkeypatch.setattr(
                "tensafe_nb.core.worker.audit", lambda *_: (_ for _ in ()).throw(tn.ValidationError("enough"))
            )
        finally:
            go.set()
        assert {error_of(answer.result()) for answer in asked} == {(422, "validation_error")}


def test_everything_that_a_tenant_stores_counts_and_what_is_full_says_what_takes_how_much_and_what_frees_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Tokens(tmp_path / "tokens.json")
    with serving_thread(tmp_path / "server") as serving:
        headers = {"authorization": f"Bearer {serving.tokens.mint('ada')}"}
        tenant = serving.service.tenant("ada")
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30) as http:
            path = new_client(http)
            saved = outcome(http, http.post(f"{path}/save_state", json={}).json()["future_id"]).json()
            tenant.stored.measure()
            counted = dict(tenant.stored.bytes)
            assert counted["artifacts"] >= saved["size_bytes"] and all(counted.values())
            figures = httpx.get(f"{serving.url}/metrics", headers=headers).text
            for kind, count in counted.items():
                assert f'tensafe_nb_stored_bytes{{kind="{kind}"}} {count}\n' in figures
            most = sum(counted.values())
            serving.tokens.limit("ada", stored_bytes=most)
            told = [{"$": "metrics", "step": 1, "values": {"loss": 1.0}, "run_id": "tc/1"}]
            full = [
                http.post(f"{path}/save_state", json={}),
                http.put("/artifacts", content=b"x"),
                http.post("/training_clients", json={}),
            ]
            for answer in full:
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (507, "storage_error")
                assert all(f"{kind} {count:,}" in error["message"] for kind, count in counted.items())
                assert "service.delete_artifact(…)" in error["message"] and "tc.close()" in error["message"]
            trained = http.post(f"{path}/forward_backward", json={"batch": BATCH}).json()["future_id"]
            assert outcome(http, trained).status_code == 200  # training goes on
            assert http.post(f"{path}/events", json=told).status_code == 200  # and how it goes is told
            serving.tokens.limit("ada", stored_bytes=most // 2)
            assert error_of(http.post(f"{path}/events", json=told)) == (507, "storage_error")
            serving.tokens.limit("ada", stored_bytes=most)
            assert http.delete(f"/artifacts/{saved['artifact_id']}").status_code == 204
            again = outcome(http, http.post(f"{path}/save_state", json={}).json()["future_id"])
            assert again.status_code == 200 and tenant.stored.bytes["artifacts"] >= again.json()["size_bytes"]
    own.mint("ada"), own.mint("ben")
    assert (
        main(
            ["tokens", "list", "--tokens", str(tmp_path / "tokens.json"), "--home", str(tmp_path / "server")]
        )
        == 0
    )
    ada, ben = capsys.readouterr().out.splitlines()
    assert ben.endswith("  0 bytes") and int(ada.split()[-2].replace(",", "")) > 1_000
