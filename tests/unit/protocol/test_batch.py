from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.protocol.batch import BatchData


def test_labels_default_to_the_next_token_of_the_same_row() -> None:
    batch = BatchData(input_ids=[[1, 2, 3, 0], [4, 5, 6, 7]], attention_mask=[[1, 1, 1, 0], [1, 1, 1, 1]])
    assert batch.labels.tolist() == [[2, 3, -100, -100], [5, 6, 7, -100]]


def test_a_batch_takes_lists_arrays_and_tensors_alike() -> None:
    torch = pytest.importorskip("torch")
    rows = [[1, 2], [3, 4]]
    assert BatchData(rows) == BatchData(np.array(rows)) == BatchData(torch.tensor(rows))
    assert BatchData.of({"input_ids": rows}) == BatchData(rows)


def test_rows_are_cut_out_without_the_columns_that_are_padding_in_all_of_them() -> None:
    batch = BatchData(
        [[1, 2, 3, 0], [4, 5, 0, 0]], [[1, 1, 1, 0], [1, 1, 0, 0]], advantages=[[1.0] * 4, [2.0] * 4]
    )
    part = batch.rows(1, 2)
    assert part.shape == (1, 2)
    assert part.extras["advantages"].tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2], [3]]}, r"row 1 has 1 entries, row 0 has 2.*pad them"),
        ({"input_ids": []}, r"shape \(0,\).*at least one of each"),
        ({"input_ids": [[]]}, r"at least one of each"),
        ({"input_ids": [[1.5, 2.0]]}, r"holds float64, expected whole numbers"),
        ({"input_ids": [["a"]]}, r"holds texts, expected whole numbers"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            r"attention_mask has shape \(1, 1\), input_ids has \(1, 2\)",
        ),
        ({"input_ids": [[1, 2]], "labels": [[1, 2, 3]]}, r"labels has shape \(1, 3\)"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, r"only 0 \(padding\) and 1"),
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, r"every label is -100.*Label at least one"),
        ({"input_ids": [[1], [2]]}, r"one token long"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1, 0]], "labels": [[2, 3]]},
            r"labels\[0\]\[1\] is 3 where",
        ),
        ({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [0, 0]]}, r"row 1 is all padding"),
        ({"input_ids": [[1, 2]], "weights": [1.0, 2.0]}, r"weights has shape \(2,\)"),
        (
            {"input_ids": [[1, 2], [3, 4]], "weights": [[1.0], [2.0, 3.0]]},
            r"weights cannot be read as one array",
        ),
        ({"input_ids": [[1, 2]], "weights": [None]}, r"weights\[0\] is None: expected numbers or texts"),
        ({"input_ids": [[1, 2]], "weights": None}, r"weights is None: expected numbers or texts"),
        ({"input_ids": [[1, 2]], "notes": [["a", 1]]}, r"notes\[0\]\[1\] is 1: expected texts"),
    ],
)
def test_a_batch_that_does_not_fit_says_what_where_and_what_next(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        BatchData(**arguments)


def test_a_dict_without_input_ids_is_refused() -> None:
    with pytest.raises(tn.ValidationError, match="no 'input_ids'; it has \\['tokens'\\]"):
        BatchData.of({"tokens": [[1]]})


@pytest.mark.parametrize("ids", [["a", "bc"], [3, 2**63 - 1], [2**63, 2**63 + 1], [0.5, 2.0]])
def test_ids_in_objects_are_the_ids_of_a_list(ids: list[Any]) -> None:
    pandas = pytest.importorskip("pandas")
    listed = BatchData([[1, 2]] * 2, example_ids=ids)
    for given in (pandas.Series(ids), pandas.Series(ids, dtype=object), np.array(ids, dtype=object)):
        assert BatchData([[1, 2]] * 2, example_ids=given) == listed
    assert listed.extras["example_ids"].tolist() == ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", None], r"\[1\] is None: expected texts, like the entries before it"),
        ([1, "1"], r"\[1\] is '1': expected numbers"),
        (["1", b"1"], r"\[1\] is b'1': expected texts"),
        ([True, "True"], r"\[1\] is 'True': expected numbers"),
        (["a", "a\0"], r"\[1\] is .*a text must not hold a NUL"),
        ([b"a", b"a\0"], r"\[1\] is .*a text must not hold a NUL"),
        ([1, 2**70], r"\[1\] is 1180591620717411303424: no array holds so large a number"),
        ([2**53, 2**53 + 1, 0.5], r"\[1\] is 9007199254740993, which .* would round"),
    ],
)
def test_ids_that_numpy_would_take_for_one_are_refused_by_their_place(ids: list[Any], message: str) -> None:
    with pytest.raises(tn.ValidationError, match=f"BatchData.example_ids{message}"):
        BatchData([[1, 2]] * len(ids), example_ids=ids)
