import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb import data


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from tensafe_nb.engine.models.load import ASSETS

    return AutoTokenizer.from_pretrained(ASSETS / "tiny")


def learnt_text(example: data.Example, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != -100], skip_special_tokens=False)


def test_of_a_pair_only_the_completion_and_the_end_are_learnt(tokenizer: Any) -> None:
    example = data.encode({"prompt": "len(obj)\n", "completion": "Return the length."}, tokenizer)
    assert learnt_text(example, tokenizer) == "Return the length." + tokenizer.eos_token
    assert example.labels[-1] == -100


def test_of_a_text_everything_after_the_first_token_is_learnt(tokenizer: Any) -> None:
    example = data.encode("Return the length.", tokenizer)
    assert list(example.labels[:-1]) == list(example.input_ids[1:])
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_of_a_chat_only_the_assistants_turns_are_learnt(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    learnt = learnt_text(data.encode({"messages": messages}, tokenizer), tokenizer)
    assert "two" in learnt and "four" in learnt
    assert "one" not in learnt and "three" not in learnt


def test_rows_come_from_lists_iterables_jsonl_and_datasets(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    datasets = pytest.importorskip("datasets")
    for source in (rows, iter(rows), path, str(path), datasets.Dataset.from_list(rows)):
        assert data.read_rows(source) == rows


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (None, "There is no file"),
        ("", "There are no rows"),
        ('{"text": "a"}\n{oops\n', r"Row 1 \(rows\.jsonl, line 2\): not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path: Path, write: str | None, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    if write is not None:
        path.write_text(write)
    with pytest.raises(tn.ValidationError, match=message):
        data.read_rows(path)


def test_a_row_that_cannot_be_used_says_why(tokenizer: Any) -> None:
    with pytest.raises(tn.ValidationError, match=r"keys \['question'\] cannot be read"):
        data.encode({"question": "?"}, tokenizer)
    with pytest.raises(tn.ValidationError, match=r"Nothing is left to learn.*max_length=2"):
        data.encode({"prompt": "a long prompt", "completion": "x"}, tokenizer, max_length=2, truncate=True)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 7), st.booleans(), st.integers(0, 3)
)
def test_every_pass_holds_every_example_once(
    lengths: list[int], batch_size: int, bucket: bool, seed: int
) -> None:
    examples = [
        data.Example((number,) * length, (number,) * length) for number, length in enumerate(lengths, 1)
    ]
    batches = data.Batches(examples, batch_size, 0, bucket=bucket, seed=seed)
    for _ in range(2):
        rows = [int(row[0]) for batch in batches for row in batch.input_ids]
        assert sorted(rows) == list(range(1, len(lengths) + 1))
    assert len(batches) == -(-len(examples) // batch_size)


def test_passes_differ_and_repeat_with_the_seed() -> None:
    examples = [data.Example((n, n), (n, n)) for n in range(20)]

    def two_passes(seed: int) -> list[list[int]]:
        batches = data.Batches(examples, 4, 0, seed=seed)
        return [[int(row[0]) for batch in batches for row in batch.input_ids] for _ in range(2)]

    first, second = two_passes(1)
    assert first != second
    assert two_passes(1) == [first, second]
    assert two_passes(2) != [first, second]


def test_bucketing_saves_padding() -> None:
    examples = [data.Example((1,) * (2 + n % 30), (1,) * (2 + n % 30)) for n in range(300)]

    def padding(bucket: bool) -> int:
        return sum(int((b.attention_mask == 0).sum()) for b in data.Batches(examples, 8, 0, bucket=bucket))

    assert padding(True) < 0.3 * padding(False)


PREFERENCES = {"prompt": "len(obj)\n", "chosen": "Return the length.", "rejected": "Sort the list in place."}
TEXTS = {"anchor": "len(obj)", "positive": "Return the length."}


def test_of_a_preference_the_completions_are_learnt_after_the_same_prompt(tokenizer: Any) -> None:
    pairs = data.batches([PREFERENCES] * 3, tokenizer, batch_size=2, shuffle=False)
    assert repr(pairs) == "<Batches 2 of 2 pairs, 6 examples>"
    first, last = pairs
    assert (len(first), len(last)) == (4, 2)
    chosen, rejected = pairs.examples[:2]
    assert learnt_text(chosen, tokenizer) == PREFERENCES["chosen"] + tokenizer.eos_token
    assert learnt_text(rejected, tokenizer) == PREFERENCES["rejected"] + tokenizer.eos_token
    unlearnt = chosen.labels.index(chosen.input_ids[chosen.labels.count(-100)])
    assert chosen.input_ids[:unlearnt] == rejected.input_ids[:unlearnt]


def test_of_two_texts_about_the_same_each_is_a_row(tokenizer: Any) -> None:
    (batch,) = data.batches([TEXTS], tokenizer, batch_size=1)
    rows = [
        tokenizer.decode(ids[mask == 1])
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert rows == [TEXTS["anchor"] + tokenizer.eos_token, TEXTS["positive"] + tokenizer.eos_token]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_pass_holds_every_pair_once_with_its_rows_next_to_each_other(
    lengths: list[tuple[int, int]], batch_size: int, shuffle: bool, bucket: bool, seed: int
) -> None:
    examples = [
        data.Example((1 + 2 * pair + side,) * length, (1,) * length)
        for pair, both in enumerate(lengths)
        for side, length in enumerate(both)
    ]
    batches = data.Batches(examples, batch_size, 0, group=2, shuffle=shuffle, bucket=bucket, seed=seed)
    for _ in range(2):
        passed = [batch.input_ids[:, 0].tolist() for batch in batches]
        assert len(passed) == len(batches) == -(-len(lengths) // batch_size)
        assert max(map(len, passed)) <= 2 * batch_size
        assert all(
            left % 2 == 1 and right == left + 1
            for rows in passed
            for left, right in zip(rows[::2], rows[1::2], strict=True)
        )
        assert sorted(left // 2 for rows in passed for left in rows[::2]) == list(range(len(lengths)))


def test_bucketing_brings_pairs_of_like_length_together() -> None:
    examples = [data.Example((1,) * (2 + n % 30), (1,) * (2 + n % 30)) for n in range(600)]

    def padding(bucket: bool) -> int:
        batches = data.Batches(examples, 8, 0, group=2, bucket=bucket)
        return sum(int((batch.attention_mask == 0).sum()) for batch in batches)

    assert padding(True) < 0.3 * padding(False)


@given(st.integers(1, 4), st.integers(1, 9))
def test_targets_stay_with_their_rows(width: int, rows: int) -> None:
    examples = [data.Example((row, row), (row, -100), (float(row),) * width) for row in range(1, rows + 1)]
    for batch in data.Batches(examples, 2, 0):
        assert batch.extras["targets"].tolist() == [[row] * width for row in batch.input_ids[:, 0].tolist()]


@pytest.mark.parametrize("target", [0.5, [0.5, 2], (1, 2, 3), np.array([1.0, 2.0])])
def test_a_row_may_have_numbers_to_be_compared_with(tokenizer: Any, target: Any) -> None:
    rows = [{"text": "one", "target": target}, {"prompt": "two", "completion": "three", "target": target}]
    (batch,) = data.batches(rows, tokenizer, batch_size=2)
    assert batch.extras["targets"].tolist() == [np.atleast_1d(target).tolist()] * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PREFERENCES, "a text"], r"Row 1 is no pair, row 0 is one: batch them separately"),
        (["a text", TEXTS], r"Row 1 is a pair, row 0 is none"),
        (
            [{"chosen": "a", "rejected": "b"}],
            r"keys \['chosen', 'rejected'\] cannot be read.*'prompt', 'chosen'",
        ),
        ([{"text": "a", "target": "positive"}], r"is no list of numbers.*'mse'.*another name"),
        ([{"text": "a", "target": [[1.0]]}], r"is no list of numbers"),
        ([{"text": "a", "target": [1.0]}, {"text": "b", "target": [1.0, 2.0]}], r"between 1 and 2 numbers"),
        ([{"text": "a", "target": [1.0]}, "b"], r"between 0 and 1 numbers"),
    ],
)
def test_pairs_and_targets_that_cannot_be_batched_say_why(
    tokenizer: Any, rows: list[Any], message: str
) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        data.batches(rows, tokenizer)


def test_an_empty_answer_is_one(tokenizer: Any) -> None:
    rejected = data.batches([PREFERENCES | {"rejected": ""}], tokenizer).examples[1]
    assert learnt_text(rejected, tokenizer) == tokenizer.eos_token


def test_examples_make_whole_groups() -> None:
    with pytest.raises(tn.ValidationError, match="3 examples do not make whole groups of 2"):
        data.Batches([data.Example((1, 2), (2, -100))] * 3, 4, 0, group=2)


def test_every_line_that_json_allows_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\ufeff" + json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert data.read_rows(path) == [{"text": "one\u2028two\x85three"}]


def test_files_and_rows_of_the_wrong_kind_are_named(tmp_path: Path, tokenizer: Any) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(tn.ValidationError, match="line 1: not UTF-8"):
        data.read_rows(latin)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "one"}\n[{"text": "two"}]\n')
    with pytest.raises(tn.ValidationError, match=r"line 2\): a list: one JSON object per line"):
        data.read_rows(mixed)
    with pytest.raises(tn.ValidationError, match=r"put it in a list, \[row\]"):
        data.read_rows({"text": "one"})
    with pytest.raises(tn.ValidationError, match="max_length=1 must be a whole number of at least 2"):
        data.encode("a text", tokenizer, max_length=1)
