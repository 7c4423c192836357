"""What a server takes of who may enter: bodies of a bounded size, strictly read, models that are offered, no code."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from tensafe_nb.protocol import wire
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.operations import Forward, ForwardBackward, OptimStep
from tensafe_nb.server.door import guard
from tests.parity.serving import serving_thread
from tests.unit.server.conftest import BATCH, error_of, new_client, outcome, submit

Enter = Callable[..., httpx.Client]


def test_a_body_that_is_too_large_is_refused_before_and_while_it_comes(
    http: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MOST_BODY_BYTES", 10_000)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 1_000
            yield b" " * 1_000

    assert error_of(http.post(f"{path}/operations", content=b" " * 10_001)) == (413, "too_large")
    assert error_of(http.post(f"{path}/operations", content=endless())) == (413, "too_large")
    assert error_of(http.post(f"{path}/forward", content=endless())) == (413, "too_large")
    assert http.get("/artifacts").status_code == 200


def bomb(**header: Any) -> bytes:
    """Return a small safetensors body that claims much."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff" * 66,
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
        bomb(a={"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}),
        bomb(__metadata__={"record": "{}"}, a={"dtype": "F32", "shape": [1 << 27], "data_offsets": [0, 4]}),
        bomb(__metadata__={"record": '{"$": "optim_step", "apply_dp_noise": "yes"}'}),
        bomb(__metadata__={"record": '{"$": "tokenizer"}'}),
        bomb(__metadata__={"record": "[" * 100_000}),
        bomb(__metadata__={"record": '{"$": "forward", "batch": {"$tensor": "0"}}'}),
    ],
    ids=range(10),
)
def test_what_is_no_record_is_refused_whatever_it_claims(http: httpx.Client, path: str, body: bytes) -> None:
    for media_type in (wire.TENSORS, wire.JSON):
        answer = http.post(f"{path}/operations", content=body, headers={"content-type": media_type})
        assert error_of(answer) == (422, "validation_error")
    assert (
        error_of(http.post(f"{path}/operations", content=body, headers={"content-type": "text/x"}))[0] == 422
    )


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_arrays_have_the_types_that_records_have(http: httpx.Client, path: str, dtype: str) -> None:
    record = json.dumps({"$": "forward", "batch": {"$tensor": "0"}})
    size = 2 if dtype == "BF16" else 1
    body = bomb(
        __metadata__={"record": record}, **{"0": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}
    )
    answer = http.post(
        f"{path}/operations", content=body + b"0" * size, headers={"content-type": wire.TENSORS}
    )
    assert error_of(answer) == (422, "validation_error")


def test_a_record_without_arrays_of_its_own_takes_none_of_others(http: httpx.Client, path: str) -> None:
    body = safetensors.numpy.save({"0": np.zeros(3, np.float32)}, metadata={"record": '{"$": "optim_step"}'})
    answer = http.post(f"{path}/operations", content=body, headers={"content-type": wire.TENSORS})
    assert answer.status_code == 202  # what nobody asked for is left out


def test_depth_is_bounded(http: httpx.Client, path: str) -> None:
    deep: Any = 1
    for _ in range(100):
        deep = {"a": deep}
    answer = http.post(f"{path}/save_state", json={"metadata": deep})
    assert error_of(answer) == (422, "validation_error") and "64 deep" in answer.text


def test_sizes_are_bounded(http: httpx.Client, path: str) -> None:
    rows = np.zeros((129, 512), int)
    assert error_of(http.post(f"{path}/forward", json={"batch": {"input_ids": rows.tolist()}})) == (
        422,
        "validation_error",
    )
    sampling = {"$": "sampling_config", "max_new_tokens": 2048, "num_samples": 1025}
    drawn = http.post(f"{path}/sample", json={"prompts": ["x"], "sampling": sampling})
    assert error_of(drawn) == (422, "validation_error") and "Sample in parts" in drawn.text
    refused = http.post("/training_clients", json={"config": {"lora_config": {"rank": 257}}})
    assert error_of(refused) == (422, "validation_error") and "at most 256" in refused.text


def test_a_tenant_has_so_many_clients_so_many_bytes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensafe_nb.server.door.limits import Limits

    with serving_thread(tmp_path / "server", limits=Limits(clients=2)) as serving:
        headers = {"authorization": f"Bearer {serving.tokens.mint('small')}"}
        with httpx.Client(base_url=f"{serving.url}/api/v1", headers=headers) as http:
            path = new_client(http)
            new_client(http)
            assert error_of(http.post("/training_clients", json={})) == (429, "too_many")
            http.delete(path)
            path = new_client(http)
            first = http.post(f"{path}/save_state", json={}).json()["future_id"]
            assert outcome(http, first).status_code == 200
            serving.tokens.limit("small", stored_bytes=1)
            assert error_of(http.post(f"{path}/save_state", json={})) == (507, "storage_error")
            assert error_of(http.put("/artifacts", content=b"x" * 10)) == (507, "storage_error")


def test_requests_a_minute_are_bounded_for_each_tenant_by_itself() -> None:
    from tensafe_nb.server.door.limits import Limits, Quotas

    quotas = Quotas(Limits(requests=2), lambda: {"c": {"requests": 0}})
    assert [quotas.seconds_to_wait("a") for _ in range(2)] == [0, 0]
    assert 1 <= quotas.seconds_to_wait("a") <= 60
    assert quotas.seconds_to_wait("b") == 0 and quotas.seconds_to_wait("c") == 60


