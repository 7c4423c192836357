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
        ({"input_ids": [[1, 2]], "weights": [None]}, r"weights cannot be read as one array.*mixed objects"),
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
