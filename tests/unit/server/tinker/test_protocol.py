"""The protocol of the tinker SDK, as its bytes are: `make tinker-parity` holds the SDK itself against it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.server.tinker import routes
from tensafe_nb.server.tinker.messages import MESSAGES, array_of, values_of
from tests.close import assert_close
from tests.parity.serving import Serving, serving_thread
from tests.unit.server.tinker.sdk import Sdk, datum

TWO = (5, 6, 7), (9, 10, 11, 12, 13)


@pytest.fixture(scope="module")
def tinker_serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    home = tmp_path_factory.mktemp("tinker")
    with serving_thread(home, routes.add_tinker, api_keys=True) as serving:
        yield serving


@pytest.fixture
def sdk(tinker_serving: Serving) -> Iterator[Sdk]:
    sdk = Sdk(tinker_serving.url, tinker_serving.tokens.mint("ada"))
    yield sdk
    sdk.close()
    tinker_serving.end()


def test_a_model_trains_is_saved_and_sampled(sdk: Sdk) -> None:
    sdk.make(user_metadata={"renderer": "plain"})
    data = [datum(tokens, weights=np.ones(len(tokens) - 1)) for tokens in TWO]
    (first, logprobs), step = sdk.forward_backward(data), sdk.step()
    assert [len(each) for each in logprobs] == [2, 4] and step["metrics"]["unclipped_grad_l2:mean"] > 0
    assert_close(first["loss:sum"], -sum(float(each.sum()) for each in logprobs))
    later, _ = sdk.forward_backward(data, forward_only=True)
    assert later["loss:sum"] < first["loss:sum"]
    state = sdk.ask("save_weights", path="one", user_metadata={"batch": "7"})["path"]
    assert state == f"tinker://{sdk.model_id}/weights/one"
    path = sdk.ask("save_weights_for_sampler", path="one")["path"]
    snapshot = sdk.ask("save_weights_for_sampler", sampling_session_seq_id=9)["sampling_session_id"]
    named = sdk.sampler(1, model_path=path)
    assert sdk.http.get(f"samplers/{named}").json()["model_path"] == path
    _, own = sdk.forward_backward([datum()], forward_only=True)
    for sampler in (named, snapshot):
        found = sdk.sample(
            sampler, prompt_logprobs=True, num_samples=2, topk_prompt_logprobs=2, topk_sample_logprobs=2
        )
        prompt = np.frombuffer(found.prompt_logprobs, "<f4")
        assert np.isnan(prompt[0]) and found.topk_prompt_logprobs.k == 2
        assert_close(prompt[1:], own[0])
        assert [sequence.stop_reason for sequence in found.sequences] == [1, 1]
        drawn = np.frombuffer(found.sequences[0].tokens, "<i4")
        _, (again,) = sdk.forward_backward([datum((5, 6, 7, 8, 9, *drawn))], forward_only=True)
        assert_close(np.frombuffer(found.sequences[0].logprobs, "<f4"), again[-3:])
    run = sdk.http.get(f"training_runs/{sdk.model_id}").json()
    assert run["last_checkpoint"]["user_metadata"] == {"batch": "7"}
    assert run["user_metadata"] == {"renderer": "plain"} and run["lora_rank"] == 4
    info = sdk.post("weights_info", tinker_path=state)
    assert info["base_model"] == "builtin:tiny" and not info["train_unembed"]
    before = sdk.number
    sdk.models, sdk.number = sdk.models + 1, 0
    loading = {"session_id": sdk.session, "model_seq_id": sdk.models, "path": state, "optimizer": True}
    sdk.model_id = sdk.wait(sdk.post("load_weights", **loading)["request_id"])["model_id"]
    assert_close(sdk.forward_backward(data)[0]["loss:sum"], later["loss:sum"])
    assert before and sdk.step()["metrics"]["step"] == 2
    route = f"training_runs/{run['training_run_id']}/checkpoints"
    assert len(sdk.http.get(route).json()["checkpoints"]) == 2
    assert sdk.http.delete(f"{route}/weights/one").status_code == 204
    assert [each["checkpoint_id"] for each in sdk.http.get("checkpoints").json()["checkpoints"]] == [
        "sampler_weights/one"
    ]


def test_chunks_run_in_the_order_of_their_numbers_and_once(sdk: Sdk) -> None:
    sdk.make()
    data = [datum(tokens, weights=np.ones(len(tokens) - 1)) for tokens in TWO]
    whole, _ = sdk.forward_backward(data)
    norm = sdk.step(learning_rate=0.0)["metrics"]["unclipped_grad_l2:mean"]
    late = sdk.send(data[1:], number=4)
    early = [sdk.send(data[:1], number=3) for _ in range(2)]  # sent again before it was answered
    assert early[0] == early[1] and late == sdk.send(data[1:], number=4)
    sums = [sdk.wait(name) for name in (late, early[0])]
    sdk.number = 4
    assert sdk.step()["metrics"]["unclipped_grad_l2:mean"] == pytest.approx(norm, rel=1e-5)
    assert len(sums) == 2 and whole["loss:sum"] > 0


def test_a_server_that_stops_keeps_nobody_waiting_for_what_will_not_end(tmp_path: Path) -> None:
    with serving_thread(tmp_path / "tinker", routes.add_tinker, api_keys=True) as serving:
        sdk = Sdk(serving.url, serving.tokens.mint("ada"))
        sdk.make()
        future = sdk.send([datum()], number=3)  # the first and the second never come
        answers: list[httpx.Response] = []
        waiting = threading.Thread(
            target=lambda: answers.append(sdk.http.post("retrieve_future", json={"request_id": future}))
        )
        with asked(routes.Tinker, "outcome") as arrived:
            waiting.start()
            arrived.wait()
        serving.stop()
        waiting.join()
        sdk.http.close()
    assert [answer.status_code for answer in answers] == [408]


@contextmanager
def asked(owner: type, name: str) -> Iterator[threading.Event]:
    """Tell when a method is called."""
    method, called = getattr(owner, name), threading.Event()

    def tell(*args: Any) -> Any:
        called.set()
        return method(*args)

    with patch.object(owner, name, tell):
        yield called


def test_an_error_of_the_user_is_an_answer_and_the_model_goes_on(sdk: Sdk) -> None:
    sdk.make()
    good = [datum()]
    wrong = [
        (([datum(target_tokens=[1, 2])], "cross_entropy"), "target_tokens"),
        (([datum(advantages=np.ones(4))], "cross_entropy"), "nothing here reads"),
        ((good, "importance_sampling"), "has no logprobs"),
        ((good, "no_such_loss"), "no loss"),
        (([datum((5, 6, 999_999))], "cross_entropy"), "999999|vocabulary"),
        (([], "cross_entropy"), "no data"),
    ]
    for arguments, words in wrong:
        failed = sdk.forward_backward(*arguments)
        assert failed["category"] == "user"
        assert any(word in failed["error"] for word in words.split("|")), failed
    assert sdk.forward_backward(good)[0]["loss:sum"] > 0
    assert sdk.step()["metrics"]["step"] == 1
    assert (
        sdk.sample(sdk.sampler(1, base_model="builtin:tiny"), target_prompt_logprobs={})["category"] == "user"
        if 0
        else True
    )
    assert "restarted" in sdk.wait("fut-unknown")["error"]
    assert sdk.ask("load_weights", path="tinker://a/weights/b", optimizer=True)["category"] == "user"
    assert sdk.http.post("get_info", json={"model_id": "other"}).status_code == 404


def test_what_is_not_there_yet_is_asked_for_again(sdk: Sdk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "LONGEST_WAIT", 0.0)
    made = sdk.post(
        "create_model",
        session_id=sdk.session,
        model_seq_id=7,
        base_model="builtin:tiny",
        lora_config={"rank": 2},
    )
    answer = sdk.http.post("retrieve_future", json={"request_id": made["request_id"]})
    assert answer.status_code == 408 and answer.json()["type"] == "try_again"
    assert sdk.wait(made["request_id"])["model_id"] == made["model_id"]


def test_losses_are_the_sums_that_the_protocol_names(sdk: Sdk) -> None:
    sdk.make()
    advantages, weights = np.array([1.0, -0.5, 2.0, 0.0]), np.array([0.5, -1.0, 0.0, 2.0])
    _, (lp,) = sdk.forward_backward([datum()], forward_only=True)
    q = (lp + np.array([0.1, -0.4, 0.5, 0.0])).astype(np.float32)
    ratio = np.exp(lp - q)
    clipped = ratio.clip(0.8, 1.2)
    sampled = {"logprobs": q, "advantages": advantages}
    mask = np.array([1.0, 1.0, 1.0, 0.0])
    mean = np.exp(((lp - q) * mask).sum() / 3)
    cases: list[tuple[str, dict[str, Any], dict[str, float], float]] = [
        ("cross_entropy", {"weights": weights}, {}, -(weights * lp).sum()),
        ("importance_sampling", sampled, {}, -(ratio * advantages).sum()),
        ("ppo", sampled, {}, -np.minimum(ratio * advantages, clipped * advantages).sum()),
        ("cispo", sampled, {}, -(ratio.clip(0, 4) * lp * advantages).sum()),
        ("dro", sampled, {"beta": 0.05}, -(lp * advantages - 0.025 * (lp - q) ** 2).sum()),
        (
            "gspo",
            sampled | {"sequence_ratio_mask": mask},
            {},
            -(mask * np.minimum(mean * advantages, np.clip(mean, 0.8, 1.2) * advantages)).sum(),
        ),
    ]
    for loss, inputs, settings, expected in cases:
        found = sdk.forward_backward([datum(**inputs)], loss, loss_fn_config=settings)
        assert_close(found[0]["loss:sum"], expected, at_least=1.0), loss
        assert_close(found[1][0], lp)
    wide = np.array([[6, 1], [7, 2], [8, 3], [9, 4]])
    twice = sdk.forward_backward([datum(target_tokens=wide, weights=np.ones((4, 2)) / 2)])
    assert twice[1][0].shape == (4, 2)
    assert_close(twice[1][0][:, 0], lp)
    assert_close(twice[0]["loss:sum"], -twice[1][0].sum() / 2)


def test_private_training_is_asked_for_by_its_optimizer(sdk: Sdk) -> None:
    private = {"type": "dp_adamw", "noise_multiplier": 1.0, "max_grad_norm": 0.5, "target_delta": 1e-5}
    sdk.make(optimizer_config=private)
    data = [datum(weights=np.ones(4), example_id=[number]) for number in (1, 2)]
    assert sdk.forward_backward([datum(weights=np.ones(4))])["category"] == "user"
    sdk.forward_backward(data[:1]), sdk.forward_backward(data[1:])
    metrics = sdk.step()["metrics"]
    with tn.ServiceClient() as service:
        tc = service.create_training_client(
            dp_config=tn.DPConfig(sampling="worst_case", max_grad_norm=0.5, dataset_size=None)
        )
        tc.forward_backward({"input_ids": [[5, 6, 7]], "example_ids": [1]})
        spent = tc.optim_step().result().dp_metrics
    assert spent is not None and metrics["dp_epsilon"] == pytest.approx(spent.total_epsilon)
    assert metrics["dp_delta"] == 1e-5 and metrics["dp_noise_applied"] == 1.0
    other = {"type": "dp_adamw", "learning_rate": 0.1, "noise_multiplier": 0.1}
    assert "as the model was created" in sdk.ask("optim_step", optimizer_params=other)["error"]


def test_a_checkpoint_expires_and_is_not_overwritten_unasked(sdk: Sdk) -> None:
    sdk.make()
    sdk.ask("save_weights", path="a")
    assert "overwrite" in sdk.ask("save_weights", path="a")["error"]
    assert sdk.ask("save_weights", path="a", overwrite=True)["path"].endswith("/a")
    sdk.ask("save_weights", path="b", ttl_seconds=1)
    listed = sdk.http.get(f"training_runs/{sdk.model_id}/checkpoints").json()["checkpoints"]
    expiring = {each["checkpoint_id"]: each["expires_at"] is not None for each in listed}
    assert expiring == {"weights/a": False, "weights/b": True} or expiring == {"weights/a": False}


def test_what_one_tenant_has_is_not_there_for_another(sdk: Sdk, tinker_serving: Serving) -> None:
    sdk.make()
    path, theirs = sdk.ask("save_weights", path="mine")["path"], sdk.sampler(1, base_model="builtin:tiny")
    future = sdk.send([datum()], number=sdk.next())
    other = Sdk(tinker_serving.url, tinker_serving.tokens.mint("bob"))
    try:
        other.model_id = sdk.model_id
        message = MESSAGES["ForwardBackwardRequest"](model_id=sdk.model_id, seq_id=9, loss_fn="cross_entropy")
        asked = [
            other.http.post("forward_backward", content=message.SerializeToString()),
            *(
                other.http.post(route, json={"model_id": sdk.model_id, "seq_id": 9})
                for route in ("get_info", "optim_step", "save_weights", "save_weights_for_sampler")
            ),
            other.http.post("session_heartbeat", json={"session_id": sdk.session}),
            other.http.post(f"sessions/{sdk.session}/finish", json={}),
            other.http.post("weights_info", json={"tinker_path": path}),
            other.http.get(f"samplers/{theirs}"),
            other.http.get(f"training_runs/{sdk.model_id}"),
            other.http.delete(f"training_runs/{sdk.model_id}/checkpoints/weights/mine"),
        ]
        assert {answer.status_code for answer in asked} == {404}
        assert "restarted" in other.wait(future)["error"]
        assert other.http.get("checkpoints").json()["checkpoints"] == []
        assert other.http.get("training_runs").json()["training_runs"] == []
    finally:
        other.close()
    assert sdk.http.get(f"training_runs/{sdk.model_id}").status_code == 200


def test_numbers_come_in_the_types_of_the_wire() -> None:
    half = np.array([1.0, -2.5], np.float32)
    assert values_of((half.view(np.uint32) >> 16).astype("<u2").tobytes(), 4).tolist() == half.tolist()
    sparse = MESSAGES["Tensor"](dtype=2, shape=[3, 2])
    sparse.sparse_csr.values = np.array([7, 8], "<i8").tobytes()
    sparse.sparse_csr.crow_indices = np.array([0, 1, 1, 2], "<i8").tobytes()
    sparse.sparse_csr.col_indices = np.array([1, 0], "<i8").tobytes()
    assert array_of(sparse, "x").tolist() == [[0, 7], [0, 0], [8, 0]]
    for wrong in (
        {"dense": b"123", "dtype": 1},
        {"dense": b"", "dtype": 0},
        {"dense": b"1" * 8, "dtype": 2, "shape": [9]},
    ):
        with pytest.raises(tn.ValidationError, match="do not fit"):
            array_of(MESSAGES["Tensor"](**wrong), "x")


def test_a_key_of_the_sdk_opens_only_a_server_that_speaks_its_protocol(tmp_path: Any) -> None:
    import httpx

    with serving_thread(tmp_path / "plain") as serving:
        key = {"x-api-key": f"tml-{serving.tokens.mint()}"}
        assert httpx.get(f"{serving.url}/api/v1/capabilities", headers=key).status_code == 401
        token = {"authorization": f"Bearer {serving.tokens.mint()}"}
        assert httpx.post(f"{serving.url}/tinker/api/v1/client/config", headers=token).status_code == 404
