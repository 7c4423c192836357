"""What becomes of the rows: lines in the terminal, and records as JSON; `pages.py` makes tables of these."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.harness import FASTER, Row, Skipped

Facts = Mapping[str, Any]
WORSE, MUCH_WORSE = 1.1, 1.5  # of a ratio; of a figure alone, which another load of the machine moves too


def facts(threads: int) -> dict[str, Any]:
    """Say on what machine and with what software the rows were measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "capability": _capability(),
        "cpu_count": os.cpu_count(),
        "load_average": _load(),
        "torch_threads": threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # None on Windows


def load_now() -> str:
    """Say how many processes wanted to run in the last minute."""
    return f"load average {_load()} after"


def _capability() -> str:
    """Say which vectors torch computes with, and whether it could do more."""
    import torch

    widest = ("amx_bf16", "avx512_bf16") if hasattr(torch.cpu, "get_capabilities") else ()
    found = [name for name in widest if torch.cpu.get_capabilities().get(name)]
    if "ATEN_CPU_CAPABILITY" in os.environ:
        return f"{torch.backends.cpu.get_cpu_capability()}, imitated"
    return " with ".join([torch.backends.cpu.get_cpu_capability(), *found[:1]])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None


def machine_line(about: Facts) -> str:
    return (
        f"{about['cpu_count']} CPU cores ({about['cpu']}{_computes(about)}; "
        f"load average {about['load_average']} before), "
        f"{about['torch_threads']} torch thread(s), "
        f"OMP_WAIT_POLICY={about['OMP_WAIT_POLICY']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"peft {about['peft']}, Python {about['python']}, {about['date'][:10]}"
    )


def _computes(about: Facts) -> str:
    return f", {about['capability']}" if about.get("capability") else ""  # older runs have not noted it


def regressions(kept: Mapping[str, Any], about: Facts, rows: Mapping[str, Row | Skipped]) -> list[str]:
    """Say which rows are worse than those kept, by more than what comes and goes.

    A ratio counts as worse when it is so by a tenth, and the middle halves of its pairs and of those kept lie apart. A
    figure without a peer is compared on the same kind of processor only, and counts from one and a half times on.
    """
    found = []
    for name, row in rows.items():
        old = kept["rows"].get(name)
        if old is None or isinstance(row, Skipped):
            continue
        if row.ratio is not None and old["ratio"]:
            factor = old["ratio"] / row.ratio if row.compares == FASTER else row.ratio / old["ratio"]
            worse = factor > WORSE and _apart(row.middle_half, old["middle_half"])
            said = f"ratio {row.ratio:.3g}, kept {old['ratio']:.3g}"
        else:
            factor = row.ours / old["ours"] if old["ours"] else 1.0
            worse = factor > MUCH_WORSE and kept["runs"][old["run"]]["cpu"] == about["cpu"]
            said = f"{amount(row.ours, row.unit)}, kept {amount(old['ours'], row.unit)}"
        if worse:
            found.append(f"worse than bench/measured.json: {name}: {said}, of {old['run'][:10]}")
    return found or ["nothing is worse than bench/measured.json by more than the noise"]


def _apart(one: tuple[float, float] | None, other: Sequence[float] | None) -> bool:
    """Whether two middle halves have nothing in common; one that is not known is no reason to doubt."""
    return one is None or other is None or one[1] < other[0] or other[1] < one[0]


def side_by_side(
    capability: str, rows: Mapping[str, Row | Skipped], imitated: Mapping[str, Any]
) -> list[str]:
    """Return a line for each row that was measured again, with both ratios, or both figures where it has no peer."""
    found = [f"\nwhat AVX2 alone would give, beside {capability}:"]
    for name, other in imitated.items():
        row = rows[name]
        if isinstance(row, Row):
            sides = [
                amount(one["ours"], row.unit) if one["ratio"] is None else f"{one['ratio']:.3g}"
                for one in (plain(row), other)
            ]
            found.append(
                f"{name:26} {sides[0]:>9}, with AVX2 {sides[1]}; {row.compares if row.peer else 'ours'}"
            )
    return found


def lines(name: str, row: Row) -> str:
    """Return a row as it is shown in the terminal."""
    against = f"against {row.peer}" if row.peer else "against nothing"
    figures = [f"{row.figure.__name__} {amount(row.ours, row.unit)}"]
    if row.theirs is not None:
        figures += [
            f"peer {amount(row.theirs, row.unit)}",
            f"ratio {_ratio(row)}, {row.compares}{_spread(row)}",
        ]
    elif row.taken.cpu is not None:
        figures.append(f"CPU time {amount(row.figure(row.taken.cpu.ours), row.unit)}")
    said = (row.what, "; ".join(part for part in (against, _circumstances(row)) if part), " · ".join(figures))
    return "\n".join(
        f"{title:17} {line}"
        for title, line in zip((name, "", "", ""), (*said, f"target: {target(row)}"), strict=True)
    )


def amount(value: float, unit: str) -> str:
    """Three significant digits, seconds below one in milliseconds: 0.02 s → 20.0 ms, 29.53 → 29.5, 1034 → 1034."""
    if unit == "s" and abs(value) < 1:
        value, unit = 1e3 * value, "ms"
    decimals = next(d for d, limit in ((0, 100), (1, 10), (2, 1), (3, 0.1), (4, 0)) if abs(value) >= limit)
    return f"{value:.{decimals}f} {unit}"


def target(row: Row) -> str:
    if row.target is None:
        return "none"
    own = row.target.of == "ours"
    limit = amount(row.target.limit, row.unit) if own else f"{row.target.limit:g}"
    what = row.figure.__name__ if own else {"ratio": "ratio", "cpu": "ratio in CPU time"}[row.target.of]
    return f"{what} {row.target.sign} {limit}: {'met' if row.met else 'missed'}"


def _circumstances(row: Row) -> str:
    return ", ".join(part for part in (row.precision, row.sizes) if part)


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "–"
    return f"{row.ratio:.3g}" if row.ratio >= 10 else f"{row.ratio:.3f}"


def _spread(row: Row) -> str:
    parts = []
    if row.middle_half is not None:
        parts.append(
            f"half of {len(row.ratios)} pairs in {row.middle_half[0]:.3f} to {row.middle_half[1]:.3f}"
        )
    if row.cpu_ratio is not None:
        parts.append(f"in CPU time {row.cpu_ratio:.3f}")
    return f" ({'; '.join(parts)})" if parts else ""


def as_json(about: Facts, rows: Mapping[str, Row | Skipped]) -> str:
    measured = {name: plain(row) for name, row in rows.items() if isinstance(row, Row)}
    skipped = {name: str(why) for name, why in rows.items() if isinstance(why, Skipped)}
    found = {"machine": about, "rows": measured, "skipped": skipped}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def plain(row: Row) -> dict[str, Any]:
    """Return all of a row but its single measurements."""
    return {
        **{name: getattr(row, name) for name in ("what", "peer", "precision", "sizes", "unit", "compares")},
        "figure": row.figure.__name__,
        **{name: getattr(row, name) for name in ("ours", "theirs", "ratio", "cpu_ratio", "middle_half")},
        "measurements": len(row.taken.ours),
        "target": target(row),
        "met": row.met,
    }
