"""Where the time of an operation that does nothing goes: `python -m scripts.queue_costs`.

Prints medians of microseconds between the stations of a `forward` whose engine does nothing, from the call to its
result, in a plain script. The stations are noted on the way, which takes about a tenth of the time itself.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from statistics import median
from typing import Any
from unittest.mock import patch

import tensafe_nb as tn
from bench.queue import client_that_does_nothing
from tensafe_nb.core.auditor import Auditor
from tensafe_nb.core.bus import EventBus
from tensafe_nb.core.worker import Worker
from tensafe_nb.futures import Promise
from tensafe_nb.store.audit.files import LogFiles
from tensafe_nb.store.audit.key import Secrets

OPERATIONS = 3_000
STATIONS = (  # in their order: what has been done when the function is entered, or left
    ("the operation made and checked", Worker, "job_of", "left"),
    ("told that it is queued", EventBus, "publish", "left"),
    ("put into the queue, a handle given", Worker, "submit", "left"),
    ("the worker's thread woken", Worker, "_run", "entered"),
    ("told that it has started", Worker, "_carry_out", "entered"),
    ("executed", Auditor, "record", "entered"),
    ("audit: the files held and looked at", Secrets, "hash_request", "entered"),
    ("audit: the request hashed", Secrets, "hash_request", "left"),
    ("audit: the record chained, and written", LogFiles, "append", "left"),
    ("audit: the next key, sealed and written", LogFiles, "keep", "left"),
    ("audit: the files let go", Auditor, "record", "left"),
    ("told that it has finished", Promise, "succeed", "entered"),
)


def main() -> None:
    batch = tn.BatchData(input_ids=[[1]], labels=[[1]])
    passed: dict[str, list[float]] = defaultdict(list)
    with client_that_does_nothing() as tc, noted() as notes:
        for number in range(OPERATIONS + 200):
            notes.clear()
            started = time.perf_counter()
            tc.forward(batch).result()
            notes["the waiting thread woken"] = time.perf_counter()
            for station, at in notes.items() if number >= 200 else ():
                passed[station].append((at - started) * 1e6)
    before = 0.0
    for station, at in sorted(((name, median(times)) for name, times in passed.items()), key=itemgetter(1)):
        print(f"{station:42} {at - before:5.0f} µs")
        before = at
    print(f"{'in all':42} {before:5.0f} µs")


@contextmanager
def noted() -> Iterator[dict[str, float]]:
    """Note when each station is passed, for the first time after the notes were cleared."""
    notes: dict[str, float] = {}
    with ExitStack() as patched:
        for station in STATIONS:
            patched.enter_context(_noting(notes, *station))
        yield notes


def _noting(notes: dict[str, float], station: str, owner: type, name: str, when: str) -> Any:
    function: Callable[..., Any] = getattr(owner, name)

    def note(*args: Any, **kwargs: Any) -> Any:
        if when == "entered":
            notes.setdefault(station, time.perf_counter())
        answer = function(*args, **kwargs)
        if when == "left":
            notes.setdefault(station, time.perf_counter())
        return answer

    return patch.object(owner, name, note)


if __name__ == "__main__":
    main()
