"""One record of the audit log for every operation that ended, whichever way."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensafe_nb.batch import BatchData
from tensafe_nb.engine.lane import Job
from tensafe_nb.errors import FutureCancelledError, TGTinkerError, ValidationError
from tensafe_nb.operations import ForwardBackward, Operation, OptimStep
from tensafe_nb.plain import to_plain
from tensafe_nb.registry import name_of
from tensafe_nb.store.audit_log import AuditLog
from tensafe_nb.types import LoadStateResult, SaveStateResult


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
            "operation": job.name,
            "training_client_id": self._training_client_id,
            "request": () if self._private or job.operation is None else tuple(_buffers(job.operation)),
            "to_the_day": self._private,
            "produced": (outcome.artifact_id,) if isinstance(outcome, SaveStateResult) else (),
            "consumed": (outcome.loaded_artifact_id,) if isinstance(outcome, LoadStateResult) else (),
            "started_at": job.promise.started_at or now,
            "completed_at": now,
            "success": error is None,
            "error_code": _code(error),
            "error_class": None if error is None else type(error).__name__,
        }
        with self._lock:
            try:
                self.catch_up()
                self._log.append(**entry)
            except TGTinkerError:  # a broken log, a full disk, a missing key: `catch_up` will say so
                self._owed.append(entry | {"request": ()})

    def _is_further_part(self, job: Job, error: BaseException | None) -> bool:
        """Whether this is a step's second forward_backward or a later one: how many there are tells what was drawn."""
        within = self._in_step and job.kind is ForwardBackward and error is None
        self._in_step = error is None and (
            job.kind is ForwardBackward or (self._in_step and job.kind is not OptimStep)
        )
        return within


def _described(value: Any) -> Any:
    """Return plain data that stands for a value; of what is none, a tensor or a function, its name."""
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if callable(value):
        return name_of(value)
    try:
        return to_plain(value)
    except ValidationError:
        return type(value).__name__


def _code(error: BaseException | None) -> str | None:
    if error is None:
        return None
    if isinstance(error, FutureCancelledError):
        return "cancelled"
    return error.code if isinstance(error, TGTinkerError) else "failed"


def _buffers(operation: Operation) -> Iterator[Any]:
    """Yield what was asked for, as bytes to hash: small fields as JSON, arrays as they lie in memory."""
    yield type(operation).__name__.encode()
    for name in operation.__slots__:
        value = getattr(operation, name)
        if isinstance(value, BatchData):
            arrays = {"input_ids": value.input_ids, "mask": value.attention_mask, "labels": value.labels}
            for key, array in (arrays | dict(value.extras)).items():
                yield f"{key}{array.dtype.str}{array.shape}".encode()
                yield np.ascontiguousarray(array).data.cast("B") if array.size else b""
        else:
            yield json.dumps([name, _described(value)], sort_keys=True).encode()
