"""What the queue adds to the work: the latency of one operation, and the gaps between many."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import tensafe_nb as tn
from bench import workload
from bench.harness import LARGER, Row, Taken, Target, p99, paired
from tensafe_nb.core import engines
from tensafe_nb.engine.engine import Engine
from tensafe_nb.events import Event, OperationFinished
from tensafe_nb.protocol.results import ForwardResult

STEPS = 100


class EngineThatDoesNothing(Engine):
    """What is left of a `forward` is its way through the queue."""

    def forward(self, *_: Any) -> ForwardResult:
        return ForwardResult(0.0, 1)


def usual_latency() -> Row:
    """Issue 26: at most 0.2 ms."""
    return Row(
        what="an operation that does nothing, from submit to result() in a plain script",
        peer="`ThreadPoolExecutor(1).submit(nothing).result()`: no checks, no events, no log",
        sizes="`forward` of one token on an engine that does nothing",
        taken=_latencies(),
        target=Target("≤", 0.2e-3, "ours"),
    )


def worst_latency() -> Row:
    """Issue 26: at most 2 ms."""
    return Row(
        what="the same, 99th percentile",
        peer="",
        sizes="`forward` of one token on an engine that does nothing",
        taken=Taken(_latencies().ours),
        figure=p99,
        target=Target("≤", 2e-3, "ours"),
    )


@cache
def _latencies() -> Taken:
    batch = tn.BatchData(input_ids=[[1]], labels=[[1]])
    with client_that_does_nothing() as tc, ThreadPoolExecutor(1) as pool:
        return paired(
            lambda: tc.forward(batch).result(),
            lambda: pool.submit(lambda: None).result(),
            seconds=2,
            at_least=1_000,
            warmup=100,
        )


@contextmanager
def client_that_does_nothing() -> Iterator[tn.TrainingClient]:
    with patch.object(engines, "Engine", EngineThatDoesNothing), tn.ServiceClient() as service:
        tc = service.create_training_client()
        tc.ready().result()
        yield tc


def pipelined_steps() -> Row:
    """Issue 2: at most 1.02."""
    return _pipelined(8, 64, repeats=1, target=Target("≤", 1.02))


def pipelined_short_steps() -> Row:
    """Shorter steps, in which the gaps weigh more."""
    return _pipelined(2, 16, repeats=3)


def _pipelined(rows: int, tokens: int, repeats: int, target: Target | None = None) -> Row:
    with tn.ServiceClient() as service:
        run = _all_queued_first(workload.tiny_client(service), workload.full(rows, tokens))
        run(5)
        elapsed, engine = zip(*(run(STEPS) for _ in range(repeats)), strict=True)
    return Row(
        what=f"{STEPS} pipelined steps, all queued first, from the first submit to the last result",
        peer="the sum of their engine times, as their events tell",
        precision="fp32",
        sizes=f"{workload.MODEL}, {rows}×{tokens}",
        taken=Taken(elapsed, engine),
        compares=LARGER,
        target=target,
    )


def _all_queued_first(tc: tn.TrainingClient, batch: tn.BatchData) -> Callable[[int], tuple[float, float]]:
    """Return a function that runs so many steps and returns their seconds, and the engine's among them."""
    durations: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, OperationFinished):
            durations.append(event.duration)

    def run(steps: int) -> tuple[float, float]:
        durations.clear()
        started = time.perf_counter()
        handles = [handle for _ in range(steps) for handle in (tc.forward_backward(batch), tc.optim_step())]
        handles[-1].result()
        elapsed = time.perf_counter() - started
        assert len(durations) == len(handles), "an operation did not finish"
        return elapsed, sum(durations)

    tc.subscribe(listen)
    return run
