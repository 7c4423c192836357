"""Whether a long run grows. In a process of its own: memory that an earlier row has freed would hide it."""

import psutil

import tensafe_nb as tn
from bench import workload
from bench.harness import LARGER, Row, Taken, Target, fresh_process

EARLY, LATE = 50, 1_000
ROWS, TOKENS = 1, 8


def after_a_thousand_steps() -> Row:
    """Issue 2: at most 1.02."""
    early, late = fresh_process("from bench import memory; print(memory.resident())")
    return Row(
        what=f"resident memory after {LATE} steps through the client",
        peer=f"after {EARLY} steps, the same process",
        precision="fp32",
        sizes=f"{workload.MODEL}, {ROWS}×{TOKENS}",
        unit="MiB",
        taken=Taken([late], [early]),
        compares=LARGER,
        target=Target("≤", 1.02),
    )


def resident() -> list[float]:
    """Train, and return the MiB resident after EARLY and after LATE steps."""
    found = []
    with tn.ServiceClient() as service:
        step = workload.step_through(workload.tiny_client(service), workload.full(ROWS, TOKENS))
        for number in range(1, LATE + 1):
            step()
            if number in (EARLY, LATE):
                found.append(psutil.Process().memory_info().rss / 2**20)
    return found
