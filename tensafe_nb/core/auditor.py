"""The auditor: puts every operation that ended, whichever way, on record in the audit log."""

import functools
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensafe_nb import config
from tensafe_nb.core.queue import Job
from tensafe_nb.errors import TGTinkerError
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.codec import field_names
from tensafe_nb.protocol.operations import ForwardBackward, Operation, OptimStep
from tensafe_nb.protocol.results import LoadStateResult, SaveStateResult
from tensafe_nb.registry import name_of
from tensafe_nb.store.audit.log import AuditLog, outcome_of

logger = logging.getLogger(__name__)


class Auditor:
    """Writes down what one training client did.

    A record that cannot be written is kept, and the client does no further work until it is: what happened
    unseen is at most one operation, and it is caught up.

    The log can be read without a key, so that of a client that trains privately it holds nothing a draw's size can be
    read off: no request, no time but the day, and of the calls that make up one step the first.

    Args:
        log: The tenant's audit log.
        training_client_id: Who.
        private: Whether that client trains with differential privacy.
    """

    def __init__(self, log: AuditLog, training_client_id: str, *, private: bool = False) -> None:
        self._log = log
        self._training_client_id = training_client_id
        self._private, self._in_step = private, False
        self._owed: list[dict[str, Any]] = []
        self._lock = threading.RLock()

    def catch_up(self) -> None:
        """Write the records that could not be written before.

        Raises:
            StorageError: They still cannot be.
        """
        with self._lock:
            while self._owed:
                self._log.append(**self._owed[0])
                del self._owed[0]

    def record(self, job: Job, outcome: object) -> None:
        """Write down how a job ended: `outcome` is its result or its error."""
        error = outcome if isinstance(outcome, BaseException) else None
        if self._private and self._is_further_part(job, error):
            return
        now = time.time()
        entry: dict[str, Any] = {
            "operation": job.kind.verb,
            "training_client_id": self._training_client_id,
            "request": () if self._private or job.operation is None else request_buffers(job.operation),
            "to_the_day": self._private,
            "produced": (outcome.artifact_id,) if isinstance(outcome, SaveStateResult) else (),
            "consumed": (outcome.loaded_artifact_id,) if isinstance(outcome, LoadStateResult) else (),
            "started_at": job.promise.started_at or now,
            "completed_at": now,
            **outcome_of(error),
        }
        with self._lock:
            try:
                self.catch_up()
                self._log.append(**entry)
            except Exception as error:  # a full disk, a missing key: `catch_up` will say so
                if not isinstance(error, TGTinkerError):
                    logger.exception("the audit record of %s could not be written", job.kind.verb)
                self._owed.append(entry | {"request": ()})

    def _is_further_part(self, job: Job, error: BaseException | None) -> bool:
        """Whether this is a step's second forward_backward or a later one: how many there are tells what was drawn."""
        within = self._in_step and job.kind is ForwardBackward and error is None
        self._in_step = error is None and (
            job.kind is ForwardBackward or (self._in_step and job.kind is not OptimStep)
        )
        return within


class Description:
    """Plain data that stands for any value at all, whoever made it: what is deep, huge, cyclic or odd has an end too.

    It is what gets hashed, never written. Past DEEPEST levels or MOST_VALUES values, and for what is no data (a
    tensor, a function, an object), the name of the type stands for the rest.
    """

    DEEPEST = 64
    MOST_VALUES = 200_000  # a list of token ids is one of them
    MOST_BYTES = 1 << 28  # of one array; of a larger one, shape and type stand for it

    def __init__(self) -> None:
        self._left = self.MOST_VALUES

    def of(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if self._left < 0 or depth > self.DEEPEST:
            return {"$more": type(value).__name__}
        match value:
            case None | bool() | str():
                return value
            case int():
                return (
                    int(value) if abs(value) < 1 << 63 else {"$int": f"{value:x}"}
                )  # decimal digits have a limit
            case float():
                return float(value) if math.isfinite(value) else {"$float": str(float(value))}
            case np.ndarray() | np.generic():
                unread = value.dtype.hasobject or value.nbytes > self.MOST_BYTES
                content = "" if unread else hashlib.sha256(value.tobytes()).hexdigest()
                return {"$array": [value.dtype.str, list(value.shape), content]}
        try:
            if callable(value):
                return {"$function": str(name_of(value))}
            if isinstance(value, config.Config):
                value = value.model_dump()
            if isinstance(value, Mapping):
                return {
                    "$map": [
                        [self.of(key, depth + 1), self.of(item, depth + 1)] for key, item in value.items()
                    ]
                }
            if isinstance(value, list | tuple) and {type(item) for item in value} == {int}:
                return {"$ints": hashlib.sha256(repr(value).encode()).hexdigest()}
            if isinstance(value, list | tuple):
                return [self.of(item, depth + 1) for item in value]
        except Exception:  # noqa: BLE001  # what a user made may do anything when it is looked at
            return {"$unreadable": type(value).__name__}
        return {"$object": type(value).__name__}


def request_buffers(operation: Operation[Any]) -> Iterator[Any]:
    """Yield what was asked for, as bytes to hash: small fields as JSON, arrays as they lie in memory."""
    yield operation.verb.encode()
    for name in field_names(type(operation)):  # type: ignore[arg-type]  # a class can be hashed
        value = getattr(operation, name)
        if value is None or value is True or value is False:
            yield _of_constant(name, value)
        elif type(value) is dict and not value:
            yield _of_constant(name, ())
        elif isinstance(value, BatchData):
            arrays = {"input_ids": value.input_ids, "mask": value.attention_mask, "labels": value.labels}
            for key, array in (arrays | dict(value.extras)).items():
                yield _of_layout(key, array.dtype.str, array.shape)
                yield array.tobytes()
        else:
            yield json.dumps([name, Description().of(value)]).encode()


@functools.lru_cache(256)
def _of_layout(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{name}{dtype}{shape}".encode()


@functools.cache
def _of_constant(name: str, value: bool | tuple[()] | None) -> bytes:
    return json.dumps([name, {"$map": []} if value == () else value]).encode()
