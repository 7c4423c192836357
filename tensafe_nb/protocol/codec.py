"""The form in which records are stored and sent: JSON with explicit tags.

A record is an object `{"$": tag, field: value, …}`. Its tag is declared beside its class and is the format: a class may
be renamed, its tag may not. `decode(json.loads(json.dumps(encode(x)))) == x` for every class marked with `@tagged`.

Reading is strict: an unknown tag, a field that is missing, unknown or of another type, an array of a type or of more
dimensions than any record has, nesting without end: each is refused before anything is allocated for it. Never pickle.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar, get_type_hints

import numpy as np
import pydantic
from numpy.typing import NDArray

from tensafe_nb.config import Config, SamplingConfig, StepConfig, TrainingConfig
from tensafe_nb.display import as_given, shown
from tensafe_nb.errors import ValidationError
from tensafe_nb.registry import name_of

C = TypeVar("C", bound=type)
DEEPEST = 64  # objects and lists in each other: records have five or six, a user's metadata may have more
DIMENSIONS = 4  # of an array: a batch has two, an extra seldom three
DTYPES = frozenset({"|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"})
TEXTS = re.compile(r"<U[0-9]{1,5}")  # the type of an array of texts, such as the ids of people
MOST_TEXT_BYTES = 64 << 20  # of such an array, which takes the longest text's room for each
OF_0_1 = {  # where the tags are now, version 0.1 wrote these class names
    "Alarm": "alarm",
    "ArtifactDeleted": "artifact_deleted",
    "CheckpointSaved": "checkpoint_saved",
    "ClientCreated": "client_created",
    "Forked": "forked",
    "ForwardBackwardResult": "forward_backward_result",
    "Metrics": "metrics",
    "MockTookPart": "mock_took_part",
    "OperationCancelled": "operation_cancelled",
    "OperationFailed": "operation_failed",
    "OperationFinished": "operation_finished",
    "OperationQueued": "operation_queued",
    "OperationStarted": "operation_started",
    "PrivacySpent": "privacy_spent",
    "Rollouts": "rollouts",
    "RunState": "run_state",
    "RunStep": "run_step",
    "SamplingConfig": "sampling_config",
    "StateLoaded": "state_loaded",
    "StatusChanged": "status_changed",
    "TrainingConfig": "training_config",
}
_AS_IT_IS = frozenset({str, int, bool, type(None)})
_classes: dict[str, type] = {
    "sampling_config": SamplingConfig,
    "step_config": StepConfig,
    "training_config": TrainingConfig,
}
_tags: dict[type, str] = {cls: tag for tag, cls in _classes.items()}


def tagged(tag: str) -> Callable[[C], C]:
    """Class decorator for dataclasses: instances are written under `tag`, and a notebook shows them as a table."""

    def register(cls: C) -> C:
        _classes[tag], _tags[cls] = cls, tag
        return shown(cls)

    return register


def tags_of(cls: type) -> tuple[str, ...]:
    """Return the tags under which a class's records lie in files: today's, and what version 0.1 wrote."""
    tag = _tags[cls]
    return (tag, *(old for old, new in OF_0_1.items() if new == tag))


def encode(value: Any, arrays: dict[str, NDArray[Any]] | None = None) -> Any:
    """Turn a record, and what its fields may hold, into what `json.dumps(…, allow_nan=False)` takes.

    Args:
        value: The record.
        arrays: Takes the arrays, under names of ours, for whoever sends them beside the JSON; None writes them into it.

    Raises:
        ValidationError: The value holds a Python function, which cannot leave the process.
    """
    kind = type(value)
    if kind in _tags and not issubclass(kind, Config):  # first: three such records come with each operation
        record: dict[str, Any] = {"$": _tags[kind]}
        for name in field_names(kind):  # type: ignore[arg-type]  # a class can be hashed
            found = getattr(value, name)
            as_it_is = type(found) in _AS_IT_IS or (type(found) is float and math.isfinite(found))
            record[name] = found if as_it_is else encode(found, arrays)
        return record
    match value:
        case None | bool() | str() | int():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": str(value)}
        case np.ndarray() if arrays is not None and value.dtype.kind != "U":
            name = str(len(arrays))
            arrays[name] = value
            return {"$tensor": name}
        case np.ndarray():
            return {"$array": encode(value.tolist()), "dtype": value.dtype.str}
        case np.generic():
            return encode(value.item())
        case Mapping():
            items = {str(key): encode(item, arrays) for key, item in value.items()}
            return {"$map": list(items.items())} if any(key.startswith("$") for key in items) else items
        case list() | tuple():
            return [encode(item, arrays) for item in value]
        case Config():
            return {"$": _tags[type(value)]} | encode(value.model_dump())
    if callable(value):
        raise ValidationError(
            f"The Python function {as_given(name_of(value))} cannot leave this process. "
            f"Remotely, losses are given by registered name."
        )
    raise ValidationError(f"A {type(value).__name__} cannot be written as plain data.")


def writer_of(encoder: json.JSONEncoder) -> Callable[[Any], str]:
    """Return what writes as `encoder.encode` does, for whoever writes small things often.

    `encode` makes its inner half, which is compiled, anew for each value: of a record's time, that is a third. Here it
    is made once. Cycles end in a RecursionError.
    """
    compiled = getattr(json.encoder, "c_make_encoder", None)  # CPython has it
    if compiled is None:
        return encoder.encode
    of_text = json.encoder.encode_basestring_ascii if encoder.ensure_ascii else json.encoder.encode_basestring
    pieces = compiled(
        None,
        encoder.default,
        of_text,
        None,
        encoder.key_separator,
        encoder.item_separator,
        encoder.sort_keys,
        encoder.skipkeys,
        encoder.allow_nan,
    )
    return lambda value: "".join(pieces(value, 0))


@cache
def field_names(cls: type) -> tuple[str, ...]:
    """Return the names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(cls))


