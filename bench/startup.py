"""How long a notebook waits before its first line."""

from functools import partial

from bench.harness import Row, Taken, Target, fresh_process, paired

IMPORT = """
import sys, time
started, cpu_started = time.perf_counter(), time.process_time()
{statement}
print([time.perf_counter() - started, time.process_time() - cpu_started])
assert {may_load_torch} or "torch" not in sys.modules, "{statement} has loaded torch"
"""


def package() -> Row:
    """Issue 2: at most 0.5 s, and no torch."""
    return Row(
        what="`import tensafe_nb` in a fresh process; asserts that torch stays out",
        peer="`import torch`",
        taken=_in_turns("import tensafe_nb", "import torch"),
        target=Target("≤", 0.5, "ours"),
    )


def clients() -> Row:
    """What the row above leaves out, since names load when first used."""
    names = "ServiceClient, TrainingConfig, LoRAConfig, BatchData"
    return Row(
        what="the same with the names of a first cell, which load when first used; torch stays out",
        peer="`import numpy, pydantic`",
        taken=_in_turns(f"from tensafe_nb import {names}", "import numpy, pydantic"),
    )


def _in_turns(ours: str, peer: str) -> Taken:
    return paired(
        partial(_import, ours),
        partial(_import, peer),
        seconds=3,
        warmup=1,
        watch=lambda import_: import_(),  # the new process holds the watch itself
    )


def _import(statement: str) -> tuple[float, float]:
    code = IMPORT.format(statement=statement, may_load_torch=statement == "import torch")
    wall, cpu = fresh_process(code)
    return wall, cpu
