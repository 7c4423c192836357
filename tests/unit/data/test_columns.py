"""Columns by name, templates, answers behind a mark, and rows that are held out."""

import json

import pandas as pd
import pytest

from tensafe_nb.data import read_rows, split_rows
from tensafe_nb.data.columns import PromptColumns
from tensafe_nb.errors import ValidationError

GSM8K = {"question": "2 apples and 3?", "answer": "2 and 3 are <<2+3=5>>5.\n#### 5"}


def test_a_data_set_like_gsm8k_is_read_by_the_names_of_its_columns(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps(GSM8K))
    expected = [{"prompt": "2 apples and 3?", "answer": "5"}]
    for source in (path, [GSM8K], pd.DataFrame([GSM8K])):
        assert read_rows(source, prompt="question", answer="answer", answer_after="####") == expected


def test_a_solution_is_never_taken_for_an_answer_in_silence():
    with pytest.raises(ValidationError, match=r"Row 0: .*'answer' holds a solution.*answer_after='####'"):
        read_rows([GSM8K], prompt="question", answer="answer")
    with pytest.raises(ValidationError, match="answer='answer', answer_after='####'"):
        read_rows([GSM8K], prompt="question")
    whole = read_rows([GSM8K], prompt="question", answer="answer", answer_after="")
    assert whole[0]["answer"] == GSM8K["answer"]
    plain = {"question": "q", "answer": "5"}
    with pytest.raises(ValidationError, match=r"Row 1: .*has no '####'"):
        read_rows([GSM8K, plain], prompt="question", answer="answer", answer_after="####")


def test_a_template_makes_the_prompt_of_columns_and_leaves_them_to_the_reward():
    row = {"question": "2+3", "hint": 7, "answer": "5"}
    read = read_rows([row], template="Q: {question} ({hint}) {{x}}\nA:")
    assert read == [row | {"prompt": "Q: 2+3 (7) {x}\nA:"}]
    asked = read_rows([row], prompt="question", template="Q: {prompt}\nA:")
    assert asked == [{"prompt": "Q: 2+3\nA:", "hint": 7, "answer": "5"}]
    assert read_rows(["2+3="], template="Add: {prompt}") == [{"prompt": "Add: 2+3="}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Q: {qestion}"}, "no column 'qestion'.* 'question'"),
        ({"prompt": "Question"}, "prompt='Question': there is no column.* 'question'"),
        ({"answer": "solution"}, "no column 'solution'"),
        ({"template": "Q:"}, "names no column"),
        ({"template": "{}"}, "between braces stands the name"),
        ({"template": "{question.__class__}"}, "between braces stands the name"),
        ({"template": "{question[0]}"}, "between braces stands the name"),
        ({"template": "{question!r}"}, "between braces stands the name"),
        ({"template": "{question"}, "written twice"),
        ({"answer_after": "####"}, "name the column, answer="),
        ({"prompt": ""}, "the name of a column"),
    ],
)
def test_what_names_no_column_is_refused_with_the_nearest_name(options, message):
    with pytest.raises(ValidationError, match=message):
        read_rows([GSM8K], **options)


def test_a_column_that_another_would_cover_is_not_lost_in_silence():
    with pytest.raises(ValidationError, match="a column 'prompt' besides 'question'"):
        read_rows([{"prompt": "a", "question": "b"}], prompt="question")


def test_without_names_rows_stay_as_they_are():
    assert not PromptColumns()
    assert read_rows(["a", GSM8K]) == ["a", GSM8K]


def test_a_row_stays_on_its_side_when_rows_are_added_and_shuffled():
    rows = [{"prompt": str(n), "answer": n} for n in range(400)]
    train, test = split_rows(rows, 0.1)
    assert 20 <= len(test) <= 60
    assert sorted(row["answer"] for row in train + test) == list(range(400))
    _, more_test = split_rows([{"prompt": "new", "answer": 1}, *reversed(rows)], 0.1)
    assert {row["prompt"] for row in test} == {row["prompt"] for row in more_test} - {"new"}
    other = split_rows(rows, 0.1, seed=1)[1]
    assert other != test


def test_a_larger_share_holds_out_what_a_smaller_one_did():
    rows = [str(n) for n in range(200)]
    assert set(split_rows(rows, 0.1)[1]) < set(split_rows(rows, 0.3)[1])


def test_rows_with_the_same_question_are_on_one_side():
    rows = [{"prompt": str(n % 50), "answer": n} for n in range(200)]
    train, test = split_rows(rows, 0.2, by="prompt")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


@pytest.mark.parametrize(
    ("rows", "share", "message"),
    [
        (["a"], 0.5, "leaves none"),
        (["a", "b"], 1.0, "between 0 and 1"),
        (["a", "b"], 10, "between 0 and 1"),
        (["a", "b"], True, "between 0 and 1"),
    ],
)
def test_a_share_that_parts_nothing_is_refused(rows, share, message):
    with pytest.raises(ValidationError, match=message):
        split_rows(rows, share)
