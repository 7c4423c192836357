"""All chat templates that TRL ships, from the environment of `make trl-parity`: what is learnt, by characters."""

import re
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken

from tensafe_nb.data.labels import encode_many
from tensafe_nb.errors import ValidationError
from tests.unit.data.test_labels import chat, tokenizer_with

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]
TEMPLATES = sorted(ROOT.glob(".venv-trl/lib/*/site-packages/trl/chat_templates/*.jinja"))
SPECIAL = re.compile(
    r"<\|[^<>|\n{}'\"]{1,60}\|>|<｜[^｜\n<>{}']{1,60}｜>|<[a-z_]{3,30}>|<[a-z]+\|>|<\|[a-z]+>|</[a-z_]{3,30}>"
)
ANSWERS = ("Koblenz, where it joins the Rhine.", "Some sixty kilometres.", "No: a boat needs half a day.")
QUESTIONS = ("At the mouth of the Aare?", "How far to Basel?", "Is a boat quicker?")
BESIDE = re.compile(
    r"[\s:]|to=user|final|self|response|message|content|assistant|text|None"
)  # channels and the like
CHATS = {
    "one turn": chat(QUESTIONS[0], ANSWERS[0]),
    "a system prompt": chat(QUESTIONS[0], ANSWERS[0], system="Answer in one sentence."),
    "three turns": chat(*(text for pair in zip(QUESTIONS, ANSWERS, strict=True) for text in pair)),
    "blank lines first": chat(QUESTIONS[0], f"\n\n{ANSWERS[0]}\nYes."),
    "many bytes": chat("¿Qué hora es? 🕰️", "Ça dépend… 東京は九時です 👩‍🚀 ½ €5"),
}


@pytest.mark.filterwarnings("ignore:The model's chat template leaves out what the system says")  # some do
@pytest.mark.parametrize("name", CHATS)
def test_every_template_of_trl_teaches_the_answers_and_nothing_else(name: str) -> None:
    if not TEMPLATES:
        pytest.skip("no .venv-trl here: `make trl-parity` makes it")
    right = sum(_is_right(path, CHATS[name]) for path in TEMPLATES)
    assert right >= 0.85 * len(TEMPLATES), f"{len(TEMPLATES) - right} of {len(TEMPLATES)} refuse such a chat"


def _is_right(path: Path, messages: list[dict[str, Any]]) -> bool:
    template = path.read_text(encoding="utf-8")
    tokenizer = tokenizer_with(template, end="</s>")
    special = sorted({*SPECIAL.findall(template)})
    tokenizer.add_tokens(
        [AddedToken(one, special=True, normalized=False) for one in special], special_tokens=True
    )
    (made,) = encode_many([{"messages": messages}], tokenizer)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError):
        text = ""
    last = messages[-1]["content"].strip()
    if last not in text:
        assert isinstance(made, ValidationError), (
            f"{path.name}: learns of a chat that the template does not write"
        )
        return False
    assert not isinstance(made, ValidationError), f"{path.name}: {made}"
    tokens, learnt = made
    whole = tokenizer.decode(tokens)
    assert text.startswith(whole.removesuffix("</s>")) or text == whole, path.name
    taught = [
        tokenizer.decode([token for token, _ in run]) for run in _runs(list(zip(tokens, learnt, strict=True)))
    ]
    assert last in taught[-1], f"{path.name}: {taught}"
    for run in taught:
        left = run
        for message in messages:
            if message["role"] == "assistant":
                left = left.replace(message["content"].strip(), "")
        for one in sorted({*special, "</s>", *tokenizer.get_added_vocab()}, key=len, reverse=True):
            left = left.replace(one, "")
        assert not BESIDE.sub("", left), f"{path.name} teaches {left!r}"
        assert run.strip() != left.strip(), f"{path.name} teaches no answer: {run!r}"
    return True


def _runs(pairs: list[tuple[int, bool]]) -> list[list[tuple[int, bool]]]:
    runs: list[list[tuple[int, bool]]] = []
    before = False
    for pair in pairs:
        if pair[1]:
            runs.append([]) if not before else None
            runs[-1].append(pair)
        before = pair[1]
    return runs