def decode(data: Any, *kinds: type, arrays: Mapping[str, NDArray[Any]] | None = None) -> Any:
    """Read back what `encode` wrote. Sequences come back as tuples.

    Args:
        data: As `json.loads` gave it.
        kinds: The classes it may be an instance of; any when none is given.
        arrays: Those that came beside the JSON.

    Raises:
        ValidationError: It is no such record; says what does not fit, and in which field.
    """
    value = _decoded(data, DEEPEST, arrays or {})
    if kinds and not isinstance(value, kinds):
        expected = " or ".join(repr(_tags.get(kind, kind.__name__)) for kind in kinds)
        raise ValidationError(
            f"Expected a record {expected}, not {_tags.get(type(value), type(value).__name__)!r}."
        )
    return value


def _decoded(data: Any, depth: int, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if not isinstance(data, list | dict):
        return data
    if depth == 0:
        raise ValidationError(f"This is nested more than {DEEPEST} deep, as no record is.")
    if isinstance(data, list):
        return tuple([_decoded(item, depth - 1, arrays) for item in data])
    if "$float" in data:
        return _float(data)
    if "$map" in data:
        return {key: _decoded(item, depth - 1, arrays) for key, item in _pairs(data["$map"])}
    if "$array" in data:
        return _array(data)
    if "$tensor" in data:
        return _tensor(data["$tensor"], arrays)
    values = {key: _decoded(item, depth - 1, arrays) for key, item in data.items() if key != "$"}
    return _record(data["$"], values) if "$" in data else values


def _record(given: Any, values: dict[str, Any]) -> Any:
    tag = OF_0_1.get(given, given) if isinstance(given, str) else None
    if tag not in _classes:
        raise ValidationError(f"Unknown tag {as_given(given)}: written by a newer version?")
    cls = _classes[tag]
    for name in _plain_fields(tag) & values.keys():
        values[name] = _with_lists(values[name])
    if issubclass(cls, Config):  # reads answers as a user types them, and refuses the rest
        return cls(**values)
    try:
        checked = _checker(tag).model_validate(values)
    except pydantic.ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3]
        )
        raise ValidationError(f"The record {tag!r} does not read: {faults}.") from error
    return cls(**{name: getattr(checked, name) for name in checked.model_fields_set})


