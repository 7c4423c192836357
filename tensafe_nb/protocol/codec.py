"""Plain data ↔ JSON: operations, results and events can be logged, and later carried by a server.

`from_plain(json.loads(json.dumps(to_plain(x)))) == x` for every class marked with `@plain`. Never pickle.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from tensafe_nb import config
from tensafe_nb.display import as_given, shown
from tensafe_nb.errors import ValidationError
from tensafe_nb.registry import name_of

C = TypeVar("C", bound=type)
_CLASSES: dict[str, type] = {"SamplingConfig": config.SamplingConfig, "TrainingConfig": config.TrainingConfig}


def plain(cls: C) -> C:
    """Class decorator: instances can be written as JSON and read back, and a notebook shows them as a table."""
    _CLASSES[cls.__name__] = cls
    return shown(cls)


def to_plain(value: Any) -> Any:
    """Turn operations, results and events into what `json.dumps(…, allow_nan=False)` takes.

    Raises:
        ValidationError: The value holds a Python function, which cannot leave the process.
    """
    match value:
        case None | bool() | str() | int():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": str(value)}
        case np.ndarray():
            return {"$array": to_plain(value.tolist()), "dtype": value.dtype.str}
        case np.generic():
            return to_plain(value.item())
        case Mapping():
            items = {str(key): to_plain(item) for key, item in value.items()}
            return {"$map": list(items.items())} if any(key.startswith("$") for key in items) else items
        case list() | tuple():
            return [to_plain(item) for item in value]
        case config.Config():
            return {"$": type(value).__name__} | to_plain(value.model_dump())
    if type(value).__name__ in _CLASSES and dataclasses.is_dataclass(value):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"$": type(value).__name__} | fields
    if callable(value):
        raise ValidationError(
            f"The Python function {as_given(name_of(value))} cannot leave this process. "
            f"Remotely, losses are given by registered name."
        )
    raise ValidationError(f"A {type(value).__name__} cannot be written as plain data.")


def from_plain(data: Any) -> Any:
    """Read back what `to_plain` wrote. Sequences come back as tuples."""
    if isinstance(data, list):
        return tuple(from_plain(item) for item in data)
    if not isinstance(data, dict):
        return data
    if "$float" in data:
        return float(data["$float"])
    if "$map" in data:
        return {key: from_plain(item) for key, item in data["$map"]}
    if "$array" in data:
        return np.array(from_plain(data["$array"]), dtype=data["dtype"])
    values = {key: from_plain(item) for key, item in data.items() if key != "$"}
    if "$" not in data:
        return values
    if data["$"] not in _CLASSES:
        raise ValidationError(f"Unknown plain type {data['$']!r}: written by a newer version?")
    return _CLASSES[data["$"]](**values)


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
