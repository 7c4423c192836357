"""A FutureHandle for whoever waits, a Promise for whoever does the work: one future, awaited or blocked on."""

import asyncio
import contextlib
import copy
import functools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given, table
from tensafe_nb.errors import (
    FutureCancelledError,
    FutureFailedError,
    FutureTimeoutError,
    TGTinkerError,
    ValidationError,
)
from tensafe_nb.protocol.results import FutureStatus

logger = logging.getLogger(__name__)

HEARTBEAT = 0.1  # s; how often a wait looks up, so that an interrupted cell gets its prompt back
R = TypeVar("R")
_here = threading.local()  # of this thread: whether it is inside a subscriber


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Mark this thread while it tells a subscriber something: the work goes on only once the subscriber returns."""
    before, _here.telling = is_telling(), True
    try:
        yield
    finally:
        _here.telling = before


def is_telling() -> bool:
    """Whether this thread is inside a subscriber."""
    return getattr(_here, "telling", False)


class Promise(Generic[R]):
    """The producer's half: who does the work reports here. Every method may be called from any thread."""

    def __init__(self, *, streams: bool = False) -> None:
        self._lock = threading.Lock()
        self._unfinished = threading.Lock()  # until the end; whoever waits takes it, and hands it on
        self._unfinished.acquire()
        self._callbacks: list[Callable[[], object]] = []
        self._watchers: list[Callable[[], None]] = []
        self.streams = streams  # whether pieces of the value are told
        self.pieces: list[Any] = []  # those that have come
        self.state = FutureStatus.PENDING
        self.progress: tuple[int, int] | None = None
        self.cancel_requested = False
        self.told = False  # whether somebody has been given the outcome
        self.created_at = time.time()
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.value: R | None = None
        self.error: BaseException | None = None
        self.owner: threading.Thread | None = None  # who does the work: waiting there would wait for itself

    @property
    def done(self) -> bool:
        return self.ended_at is not None

    def start(self) -> bool:
        """PENDING → RUNNING; False if it was cancelled before."""
        with self._lock:
            if self.state is not FutureStatus.PENDING:
                return False
            self.state, self.started_at = FutureStatus.RUNNING, time.time()
            return True

    def succeed(self, value: R) -> None:
        self._end(FutureStatus.COMPLETED, value=value)

    def fail(self, error: BaseException) -> None:
        self._end(FutureStatus.FAILED, error=error)

    def cancel(self) -> bool:
        """End as CANCELLED unless it has ended; True if this call did it."""
        return self._end(FutureStatus.CANCELLED)

    def cancel_pending(self) -> bool:
        """End as CANCELLED if it has not started."""
        return self._end(FutureStatus.CANCELLED, only_from=FutureStatus.PENDING)

    def on_done(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call back once ended (at once if it has); returns a function that forgets the callback."""

        def forget() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._callbacks.remove(callback)

        with self._lock:
            is_to_come = not self.done
            if is_to_come:
                self._callbacks.append(callback)
        if not is_to_come:
            callback()
        return forget

    def add_piece(self, piece: Any) -> None:
        """Hand out a piece of the value before it is whole."""
        with self._lock:
            if self.done:
                return
            self.pieces.append(piece)
            watchers = tuple(self._watchers)
        for watcher in watchers:
            watcher()

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Call back at every piece and at the end; returns a function that forgets the callback."""
        with self._lock:
            self._watchers.append(watcher)
        forget = self.on_done(watcher)

        def forget_both() -> None:
            forget()
            with self._lock, contextlib.suppress(ValueError):
                self._watchers.remove(watcher)

        return forget_both

    def wait(self, timeout: float | None = None) -> bool:
        """Block in slices, so that Ctrl-C is seen everywhere; True if it ended in time."""
        if not self.done and (is_telling() or threading.current_thread() is self.owner):
            raise ValidationError(
                "This runs where the training client waits for it (a callback, a loss or a subscriber): waiting here "
                "for another of its operations would wait for ever. Submit it here, and wait elsewhere."
            )
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            left = HEARTBEAT if deadline is None else min(HEARTBEAT, deadline - time.monotonic())
            if left <= 0:
                return False
            if self._unfinished.acquire(timeout=left):
                self._unfinished.release()
        return True

    def outcome(self) -> R:
        """Return the value or raise the error of what has ended."""
        self.told = True
        if self.state is FutureStatus.CANCELLED:
            raise FutureCancelledError("The operation was cancelled; it left no trace on the weights.")
        if isinstance(self.error, TGTinkerError):
            raise _twin_of(self.error)
        if self.error is not None:
            raise FutureFailedError(
                f"The operation failed: {type(self.error).__name__}: {self.error}"
            ) from self.error
        return self.value  # type: ignore[return-value]

    async def wait_async(self) -> None:
        """Await the end. Cancelling the await cancels nothing else; the heartbeat lets an interrupt through."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
                loop.call_soon_threadsafe(waiter.cancel)  # which ends the wait below, and raises nowhere

        forget = self.on_done(wake)
        try:
            while not self.done:
                await asyncio.wait({waiter}, timeout=HEARTBEAT)
        finally:
            forget()
            waiter.cancel()

    def awaited(self) -> Generator[Any, None, R]:
        """Wait and return the outcome, for `__await__`: what an interrupt has to show lies on this page alone."""
        yield from self.wait_async().__await__()
        return self.outcome()

    def _end(
        self,
        state: FutureStatus,
        *,
        value: R | None = None,
        error: BaseException | None = None,
        only_from: FutureStatus | None = None,
    ) -> bool:
        with self._lock:
            if self.done or (only_from is not None and self.state is not only_from):
                return False
            self.value, self.error = value, error
            self.state, self.ended_at = state, time.time()
            self._unfinished.release()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                logger.exception("a done-callback failed; the operation itself is not affected")
        return True


def _twin_of(error: TGTinkerError) -> TGTinkerError:
    """Return an error to raise: raising ties it to the frames of whoever waits, which the promise must not keep."""
    twin = copy.copy(error)
    twin.__dict__.update(error.__dict__)
    twin.__cause__ = error.__cause__
    return twin.with_traceback(error.__traceback__)


@functools.cache
def lent_names(result_type: type) -> frozenset[str]:
    """Return the fields and properties that a result declares: what its handle lends."""
    properties = [name for name, value in vars(result_type).items() if isinstance(value, property)]
    return frozenset(field.name for field in fields(result_type)).union(properties)


class FutureHandle(Generic[R]):
    """An operation that was queued: await it, or ask for its `result()`.

    Both work any number of times, from any thread, also inside a running event loop. Interrupting a wait stops
    the waiting; the operation goes on until `cancel()`. A handle lends the fields of its result: reading
    `handle.loss` waits for the result and returns its loss.

    Example:
        >>> handle = tc.forward_backward(batch)
        >>> (await handle).loss == handle.result().loss == handle.loss
        True
    """

    def __init__(
        self,
        promise: Promise[R],
        *,
        operation: str,
        future_id: str,
        training_client_id: str,
        result_type: type[R],
        cancel: Callable[[], bool],
        position: Callable[[], int | None],
    ) -> None:
        self._promise = promise
        self._cancel = cancel
        self._position = position
        self._lent = lent_names(result_type)  # type: ignore[arg-type]  # a class can be hashed
        self.operation = operation
        self.future_id = future_id
        self.training_client_id = training_client_id

    @property
    def state(self) -> FutureStatus:
        """PENDING, RUNNING, COMPLETED, FAILED or CANCELLED."""
        return self._promise.state

    @property
    def progress(self) -> tuple[int, int] | None:
        """(done, total) micro-batches or tokens, once it runs."""
        return self._promise.progress

    @property
    def queue_position(self) -> int | None:
        """How many operations run before this one; None once it runs."""
        return self._position() if self.state is FutureStatus.PENDING else None

    def done(self) -> bool:
        """Whether it completed, failed or was cancelled."""
        return self._promise.done

    @checked
    def result(self, timeout: float | None = None) -> R:
        """Wait for the result.

        Args:
            timeout: Seconds to wait; None waits as long as it takes.

        Raises:
            FutureTimeoutError: Not there in time; the operation goes on.
            FutureCancelledError: It was cancelled.
            TGTinkerError: What made it fail.
        """
        if not self._promise.wait(timeout):
            raise FutureTimeoutError(
                f"{self.operation} was not done after {timeout} s ({self._place()}). It goes on: "
                f"wait again, or call cancel().",
                request_id=self.future_id,
            )
        return self._promise.outcome()

    def exception(self, timeout: float | None = None) -> TGTinkerError | None:
        """Wait, and return the error instead of raising it; None if it completed."""
        try:
            self.result(timeout)
        except FutureTimeoutError:
            raise
        except TGTinkerError as error:
            own = self._promise.error
            return own if isinstance(own, TGTinkerError) else error
        return None

    def cancel(self) -> bool:
        """Cancel: what is pending never runs; what runs stops at the next micro-batch or token.

        Returns:
            True if it was cancelled before it completed.
        """
        return self._cancel()

    def pieces(self) -> "Pieces":
        """Iterate over a result's pieces as they come, with `for` or `async for`: of `sample(…, stream=True)`.

        They end when the result is there, and add up to it; where the operation failed, they end with its error.

        Raises:
            ValidationError: It was submitted without `stream=True`.
        """
        if not self._promise.streams:
            raise ValidationError(
                f"pieces(): this {self.operation} is not told in pieces, and result() returns it whole. To read a "
                f"sample as it is drawn: tc.sample(prompts, stream=True).pieces(), or tc.stream(prompt)."
            )
        return Pieces(self, self._promise)

    def add_done_callback(self, callback: "Callable[[FutureHandle[R]], object]") -> None:
        """Call `callback(handle)` when it has ended, on the thread that ended it.

        Raises:
            ValidationError: It cannot be called.
        """
        if not callable(callback):
            raise ValidationError(
                f"add_done_callback takes a function of the handle, not {as_given(callback)}."
            )
        self._promise.on_done(lambda: callback(self))

    def __await__(self) -> Generator[Any, None, R]:
        return self._promise.awaited()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._lent:
            raise AttributeError(
                f"A {self.operation} handle has no {name!r}; its result lends {sorted(self._lent)}."
            )
        return getattr(self.result(), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._lent})

    def __copy__(self) -> "FutureHandle[R]":
        return self

    def __deepcopy__(self, _memo: object) -> "FutureHandle[R]":
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise ValidationError(
            "A FutureHandle belongs to this process and cannot be pickled; pickle handle.result()."
        )

    def __repr__(self) -> str:
        return f"<FutureHandle {self.operation} {self.future_id} {self._place()}>"

    def _place(self) -> str:
        position, progress = self.queue_position, self.progress
        if position is not None:
            return f"{self.state}, {position} before it"
        return (
            f"{self.state} {progress[0]}/{progress[1]}" if progress and not self.done() else str(self.state)
        )

    def _repr_html_(self) -> str:
        promise = self._promise
        facts: dict[str, object] = {"operation": self.operation, "state": self._place()}
        if promise.started_at is not None:
            facts["duration"] = f"{(promise.ended_at or time.time()) - promise.started_at:.3f} s"
        if promise.error is not None:
            facts[type(promise.error).__name__] = str(promise.error)
        if promise.state is FutureStatus.COMPLETED:
            for name in sorted(self._lent):
                with contextlib.suppress(
                    TGTinkerError
                ):  # a property that this value does not have, and says why
                    facts[name] = getattr(promise.value, name)
        return table(self.future_id, facts)


class Pieces:
    """The pieces of a streamed result, in the order they come; each loop over it begins with the first.

    Attributes:
        handle: Of the result.
    """

    def __init__(self, handle: FutureHandle[Any], promise: Promise[Any], *, cancels: bool = False) -> None:
        self.handle, self._promise = handle, promise
        self._cancels = cancels  # who leaves a loop before its end wants no more

    def __iter__(self) -> Iterator[Any]:
        promise, seen = self._promise, 0
        changed = threading.Event()
        forget = promise.watch(changed.set)
        try:
            while not promise.wait(0) or seen < len(promise.pieces):
                if seen < len(promise.pieces):
                    yield promise.pieces[seen]
                    seen += 1
                elif changed.wait(HEARTBEAT):
                    changed.clear()
        finally:
            forget()
            if self._cancels and not promise.done:
                self.handle.cancel()
        promise.outcome()

    async def __aiter__(self) -> AsyncIterator[Any]:
        promise, seen = self._promise, 0
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(changed.set)

        forget = promise.watch(wake)
        try:
            while not promise.done or seen < len(promise.pieces):
                if seen < len(promise.pieces):
                    yield promise.pieces[seen]
                    seen += 1
                else:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(HEARTBEAT):
                            await changed.wait()
                    changed.clear()
        finally:
            forget()
            if self._cancels and not promise.done:
                await asyncio.to_thread(self.handle.cancel)
        promise.outcome()


def promise_of(handle: FutureHandle[R]) -> Promise[R]:
    """Return a handle's other half, for a server that passes the outcome on and is not told of it itself."""
    return handle._promise


def completed(value: R, *, operation: str, training_client_id: str) -> FutureHandle[R]:
    """Return a handle of something that needed no waiting."""
    promise: Promise[R] = Promise()
    promise.succeed(value)
    return handle_of(promise, operation, training_client_id, type(value), cancel=lambda: False)


def combine(
    handles: Sequence[FutureHandle[Any]],
    result_of: Callable[[list[Any]], R],
    *,
    operation: str,
    result_type: type[R],
) -> FutureHandle[R]:
    """Return one handle for several: `result_of(results)` once all are there, or the first failure.

    Cancelling it cancels all of them.
    """
    promise: Promise[R] = Promise()
    promise.start()

    def finish() -> None:
        if promise.done or not all(handle.done() for handle in handles):
            return
        try:
            value = result_of([handle.result() for handle in handles])
        except FutureCancelledError:
            promise.cancel()
        except Exception as error:  # noqa: BLE001  # any failure becomes the handle's
            promise.fail(error)
        else:
            promise.succeed(value)

    def cancel() -> bool:
        return sum(handle.cancel() for handle in handles) > 0  # each of them, not only up to the first

    for handle in handles:
        handle.add_done_callback(lambda _: finish())
    return handle_of(promise, operation, handles[0].training_client_id, result_type, cancel)


def follow(handle: FutureHandle[R], promise: Promise[R]) -> None:
    """Let a promise end as a handle ends."""

    def end(ended: FutureHandle[R]) -> None:
        if ended.state is FutureStatus.CANCELLED:
            promise.cancel()
        elif (error := ended.exception()) is not None:
            promise.fail(error)
        else:
            promise.succeed(ended.result())

    promise.start()
    handle.add_done_callback(end)


def handle_of(
    promise: Promise[R],
    operation: str,
    training_client_id: str,
    result_type: type[R],
    cancel: Callable[[], bool] | None = None,
) -> FutureHandle[R]:
    """Return the consumer's half of a promise."""
    return FutureHandle(
        promise,
        operation=operation,
        future_id=f"fut-{uuid.uuid4().hex[:12]}",
        training_client_id=training_client_id,
        result_type=result_type,
        cancel=cancel or promise.cancel_pending,
        position=lambda: None,
    )


def enable_nested_asyncio() -> None:
    """Let `asyncio.run()` work inside a notebook cell, by patching asyncio with nest_asyncio.

    You seldom need this: cells can `await`, and `handle.result()` never blocks an event loop's work, since the
    work is on another thread. The patch has a price, measured on ipykernel 7.4: while a cell runs, clicks in a
    live panel are lost (nest_asyncio) or wait for the end of the cell (nest_asyncio2). nest_asyncio2 is used
    where it is installed.
    """
    import importlib
    import warnings

    for name in ("nest_asyncio2", "nest_asyncio"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name).apply()
            break
    else:
        raise ValidationError(
            "Neither nest_asyncio2 nor nest_asyncio is installed: pip install nest-asyncio2"
        )
    warnings.warn(
        "panel buttons may be lost or delayed until the cell ends (nest_asyncio: lost)", stacklevel=2
    )


class Outstanding:
    """The handles of one training client that are not done yet, whoever else holds them, in the order of its queue."""

    def __init__(self) -> None:
        self._handles: deque[FutureHandle[Any]] = deque()
        self._lock = threading.Lock()

    def add(self, handle: FutureHandle[Any]) -> None:
        """Take in the newest; let go of the oldest that are done."""
        with self._lock:
            self._handles.append(handle)
            while self._handles and self._handles[0].done():
                self._handles.popleft()

    def waiting(self) -> list[FutureHandle[Any]]:
        """Return those that wait, newest first."""
        with self._lock:
            waiting = [handle for handle in self._handles if handle.state is FutureStatus.PENDING]
        return waiting[::-1]
