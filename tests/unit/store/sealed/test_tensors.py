"""Streamed safetensors, held against the library itself."""

import io
import json
import sys
import weakref
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import ValidationError
from tensafe_nb.store.sealed.tensors import ITEM_SIZES, TensorPart, read_tensors

TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip

names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
kinds = st.tuples(st.sampled_from(sorted(ITEM_SIZES)), st.lists(st.integers(0, 4), max_size=3))
states = st.dictionaries(names, kinds, max_size=6)


def filled(dtype: str, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """A tensor of bytes that differ; of bools, only 0 and 1 are valid."""
    tensor = torch.zeros(list(shape), dtype=TORCH[dtype])
    view = raw(tensor)
    view[:] = np.random.default_rng(seed).integers(
        0, 2 if dtype == "BOOL" else 256, len(view), dtype=np.uint8
    )
    return tensor


def raw(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Its bytes: a view, so what is written to it is the tensor's."""
    return tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def written(part: TensorPart) -> bytes:
    return b"".join(part.chunks())


def read(data: bytes, size: int | None = None) -> list[Any]:
    return list(read_tensors(io.BytesIO(data), len(data) if size is None else size))


@settings(max_examples=60)
@given(states)
def test_the_bytes_are_those_the_library_writes_and_come_back_as_they_went(
    state: dict[str, tuple[str, list[int]]],
) -> None:
    tensors = {name: filled(dtype, shape, at) for at, (name, (dtype, shape)) in enumerate(state.items())}
    part = TensorPart((name, *state[name], raw(tensor)) for name, tensor in tensors.items())
    data = written(part)
    assert data == safetensors.torch.save(tensors)
    assert part.size == len(data)
    back = {name: (dtype, list(shape), bytes(found)) for name, dtype, shape, found in read(data)}
    assert back == {name: (*state[name], raw(tensor).tobytes()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", sorted(ITEM_SIZES))
def test_every_dtype_is_read_as_the_library_reads_it(dtype: str) -> None:
    tensor = filled(dtype, (3, 5))
    loaded = safetensors.torch.load(written(TensorPart([("weight", dtype, (3, 5), raw(tensor))])))
    assert loaded["weight"].dtype == TORCH[dtype]
    assert raw(loaded["weight"]).tobytes() == raw(tensor).tobytes()


def test_what_the_library_wrote_is_read_its_free_text_left_out() -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.int64)}
    data = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    assert [(n, d, s, bytes(b)) for n, d, s, b in read(data)] == [
        ("a", "I64", (3,), arrays["a"].tobytes()),
        ("b", "F32", (2, 3), arrays["b"].tobytes()),
    ]


def test_a_source_is_asked_when_its_turn_comes_and_let_go_before_the_next() -> None:
    made: list[weakref.ref[Any]] = []

    def source(value: int) -> Any:
        def make() -> Any:
            assert all(earlier() is None for earlier in made)
            buffer = array("B", [value])
            made.append(weakref.ref(buffer))
            return buffer

        return make

    part = TensorPart((name, "U8", (1,), source(value)) for value, name in enumerate("abc"))
    chunks = part.chunks()
    next(chunks)
    assert made == []
    assert [bytes(next(chunks)) for _ in "abc"] == [b"\0", b"\1", b"\2"]
    assert len(made) == 3


def test_a_part_can_be_written_twice() -> None:
    part = TensorPart([("w", "F32", (2,), lambda: array("f", [1, 2]))])
    assert written(part) == written(part)


def test_reading_keeps_one_tensor_at_a_time() -> None:
    data = written(TensorPart([(name, "U8", (1 << 20,), bytes(1 << 20)) for name in "abcd"]))
    for _, _, _, tensor in read_tensors(io.BytesIO(data), len(data)):
        assert (
            sys.getrefcount(tensor) == 2
        )  # this loop's name and the call's argument: none inside the reader


def test_short_reads_are_put_together() -> None:
    class Slow(io.BytesIO):
        def readinto(self, buffer: Any, /) -> int:
            return super().readinto(memoryview(buffer)[:3])

    data = written(TensorPart([("w", "I32", (4,), array("i", range(4)))]))
    assert [bytes(b) for *_, b in read_tensors(Slow(data), len(data))] == [array("i", range(4)).tobytes()]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("w", "F32", (2,), bytes(7))], "takes 8 bytes, its buffer has 7"),
        ([("w", "F32", (2,), lambda: bytes(9))], "its buffer has 9"),
        ([("w", "C64", (2,), bytes(16))], "dtype 'C64'"),
        ([("w", "F32", (-1,), b"")], "shape"),
        ([("w", "F32", (1.5,), b"")], "shape"),
        ([("w", "U8", (1,), b"a"), ("w", "U8", (1,), b"b")], "'w'"),
        ([("__metadata__", "U8", (1,), b"a")], "taken"),
        ([("w", "F32", (2, 2), np.ones((2, 4), np.float32)[:, ::2])], "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tensors: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        written(TensorPart(tensors))


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def line(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (99).to_bytes(8, "little") + b"{}",
        (1 << 60).to_bytes(8, "little") + b"{}",
        file_of(b"\xff"),
        file_of(b"[]"),
        file_of(b"[" * 100_000),
        file_of(b'{"a":1}'),
        file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"x"),
        file_of({"a": line(0, 2)}, b"x"),
        file_of({"a": line(0, 2)}, b"xyz"),
        file_of({"a": line(0, 1), "b": line(2, 3)}, b"xyz"),
        file_of({"a": line(0, 2), "b": line(1, 3)}, b"xyz"),
        file_of({"a": line(1, 3)}, b"xyz"),
        file_of({"a": line(0, 3, shape=[2])}, b"xyz"),
        file_of({"a": line(0, 3, shape=[-3])}, b"xyz"),
        file_of({"a": line(0, 3, shape=7)}, b"xyz"),
        file_of({"a": line(0, 3, "STR")}, b"xyz"),
        file_of({"a": {**line(0, 1), "data_offsets": ["0", 1]}, "b": line(1, 2)}, b"xy"),
        file_of({"a": {**line(0, 1), "data_offsets": [0]}}, b"x"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_before_a_tensor_is_yielded(data: bytes) -> None:
    with pytest.raises(ValidationError):
        next(read_tensors(io.BytesIO(data), len(data)))


def test_a_stream_that_ends_early_is_refused() -> None:
    data = written(TensorPart([("a", "U8", (8,), bytes(8))]))
    with pytest.raises(ValidationError, match="3 bytes early"):
        read(data[:-3], len(data))


@settings(max_examples=150)
@given(st.data())
def test_any_damage_to_the_header_is_read_as_the_library_would_or_refused(data: Any) -> None:
    """Never a crash, and never more bytes than the file has."""
    whole = bytearray(written(TensorPart([("a", "F32", (2,), bytes(8)), ("b", "U8", (3,), b"abc")])))
    at = data.draw(st.integers(0, len(whole) - 12))
    whole[at] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(whole))
    except ValidationError:
        return
    assert sum(len(tensor) for *_, tensor in found) == 11
