"""Checkpoints and models without a training client under their names; tools where a chat template shows them."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.engine.sampling import sampler
from tests.parity.serving import Serving
from tests.unit.server.openai.test_routes import CHAT, refused, streamed

HERMES = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}


def test_a_checkpoint_is_a_model_under_its_name_and_its_id(
    v1: httpx.Client, tc: tn.TrainingClient, service: tn.ServiceClient, serving: Serving
) -> None:
    saved = tc.save_state(name="first/best").result()
    then = tc.sample(CHAT, max_new_tokens=6, seed=5).texts
    batch = {"input_ids": [[5, 6, 7, 8, 9, 10]]}
    for _ in range(3):
        tc.forward_backward(batch), tc.optim_step(learning_rate=0.5)
    now = tc.sample(CHAT, max_new_tokens=6, seed=5).texts
    assert now != then
    listed = [entry["id"] for entry in v1.get("/models").json()["data"]]
    assert listed == [tc.training_client_id, "first/best"]
    assert v1.get("/models/first/best").json()["root"] == tc.config.model_ref
    for name, expected in (("first/best", then), (saved.artifact_id, then), (tc.training_client_id, now)):
        asked = {"model": name, "messages": CHAT, "max_tokens": 6, "seed": 5}
        answer = v1.post("/chat/completions", json=asked).json()
        assert [answer["choices"][0]["message"]["content"]] == expected
        assert answer["system_fingerprint"].partition("@")[0] == (
            saved.artifact_id if expected == then else name
        )
        told = [
            chunk["choices"][0]["delta"]["content"] for chunk in streamed(v1, "/chat/completions", **asked)
        ]
        assert ["".join(told)] == expected
    base = v1.post(
        "/completions", json={"model": "builtin:tiny", "prompt": "x", "max_tokens": 2, "seed": 1}
    ).json()
    assert [base["choices"][0]["text"]] == service.sample(
        "x", model_ref="builtin:tiny", max_new_tokens=2, seed=1
    ).texts
    stranger = {"authorization": f"Bearer {serving.tokens.mint('stranger')}"}
    answers = [
        v1.get(f"/models/{name}", headers=stranger)
        for name in ("first/best", saved.artifact_id, "/etc", "none")
    ]
    assert {refused(answer) for answer in answers} == {(404, "model_not_found", "model")}


@pytest.fixture
def with_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: tn.ServiceClient
) -> tn.TrainingClient:
    """A model whose chat template shows tools, in the folder whose models are offered."""
    import transformers

    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "tiny")
    tokenizer.chat_template = HERMES
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained("hermes")
    tokenizer.save_pretrained("hermes")
    return service.create_training_client(model_ref="hermes", lora_config=tn.LoRAConfig(rank=2))


def says(tc: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let every model say a text, token by token, whatever it is asked."""
    tokens = [*tc.tokenizer(text, add_special_tokens=False)["input_ids"], tc.tokenizer.eos_token_id]
    at = [0]

    def draw(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        token = torch.full((len(logits),), tokens[at[0] % len(tokens)])
        at[0] += 1
        return token, *[torch.zeros(len(logits))] * 3  # their logprobs, and the entropy

    monkeypatch.setattr(sampler, "draw", draw)


def test_calls_of_tools_come_as_calls_and_results_go_back(
    v1: httpx.Client, with_tools: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    says(with_tools, monkeypatch, f"Let me add. {call}")
    asked = {"model": with_tools.training_client_id, "messages": CHAT, "tools": [TOOL], "max_tokens": 80}
    answer = v1.post("/chat/completions", json=asked).json()["choices"][0]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", "Let me add.")
    (called,) = answer["message"]["tool_calls"]
    assert called["function"]["name"] == "add" and json.loads(called["function"]["arguments"]) == {"a": 1}
    last = streamed(v1, "/chat/completions", **asked)[-1]["choices"][0]
    assert last["finish_reason"] == "tool_calls" and last["delta"]["content"] == "Let me add."
    assert last["delta"]["tool_calls"][0]["function"] == called["function"]
    result = {"role": "tool", "tool_call_id": called["id"], "content": "2"}
    says(with_tools, monkeypatch, "It is 2.")
    again = {**asked, "messages": [*CHAT, answer["message"], result]}
    final = v1.post("/chat/completions", json=again).json()["choices"][0]
    assert (final["message"]["content"], final["finish_reason"]) == ("It is 2.", "stop")
    says(with_tools, monkeypatch, call.replace("}}", "}"))
    broken = v1.post("/chat/completions", json=asked).json()["choices"][0]
    assert broken["message"]["content"].startswith("<tool_call>") and broken["finish_reason"] == "stop"
    says(with_tools, monkeypatch, call)
    unread = v1.post("/chat/completions", json={**asked, "tool_choice": "none"}).json()["choices"][0]
    assert unread["message"]["content"] == call and "tool_calls" not in unread["message"]
    wrong = [
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{"}}],
        }
    ]
    refusal = v1.post("/chat/completions", json={**asked, "messages": [*CHAT, *wrong]})
    assert refused(refusal)[:2] == (400, "validation_error") and "no JSON" in refusal.text
