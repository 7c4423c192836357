"""The queue of a training client: first in, first out; a window that was broken fails its optimiser step.

A window is what accumulates between two optimiser steps.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tensafe_nb.core.past import Past
from tensafe_nb.errors import FutureFailedError, QueueFullError, TGTinkerError
from tensafe_nb.futures import FutureHandle, Promise
from tensafe_nb.losses import Loss, resolve_loss
from tensafe_nb.protocol.operations import Forward, ForwardBackward, Operation, OptimStep, Sample

MAX_PENDING = 1_000


@dataclass(slots=True, eq=False)
class Job:
    """An operation in its place in the queue."""

    operation: Operation[Any] | None  # until it has ended
    kind: type[Operation[Any]]
    future_id: str = field(default_factory=lambda: f"fut-{os.urandom(6).hex()}")
    promise: Promise[Any] = field(default_factory=Promise)
    loss: Loss | None = None
    refusal: TGTinkerError | None = None  # it was refused at a server's door, and only takes its turn to fail
    knows_of: frozenset[str] = frozenset()  # failures of which its submitter had been told
    handle: "weakref.ref[FutureHandle[Any]] | None" = None  # a job never keeps what is given out for it
    artifact_id: str | None = None  # of what it saves, where that is settled before
    past: Past | None = None  # it ended in an earlier process, and leaves its mark on this one
    unwritten: bool = False  # a full disk kept it out of the journal: no process to come will know of it

    @classmethod
    def of(cls, operation: Operation[Any], default_loss: Loss) -> "Job":
        """Return the job of an operation, its loss resolved: a wrong one is an error of the call.

        Raises:
            ValidationError: There is no such loss, or it does not fit its keywords or the batch.
        """
        loss, streams = None, isinstance(operation, Sample) and operation.stream
        if isinstance(operation, ForwardBackward | Forward):
            loss = default_loss if operation.loss_fn is None else resolve_loss(operation.loss_fn)
            loss = loss.bind(**operation.loss_kwargs)
            loss.check(operation.batch)
        return cls(operation, type(operation), promise=Promise(streams=streams), loss=loss)

    def let_go(self) -> None:
        """Let go of the operation with its batch, and of the loss: whoever keeps the handle keeps the result only."""
        self.operation = self.loss = None

    @property
    def is_wanted(self) -> bool:
        """Whether its outcome can still reach somebody."""
        return self.kind.lasting or (self.handle is not None and self.handle() is not None)


class JobQueue:
    """Jobs in order, and what became of the window they belong to. Knows no thread."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._broken: tuple[Job, str] | None = None
        self._forgivable = False  # what broke the window was the first in it: nothing had been accumulated
        self.last: str | None = None  # the operation that had its turn last, of those that the journal has
        self.inherited: str | None = None  # how the window of a loaded state was broken
        self.stale_gradients = False  # a window ended without its step: what it accumulated must go

    def put(self, job: Job) -> None:
        if job.kind is ForwardBackward and self._broken and self._broken[0].promise.told:
            job.knows_of |= {self._broken[0].future_id}
        self._jobs.append(job)

    def check_room(self) -> None:
        if len(self) >= MAX_PENDING and self.depth >= MAX_PENDING:
            raise QueueFullError(
                f"{MAX_PENDING} operations of this training client are waiting already. Wait for some results "
                f"before you submit more."
            )

    def take(self, fits: Callable[[Job], bool] = lambda job: True) -> Job | None:
        """Return the next job that is still wanted, if it fits; cancelled ones leave their mark on the window."""
        while self._jobs:
            job = self._jobs[0]
            if not (job.past is None and job.promise.done) and not fits(job):
                return None
            self._jobs.popleft()
            if not job.unwritten:
                self.last = job.future_id
            if job.past is not None and job.past.started:
                self._forgive(job)
            if job.past is not None:
                return job
            if job.promise.start():
                self._forgive(job)
                return job
            self.mark_broken(job, "was cancelled")
        return None

    def _forgive(self, job: Job) -> None:
        """Begin a new window with a forward_backward that was submitted by who knew of the failure before it.

        What was queued behind a failure, unaware of it, depends on it. Who has been told, and goes on, does not, as
        long as no gradient is dropped by it: a cell that failed is mended and run again.
        """
        if self._forgivable and self._broken is not None and self._broken[0].future_id in job.knows_of:
            self._broken = None

    @property
    def depth(self) -> int:
        return sum(not job.promise.done for job in self._jobs)

    @property
    def is_empty(self) -> bool:
        """Whether none waits; unlike `depth`, it looks no further than the first that does."""
        return all(job.promise.done for job in self._jobs)

    def __len__(self) -> int:
        """How many jobs are in it, cancelled ones too; from any thread, without a lock, however many there are."""
        return len(self._jobs)

    def position(self, job: Job) -> int | None:
        waiting = [other for other in self._jobs if not other.promise.done]
        return waiting.index(job) if job in waiting else None

    def pending(self) -> list[Job]:
        return [job for job in self._jobs if not job.promise.done]

    def mark_broken(self, job: Job, how: str, *, first: bool = False) -> None:
        """Note that a job did not complete: a forward_backward breaks its window, an optim_step ends it.

        Args:
            job: What did not complete.
            how: In words.
            first: Nothing of its window was accumulated before it.
        """
        if job.kind is ForwardBackward and self._broken is None:
            self._broken, self._forgivable = (job, how), first
        elif job.kind is OptimStep:
            self._broken, self.inherited, self.stale_gradients = None, None, True

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the open window is missing, but for what a loaded state lacked already."""
        return self._broken is None

    @property
    def broken(self) -> str | None:
        """How the open window was broken, in words; None when it is whole."""
        if self._broken is None:
            return self.inherited
        job, how = self._broken
        return f"{job.kind.verb} {job.future_id} of the same step {how}"

    def end_window(self) -> FutureFailedError | None:
        """Close the window for an optimiser step; the error it must fail with, if the window is broken."""
        reason, broken = self.broken, self._broken
        self._broken = self.inherited = None
        if reason is None:
            return None
        error = FutureFailedError(
            f"optim_step was not run: {reason}. The weights are untouched and the gradients cleared; the next step "
            f"starts clean.",
            details={"cause": broken[0].future_id} if broken else {},
        )
        error.__cause__ = broken[0].promise.error if broken else None
        return error
