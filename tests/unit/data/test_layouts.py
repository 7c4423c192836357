"""The layouts of rows, and the faults they may have: each is read as it is meant, or refused by its number."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb import data
from tensafe_nb.data.layouts import canonical
from tensafe_nb.data.messages import messages_of

ASK = {"role": "user", "content": "How far is the moon?"}
TELL = {"role": "assistant", "content": "384,400 km."}
MORE = {"role": "user", "content": "And the sun?"}
FAR = {"role": "assistant", "content": "Further."}
CALL = {"type": "function", "function": {"name": "distance", "arguments": {"to": "moon"}}}
TOOL = {"type": "function", "function": {"name": "distance", "description": "How far away it is."}}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Pair:
    prompt: str
    completion: str


def members(row: Any, chats: bool = True) -> list[dict[str, Any]]:
    return canonical(row, chats=chats).members


def unlearnt(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"weight": 0}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("a text", [{"text": "a text"}]),
        ({"text": np.str_("a text")}, [{"text": "a text"}]),
        ({"prompt": "p", "completion": "c"}, [{"prompt": "p", "completion": "c"}]),
        ({"text": "x", "images": [], "labels": None}, [{"text": "x"}]),
        ({"text": None, "prompt": "p", "completion": "c"}, [{"prompt": "p", "completion": "c"}]),
        ({"text": float("nan"), "prompt": "p", "completion": ""}, [{"prompt": "p", "completion": ""}]),
        ({"messages": [ASK, TELL]}, [{"messages": [ASK, TELL]}]),
        ([ASK, TELL], [{"messages": [ASK, TELL]}]),
        ({"messages": [ASK, TELL | {"tool_calls": []}], "tools": ""}, [{"messages": [ASK, TELL]}]),
        ({"messages": [ASK, TELL], "system": ""}, [{"messages": [ASK, TELL]}]),
        (
            {"messages": [ASK, TELL], "system": "Be brief."},
            [{"messages": [{"role": "system", "content": "Be brief."}, ASK, TELL]}],
        ),
        (
            {
                "conversations": [
                    ASK | {"role": "human"},
                    TELL | {"role": "GPT"},
                    {"role": "user", "value": "ok"},
                ]
            },
            [{"messages": [ASK, TELL, {"role": "user", "content": "ok"}]}],
        ),
        ({"messages": (TELL,), "target": [1.0]}, [{"messages": [TELL], "target": [1.0]}]),
        (
            {
                "conversations": [
                    {"from": "human", "value": ASK["content"]},
                    {"from": "gpt", "value": TELL["content"]},
                ]
            },
            [{"messages": [ASK, TELL]}],
        ),
        (
            {
                "system": "Be brief.",
                "conversation": [
                    {"from": "GPT", "value": "hi", "weight": 0},
                    {"from": "assistant", "value": "yo"},
                ],
            },
            [
                {
                    "messages": [
                        {"role": "system", "content": "Be brief."},
                        {"role": "assistant", "content": "hi", "weight": 0},
                        {"role": "assistant", "content": "yo"},
                    ]
                }
            ],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "?"},
                    {"from": "function_call", "value": '{"name": "distance", "arguments": {"to": "moon"}}'},
                    {"from": "observation", "value": "384,400"},
                    {"from": "gpt", "value": "Far."},
                ]
            },
            [
                {
                    "messages": [
                        {"role": "user", "content": "?"},
                        {"role": "assistant", "content": None, "tool_calls": [CALL]},
                        {"role": "tool", "content": "384,400"},
                        {"role": "assistant", "content": "Far."},
                    ]
                }
            ],
        ),
        ({"conversations": [ASK, TELL]}, [{"messages": [ASK, TELL]}]),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            [
                {
                    "messages": [
                        {"role": "user", "content": "Add.\n\n2, 2"},
                        {"role": "assistant", "content": "4"},
                    ]
                }
            ],
        ),
        (
            {"instruction": "Sing.", "context": "", "response": "La."},
            [{"messages": [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]}],
        ),
        ({"prompt": [ASK], "completion": [TELL]}, [{"messages": [ASK, TELL]}]),
        (
            {"prompt": [ASK, TELL, MORE], "completion": [FAR]},
            [{"messages": [ASK, unlearnt(TELL), MORE, FAR]}],
        ),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "r"}],
        ),
        (
            {"prompt": [ASK], "chosen": [TELL], "rejected": [FAR]},
            [{"messages": [ASK, TELL]}, {"messages": [ASK, FAR]}],
        ),
        (
            {"chosen": [ASK, TELL, MORE, FAR], "rejected": [ASK, TELL, MORE, TELL]},
            [
                {"messages": [ASK, unlearnt(TELL), MORE, FAR]},
                {"messages": [ASK, unlearnt(TELL), MORE, TELL]},
            ],
        ),
        (
            {"prompt": ASK["content"], "chosen": [ASK, TELL], "rejected": [ASK, FAR]},
            [{"messages": [ASK, TELL]}, {"messages": [ASK, FAR]}],
        ),
        (
            {"prompt": ASK["content"], "chosen": [TELL], "rejected": [FAR]},
            [{"messages": [ASK, TELL]}, {"messages": [ASK, FAR]}],
        ),
        ({"anchor": "a", "positive": "b"}, [{"text": "a"}, {"text": "b"}]),
        (
            {"messages": [ASK, TELL], "tools": [TOOL]},
            [{"messages": [ASK, TELL], "tools": [TOOL]}],
        ),
        ({"messages": [ASK, TELL], "tools": "[]"}, [{"messages": [ASK, TELL]}]),
        ({"messages": [ASK, TELL], "tools": None}, [{"messages": [ASK, TELL]}]),
        (
            {"messages": [ASK, TELL], "chat_template_kwargs": {"enable_thinking": False}},
            [{"messages": [ASK, TELL], "chat_template_kwargs": {"enable_thinking": False}}],
        ),
    ],
)
def test_a_layout_is_read_as_it_is_meant(row: Any, expected: list[dict[str, Any]]) -> None:
    assert members(row) == expected


def test_alpaca_without_a_chat_template_is_alpacas_own_prompt() -> None:
    (member,) = members({"instruction": "Add {two}.", "input": "2, {0}", "output": "4"}, chats=False)
    assert member["completion"] == "4"
    assert member["prompt"].startswith("Below is an instruction that describes a task, paired with an input")
    assert member["prompt"].endswith("### Instruction:\nAdd {two}.\n\n### Input:\n2, {0}\n\n### Response:\n")
    (member,) = members({"instruction": "Sing.", "output": "La."}, chats=False)
    assert member["prompt"].startswith("Below is an instruction that describes a task. Write")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        (["one ", "two"], "one two"),
        (np.array([{"type": "text", "text": "one", "image": None}], dtype=object), "one"),
        ([{"type": "output_text", "text": "one"}], "one"),
        ([], ""),
    ],
)
def test_content_in_parts_is_joined(content: Any, text: str) -> None:
    assert messages_of([{"role": "user", "content": content}], "'messages'") == [
        {"role": "user", "content": text}
    ]


def test_what_a_message_has_besides_reaches_the_template_and_empty_keys_do_not() -> None:
    given = {
        "role": "assistant",
        "content": "x",
        "name": "bot",
        "tool_calls": None,
        "reasoning_content": "hm",
    }
    (message,) = messages_of([given], "'messages'")
    assert message == {"role": "assistant", "content": "x", "name": "bot", "reasoning_content": "hm"}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"train": np.False_}])
def test_a_turn_with_weight_zero_is_not_learnt(tokenizer: Any, mark: dict[str, Any]) -> None:
    (batch,) = data.batches([{"messages": [ASK, TELL | mark, MORE, FAR]}], tokenizer, batch_size=1)
    learnt = tokenizer.decode(batch.labels[batch.labels != -100])
    assert "Further" in learnt and "384" not in learnt
    assert "384" in tokenizer.decode(batch.input_ids[0])


BAD_ROWS: list[tuple[Any, str]] = [
    (None, "it is None: a row is a text or a dict"),
    (3.5, "the float 3.5"),
    (b"text", "a bytes"),
    (["a", "b"], "a list"),
    ({}, r"the keys \[\] cannot be read"),
    ({"question": "q", "answer": "a"}, r"'prompt': row\['question'\], 'completion': row\['answer'\]"),
    ({"content": "hello"}, r"\[\{'text': row\['content'\]\} for row in rows\]"),
    ({"text": None}, "'text' is None"),
    ({"text": float("nan")}, "'text' is missing"),
    ({"text": 4}, r"'text' is the int 4.*str\(row\['text'\]\)"),
    ({"text": np.float32(4)}, "'text' is the float32 4.0"),
    ({"text": True}, "'text' is the bool True"),
    ({"text": b"x"}, r"row\['text'\]\.decode\(\)"),
    ({"text": ["a", "b"]}, "a row for each"),
    ({"text": {"a": 1}}, "'text' is a dict"),
    ({"text": "\ud800"}, "half a surrogate pair"),
    ({"text": ""}, "Nothing is left to learn"),
    ({"prompt": "p", "completion": None}, "'completion' is None"),
    ({"prompt": "p", "completion": 6}, "'completion' is the int 6"),
    ({"prompt": 6, "completion": "c"}, "'prompt' is the int 6"),
    ({"prompt": ["a"], "completion": ["b"]}, "both texts, or both lists of messages"),
    ({"prompt": [ASK], "completion": "c"}, "both texts, or both lists of messages"),
    ({"prompt": [], "completion": "c"}, "'prompt' is empty"),
    ({"prompt": "p", "completion": "half \udc00"}, "half a surrogate pair"),
    ({"messages": []}, "'messages' is empty"),
    ({"messages": "hi"}, r"json\.loads\(row\['messages'\]\)"),
    ({"messages": [ASK]}, r"turns are of \['user'\], and none of the assistant. Leave it out.$"),
    ({"messages": [ASK, {"role": "model", "content": "Far."}]}, "call the role of its answers assistant"),
    ({"messages": [ASK, TELL | {"content": None, "tool_calls": []}]}, "no content"),
    (
        {"messages": [ASK, TELL | {"content": None, "function_call": {"name": "f", "arguments": "{}"}}]},
        "'function_call', which cannot be honoured: that is the old form of 'tool_calls'",
    ),
    ({"messages": [ASK, TELL], "functions": [TOOL]}, "'functions' cannot be honoured: call the column 'tools'"),
    ({"prompt": [ASK], "completion": "Far."}, r"'assistant', 'content': row\['completion'\]"),
    ({"prompt": ASK, "completion": [TELL]}, r"in a list: \[row\['prompt'\]\]"),
    (("p", "c"), "for a, b in rows"),
    (Path("rows.jsonl"), r"for row in tensafe_nb\.data\.read_rows\(path\)"),
    ({"prompt": "p", "completion": "c", "system": "Be brief."}, "'system' cannot be honoured: write it"),
    ({"messages": [{"role": "system", "content": "x"}, ASK, TELL], "system": "y"}, "leave one out"),
    ({"messages": [ASK, TELL], "chat_template_kwargs": {"tools": [TOOL]}}, "'tools', which is no word of the template"),
    ({"messages": [ASK, TELL], "chat_template_kwargs": {"tokenize": True}}, "'tokenize', which is no word"),
    (Pair("p", "c"), r"dataclasses\.asdict"),
    ({"Prompt": "p", "Completion": "c"}, r"'prompt': row\['Prompt'\], 'completion': row\['Completion'\]"),
    ({"messages": [ASK, unlearnt(TELL)]}, "all its answers have weight 0"),
    ({"messages": [ASK, None]}, r"'messages'\[1\] is None: a message is a dict"),
    ({"conversations": ["hi", "yo"]}, r"'conversations'\[0\] is a str"),
    ({"messages": [{"from": "human", "value": "x"}]}, "Call the column 'conversations'"),
    ({"messages": [{"content": "x"}]}, "has no 'role'"),
    ({"messages": [{"role": None, "content": "x"}]}, "has no 'role'"),
    ({"messages": [{"role": "assistant"}]}, r"'messages'\[0\] has no content.*has \['role'\]"),
    ({"messages": [{"role": "assistant", "content": None}]}, "has no content"),
    ({"messages": [{"role": "assistant", "content": float("nan")}]}, "has no content"),
    ({"messages": [ASK, {"role": "assistant", "content": 4}]}, r"'messages'\[1\]'s content is the int 4"),
    ({"messages": [{"role": "assistant", "content": {"text": "x"}}]}, "content is a dict"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TELL]}, "only text is read"),
    ({"messages": [{"role": "user", "content": [{"type": "thinking", "text": "x"}]}, TELL]}, "a part is"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 4}]}, TELL]}, "a part is"),
    ({"messages": [{"role": "user", "content": "x", "images": ["a"]}, TELL]}, "'images'"),
    ({"messages": [ASK, TELL | {"weight": 0.5}]}, "weight 0.5"),
    ({"messages": [ASK, TELL | {"weight": [1]}]}, "weight"),
    ({"messages": [ASK, TELL | {"train": "no"}]}, "train 'no'"),
    ({"messages": [ASK, TELL | {"train_detail": []}]}, "train_detail"),
    ({"messages": [ASK, TELL], "tools": "{"}, "not JSON"),
    ({"messages": [ASK, TELL], "chat_template_kwargs": [1]}, "a dict of keywords"),
    ({"messages": [ASK, TELL], "tools": ["distance"]}, "'tools' is a list"),
    ({"messages": [ASK, TELL], "tools": [TOOL]}, "'tools', and this model's chat template does not show them"),
    ({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "'tool_calls', and this"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "from 'narrator': known are"),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": None}]}, "has no content"),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "x"}]}, "function_call"),
    ({"instruction": "Add.", "input": 4, "output": "4"}, "the input is the int 4"),
    ({"instruction": None, "output": "x"}, "'instruction' is None"),
    ({"role": "user", "content": "x"}, "it is one message"),
    ({"text": "x", "image": object()}, "'image' cannot be honoured"),
    ({"text": "x", "labels": [1]}, "'labels' cannot be honoured"),
    ({"prompt": "p", "completion": "c", "logits": [0.1]}, "'logits' cannot be honoured"),
    ({"prompt": "p", "completion": "c", "label": False}, "KTO"),
    ({"prompt": "p", "completion": "c", "weight": 0.1}, "rows have no weights"),
    ({"input_ids": [1, 2]}, "rows of tokens make a batch"),
    ({"text": "a", "target": "positive"}, "is no list of numbers"),
    ({"text": "a", "target": [float("inf")]}, "is no list of numbers"),
    ({1: "a", "b": "c"}, "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_by_its_number_and_left_out_on_demand(
    tokenizer: Any, row: Any, message: str
) -> None:
    rows = ["one", {"prompt": "p", "completion": "c"}, row, {"messages": [ASK, TELL]}]
    with pytest.raises(tn.ValidationError, match=rf"^Row 2: .*{message}") as caught:
        data.batches(rows, tokenizer)
    assert caught.value.details["row"] == 2
    kept = data.batches(rows, tokenizer, on_bad_rows="skip")
    assert len(kept.examples) == 3
    assert kept.skipped == (str(caught.value),)


KEYS = [
    *(
        "text",
        "prompt",
        "completion",
        "messages",
        "conversations",
        "role",
        "content",
        "from",
        "value",
        "type",
    ),
    *("tools", "tool_calls", "chosen", "rejected", "anchor", "positive", "instruction", "output", "target"),
    *("weight", "train", "system", "input", "label"),
]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=2)
    | st.sampled_from(["\ud83d", "user", "assistant", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
        | st.just(np.array([{"role": "assistant", "content": "x"}, None], dtype=object))
    ),
    max_leaves=8,
)


@given(row=JUNK)
@settings(max_examples=300, deadline=None)
def test_whatever_a_row_holds_it_is_read_or_refused_by_our_own_error(tokenizer: Any, row: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            batches = data.batches([row], tokenizer)
        except tn.ValidationError as error:
            assert "Row 0" in str(error) or str(error).startswith("rows: this is one chat")
        else:
            assert len(batches.examples) in (1, 2)


@given(
    message=st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "from", "value", "weight"]), JUNK
    )
)
@settings(max_examples=200, deadline=None)
def test_training_and_sampling_read_a_message_alike(message: dict[str, Any]) -> None:
    chat = [message, {"role": "assistant", "content": "x"}]
    try:
        read = messages_of(chat, "messages")
    except tn.ValidationError as error:
        with pytest.raises(tn.ValidationError) as caught:
            data.read_prompts(chat)
        assert str(caught.value) == f"Prompt 0: {error}"
    else:
        (prompt,) = data.read_prompts(chat)
        assert list(prompt) == [{k: v for k, v in m.items() if k != "weight"} for m in read]  # type: ignore[union-attr]


def test_columns_nobody_reads_are_named_once(tokenizer: Any) -> None:
    rows = [{"text": f"row {n}", "source": "web", **({"score": 1} if n % 2 else {})} for n in range(40)]
    with pytest.warns(UserWarning) as caught:
        data.batches(rows, tokenizer)
    assert len(caught) == 1
    assert "'score', 'source' (in 40 of 40 rows)" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_what_messages_have_and_the_template_never_shows_is_named_once(tokenizer: Any) -> None:
    chat = {
        "messages": [ASK | {"name": "Galileo"}, TELL | {"reasoning_content": "By radar.", "weight": 1}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    named = r"'chat_template_kwargs.enable_thinking', 'messages.name', 'messages.reasoning_content'"
    with pytest.warns(UserWarning, match=named) as caught:
        data.batches([chat, chat], tokenizer)
    assert len(caught) == 1


def test_what_is_read_is_not_named(tokenizer: Any) -> None:
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = TEMPLATE
    rows = [
        {"messages": [ASK, TELL], "tools": [TOOL], "target": 1.0},
        {"instruction": "Add.", "input": "", "output": "4", "target": 2.0},
        {"text": "x", "empty": None, "target": 0.0},
    ]
    with warnings.catch_warnings(action="error"):
        batches = data.batches(rows, tokenizer, batch_size=3)
    assert "How far away it is." in tokenizer.decode(list(batches.examples[0].input_ids))


def test_calls_of_tools_are_learnt_where_the_template_shows_them(tokenizer: Any) -> None:
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = TEMPLATE
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    (example,) = data.batches([{"messages": [ASK, called]}], tokenizer).examples
    learnt = tokenizer.decode([label for label in example.labels if label != -100])
    assert '"distance"' in learnt and "None" not in learnt


def test_faults_of_a_template_name_the_row(tokenizer: Any) -> None:
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system prompt here') }}{% endif %}"
        "{{ m.role }}: {{ m.content | trim }}{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [ASK, TELL]}, {"messages": [system, ASK, TELL]}]
    with pytest.raises(tn.ValidationError, match=r"Row 1: .*No system prompt here"):
        data.batches(rows, tokenizer)
    assert len(data.batches(rows, tokenizer, on_bad_rows="skip").examples) == 1


def test_pairs_among_rows_that_are_none_are_never_skipped(tokenizer: Any) -> None:
    rows = ["a text", {"anchor": "a", "positive": "b"}]
    with pytest.raises(tn.ValidationError, match="Row 1 is a pair, row 0 is none"):
        data.batches(rows, tokenizer, on_bad_rows="skip")


def test_nothing_that_can_be_used_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(tn.ValidationError, match=r"None of the 2 rows can be used\. Row 0: "):
        data.batches([None, 3], tokenizer, on_bad_rows="skip")
    with pytest.raises(tn.ValidationError, match="must be 'raise' or 'skip'"):
        data.batches(["a"], tokenizer, on_bad_rows="ignore")  # type: ignore[arg-type]


def test_skipped_rows_are_counted_and_shown(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{oops\n\n{"text": 4}\n{"text": "two"}\n')
    batches = data.batches(path, tokenizer, on_bad_rows="skip")
    assert repr(batches).endswith("2 examples, 2 rows left out>")
    assert "rows left out" in batches._repr_html_()
    assert [text[:30] for text in batches.skipped] == [
        "Row 1 (rows.jsonl, line 2): no",
        "Row 2 (rows.jsonl, line 4): 't",
    ]
    assert "2 of 4 rows were left out, the first: Row 1 (rows.jsonl, line 2)" in caplog.text


def test_rows_that_are_too_long_are_refused_cut_or_skipped(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"text {n}" for n in range(7)] + ["word " * 50, {"prompt": "word " * 50, "completion": "x"}]
    for limit in ({"max_length": 20}, {"context": 20}, {"max_length": 64, "context": 20}):
        with pytest.raises(
            tn.ValidationError, match=r"^Row 7: it has \d+ tokens, more than .*20.*truncate=True"
        ):
            data.batches(rows, tokenizer, **limit)
        kept = data.batches(rows, tokenizer, on_bad_rows="skip", **limit)
        assert (len(kept.examples), len(kept.skipped)) == (7, 2)
        with pytest.raises(tn.ValidationError, match=r"^Row 8: Nothing is left to learn"):
            data.batches(rows, tokenizer, truncate=True, **limit)
        cut = data.batches(rows, tokenizer, truncate=True, on_bad_rows="skip", **limit)
        assert max(map(len, cut.examples)) == 20
        assert (cut.cut, len(cut.skipped)) == (1, 1)
        assert "1 cut, 1 rows left out" in repr(cut)
    assert "1 of 8 sequences were cut at 20 tokens" in caplog.text
