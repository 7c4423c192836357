"""Two things that last as long as this process: the loop of coroutine rewards, and the thread that starts processes.

A semaphore, a session or a client of a judge belongs to the loop it was first used on. So there is one loop for all
scorers, previews and calls by hand, not one for each. And Linux ties a process to the *thread* that started it
(prctl(2), PR_SET_PDEATHSIG), so scoring processes are started by one that ends with this process only.
"""

import asyncio
import queue
import subprocess
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any


class LastingLoop:
    """An event loop on a thread of its own, made when it is needed. It has no end, but may be left behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> "tuple[Future[Any], asyncio.AbstractEventLoop]":
        """Run a coroutine and return what will be its result, and the loop it runs on."""
        with self._lock:
            if (
                self._loop is None or self._thread is None or not self._thread.is_alive()
            ):  # never, left, or forked
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=serve, args=(self._loop,), name="tensafe_nb rewards loop", daemon=True
                )
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop), self._loop

    def here(self) -> bool:
        """Whether this thread is the loop's own, which must not wait for it."""
        return threading.current_thread() is self._thread

    def leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave a loop that something blocks behind; what comes later gets a new one."""
        with self._lock:
            if self._loop is loop:
                self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)  # when it comes to itself


def serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, and end what is left on it."""
    try:
        loop.run_forever()
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class LastingStarter:
    """A thread that starts processes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._orders: queue.SimpleQueue[tuple[Future[subprocess.Popen[bytes]], Sequence[str], dict[str, Any]]]
        self._thread: threading.Thread | None = None

    def start(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
        """Do as `subprocess.Popen` does, on that thread.

        Raises:
            OSError: It could not be started.
        """
        order: Future[subprocess.Popen[bytes]] = Future()
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # never, or forked
                self._orders = queue.SimpleQueue()
                self._thread = threading.Thread(target=self._serve, name="tensafe_nb starter", daemon=True)
                self._thread.start()
            self._orders.put((order, command, options))
        return order.result()

    def _serve(self) -> None:
        orders = self._orders
        while True:
            order, command, options = orders.get()
            try:
                order.set_result(subprocess.Popen(command, **options))
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                order.set_exception(error)
            del order, command, options


LOOP = LastingLoop()
STARTER = LastingStarter()
