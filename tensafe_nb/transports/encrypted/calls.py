"""Calls one after the other, beside the queue of a training client, on a thread of their own."""

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from tensafe_nb.errors import (
    ClientClosedError,
    FutureCancelledError,
)
from tensafe_nb.futures import FutureHandle, Promise

R = TypeVar("R")
Tick = Callable[[int, int], None]


class CallQueue:
    """Calls that run one after the other on a thread of their own, which begins with the first.

    Args:
        name: Of the thread.
        owner: Id of the training client, which handles name.
        at_end: Called on the thread, or where there was none, when no further call is taken.
    """

    def __init__(self, name: str, owner: str, at_end: Callable[[], None]) -> None:
        self._name, self._owner, self._at_end = name, owner, at_end
        self._waiting: deque[tuple[Promise[Any], Callable[[Tick], Any]]] = deque()
        self._running: Promise[Any] | None = None
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self.closed = False

    def submit(self, operation: str, work: Callable[[Tick], R], kind: type[R]) -> FutureHandle[R]:
        """Queue a call.

        Args:
            operation: What a handle calls it.
            work: Does it; the function it gets takes progress, and raises once the call is cancelled.
            kind: Of its result.

        Raises:
            ClientClosedError: No call is taken any more.
        """
        promise: Promise[R] = Promise()
        with self._changed:
            if self.closed:
                raise ClientClosedError(
                    f"{operation}: this encrypted adapter is closed, and its keys are gone. Make a new one: "
                    f"tc.he_adapter(…)."
                )
            self._waiting.append((promise, work))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            promise.owner = self._thread
            self._changed.notify()

        def cancel() -> bool:
            if not promise.cancel_pending():
                promise.cancel_requested = True
                promise.wait()
            return promise.state == "CANCELLED"

        return FutureHandle(
            promise,
            operation=operation,
            future_id=f"fut-{hashlib.blake2b(str(id(promise)).encode(), digest_size=6).hexdigest()}",
            training_client_id=self._owner,
            result_type=kind,
            cancel=cancel,
            position=lambda: self._position(promise),
        )

    def _position(self, promise: Promise[Any]) -> int | None:
        with self._changed:
            waiting = [other for other, _ in self._waiting if not other.done]
            before = int(self._running is not None)
        return waiting.index(promise) + before if promise in waiting else None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting or self.closed)
                if not self._waiting:
                    break
                promise, work = self._waiting.popleft()
                self._running = promise
            if promise.start():
                self._do(promise, work)
            del promise, work
        self._at_end()

    @staticmethod
    def _do(promise: Promise[Any], work: Callable[[Tick], Any]) -> None:
        def tick(done: int, total: int) -> None:
            if promise.cancel_requested:
                raise FutureCancelledError("cancelled while running")
            if total:
                promise.progress = (done, total)

        try:
            tick(0, 0)
            value = work(tick)
        except FutureCancelledError:
            promise.cancel()
        except BaseException as error:  # noqa: BLE001  # any failure is the handle's, never the thread's
            promise.fail(error)
        else:
            promise.succeed(value)

    def end_soon(self) -> None:
        """Take no further calls; what is queued is done. Never waits."""
        with self._changed:
            self.closed = True
            self._changed.notify()
        if self._thread is None:
            self._at_end()

    def close(self) -> None:
        """Cancel what waits and what runs, take no further calls, and wait for the thread to end; idempotent."""
        with self._changed:
            for promise, _ in self._waiting:
                promise.cancel_pending()
            if self._running is not None:
                self._running.cancel_requested = True
        self.end_soon()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
