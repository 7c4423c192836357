"""`python -m bench [names] [--threads N] [--write]`: measure, print, write build/bench.json, and pages if asked to.

Imports no torch before its threads are settled: how many, and that waiting ones sleep.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from bench import pages, report
from bench.harness import ROOT, Row, Skipped

BUILD = ROOT / "build"
IMITATED = BUILD / "bench-avx2.json"
ROWS = {
    "import": "startup:package",
    "import-clients": "startup:clients",
    "client-ready": "startup:ready",
    "queue-p50": "queue:usual_latency",
    "queue-p99": "queue:worst_latency",
    "pipeline": "queue:pipelined_steps",
    "pipeline-short": "queue:pipelined_short_steps",
    "training": "training:all_labelled",
    "training-ragged": "training:ragged",
    "training-quarter": "training:quarter_labelled",
    "training-checkpointing": "training:recomputed",
    "sampling": "sampling:sums",
    "sampling-requests": "sampling:requests",
    "rl-update": "rl:update",
    "rl-environments": "rl:environments",
    "rl-overhead": "rl:overhead",
    "rl-waiting": "rl:waiting",
    "memory": "memory:after_a_thousand_steps",
    "checkpoint-write": "store:write",
    "checkpoint-read": "store:read",
    "checkpoint-seal": "store:sealing",
    "checkpoint-lora": "store:checkpoint",
    "key-rotation": "store:rotation",
    "audit": "store:audit",
    "dp-step": "privacy:step_tiny",
    "dp-step-llama": "privacy:step_llama",
    "dp-step-all-weights": "privacy:step_all_weights",
    "dp-opacus": "privacy:step_opacus",
    "dp-memory": "privacy:memory",
    "dp-accounting-step": "privacy:accounting_step",
    "encrypted-one": "encrypted:one_token",
    "encrypted-library": "encrypted:one_token_against_the_library",
    "encrypted-64": "encrypted:of_64_tokens",
    "encrypted-512": "encrypted:of_512_tokens",
    "encrypted-upload": "encrypted:upload",
    "encrypted-download": "encrypted:download",
    "encrypted-sum": "encrypted:aggregation",
    "encrypted-estimate": "encrypted:estimated",
    "panel-bytes": "panel:bytes_per_update",
    "panel-slow-down": "panel:slow_down",
    "panel-static": "panel:static_part",
    "panel-picture": "panel:picture_size",
    "panel-memory": "panel:memory",
    "chat-first": "panel:first_piece",
    "remote-p50": "remote:usual_latency",
    "remote-p95": "remote:worst_latency",
    "remote-large": "remote:large_batch",
    "remote-cpu": "remote:cpu",
    "remote-events": "remote:event_delay",
    "remote-pipeline-short": "remote:pipelined_small_steps",
    "remote-pipeline": "remote:pipelined_steps",
    "remote-many-empty": "remote:many_empty",
    "remote-many": "remote:many_steps",
    "remote-many-slowest": "remote:slowest_of_many",
    "remote-journal": "remote:journal",
    "remote-restart": "remote:restart",
    "remote-memory": "remote:further_client",
    "remote-download": "remote:download",
    "tinker-pipeline": "tinker:pipelined_steps",
    "cluster-two": "cluster:two",
    "cluster-one": "cluster:one",
    "cluster-call": "cluster:call",
    "cluster-sum": "cluster:gradients",
    "cluster-regroup": "cluster:regroup",
    "ray-call": "on_ray:call",
    "ray-sum": "on_ray:gradients",
    "ray-regroup": "on_ray:regroup",
}
REAL = {
    "real-training": "real:all_labelled",
    "real-training-bf16": "real:in_bf16",
    "real-pairs": "real:docstring_pairs",
    "real-token-ce": "real:token_ce",
    "real-token-ce-memory": "real:token_ce_memory",
    "real-sampling": "real:sampling",
    "real-sampling-one-row": "real:sampling_one_row",
    "real-sampling-requests": "real:sampling_requests",
    "real-sampling-bf16": "real:sampling_bf16",
    "real-sampling-one-row-int8": "real:sampling_one_row_int8",
    "real-sampling-llama-cpp": "real:sampling_llama_cpp",
    "real-sampling-by-llama-cpp": "real:sampling_by_llama_cpp",
    "real-sampling-base-by-llama-cpp": "real:sampling_a_base_by_llama_cpp",
    "real-rl-update": "real:rl_update",
    "real-rl-update-auto": "real:rl_update_auto",
    "real-memory": "real:step_memory",
    "real-memory-checkpointing": "real:step_memory_recomputed",
    "real-gguf-again": "real:gguf_again",
    "real-chats": "chats:one_turn",
    "real-chats-five-turns": "chats:five_turns",
}
ALL = ROWS | REAL
COMPUTED = (  # how rows begin whose ratios the processor's vectors decide
    "training",
    "sampling",
    "rl-update",
    "rl-environments",
    "dp-step",
    "dp-opacus",
    "real-training",
    "real-pairs",
    "real-token-ce",
    "real-sampling",
    "real-rl",
)
IMITATION = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}  # a newer processor then computes as if


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        names = select(chosen.rows or (list(REAL) if chosen.real else []))
        if chosen.write and chosen.avx2:
            raise ValueError("--write keeps what a processor does, and --avx2 imitates another one")
        if chosen.write:
            pages.check_marks()  # before minutes are spent
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="tensafe-bench-") as home:
        settle(chosen.threads, home, avx2=chosen.avx2)
        about, before = report.facts(chosen.threads), pages.load()
        print(report.machine_line(about))
        started = time.perf_counter()
        rows: dict[str, Row | Skipped] = {}
        for name in names:
            rows[name] = measured(name)
            if chosen.write:  # row by row: what is measured is kept, whatever happens to the next
                pages.write(pages.merged(pages.load(), about, rows, ALL), ALL)
    print(f"\n{len(rows)} rows in {time.perf_counter() - started:.0f} s, {report.load_now()}")
    if not chosen.avx2:  # what is kept was not measured so
        print("\n".join(report.regressions(before, about, rows)))
    written = IMITATED if chosen.avx2 else BUILD / f"bench{'-real' * chosen.real}.json"
    written.parent.mkdir(exist_ok=True)
    written.write_text(report.as_json(about, rows), encoding="utf-8")
    print(f"\nwritten: {written.relative_to(ROOT)}")
    if chosen.write:
        print(f"written: {', '.join(pages.write(pages.load(), ALL))}")
    if chosen.both:
        again(rows, chosen.threads, about["capability"])


def again(rows: Mapping[str, Row | Skipped], threads: int, capability: str) -> None:
    """Measure what the processor's vectors decide once more, in a process that does as if it had AVX2 only."""
    computed = [name for name in rows if name.startswith(COMPUTED)]
    if not computed or not capability.startswith("AVX512"):
        print(
            f"\nnothing to measure again with AVX2: {'this processor has no more' if computed else 'no such row'}"
        )
        return
    print("\nagain, as if the processor had AVX2 only:\n", flush=True)
    command = [sys.executable, "-m", "bench", *computed, "--avx2", f"--threads={threads}"]
    subprocess.run(command, check=True)
    imitated = json.loads(IMITATED.read_text(encoding="utf-8"))["rows"]
    print("\n".join(report.side_by_side(capability, rows, imitated)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench", description="Measure tensafe_nb against named peers.")
    parser.add_argument("rows", nargs="*", help=f"names, or how they begin; all when none: {', '.join(ROWS)}")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--real", action="store_true", help=f"the rows of a real model: {', '.join(REAL)}")
    parser.add_argument("--avx2", action="store_true", help="imitate a processor that has AVX2 only")
    parser.add_argument(
        "--both", action="store_true", help="where there is AVX-512, measure computing rows again with --avx2"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="keep these rows in bench/measured.json, and put them into docs/benchmarks.md and README.md",
    )
    return parser


def select(wanted: Sequence[str]) -> list[str]:
    """Return the rows so named, or else those whose names begin so; all but the real model's when none is wanted."""
    chosen: set[str] = set()
    for name in wanted:
        found = {name} & ALL.keys() or {row for row in ALL if row.startswith(name)}
        if not found:
            raise ValueError(f"there is no row {name!r}; there are {', '.join(ALL)}")
        chosen |= found
    return [row for row in ALL if row in chosen] if wanted else list(ROWS)


def settle(threads: int, home: str, *, avx2: bool = False) -> None:
    """Fix what would distort the figures; child processes inherit it."""
    if avx2:
        os.environ.update(IMITATION)
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        OMP_WAIT_POLICY="PASSIVE",  # a waiting thread that spins takes the core from the one it waits for
        TENSAFE_HOME=home,
    )
    import torch

    torch.set_num_threads(threads)


def measured(name: str) -> Row | Skipped:
    """Measure a row and show it, or why it was not measured."""
    module, _, function = ALL[name].partition(":")
    measure: Callable[[], Row] = getattr(import_module(f"bench.{module}"), function)
    started = time.perf_counter()
    try:
        row = measure()
    except Skipped as why:
        print(f"\n{name:17} skipped: {why}", flush=True)
        return why
    print(f"\n{report.lines(name, row)}   [{time.perf_counter() - started:.0f} s]", flush=True)
    return row


if __name__ == "__main__":
    main()
