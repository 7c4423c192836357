"""What a row of the table is, and how its numbers are taken: ours and the peer's in turns, in the same run.

A machine that others use too is faster at one moment and slower at the next. Two measurements taken one right after
the other see much the same machine, so the median of their ratios is worth more than the ratio of two medians.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

ROOT = Path(__file__).parent.parent
Action = Callable[[], object]
Turn = Callable[[], tuple[float, float]]  # does the work, and says how many seconds and CPU seconds it took
FASTER = "peer ÷ ours"  # ratio of speeds: above 1, ours is the faster one
LARGER = "ours ÷ peer"  # above 1, ours takes more


class Skipped(Exception):  # not a failure: the reason is shown in the row's place
    """What a row needs is not here; says what, and how to get it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a row's ratio, its ratio in CPU time, or its own figure should reach."""

    sign: Literal["≥", "≤"]
    limit: float
    of: Literal["ratio", "cpu", "ours"] = "ratio"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.sign == "≥" else value <= self.limit


@dataclass(frozen=True, slots=True)
class Taken:
    """What was measured: `ours[i]` and `peer[i]` one right after the other; no `peer` where there is none.

    `cpu` is the same runs in CPU time of the whole process, which the load of others stretches least.
    """

    ours: Sequence[float]
    peer: Sequence[float] = ()
    cpu: "Taken | None" = None

    def __add__(self, other: "Taken") -> "Taken":
        cpu = self.cpu + other.cpu if self.cpu and other.cpu else None
        return Taken([*self.ours, *other.ours], [*self.peer, *other.peer], cpu)

    def ratios(self, compares: str) -> list[float]:
        """Return one ratio for each pair."""
        pairs = zip(self.ours, self.peer, strict=True) if self.peer else ()
        return [peer / ours if compares == FASTER else ours / peer for ours, peer in pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        what: What is measured.
        peer: What it is compared with; "" for nothing.
        precision: Of both sides; "" where no model computes.
        sizes: Of both sides.
        unit: Of the measurements: "s", "MiB", "kB" or "times".
        taken: The measurements.
        compares: FASTER or LARGER: how a ratio is formed.
        figure: What of the measurements is shown.
        target: What was promised.
    """

    what: str
    peer: str
    taken: Taken
    precision: str = ""
    sizes: str = ""
    unit: str = "s"
    compares: str = FASTER
    figure: Callable[[Sequence[float]], float] = median
    target: Target | None = None

    @property
    def ours(self) -> float:
        return self.figure(self.taken.ours)

    @property
    def theirs(self) -> float | None:
        return self.figure(self.taken.peer) if self.taken.peer else None

    @property
    def ratios(self) -> list[float]:
        return self.taken.ratios(self.compares)

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    @property
    def cpu_ratio(self) -> float | None:
        return median(self.taken.cpu.ratios(self.compares)) if self.taken.cpu and self.taken.peer else None

    @property
    def middle_half(self) -> tuple[float, float] | None:
        """Between which two values half of the ratios lie."""
        if len(self.ratios) < 4:
            return None
        first, _, third = quantiles(self.ratios, n=4)
        return first, third

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        value = {"ours": self.ours, "ratio": self.ratio, "cpu": self.cpu_ratio}[self.target.of]
        return value is not None and self.target.met(value)


def p99(values: Sequence[float]) -> float:
    """Return what 99 % of the values do not exceed."""
    return quantiles(values, n=100, method="inclusive")[98]


def stopwatch(action: Action) -> tuple[float, float]:
    """Return seconds and CPU seconds of the whole process."""
    started, cpu_started = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - started, time.process_time() - cpu_started


def as_it_says(turn: Turn) -> tuple[float, float]:
    """Take a turn that watches its own time: the `watch` of sides whose CPU time is another process's."""
    return turn()


def paired(
    ours: Action,
    peer: Action,
    *,
    seconds: float,
    at_least: int = 4,
    warmup: int = 2,
    watch: Callable[[Any], tuple[float, float]] = stopwatch,
) -> Taken:
    """Run ours and the peer's in turns; each goes first in every other pair.

    Args:
        ours: Does the work once.
        peer: Does the same work once.
        seconds: Take pairs for so long: a faster or quieter machine takes more of them.
        at_least: Take so many, however long it takes.
        warmup: Pairs to run before, unmeasured.
        watch: Runs an action and returns its seconds and CPU seconds.
    """
    for _ in range(warmup):
        ours(), peer()
    sides = ((ours, mine := []), (peer, theirs := []))
    end = time.perf_counter() + seconds
    while len(mine) < at_least or time.perf_counter() < end:
        for action, taken in sides if len(mine) % 2 == 0 else reversed(sides):
            taken.append(watch(action))
    (wall, cpu), (peer_wall, peer_cpu) = zip(*mine, strict=True), zip(*theirs, strict=True)
    return Taken(wall, peer_wall, Taken(cpu, peer_cpu))


def fresh_process(code: str) -> Any:
    """Run code in a new Python and return the JSON it prints.

    It keeps the byte code of what it imports, as every installation does, whatever this process was told: or it would
    compile our sources each time, and the peer's never.
    """
    kept = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=kept)
    if done.returncode:
        raise RuntimeError(f"a measurement in a fresh process failed:\n{code}\n{done.stderr}")
    return json.loads(done.stdout)


@contextlib.contextmanager
def beside(*command: str | Path) -> Iterator[Callable[[object], Any]]:
    """Start a program that answers each line of JSON with one, and rests between; give the function that asks it."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        assert process.stdin and process.stdout

        def ask(question: object) -> Any:
            with contextlib.suppress(BrokenPipeError):  # it has died: it says why
                print(json.dumps(question), file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
                raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{errors.read()}")
            return json.loads(line)

        yield ask
