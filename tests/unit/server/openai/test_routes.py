"""What OpenAI's clients ask of a server, as plain requests; with their own client in tests/soak."""

import json
from typing import Any

import httpx
import pytest

import tensafe_nb as tn
from tensafe_nb.server.door.limits import Limits
from tests.parity.serving import Gate, Serving, core_of, eventually
from tests.unit.server.conftest import BATCH

CHAT = [{"role": "user", "content": "Hi"}]


def refused(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Return status, code and field of an error, which has the form that OpenAI's clients read."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and answer.headers["x-request-id"].startswith("req-")
    return answer.status_code, body["error"]["code"], body["error"]["param"]


def streamed(v1: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the chunks of a streamed answer, which end as they should."""
    with v1.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_chat_is_answered_with_what_sample_draws(v1: httpx.Client, tc: tn.TrainingClient) -> None:
    asked = {"model": tc.training_client_id, "messages": CHAT, "max_tokens": 8, "n": 2, "seed": 3}
    answer = v1.post("/chat/completions", json=asked).json()
    expected = tc.sample(CHAT, max_new_tokens=8, num_samples=2, seed=3).result()
    assert [choice["message"]["content"] for choice in answer["choices"]] == expected.texts
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    drawn = sum(len(sequence.tokens) for sequence in expected.sequences)
    read = len(expected.sequences[0].prompt_tokens)
    assert answer["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": drawn,
        "total_tokens": read + drawn,
    }
    assert answer["system_fingerprint"] == f"{tc.training_client_id}@{tc.policy_version}"
    assert (answer["object"], answer["model"]) == ("chat.completion", tc.training_client_id)


def test_a_chat_streams_the_same_and_ends_with_what_was_used(v1: httpx.Client, tc: tn.TrainingClient) -> None:
    asked = {"model": tc.training_client_id, "messages": CHAT, "max_tokens": 12, "n": 2, "seed": 3}
    whole = v1.post("/chat/completions", json=asked).json()
    chunks = streamed(v1, "/chat/completions", **asked, stream_options={"include_usage": True})
    assert chunks.pop()["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    for choice in whole["choices"]:
        told = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert told[0]["delta"]["role"] == "assistant" and len(told) > 3
        assert "".join(one["delta"].get("content", "") for one in told) == choice["message"]["content"]
        assert [one["finish_reason"] for one in told[:-1]] == [None] * (len(told) - 1)
        assert told[-1]["finish_reason"] == choice["finish_reason"]


def test_texts_and_tokens_are_completed(v1: httpx.Client, tc: tn.TrainingClient) -> None:
    for prompt in ("def add(", ["def add(", "import "], [5, 6, 7], [[5, 6, 7], [8, 9]]):
        asked = {
            "model": tc.training_client_id,
            "prompt": prompt,
            "seed": 3,
            "temperature": 0.7,
            "top_p": 0.9,
        }
        answer = v1.post("/completions", json=asked).json()
        expected = tc.sample(prompt, max_new_tokens=16, seed=3, temperature=0.7, top_p=0.9)  # type: ignore[arg-type]
        assert [choice["text"] for choice in answer["choices"]] == expected.texts
    texts = ["", ""]
    for chunk in streamed(v1, "/completions", **asked):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected.texts


def test_stop_strings_end_an_answer_and_echo_repeats_the_prompt(
    v1: httpx.Client, tc: tn.TrainingClient
) -> None:
    asked = {"model": tc.training_client_id, "prompt": "import ", "temperature": 0, "max_tokens": 24}
    plain = v1.post("/completions", json=asked).json()["choices"][0]["text"]
    stop = plain[len(plain) // 2]
    cut = v1.post("/completions", json={**asked, "stop": stop}).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (plain[: plain.index(stop)], "stop")
    echoed = v1.post("/completions", json={**asked, "echo": True}).json()["choices"][0]
    assert echoed["text"] == f"import {plain}"
    nothing = v1.post("/completions", json={**asked, "echo": True, "max_tokens": 0}).json()
    assert nothing["choices"][0]["text"] == "import " and nothing["usage"]["completion_tokens"] == 0
    chunks = streamed(v1, "/completions", **asked, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == f"import {plain}"


def test_without_a_seed_answers_differ_and_the_clients_own_draws_stay_as_they_were(
    v1: httpx.Client, service: tn.ServiceClient
) -> None:
    drawn = []
    for asks in (False, True):
        with service.create_training_client(lora_config=tn.LoRAConfig(rank=2)) as tc:
            if asks:
                asked = {"model": tc.training_client_id, "messages": CHAT, "max_tokens": 8}
                told = {
                    v1.post("/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
                    for _ in "ab"
                }
                assert len(told) == 2
            drawn.append(tc.sample("def ", max_new_tokens=8).texts)
    assert drawn[0] == drawn[1]


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"foo": 1}, "foo"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"temperature": -1}, "temperature"),
    ({"n": 0}, "n"),
    ({"n": "2"}, "n"),
    ({"top_logprobs": 3}, None),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, None),
    ({"stream_options": {"include_usage": True}}, None),
    ({"max_tokens": 4, "max_completion_tokens": 5}, None),
]


def test_what_is_not_done_here_is_refused_by_its_name(v1: httpx.Client, tc: tn.TrainingClient) -> None:
    for wrong, field in WRONG:
        asked = {"model": tc.training_client_id, "messages": CHAT, **wrong}
        assert refused(v1.post("/chat/completions", json=asked)) == (400, "validation_error", field), wrong


def test_what_asks_for_nothing_is_taken_and_labels_are_named(v1: httpx.Client, tc: tn.TrainingClient) -> None:
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "store": False,
        "service_tier": "auto",
    }
    neutral |= {"response_format": {"type": "text"}, "tool_choice": "none", "parallel_tool_calls": True}
    asked = {"model": tc.training_client_id, "messages": CHAT, "max_tokens": 1, "user": "ada", **neutral}
    answer = v1.post("/chat/completions", json=asked)
    assert answer.status_code == 200 and answer.headers["x-not-used"] == "user"


def test_a_prompt_that_leaves_no_room_is_told_before_anything_waits(
    v1: httpx.Client, tc: tn.TrainingClient
) -> None:
    asked = {"model": tc.training_client_id, "prompt": [5] * 500, "max_tokens": 20}
    answer = v1.post("/completions", json=asked)
    assert refused(answer) == (400, "context_length_exceeded", "max_tokens")
    assert "maximum context length is 512" in answer.json()["error"]["message"]
    outside = v1.post("/completions", json={"model": tc.training_client_id, "prompt": [999_999]})
    assert refused(outside)[:2] == (400, "validation_error")


def test_models_are_listed_for_whom_they_belong_to(
    serving: Serving, v1: httpx.Client, tc: tn.TrainingClient
) -> None:
    tc.ready().result()
    found = {entry["id"]: entry for entry in v1.get("/models").json()["data"]}
    own = found[tc.training_client_id]
    assert (own["root"], own["max_model_len"]) == (tc.config.model_ref, tc.context)
    assert v1.get(f"/models/{tc.training_client_id}").json() == own
    assert refused(v1.get("/models/nothing/here")) == (404, "model_not_found", "model")
    stranger = {"authorization": f"Bearer {serving.tokens.mint('stranger')}"}
    assert v1.get("/models", headers=stranger).json()["data"] == []
    for path, body in (("/completions", {"prompt": "x"}), ("/chat/completions", {"messages": CHAT})):
        answers = [
            v1.post(path, headers=stranger, json={"model": name, **body})
            for name in (tc.training_client_id, "tc-none")
        ]
        assert {refused(answer) for answer in answers} == {(404, "model_not_found", "model")}
        assert answers[0].text.replace(tc.training_client_id, "tc-none") == answers[1].text


def test_the_door_is_that_of_the_server_and_refuses_in_openais_form(v1: httpx.Client) -> None:
    assert refused(v1.get("/models", headers={"authorization": "Bearer sk-none"}))[:2] == (
        401,
        "unauthorized",
    )
    assert refused(v1.get("/nothing"))[:2] == (404, "not_found")
    assert refused(v1.get("/completions"))[:2] == (405, "method_not_allowed")
    assert refused(v1.get("/models", headers={"host": "evil.example"}))[:2] == (421, "wrong_host")
    assert refused(v1.post("/completions", content=b"{"))[:2] == (400, "validation_error")
    assert refused(v1.post("/completions", content=b"[" * 100_000))[0] == 400
    large = json.dumps({"model": "x", "prompt": "x" * (9 << 20)})
    assert refused(v1.post("/completions", content=large, headers={"content-type": "application/json"}))[
        :2
    ] == (
        413,
        "too_large",
    )


def test_too_much_that_waits_is_429_with_the_time_to_ask_again(
    v1: httpx.Client, tc: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    running, waiting = tc.forward(BATCH, loss_fn=gate.name), tc.forward(BATCH)
    assert gate.reached.wait(20)
    eventually(lambda: core_of(tc).waiting == 1)
    monkeypatch.setattr("tensafe_nb.server.door.limits.Quotas.of", lambda *_: Limits(queued=1))
    answer = v1.post("/completions", json={"model": tc.training_client_id, "prompt": "x"})
    assert refused(answer)[:2] == (429, "too_many_waiting") and int(answer.headers["retry-after"]) > 0
    gate.opened.set()
    assert running.result() and waiting.result()


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_ends_the_sampling(v1: httpx.Client, tc: tn.TrainingClient, stream: bool) -> None:
    gate = Gate()
    held = tc.forward(BATCH, loss_fn=gate.name)
    assert gate.reached.wait(20)
    asked = {"model": tc.training_client_id, "prompt": "x", "stream": stream, "max_tokens": 400}
    core = core_of(tc)
    if stream:
        with v1.stream("POST", "/completions", json=asked) as answer:
            assert answer.status_code == 200
            eventually(lambda: core.waiting == 1)
    else:
        with pytest.raises(httpx.ReadTimeout):
            v1.post("/completions", json=asked, timeout=0.2)
        eventually(lambda: core.waiting == 1)
    eventually(lambda: core.info().queue_depth == 1)
    gate.opened.set()
    held.result()


def test_a_failure_in_the_middle_of_a_stream_is_told_in_it(
    v1: httpx.Client, tc: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr("tensafe_nb.engine.sampling.sampler.draw", broken)
    asked = {"model": tc.training_client_id, "prompt": "x", "stream": True}
    with v1.stream("POST", "/completions", json=asked) as answer:
        (line,) = [line for line in answer.iter_lines() if line.startswith("data: ")]
    error = json.loads(line.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("future_failed", "server_error") and "no more" in error[
        "message"
    ]
