"""Prompts: one is told from many, chats are read as in training, and a table or a row says how its prompts are got."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb import data
from tensafe_nb.data.labels import encode_prompt
from tensafe_nb.rlvr.rollouts.prompts import PromptCursor, PromptItem, prompt_specs

ASK = {"role": "user", "content": "How far is the moon?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "distance"}}]}
TOOL = {"type": "function", "function": {"name": "distance", "description": "How far away it is."}}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a text", ("a text",)),
        (["a", "b"], ("a", "b")),
        ((n for n in ("a", "b")), ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        (np.array([1, 2]), ((1, 2),)),
        ([np.array([1, 2]), [3]], ((1, 2), (3,))),
        (np.array([[1, 2], [3, 4]]), ((1, 2), (3, 4))),
        ([ASK], ((ASK,),)),
        ([[ASK], [ASK, CALLED], "x"], ((ASK,), (ASK, CALLED), "x")),
        ([ASK | {"content": [{"type": "text", "text": ASK["content"]}], "weight": 0}], ((ASK,),)),
        (
            [{"role": "assistant", "content": "Hello."}, ASK],
            (({"role": "assistant", "content": "Hello."}, ASK),),
        ),
        ({"messages": [ASK], "tools": [TOOL]}, ({"messages": (ASK,), "tools": [TOOL]},)),
        ([{"prompt": [ASK], "tools": json.dumps([TOOL])}], ({"messages": (ASK,), "tools": [TOOL]},)),
        ([{"prompt": [ASK], "tools": None}, {"prompt": "x"}], ((ASK,), "x")),
    ],
)
def test_one_prompt_is_told_from_many(given: Any, read: Any) -> None:
    assert data.read_prompts(given) == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no prompt"),
        ("", "Prompt 0: it is empty"),
        (["a", ""], "Prompt 1: it is empty"),
        (["a", "\udfff"], "Prompt 1: .*surrogate"),
        (["a", None], "Prompt 1 is None"),
        (["a", 4], "Prompt 1 is 4"),
        (["a", float("nan")], "Prompt 1 is nan"),
        ([[ASK, {"role": "user", "content": 4}]], r"Prompt 0: messages\[1\]'s content is the int 4"),
        ([[ASK, {"role": "user", "content": None}]], r"Prompt 0: messages\[1\] has no content"),
        (ASK, r"put it in a list, \[message\]"),
        ({}, r"has 'prompt', 'messages' or 'tokens', and this is \{\}"),
        ({"question": "hi"}, r"has 'prompt', 'messages' or 'tokens', and this is \{'question': 'hi'\}"),
        ([{"prompt": "hi", "answer": "ho"}], r"'answer' besides.*\[row\['prompt'\] for row in rows\]"),
        ([{"prompt": "hi", "tools": [TOOL]}], "for the chat template only"),
        (Path("prompts.jsonl"), r"data\.read_rows\('prompts\.jsonl'\)"),
        (b"abc", "a prompt is a text"),
    ],
)
def test_what_is_no_prompt_says_what_is_wrong(given: Any, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        data.read_prompts(given)


def test_a_conversation_can_go_on_from_its_tokens(tokenizer: Any) -> None:
    going: dict[str, Any] = {"tokens": [5, 6], "chat": {}, "stream": 3}
    (read,) = data.read_prompts([going])
    assert data.read_prompts(going) == (read,) == ({"tokens": (5, 6), "chat": {}, "stream": 3},)
    assert encode_prompt(tokenizer, read) == [5, 6]
    for wrong, message in (
        ({"tokens": []}, "a list of token ids is expected"),
        ({"tokens": "ab"}, "a list of token ids is expected"),
        (going | {"stream": -1}, "'stream' is -1: a whole number"),
        (going | {"chat": True}, "'chat' is True: a dict"),
        (going | {"prompt": "hi"}, "'prompt' besides"),
    ):
        with pytest.raises(tn.ValidationError, match=message):
            data.read_prompts([wrong])


def test_a_table_is_refused_for_its_column() -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    for table in (pandas.DataFrame({"prompt": ["a"]}), datasets.Dataset.from_dict({"prompt": ["a"]})):
        with pytest.raises(tn.ValidationError, match=re.escape("table['prompt'].tolist()")):
            data.read_prompts(table)
    assert data.read_prompts(pandas.DataFrame({"prompt": ["a", "b"]})["prompt"]) == ("a", "b")


def test_tools_reach_the_template_of_a_prompt_or_are_refused(tokenizer: Any) -> None:
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    (prompt,) = data.read_prompts({"prompt": [ASK], "tools": [TOOL]})
    with pytest.raises(tn.ValidationError, match="template does not show them"):
        encode_prompt(tokenizer, prompt)
    tokenizer.chat_template = (
        "{{ tools | tojson }}{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert "How far away it is." in tokenizer.decode(encode_prompt(tokenizer, prompt))
    (prompt,) = data.read_prompts(
        {"prompt": [ASK], "tools": [TOOL], "chat_template_kwargs": {"mood": "merry"}}
    )
    assert "merry" in tokenizer.decode(encode_prompt(tokenizer, prompt))


# prompts for rewards


def test_a_template_that_would_not_show_the_question_is_refused(tokenizer: Any) -> None:
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}Say:"
    )
    with pytest.raises(tn.ValidationError, match="leaves out what the last message says"):
        encode_prompt(tokenizer, [ASK | {"content": "Is it far?"}])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}Say:"
    assert tokenizer.decode(encode_prompt(tokenizer, [ASK | {"content": "Is it far?"}])) == "IS IT FAR?Say:"


def test_further_columns_become_meta_and_the_text_is_that_of_all_messages() -> None:
    item = PromptItem.of({"prompt": [ASK, CALLED, ASK], "answer": 4, "tools": [TOOL]})
    assert item.meta == {"answer": 4, "tools": [TOOL]}
    assert item.text == "How far is the moon?\nHow far is the moon?"
    assert item.sent("auto") == {"messages": [ASK, CALLED, ASK], "tools": [TOOL]}
    assert PromptItem.of({"messages": [ASK], "answer": 4}).sent("auto") == [ASK]
    assert PromptItem.of("x").sent("always") == [{"role": "user", "content": "x"}]


def test_prompts_are_dealt_from_wherever_rows_are_read(tmp_path: Path) -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(4)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (
        rows,
        iter(rows),
        path,
        str(path),
        pandas.DataFrame(rows),
        datasets.Dataset.from_list(rows),
    ):
        assert sorted(row["answer"] for row in PromptCursor(source, 4, seed=0).take()) == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "A prompt is a text"),
        ({"prompt": None}, "A prompt is a text"),
        ({"prompt": float("nan")}, "A prompt is a text"),
        ({"prompt": 4}, "this is 4, of type int"),
        ({"prompt": ""}, "it is empty"),
        ({"question": "2+2?", "answer": "4"}, "prompt='question'"),
        ({"prompt": [{"role": "user", "content": None}]}, "has no content"),
        ({"prompt": "2+2?", "tools": [TOOL]}, "for the chat template only"),
        ([1, 2], "A prompt is a text"),
        ({"prompt": "What is shown?", "image": "a.png"}, "'image' would not be seen by the model"),
    ],
)
def test_a_bad_prompt_is_named_by_its_row_or_left_out(
    bad: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(tn.ValidationError, match=rf"^prompts: row 1: .*{message}"):
        prompt_specs(["a", bad])
    assert prompt_specs(["a", bad, "b"], "skip") == ["a", "b"]
    assert "1 of 3 prompts were left out; the first: prompts: row 1: " in caplog.text
    with pytest.raises(tn.ValidationError, match="There are no prompts"):
        prompt_specs([bad], "skip")


def test_a_prompt_of_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "sums.csv"
    path.write_text("prompt,answer\n1+1=,2\n\n,3\n")
    with pytest.raises(tn.ValidationError, match=r"^prompts: row 1 \(sums\.csv, line 4\): "):
        prompt_specs(path)


@pytest.mark.parametrize("prompts", ["a", {"prompt": "a"}, [ASK], 3, None])
def test_what_is_no_list_of_prompts_is_refused(prompts: Any) -> None:
    with pytest.raises(tn.ValidationError, match=r"^prompts: "):
        prompt_specs(prompts)


def test_a_stream_of_prompts_is_read_once() -> None:
    from tensafe_nb.rlvr import MockRolloutSampler

    batch = MockRolloutSampler(group_size=2).generate_trajectories({"prompt": text} for text in ("a", "b"))
    assert [group.prompt for group in batch.groups] == ["a", "b"]
