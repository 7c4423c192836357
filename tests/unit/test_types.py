import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tensafe_nb as tn
from tensafe_nb.events import Metrics, OperationFailed, RunState
from tensafe_nb.protocol import operations
from tensafe_nb.protocol import results as types
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.codec import from_plain, to_plain


def round_trip(value: Any) -> Any:
    return from_plain(json.loads(json.dumps(to_plain(value), allow_nan=False)))


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
        ({"input_ids": [[1.5, 2.0]]}, r"expected whole numbers"),
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


floats = st.floats(allow_nan=False)
names = st.text(max_size=8)
batches = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 3), st.integers(2, 5)), elements=st.integers(0, 9)
).map(BatchData)
batches_with_extras = batches.map(
    lambda b: BatchData(b.input_ids, b.attention_mask, b.labels, {"weights": np.full(b.shape, 0.5)})
)
samplings = st.builds(
    tn.SamplingConfig,
    temperature=st.just(0.0) | st.floats(0.001, 2),
    stop=st.lists(st.text(min_size=1), max_size=2),
)
submitted = st.one_of(
    st.builds(
        operations.ForwardBackward, batches_with_extras, st.none() | names, st.dictionaries(names, floats)
    ),
    st.builds(operations.Forward, batches, return_logprobs=st.booleans()),
    st.builds(operations.OptimStep, st.booleans()),
    st.builds(operations.Sample, st.lists(names).map(tuple), samplings),
    st.builds(operations.ComputeLogprobs, batches, floats, st.booleans()),
)
infinite = st.floats(allow_nan=False, allow_infinity=True)
sequences = st.builds(
    types.SampledSequence,
    st.integers(0, 5),
    names,
    *[st.lists(st.integers(0, 9)).map(tuple)] * 2,
    *[st.lists(infinite).map(tuple)] * 2,
    names,
    st.integers(0, 2**56),
)
results = st.one_of(
    st.builds(
        types.ForwardBackwardResult, infinite, infinite, st.integers(), st.dictionaries(names, infinite)
    ),
    st.builds(types.OptimStepResult, st.integers(), floats, floats, st.integers(), floats),
    st.builds(types.SampleResult, st.lists(sequences).map(tuple), st.integers()),
    st.builds(types.RunResult, names, names, st.integers(), st.dictionaries(names, floats)),
)
events = st.one_of(
    st.builds(
        Metrics, seq=st.integers(), time=floats, step=st.integers(), values=st.dictionaries(names, infinite)
    ),
    st.builds(OperationFailed, future_id=names, operation=names, code=names, message=names),
    st.builds(
        RunState, run_id=names, state=names, step=st.integers(), planned_steps=st.none() | st.integers()
    ),
)


@given(st.one_of(submitted, results, events))
def test_operations_results_and_events_survive_json(value: Any) -> None:
    assert round_trip(value) == value


def test_arrays_of_results_survive_json_with_their_type() -> None:
    result = types.LogprobsResult(np.zeros((2, 3), dtype=np.float32), np.full((2, 3), np.nan), 4)
    again = round_trip(result)
    assert again.logprobs.dtype == np.float32
    assert np.isnan(again.entropy).all()


def test_a_python_function_cannot_leave_the_process() -> None:
    operation = operations.ForwardBackward(
        BatchData([[1, 2]]), loss_fn=lambda outputs, batch: outputs.logits.sum()
    )
    with pytest.raises(tn.ValidationError, match="cannot leave this process"):
        to_plain(operation)
