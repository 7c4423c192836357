"""Which characters of a chat are learnt, shown as the template's own text with ⟦ ⟧ around them.

The expected texts are written by hand, one for each way in which templates differ; none is computed by the code tested.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tensafe_nb.data import labels
from tensafe_nb.data.labels import encode_many, encode_prompt, turn_ends
from tensafe_nb.errors import ValidationError

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<|return|>", "<think>",
    "</think>", "<tool_call>", "</tool_call>",
)  # fmt: skip
CORPUS = [
    "the river runs north of the old town and the bridge is closed on Sundays",
    "user\nassistant\nsystem\n\n\n\n### Answer: yes no Question",
    '{"name": "level", "arguments": {"place": "Basel"}}\n\n\n\n',
] * 40

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)
TRIMS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% endif %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DROPS_THOUGHTS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.index0 > ns.last %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' }}\n</think>"
    "\n\n{% endif %}{{ answer }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
THINKS = DROPS_THOUGHTS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS_ALOUD = DROPS_THOUGHTS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
UNTHOUGHT = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
PLAIN = (
    "{% for m in messages %}### {{ 'Answer' if m.role == 'assistant' else 'Question' }}: {{ m.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### Answer: {% endif %}"
)
RETURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' and "
    "not add_generation_prompt else '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDS_ONCE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MERGES_SYSTEM = (
    "{{ bos_token }}{% set system = messages[0].content + '\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[Q] {{ system if loop.first else '' }}"
    "{{ m.content }} [/Q]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JSON = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | tojson(ensure_ascii=True) }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REPEATS = "Last said: {{ messages[-1].content }}\n" + CHATML
LATE_END = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}\n<|im_end|>")
TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<result>{{ m.content }}</result><|im_end|>\n{% else %}<|im_start|>"
    "{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n"
    "</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS_SYSTEM = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
FORGETS = "{% for m in messages if m.role != 'assistant' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


def tokenizer_with(template: str | None, *, end: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    made.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL], special_tokens=True
    )
    made.bos_token, made.eos_token, made.chat_template = "<s>", end, template
    return made


def chat(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *said] if system is not None else said


def encoded(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    (made,) = encode_many([row], tokenizer)
    if isinstance(made, ValidationError):
        raise made
    return made


def shown(tokenizer: Any, tokens: Sequence[int], learnt: Sequence[bool]) -> str:
    """Return the text of some tokens with ⟦ ⟧ around what is learnt of it."""
    runs: list[tuple[bool, list[int]]] = []
    for token, one in zip(tokens, learnt, strict=True):
        if not runs or runs[-1][0] != one:
            runs.append((one, []))
        runs[-1][1].append(token)
    return "".join(f"⟦{tokenizer.decode(run)}⟧" if one else tokenizer.decode(run) for one, run in runs)


HI, HO = chat("Hi", "the river"), chat("Hi", "the river", "And?", "the bridge")
LEARNT = {
    "the turn and its end token": (
        CHATML, HO,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦the river<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦the bridge<|im_end|>⟧\n",
    ),
    "blank lines at the start of an answer": (
        CHATML, chat("Hi", "\n\nyes\n"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦\n\nyes\n<|im_end|>⟧\n",
    ),
    "an answer of many bytes a character": (
        CHATML, chat("é?", "東京 👩‍🚀 – ½"),
        "<|im_start|>user\né?<|im_end|>\n<|im_start|>assistant\n⟦東京 👩‍🚀 – ½<|im_end|>⟧\n",
    ),
    "an answer that is the question, and a name of the template's": (
        CHATML, chat("user", "user", "assistant", "a"),
        "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n⟦user<|im_end|>⟧\n"
        "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n",
    ),
    "an answer that says nothing": (
        CHATML, chat("Hi", ""), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n",
    ),
    "a chat that the assistant opens": (
        CHATML, chat("", "the river", "And?", "yes")[1:],
        "<|im_start|>assistant\n⟦the river<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n",
    ),
    "two answers in a row": (
        CHATML, [*HI, {"role": "assistant", "content": "the bridge"}],
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦the river<|im_end|>⟧\n"
        "<|im_start|>assistant\n⟦the bridge<|im_end|>⟧\n",
    ),
    "a chat that the user ends": (
        CHATML, HO[:3],
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦the river<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n",
    ),
    "a system prompt of the template's own": (
        DEFAULT_SYSTEM, HI,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦the river<|im_end|>⟧\n",
    ),
    "trimmed contents, and an end that is not the tokenizer's": (
        TRIMS, chat(" Hi ", "\n\nyes\n", "And?", " no"),
        "<s><|user|>\nHi<|end|>\n<|assistant|>\n⟦yes<|end|>⟧\n<|user|>\nAnd?<|end|>\n<|assistant|>\n⟦no<|end|>⟧\n",
    ),
    "an empty thought before the last answer": (
        THINKS, HO,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦the river<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nthe bridge<|im_end|>⟧\n",
    ),
    "thoughts that only the last turn keeps": (
        THINKS, chat("Hi", "<think>\nold\n</think>\n\nyes", "And?", "<think>\nnorth\n</think>\n\nno"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nnorth\n</think>\n\nno<|im_end|>⟧\n",
    ),
    "a thought that the prompt has begun": (
        THINKS_ALOUD, HI,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n⟦\n</think>\n\nthe river<|im_end|>⟧\n",
    ),
    "a prompt with a thought that answers have not": (
        UNTHOUGHT, HI, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦the river<|im_end|>⟧\n",
    ),
    "a template that ends in a space, and ends no turn": (
        PLAIN, HO,
        "### Question: Hi\n\n### Answer: ⟦the river⟧\n\n### Question: And?\n\n### Answer: ⟦the bridge<|im_end|>⟧",
    ),
    "a last turn that ends otherwise than the ones before": (
        RETURNS, HO,
        "<|user|>Hi<|end|><|assistant|>the river<|end|><|user|>And?<|end|><|assistant|>⟦the bridge<|return|>⟧",
    ),
    "an end of text after the last turn": (
        ENDS_ONCE, HO,
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦the river<|end|>⟧\n"
        "<|user|>\nAnd?<|end|>\n<|assistant|>\n⟦the bridge<|end|>⟧\n<|im_end|>",
    ),
    "a system prompt in the user's turn, and a space before answers": (
        MERGES_SYSTEM, chat("Hi", "the river", system="Be brief."),
        "<s>[Q] Be brief.\nHi [/Q]⟦ the river<|im_end|>⟧",
    ),
    "{% generation %}": (
        TAGGED, HI, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦the river<|im_end|>⟧\n",
    ),
    "contents as JSON": (
        JSON, chat("é", 'a "river"\nof ½'),
        '<|user|>"\\u00e9"<|end|><|assistant|>⟦"a \\"river\\"\\nof \\u00bd"<|end|>⟧',
    ),
    "an answer that stands elsewhere too": (
        REPEATS, HI,
        "Last said: the river\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦the river<|im_end|>⟧\n",
    ),
    "a line break before the end": (
        LATE_END, HO,
        "<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n⟦the river\n<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?\n<|im_end|>\n<|im_start|>assistant\n⟦the bridge\n<|im_end|>⟧\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", LEARNT)
def test_what_the_assistant_says_is_learnt_and_nothing_else(shape: str) -> None:
    template, messages, expected = LEARNT[shape]
    tokenizer = tokenizer_with(template)
    assert shown(tokenizer, *encoded(tokenizer, {"messages": messages})) == expected


OTHER_PROMPTS = {"a chat that the user ends", "an answer that stands elsewhere too"} | {
    "a prompt with a thought that answers have not",
}


@pytest.mark.parametrize("shape", sorted(LEARNT.keys() - OTHER_PROMPTS))
def test_the_tokens_before_an_answer_are_those_of_the_prompt_that_sampling_sees(shape: str) -> None:
    template, messages, _ = LEARNT[shape]
    tokenizer = tokenizer_with(template)
    if template == PLAIN:  # every answer's border is kept: those of earlier ones are none in a prompt
        messages = messages[-2:]
    tokens, learnt = encoded(tokenizer, {"messages": messages})
    asked = encode_prompt(tokenizer, messages[:-1]) if len(messages) > 1 else []
    assert tokens[: len(asked)] == asked and learnt[len(asked)]


def test_an_answer_that_opens_the_chat_is_learnt_from_where_its_prompt_ends() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    opening = [{"role": "assistant", "content": "Hello!"}, *chat("How are you?", "Well.")]
    made = shown(tokenizer, *encoded(tokenizer, {"messages": opening}))
    assert made == "assistant:⟦ Hello!<|im_end|>⟧\nuser: How are you?\nassistant:⟦ Well.<|im_end|>⟧\n"


def test_a_thought_without_an_answer_is_learnt_to_the_end_of_its_turn() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}"
        "{% set parts = m.content.split('</think>') %}{% if loop.last %}{{ parts[0] }}\n</think>\n\n{% endif %}"
        "{{ parts[1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    made = shown(tokenizer, *encoded(tokenizer, {"messages": chat("Why?", "<think>a long story</think>")}))
    assert made == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>a long story\n</think>\n\n<|im_end|>⟧\n"
    )


@pytest.mark.parametrize(("template", "told"), [(FORGETS_SYSTEM, 1), (CHATML, 0), (MERGES_SYSTEM, 0)])
def test_a_template_that_leaves_out_what_the_system_says_is_named_once(template: str, told: int) -> None:
    rows = [{"messages": chat("Hi", "yes", system="Be brief.")}] * 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode_many(rows, tokenizer_with(template))
    assert sum("leaves out what the system says" in str(one.message) for one in caught) == told


def test_calls_of_tools_are_learnt_and_what_the_tools_say_is_not() -> None:
    tokenizer = tokenizer_with(TOOLS)
    level = {"name": "level", "arguments": {"place": "Basel"}}
    messages = [
        *chat("How high?"),
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": level}]},
        {"role": "tool", "content": "the river runs"},
        {"role": "assistant", "content": "north"},
    ]
    text = shown(tokenizer, *encoded(tokenizer, {"messages": messages, "tools": [{"name": "level"}]}))
    assert text == (
        '<|im_start|>system\nTools: [{"name": "level"}]<|im_end|>\n<|im_start|>user\nHow high?<|im_end|>\n'
        '<|im_start|>assistant\n⟦<tool_call>\n{"name": "level", "arguments": {"place": "Basel"}}\n</tool_call>'
        "<|im_end|>⟧\n"
        "<|im_start|>user\n<result>the river runs</result><|im_end|>\n<|im_start|>assistant\n⟦north<|im_end|>⟧\n"
    )


def test_a_turn_of_weight_0_is_read_and_not_learnt() -> None:
    tokenizer = tokenizer_with(CHATML)
    unlearnt = [HO[0], {**HO[1], "weight": 0}, *HO[2:]]
    assert shown(tokenizer, *encoded(tokenizer, {"messages": unlearnt})) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nthe river<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦the bridge<|im_end|>⟧\n"
    )


@pytest.mark.parametrize("template", [CHATML, TRIMS, THINKS, PLAIN, ENDS_ONCE, MERGES_SYSTEM, JSON, REPEATS])
def test_many_chats_are_labelled_as_each_by_itself(template: str) -> None:
    tokenizer = tokenizer_with(template)
    said = ["the river", " yes ", "\n\nno", "<think>\nold\n</think>\n\nnorth", "é"]
    rows = [
        {"messages": chat(*(said[(7 * n + k) % 5] for n in range(2 * turns)))}
        for k in range(5)
        for turns in (1, 2, 3)
    ]
    assert encode_many(rows, tokenizer) == [encoded(tokenizer, row) for row in rows]


@pytest.mark.parametrize("template", [CHATML, THINKS, THINKS_ALOUD, UNTHOUGHT, TOOLS])
def test_the_renderings_of_a_chat_do_not_grow_with_its_turns(template: str) -> None:
    counts = []
    for turns in (4, 40):
        tokenizer = tokenizer_with(template)
        render, counted = tokenizer.apply_chat_template, [0]

        def counting(*given: Any, counted: list[int] = counted, render: Any = render, **more: Any) -> Any:
            counted[0] += 1
            return render(*given, **more)

        tokenizer.apply_chat_template = counting  # type: ignore[method-assign]
        encoded(tokenizer, {"messages": chat(*["the river", "<think>\nold\n</think>\n\nyes"] * turns)})
        counts.append(counted[0])
    assert counts[0] == counts[1]


REFUSED = {
    "no system here": (TRIMS, {"messages": chat("Hi", "yes", system="Be brief.")}),
    "leaves the assistant's answer out": (FORGETS, {"messages": HI}),
    "leaves a call of tools out": (
        CHATML,
        {
            "messages": [
                *HI[:1],
                {
                    "role": "assistant",
                    "content": "x",
                    "tool_calls": [{"function": {"name": "a", "arguments": {}}}],
                },
            ]
        },
    ),
    "has no chat template": (None, {"messages": HI}),
    "no turn of the assistant": (CHATML, {"messages": HI[:1]}),
    "weight=0.5": (CHATML, {"messages": [HI[0], {**HI[1], "weight": 0.5}]}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_chat_that_cannot_be_learnt_is_refused_with_the_reason_and_the_others_are_not(said: str) -> None:
    template, row = REFUSED[said]
    tokenizer = tokenizer_with(template)
    refused, text = encode_many([row, {"text": "yes"}], tokenizer)
    assert isinstance(refused, ValidationError) and said in str(refused)
    assert text == encoded(tokenizer, {"text": "yes"})


def test_rows_keep_their_places_when_some_are_rendered_while_others_are_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tokenizer_with(TRIMS)
    kinds = [
        {"messages": HO},
        {"text": "the bridge"},
        {"messages": chat("Hi", "yes", system="Be brief.")},
        {"prompt": "2+2=", "completion": "4"},
        {"messages": chat("Hi", " no ")},
    ]
    one_by_one = [encode_many([row], tokenizer)[0] for row in kinds]
    monkeypatch.setattr(labels, "AT_ONCE", 3)
    many = encode_many(kinds * 4, tokenizer)
    assert [str(one) for one in many] == [str(one) for one in one_by_one * 4]
    assert isinstance(many[2], ValidationError) and "no system here" in str(many[2])


# prompts, completions and texts


def sentencepiece(kind: str = "metaspace", single: str = "<s> $A") -> PreTrainedTokenizerFast:
    """A tokenizer that writes a space before every text; "llama" does so anew after each special token."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "llama":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.train_from_iterator(
        ["the", "river", "yes", "no", "2+2=", "▁the", "▁river:", "▁yes", "▁no", "ab", "▁▁", "=4"] * 20,
        trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class WithoutOffsets:
    """A tokenizer in Python: it gives tokens, and does not say of which characters."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self._fast = fast

    def __call__(self, text: str, **more: Any) -> Any:
        return {"input_ids": self._fast(text, **more)["input_ids"]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)


BORDERS = [
    ("2+2=", "4"),
    ("the river:", " yes"),
    ("the river: ", "yes"),
    ("a", "b"),
    ("", "yes"),
    ("the ", " no"),
]


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize(("prompt", "completion"), BORDERS)
@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "llama"])
def test_a_completion_follows_the_prompts_own_tokens_without_a_space_won_or_lost(
    kind: str, prompt: str, completion: str, offsets: bool
) -> None:
    fast = tokenizer_with(None) if kind == "byte-level" else sentencepiece(kind)
    tokenizer = fast if offsets else WithoutOffsets(fast)
    tokens, learnt = encoded(tokenizer, {"prompt": prompt, "completion": completion})
    asked = encode_prompt(tokenizer, prompt)
    assert tokens[: len(asked)] == asked and learnt == [False] * len(asked) + [True] * (
        len(tokens) - len(asked)
    )
    assert fast.decode(tokens, skip_special_tokens=True) == prompt + completion
    assert tokens[-1] == fast.eos_token_id and tokens.count(fast.eos_token_id) == 1


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
@pytest.mark.parametrize("text", ["yes", "<s>yes", "yes</s>", "<s>yes</s>"])
def test_the_first_and_the_last_token_are_neither_doubled_nor_lost(text: str, single: str) -> None:
    tokenizer = sentencepiece(single=single)
    tokens, learnt = encoded(tokenizer, {"text": text})
    first = [1] if single.startswith("<s>") or text.startswith("<s>") else []
    core = tokens[len(first) : -1]
    assert tokens == [*first, *core, 2] and not {1, 2} & {*core}
    assert learnt[len(first) :] == [True] * (len(core) + 1)
    asked = encode_prompt(tokenizer, "the river")
    assert asked[-1] != 2 and asked.count(1) == single.startswith("<s>")


def test_chats_are_labelled_by_a_tokenizer_without_offsets_as_by_one_with_them() -> None:
    for template, messages, _ in LEARNT.values():
        fast = tokenizer_with(template)
        assert shown(fast, *encoded(WithoutOffsets(fast), {"messages": messages})) == shown(
            fast, *encoded(fast, {"messages": messages})
        )


def test_what_ends_a_turn_is_known_for_chats_only() -> None:
    tokenizer = tokenizer_with(TRIMS, end="</s>")
    text, opened = turn_ends(tokenizer, ["Hi", HI[:1]])
    assert not text.tokens and opened.tokens == {tokenizer.convert_tokens_to_ids("<|end|>")}
