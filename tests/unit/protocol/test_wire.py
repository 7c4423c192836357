import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tensafe_nb as tn
from tensafe_nb.protocol import results, wire
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.operations import ForwardBackward, FreezeReference, Operation, OptimStep

batches = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 3), st.integers(2, 5)), elements=st.integers(0, 9)
).map(lambda ids: BatchData(ids, advantages=np.full(ids.shape, 0.5, np.float32)))
keywords = st.dictionaries(st.text(max_size=6), st.floats(allow_nan=False))
OPERATION = ForwardBackward(BatchData([[1, 2, 3, 4]]), "token_ce", {"label_smoothing": 0.1})


@given(st.builds(ForwardBackward, batches, st.none() | st.text(max_size=8), keywords))
def test_an_operation_with_a_batch_survives_the_wire(operation: Any) -> None:
    media_type, body = wire.pack(operation)
    assert media_type == wire.TENSORS
    assert wire.unpack(media_type, body, Operation) == operation


def test_a_record_without_arrays_is_json_that_anybody_can_write() -> None:
    assert wire.pack(FreezeReference()) == (wire.JSON, b'{"$":"freeze_reference"}')
    by_hand = b'{"$": "optim_step"}'
    assert wire.unpack("application/json; charset=utf-8", by_hand, Operation) == OptimStep()


def test_arrays_keep_type_shape_and_what_is_not_finite() -> None:
    sent = results.LogprobsResult(np.zeros((2, 3), np.float32), np.full((2, 3), np.nan), 4, np.ones((0, 3)))
    got = wire.unpack(*wire.pack(sent))
    for name in ("logprobs", "entropy", "values"):
        assert getattr(got, name).dtype == getattr(sent, name).dtype
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))


def body_of(header: dict[str, Any], data: bytes = b"") -> bytes:
    """Lay a body out by hand, without what `pack` would refuse."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


EMPTY = {"__metadata__": {"record": "{}"}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "does not fit a body of 0"),
        (b"\xff" * 66, "does not fit a body of 66"),
        (body_of({})[:-1], "does not fit"),
        (body_of({}), "no metadata 'record'"),
        (body_of({"__metadata__": {"record": "{"}}), "no JSON"),
        (
            body_of({**EMPTY, "0": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
            "do not read",
        ),
        (
            body_of({**EMPTY, "0": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}, b"ab"),
            "has the type 'BF16'",
        ),
        (body_of({"__metadata__": {"record": '{"$tensor": "7"}'}}), "tensor '7' did not come"),
    ],
)  # fmt: skip
def test_a_body_that_does_not_fit_is_refused_before_anything_is_allocated(body: bytes, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        wire.unpack(wire.TENSORS, body)


@pytest.mark.parametrize(
    ("media_type", "body", "message"),
    [
        ("text/html", b"{}", "not 'text/html'"),
        (wire.JSON, b"[" * 100_000, "no JSON|nested"),
        (wire.JSON, b'{"$": "sample"}', "prompts: Field required"),
        (wire.JSON, b"NaN", "is no JSON"),
        (wire.JSON, b"{}", "Expected a record"),
    ],
)
def test_what_is_no_operation_is_refused(media_type: str, body: bytes, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        wire.unpack(media_type, body, Operation)


@given(st.integers(0, 2**31), st.data())
def test_a_body_with_any_byte_altered_is_read_or_refused_in_our_words(seed: int, data: st.DataObject) -> None:
    media_type, body = wire.pack(OPERATION)
    altered = bytearray(body)
    altered[data.draw(st.integers(0, len(body) - 1))] = seed % 256
    with contextlib.suppress(tn.ValidationError):
        wire.unpack(media_type, bytes(altered), Operation)
