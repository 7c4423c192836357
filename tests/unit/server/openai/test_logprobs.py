"""Log-probabilities in the two forms of OpenAI's routes: those of `sample`, with the tokens written out."""

from typing import Any

import httpx
import pytest

import tensafe_nb as tn
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.server.openai.tokens import TokenTexts
from tests.unit.server.openai.test_routes import CHAT, streamed


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    from transformers import AutoTokenizer

    return TokenTexts(AutoTokenizer.from_pretrained(ASSETS / "tiny"))


def test_the_logprobs_of_a_chat_are_those_of_sample(
    v1: httpx.Client, tc: tn.TrainingClient, texts: TokenTexts
) -> None:
    asked = {"model": tc.training_client_id, "messages": CHAT, "max_tokens": 8, "seed": 3, "temperature": 0.5}
    asked |= {"logprobs": True, "top_logprobs": 3}
    answer = v1.post("/chat/completions", json=asked).json()["choices"][0]
    (drawn,) = tc.sample(CHAT, max_new_tokens=8, seed=3, temperature=0.5, top_logprobs=3).sequences
    content = answer["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == list(drawn.raw_logprobs)
    assert [entry["token"] for entry in content] == [texts.text_of(token) for token in drawn.tokens]
    tops = [[(one["token"], one["logprob"]) for one in entry["top_logprobs"]] for entry in content]
    assert tops == [[(texts.text_of(token), value) for token, value in top] for top in drawn.top_logprobs]
    said = b"".join(bytes(entry["bytes"]) for entry in content)
    assert said.decode().removesuffix("<|end|>") == answer["message"]["content"]
    chunks = streamed(v1, "/chat/completions", **asked)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == content


def test_a_text_is_echoed_with_the_logprobs_of_its_own_tokens(
    v1: httpx.Client, tc: tn.TrainingClient
) -> None:
    ids = tc.tokenizer("def add(a, b):\n    return")["input_ids"]
    asked: dict[str, Any] = {
        "model": tc.training_client_id,
        "prompt": [ids, ids[:4]],
        "temperature": 0,
        "max_tokens": 2,
    }
    answers = v1.post("/completions", json={**asked, "echo": True, "logprobs": 2}).json()["choices"]
    expected = tc.sample([ids, ids[:4]], max_new_tokens=2, temperature=0, prompt_logprobs=True).result()
    for answer, own, drawn in zip(answers, expected.prompt_logprobs, expected.sequences, strict=True):
        found = answer["logprobs"]
        assert found["token_logprobs"] == [*own, *drawn.raw_logprobs] and own[0] is None
        assert "".join(found["tokens"]) == answer["text"]
        assert [
            answer["text"][at:].startswith(token)
            for at, token in zip(found["text_offset"], found["tokens"], strict=True)
        ]
        assert found["top_logprobs"][0] is None
        for one, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
            assert one <= max(top.values()) and len(top) == 2
        greedy = zip(found["token_logprobs"], found["top_logprobs"], strict=True)
        assert all(one == max(top.values()) for one, top in list(greedy)[-2:]), (
            "those that were drawn greedily"
        )
    plain = v1.post("/completions", json={**asked, "logprobs": 0}).json()["choices"][0]
    assert plain["logprobs"]["top_logprobs"] is None
    assert plain["logprobs"]["text_offset"][0] == len(tc.tokenizer.decode(ids))


def test_a_token_that_is_no_text_is_written_as_its_bytes(texts: TokenTexts) -> None:
    tokenizer = texts._tokenizer
    ids = tokenizer.encode(" 世界 e\u0301")
    assert b"".join(map(texts.bytes_of, ids)).decode() == " 世界 e\u0301"
    parts = [texts.text_of(token) for token in ids]
    assert any(part.startswith("bytes:\\x") for part in parts) and parts[-1] != ""
    assert texts.bytes_of(tokenizer.eos_token_id) == b"<|end|>"


class Pieces:
    """A tokenizer that writes blanks as sentencepiece does, and bytes by their number."""

    words = ("▁the", "<0xE4>", "s")

    def decode(self, ids: list[int], **_: Any) -> str:
        word = self.words[ids[0]]
        return "\N{REPLACEMENT CHARACTER}" if word.startswith("<0x") else word.lstrip("▁")

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.words[token]


def test_blanks_and_bytes_of_sentencepiece_are_kept() -> None:
    assert [TokenTexts(Pieces()).bytes_of(token) for token in range(3)] == [b" the", b"\xe4", b"s"]
