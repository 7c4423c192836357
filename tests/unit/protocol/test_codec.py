import json
import typing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tensafe_nb as tn
from tensafe_nb import events as all_events
from tensafe_nb.events import Event, Metrics, OperationFailed, RunState
from tensafe_nb.protocol import operations
from tensafe_nb.protocol import results as types
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.codec import DEEPEST, OF_0_1, decode, encode, tags_of, writer_of
from tensafe_nb.protocol.operations import VERBS, Operation


def round_trip(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


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
        RunState,
        run_id=names,
        state=st.sampled_from(types.RunStatus),
        step=st.integers(),
        planned_steps=st.none() | st.integers(),
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
        encode(operation)


def test_a_verb_is_declared_once_with_its_name_its_result_and_its_tag() -> None:
    assert set(VERBS) == {
        "forward_backward", "forward", "optim_step", "sample", "compute_logprobs", "freeze_reference",
        "save_state", "load_state", "void_privacy", "read_adapter", "load_adapter",
    }  # fmt: skip
    for name, operation in VERBS.items():
        assert operation.verb == name == tags_of(operation)[0]
        assert operation.result in typing.get_args(types.Result)
        assert callable(getattr(tn.TrainingClient, name))
    assert [name for name, operation in VERBS.items() if operation.lasting] == ["save_state", "void_privacy"]


def test_every_event_has_a_tag_and_what_0_1_wrote_under_its_class_name_is_read() -> None:
    at_one_end = (Event, all_events.LineChanged)  # the latter never leaves the end that tells it
    classes = [cls for cls in vars(all_events).values() if isinstance(cls, type) and issubclass(cls, Event)]
    events = [cls for cls in classes if cls not in at_one_end]
    for cls in events:
        assert tags_of(cls)[0] not in {other.__name__ for other in events}
    line = {
        "$": "Metrics",
        "seq": 1,
        "time": 2.0,
        "step": 3,
        "values": {"loss": {"$float": "inf"}},
        "run_id": None,
    }
    assert decode(line) == Metrics(seq=1, time=2.0, step=3, values={"loss": float("inf")})
    assert set(OF_0_1.values()) <= {
        tag for cls in [*events, types.ForwardBackwardResult, tn.SamplingConfig, tn.TrainingConfig]
        if cls is not Event for tag in tags_of(cls)
    }  # fmt: skip


METRICS = {"$": "metrics", "step": 3, "values": {"loss": 1.0}}
SAMPLE = {"$": "sample", "prompts": ["a"], "sampling": encode(tn.SamplingConfig())}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"$": "from_the_future"}, "Unknown tag 'from_the_future': written by a newer version"),
        ({"$": "Operation"}, "Unknown tag"),
        ({"$": "BatchData", "input_ids": [[1]]}, "Unknown tag"),
        ({"$": ["metrics"]}, "Unknown tag"),
        ({"$": None}, "Unknown tag"),
        (METRICS | {"more": 1}, "'metrics' does not read: more: Extra inputs"),
        ({"$": "metrics", "values": {}}, "'metrics' does not read: step: Field required"),
        (METRICS | {"step": "3"}, "step: Input should be a valid integer"),
        (METRICS | {"step": True}, "step: Input should be a valid integer"),
        (METRICS | {"step": 3.0}, "step: Input should be a valid integer"),
        (METRICS | {"values": {"loss": "1"}}, "values.loss: Input should be a valid number"),
        (METRICS | {"values": [["loss", 1.0]]}, "values: Input should be a valid dictionary"),
        (SAMPLE | {"sampling": {"temprature": 1.0}}, "temprature"),
        ({"$": "sampling_config", "temperature": -1.0}, "SamplingConfig.temperature"),
        ({"$": "forward_backward", "batch": METRICS}, "batch: Input should be an instance of BatchData"),
        ({"$array": [[1, 2], [3]], "dtype": "<i8"}, "does not read"),
        ({"$array": [1], "dtype": "<U4000000000"}, "one of the types"),
        ({"$array": [1], "dtype": "|O"}, "one of the types"),
        ({"$array": [1], "dtype": "<i8,<i8"}, "one of the types"),
        ({"$array": [1]}, "one of the types"),
        ({"$array": ["1"], "dtype": "<i8"}, "numbers"),
        ({"$array": [300], "dtype": "|u1"}, "does not read"),
        ({"$array": [[[[[1]]]]], "dtype": "<i8"}, "at most 4 dimensions"),
        ({"$array": {"$float": "1e400"}, "dtype": "<f8"}, "not finite"),
        ({"$float": "__import__"}, "not finite is inf, -inf or nan"),
        ({"$map": {"a": 1}}, "pairs"),
        ({"$map": [["$a", 1, 2]]}, "pairs"),
        ({"$map": [[1, 2]]}, "pairs"),
    ],
)  # fmt: skip
def test_what_is_no_record_of_ours_is_refused_with_what_does_not_fit(data: Any, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        decode(data)


@pytest.mark.parametrize("open_, close", [("[", "]"), ('{"a":', "}"), ('{"$map":[["$a",', "]]}")])
def test_nesting_without_end_is_refused(open_: str, close: str) -> None:
    deep = json.loads(open_ * (DEEPEST + 1) + "1" + close * (DEEPEST + 1))
    with pytest.raises(tn.ValidationError, match="nested more than"):
        decode(deep)


def test_a_reader_says_which_records_it_takes() -> None:
    metrics, step = encode(Metrics(step=1, values={})), encode(operations.OptimStep())
    assert decode(metrics, Event) == Metrics(step=1, values={})
    assert decode(step, Operation) == operations.OptimStep()
    with pytest.raises(tn.ValidationError, match="Expected a record 'Operation', not 'metrics'"):
        decode(metrics, Operation)
    with pytest.raises(
        tn.ValidationError, match="Expected a record 'metrics' or 'run_state', not 'optim_step'"
    ):
        decode(step, Metrics, RunState)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("ours", [{}, {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}])
@given(value=plain)
def test_what_is_written_often_is_written_as_json_writes_it(ours: dict[str, Any], value: Any) -> None:
    encoder = json.JSONEncoder(allow_nan=False, **ours)
    assert writer_of(encoder)(value) == encoder.encode(value)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], object(), {"deep": {(): 1}}])
def test_what_json_refuses_is_refused_when_written_often(value: Any) -> None:
    encoder = json.JSONEncoder(allow_nan=False)
    for write in (encoder.encode, writer_of(encoder)):
        with pytest.raises((TypeError, ValueError)):
            write(value)


def test_no_class_name_is_written() -> None:
    written = json.dumps(
        [encode(Metrics(step=1, values={})), encode(tn.TrainingConfig()), encode(BatchData([[1, 2]]))]
    )
    assert [record["$"] for record in json.loads(written)] == ["metrics", "training_config", "batch_data"]