@cache
def _plain_fields(tag: str) -> frozenset[str]:
    """Return the fields that hold a user's own plain data: its lists come back as lists."""
    cls = _classes[tag]
    if issubclass(cls, Config):
        return frozenset()
    free = (Mapping[str, Any], Mapping[str, Any] | None)
    return frozenset(name for name, kind in get_type_hints(cls).items() if kind in free)


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, tuple) else value


@cache
def _checker(tag: str) -> type[pydantic.BaseModel]:
    """Return the model that checks the fields of a record: of exactly the types of its class, and no others."""
    cls = _classes[tag]
    types, fields = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        fields[field.name] = (types[field.name], ... if required else None)
    rules = pydantic.ConfigDict(
        strict=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )
    return pydantic.create_model(cls.__name__, __config__=rules, **fields)  # type: ignore[call-overload, no-any-return]


def _float(data: Mapping[str, Any]) -> float:
    """Read what JSON has no number for: "inf", "-inf", "nan"."""
    if data["$float"] not in ("inf", "-inf", "nan"):
        raise ValidationError(
            f"A number that is not finite is inf, -inf or nan, not {as_given(data['$float'])}."
        )
    return float(data["$float"])


def _pairs(pairs: Any) -> list[list[Any]]:
    """Return a mapping's pairs: written so where one of its keys begins with a dollar sign."""
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise ValidationError(
            f"A mapping is written as pairs of a name and a value, not as {as_given(pairs)}."
        )
    return pairs


def _tensor(name: Any, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    if not isinstance(name, str) or name not in arrays:
        raise ValidationError(f"The tensor {as_given(name)} did not come with this record.")
    return arrays[name]


def _array(data: Mapping[str, Any]) -> NDArray[Any]:
    dtype = data.get("dtype")
    if isinstance(dtype, str) and TEXTS.fullmatch(dtype):
        return _texts(data["$array"], dtype)
    if dtype not in DTYPES:
        raise ValidationError(f"An array has one of the types {sorted(DTYPES)}, not {as_given(dtype)}.")
    try:
        array = np.array(_numbers(data["$array"], DIMENSIONS), dtype=dtype)
    except (ValueError, OverflowError, TypeError) as error:
        raise ValidationError(f"An array of {dtype} does not read: {error}.") from error
    return array


def _texts(data: Any, dtype: str) -> NDArray[Any]:
    longest = int(dtype[2:])
    if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
        raise ValidationError(f"An array of {dtype} is a list of texts, not {as_given(data)}.")
    if any(len(text) > longest for text in data) or 4 * longest * len(data) > MOST_TEXT_BYTES:
        raise ValidationError(f"{len(data)} texts do not fit an array of {dtype}.")
    return np.array(data, dtype=dtype)


def _numbers(data: Any, dimensions: int) -> Any:
    if isinstance(data, list) and dimensions:
        return [_numbers(item, dimensions - 1) for item in data]
    if isinstance(data, dict) and "$float" in data:
        return _float(data)
    if isinstance(data, bool | int | float):
        return data
    raise ValidationError(f"An array has numbers in at most {DIMENSIONS} dimensions, not {as_given(data)}.")


def plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a user's metadata as it will come back from JSON; numbers of numpy become Python's.

    Raises:
        ValidationError: Something in it that JSON does not know; says what.
    """
    if not isinstance(metadata, Mapping):
        raise ValidationError(f"metadata is a dict of plain data, not {as_given(metadata)}.")
    for name, value in metadata.items():
        try:
            json.dumps({name: value}, allow_nan=False, default=_python_number)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValidationError(
                f"metadata[{as_given(name)}] is {as_given(value)}, which JSON cannot hold ({error}). Give text, "
                f"numbers that are "
                f"finite, True, False, None, lists and dicts."
            ) from error
    copied: dict[str, Any] = json.loads(json.dumps(dict(metadata), default=_python_number))
    return copied


def _python_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")
