"""What comes back from a server: events and outcomes in one order, results by reference, artifacts in pieces."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.operations import ForwardBackward, OptimStep, SaveState
from tests.parity.serving import Gate, Serving, serving_thread
from tests.unit.server.conftest import BATCH, error_of, new_client, outcome, submit, submit_gate


def read(http: httpx.Client, path: str, after: int = 0, **headers: str) -> Iterator[dict[str, Any]]:
    """Yield the items of a stream, with their ids."""
    with http.stream("GET", f"{path}/stream", headers={"last-event-id": str(after), **headers}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        number = 0
        for line in answer.iter_lines():
            if line.startswith("id:"):
                number = int(line[3:])
            elif line.startswith("data:"):
                item = json.loads(line[5:])
                assert item["event"]["seq"] == number
                yield item


def until_the_end(items: Iterator[dict[str, Any]], future_id: str) -> list[dict[str, Any]]:
    """Return the items up to the outcome of an operation."""
    found = []
    for item in items:
        found.append(item)
        if item.get("outcome", {}).get("future_id") == future_id:
            return found
    raise AssertionError("the stream ended before")


def test_a_stream_goes_on_after_the_last_event_that_was_seen(http: httpx.Client, path: str) -> None:
    batch = BatchData.of(BATCH)
    submit(http, path, ForwardBackward(batch), 1), submit(http, path, OptimStep(), 2)
    whole = until_the_end(read(http, path), "fut-me-2")
    numbers = [item["event"]["seq"] for item in whole]
    assert numbers == list(range(1, len(numbers) + 1))
    kinds = [item["event"]["$"] for item in whole]
    assert kinds.index("metrics") < kinds.index("operation_finished", kinds.index("metrics"))
    assert whole[-1]["outcome"]["result"]["step"] == 1 == whole[-1]["info"]["step"]
    rest = until_the_end(read(http, path, after=numbers[-4]), "fut-me-2")
    assert [item["event"] for item in rest] == [item["event"] for item in whole[-3:]]
    polled = http.get(f"{path}/poll", params={"after": numbers[-4]}).json()
    assert [item["event"] for item in polled] == [item["event"] for item in rest]
    assert http.get(f"{path}/poll", params={"after": numbers[-1], "wait": 0.05}).json() == []


def test_a_large_result_is_fetched_by_the_id_of_its_future(http: httpx.Client, path: str) -> None:
    batch = {"input_ids": [[5] * 400] * 4}
    queued = http.post(f"{path}/forward", json={"batch": batch, "return_logprobs": True}).json()["future_id"]
    told = until_the_end(read(http, path), queued)[-1]["outcome"]
    assert told["fetch"] > 4 * 400 * 4 and "result" not in told
    result = outcome(http, queued)
    assert len(result.content) == told["fetch"] and "safetensors" in result.headers["content-type"]


def test_a_result_that_is_not_there_yet_is_202(http: httpx.Client, path: str) -> None:
    gate = Gate()
    try:
        queued = http.post(f"{path}/forward", json={"batch": BATCH, "loss_fn": gate.name}).json()["future_id"]
        assert gate.reached.wait(20)
        waiting = http.get(f"/futures/{queued}/result", params={"wait": 0.05})
        assert (waiting.status_code, waiting.json()["status"]) == (202, "RUNNING")
        assert http.get(f"/futures/{queued}").json()["status"] == "RUNNING"
        behind = http.post(f"{path}/optim_step", json={}).json()
        assert behind["queue_position"] == 0
        assert http.post(f"/futures/{behind['future_id']}/cancel").json() == {"cancelled": True}
        assert error_of(outcome(http, behind["future_id"])) == (409, "future_cancelled")
    finally:
        gate.opened.set()
    assert outcome(http, queued).status_code == 200
    assert http.post(f"/futures/{queued}/cancel").json() == {"cancelled": False}


def test_only_what_runs_tell_is_taken_and_a_repeat_is_told_once(http: httpx.Client, path: str) -> None:
    metrics = {"$": "metrics", "seq": 0, "time": 0.0, "step": 1, "values": {"mine": 1.0}, "run_id": "r"}
    headers = {"x-submitter": "me", "x-number": "1"}
    first = http.post(f"{path}/events", json=[metrics], headers=headers).json()["seq"]
    assert http.post(f"{path}/events", json=[metrics], headers=headers).json()["seq"] == first
    core = {"$": "status_changed", "seq": 0, "time": 0.0, "status": "READY", "reason": None}
    assert error_of(http.post(f"{path}/events", json=[core])) == (422, "validation_error")
    told = http.get(f"{path}/poll", params={"after": 0}).json()
    assert [item["event"]["seq"] for item in told if item["event"].get("run_id") == "r"] == [first]


def test_an_artifact_comes_in_ranges_and_goes_to_another_tenant_only_as_a_file(
    http: httpx.Client, path: str, enter: Any
) -> None:
    saved = outcome(http, http.post(f"{path}/save_state", json={"name": "mine"}).json()["future_id"]).json()
    address = f"/artifacts/{saved['artifact_id']}/content"
    whole = http.get(address)
    assert len(whole.content) == saved["size_bytes"]
    part = http.get(address, headers={"range": "bytes=1000-"})
    assert part.status_code == 206 and part.content == whole.content[1000:]
    other = enter()
    taken = other.put("/artifacts", content=whole.content)
    assert taken.status_code in (201, 422)  # sealed for its tenant
    assert error_of(other.put("/artifacts", content=whole.content[:-1]))[0] == 422
    assert http.delete(f"/artifacts/{saved['artifact_id']}").status_code == 204
    assert error_of(http.get(address)) == (404, "artifact_not_found")
    assert http.put("/artifacts", content=whole.content).json()["artifact_id"] == saved["artifact_id"]


def test_a_file_larger_than_a_body_may_be_is_taken(
    http: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = outcome(http, http.post(f"{path}/save_state", json={}).json()["future_id"]).json()
    content = http.get(f"/artifacts/{saved['artifact_id']}/content").content
    http.delete(f"/artifacts/{saved['artifact_id']}")
    monkeypatch.setattr("tensafe_nb.server.door.guard.MOST_BODY_BYTES", 10_000)
    assert http.put("/artifacts", content=content).status_code == 201
    assert error_of(http.post(f"{path}/operations", content=content)) == (413, "too_large")


def test_a_server_that_is_to_stop_ends_what_runs_refuses_what_is_new_and_goes_on_when_it_is_back(
    tmp_path: Path,
) -> None:
    gate = Gate()
    with serving_thread(tmp_path / "server") as serving:
        headers = {"authorization": f"Bearer {serving.tokens.mint('a')}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30) as http:
            path = new_client(http)
            told: list[dict[str, Any]] = []
            reader = threading.Thread(target=lambda: told.extend(read(http, path)))
            reader.start()
            submit_gate(http, path, gate)
            submit(http, path, SaveState(name="last"), 1), submit(http, path, OptimStep(), 2)
            stopping = threading.Thread(target=serving.stop)
            stopping.start()
            while httpx.get(f"{serving.url}/ready").status_code == 200:
                pass
            assert error_of(http.post(f"{path}/optim_step", json={})) == (503, "draining")
            assert error_of(http.post("/training_clients", json={})) == (503, "draining")
            gate.opened.set()
            reader.join(30)
            stopping.join(30)
    assert not reader.is_alive() and not stopping.is_alive()
    ends = {item["outcome"]["future_id"]: item["outcome"] for item in told if "outcome" in item}
    assert ends["fut-gate-1"]["state"] == "COMPLETED"
    assert ends["fut-me-1"]["result"]["name"] == "last" and "fut-me-2" not in ends
    with serving_thread(tmp_path / "server") as serving:
        headers = {"authorization": f"Bearer {serving.tokens.mint('a')}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers, timeout=30) as http:
            assert outcome(http, "fut-me-2").json()["step"] == 1  # of the gradient from before
            assert outcome(http, "fut-me-1").json()["name"] == "last"
            again = submit(http, path, OptimStep(), 2)
            assert (again.status_code, again.json()["future_id"]) == (202, "fut-me-2")
            rest = until_the_end(read(http, path, after=told[-1]["event"]["seq"]), "fut-me-2")
            assert next(item["event"]["seq"] for item in rest) == told[-1]["event"]["seq"] + 1
            http.delete(path)
    (log,) = (tmp_path / "server").rglob("events.jsonl")
    assert json.loads(log.read_text().splitlines()[-1])["status"] == "TERMINATED"
    assert not list((tmp_path / "server").rglob("journal"))


def test_figures_count_what_happened_and_never_fall(serving: Serving, http: httpx.Client, path: str) -> None:
    def read_figures() -> dict[str, float]:
        text = http.get(f"{serving.url}/metrics").text
        lines = (line.split() for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    before = read_figures()
    outcome(http, http.post(f"{path}/forward", json={"batch": BATCH}).json()["future_id"])
    outcome(http, http.post(f"{path}/optim_step", json={}).json()["future_id"])
    after = read_figures()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["tensafe_nb_journal_bytes"] > 0
    assert grown['tensafe_nb_operations_total{outcome="finished"}'] == 1
    assert grown['tensafe_nb_operations_total{outcome="failed"}'] == 1
    assert grown['tensafe_nb_operation_seconds_count{verb="forward"}'] == 1
    assert grown['tensafe_nb_operation_seconds_sum{verb="forward"}'] > 0
    buckets = [
        value
        for name, value in after.items()
        if name.startswith('tensafe_nb_operation_seconds_bucket{verb="forward"')
    ]
    assert (
        buckets == sorted(buckets)
        and buckets[-1] == after['tensafe_nb_operation_seconds_count{verb="forward"}']
    )
    assert after["tensafe_nb_held_submissions"] == 0
    assert after["tensafe_nb_base_models"] >= 1 and after["tensafe_nb_base_references"] >= 1
    http.delete(path)
    closed = read_figures()
    assert all(
        closed[name] >= value for name, value in after.items() if "_total" in name or "_seconds" in name
    )