@pytest.mark.parametrize(
    "ref",
    [
        "/etc/passwd",
        "../model",
        "model/../../model",
        ".",
        "link",
        "absent",
        "gpt2",
        "hub/other",
        "model\x00",
        "~",
    ],
)
def test_a_model_is_one_that_is_offered_and_the_answer_tells_nothing_else(
    http: httpx.Client, ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    monkeypatch.chdir(tmp_path / "root")
    answer = http.post("/training_clients", json={"config": {"model_ref": ref}})
    assert error_of(answer) == (422, "validation_error")
    message = answer.json()["error"]["message"]
    assert re.search(
        r"is not offered by this server\. (Known: .*builtin:sums.*\.|Did you mean '.*'\?) Whoever runs it",
        message,
    )
    assert "link" not in message.split("this server.")[1], "a link that leads out is not offered"
    assert str(tmp_path) not in message


def test_a_model_beneath_the_root_and_one_of_the_list_are_offered(
    http: httpx.Client, random_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "family").mkdir()
    shutil.copytree(random_model("llama"), tmp_path / "family" / "llama")  # all tests share the folder
    monkeypatch.chdir(tmp_path)
    path = new_client(http, model_ref="family/llama")
    assert http.get(f"{path}/ready").json()["status"] == "READY"
    listed = new_client(http, model_ref="some-org/some-model")
    assert error_of(http.get(f"{listed}/ready")) == (422, "model_load_error")


def test_code_by_a_dotted_path_is_forbidden_everywhere(http: httpx.Client, path: str) -> None:
    config = {"config": {"loss": {"type": "os:system"}}}
    assert error_of(http.post("/training_clients", json=config)) == (403, "forbidden")
    for verb in ("forward", "forward_backward"):
        body = {"batch": BATCH, "loss_fn": "os:system"}
        assert error_of(http.post(f"{path}/{verb}", json=body)) == (403, "forbidden")
    named = http.post(f"{path}/forward", json={"batch": BATCH, "loss_fn": "os.system"})
    assert error_of(named) == (422, "validation_error")


def test_operations_run_in_the_order_of_their_numbers_and_a_repeat_gets_the_first_answer(
    http: httpx.Client, path: str
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    batch = BatchData.of(BATCH)
    operations = [ForwardBackward(batch), OptimStep()] * 5
    order = [3, 0, 9, 1, 2, 8, 7, 4, 6, 5]
    with ThreadPoolExecutor(10) as threads:
        sent = list(threads.map(lambda at: submit(http, path, operations[at], at + 1), order))
    assert {answer.status_code for answer in sent} == {202}
    steps = [outcome(http, f"fut-me-{number}").json()["step"] for number in range(2, 11, 2)]
    assert steps == [1, 2, 3, 4, 5]
    assert submit(http, path, operations[3], 4).json() == sent[0].json()
    assert http.get(path).json()["info"]["step"] == 5
    assert submit(http, path, OptimStep(), 1, "another").status_code == 202  # a kernel counts for itself


def test_a_number_that_never_comes_breaks_its_window_and_the_others_go_on(
    http: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensafe_nb.server.clients.LONGEST_GAP", 0.2)
    assert submit(http, path, ForwardBackward(BatchData.of(BATCH)), 2).status_code == 202
    assert submit(http, path, OptimStep(), 3).status_code == 202
    assert error_of(outcome(http, "fut-me-3")) == (409, "future_failed")
    assert submit(http, path, ForwardBackward(BatchData.of(BATCH)), 4).status_code == 202
    assert submit(http, path, OptimStep(), 5).status_code == 202
    assert outcome(http, "fut-me-5").json()["step"] == 1


def test_what_is_refused_at_the_door_has_had_its_turn_and_breaks_its_window(
    http: httpx.Client, path: str
) -> None:
    batch = BatchData.of(BATCH)
    assert submit(http, path, ForwardBackward(batch), 1).status_code == 202
    refused = submit(http, path, ForwardBackward(batch, loss_fn="os:system"), 2)
    assert error_of(refused) == (403, "forbidden") and refused.headers["x-in-turn"] == "1"
    assert submit(http, path, OptimStep(), 3).status_code == 202
    assert error_of(outcome(http, "fut-me-2")) == (403, "forbidden")
    broken = outcome(http, "fut-me-3")
    assert error_of(broken) == (409, "future_failed") and "fut-me-2" in broken.json()["error"]["message"]
    submit(http, path, ForwardBackward(batch), 4), submit(http, path, OptimStep(), 5)
    assert outcome(http, "fut-me-5").json()["step"] == 1


FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def test_plain_json_is_enough_for_every_verb(http: httpx.Client, path: str) -> None:
    bodies = {
        "forward_backward": {"batch": BATCH},
        "forward": {"batch": BATCH, "return_logprobs": True},
        "optim_step": {},
        "sample": {"prompts": ["def f"], "sampling": {"$": "sampling_config", "max_new_tokens": 2}},
        "compute_logprobs": {"batch": BATCH},
        "freeze_reference": {},
        "save_state": {"name": "mine"},
        "load_state": {"artifact_id": "mine"},
        "read_adapter": {},
        "load_adapter": {"tensors": {FACTOR: {"$array": [[0.5] * 2] * 160, "dtype": "<f4"}}},
    }
    for verb, body in bodies.items():
        queued = http.post(f"{path}/{verb}", json=body)
        assert queued.status_code == 202 and queued.json()["operation"] == verb, queued.text
        assert outcome(http, queued.json()["future_id"]).status_code == 200, verb
    refused = http.post(f"{path}/void_privacy", json={"reason": "why not"})
    assert error_of(outcome(http, refused.json()["future_id"])) == (422, "validation_error")


def test_arrays_of_texts_and_of_numbers_arrive_as_they_were_sent() -> None:
    batch = BatchData([[1, 2]], unit_ids=["Ada"], extras={"advantages": np.ones((1, 2), np.float32)})
    media_type, body = wire.pack(Forward(batch))
    assert media_type == wire.TENSORS and wire.unpack(media_type, body).batch == batch
