"""What was measured, kept row by row in `bench/measured.json`, and the pages made of it: docs/benchmarks.md, README.md.

A row stays as it was measured, with the date, the commit and the machine of its own run, until it is measured again.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from bench.harness import FASTER, ROOT, Row, Skipped
from bench.report import Facts, amount, machine_line, plain

MEASURED, TABLES, README = (
    ROOT / "bench" / "measured.json",
    ROOT / "docs" / "benchmarks.md",
    ROOT / "README.md",
)
SECTIONS = {
    "startup": "Import",
    "queue": "The queue",
    "training": "Training",
    "sampling": "Sampling",
    "rl": "Reinforcement learning",
    "memory": "Memory",
    "store": "Checkpoints, keys, audit log",
    "privacy": "Differential privacy",
    "encrypted": "Homomorphic LoRA",
    "panel": "The panel",
    "remote": "A remote server",
    "tinker": "The tinker SDK",
    "cluster": "Replicas in processes of one machine",
    "on_ray": "Replicas on Ray",
    "real": "A real model",
    "chats": "Reading chats",
}
COLUMNS = ("measured, and against what", "ours", "peer", "ratio", "target", "run")
HEADLINES = (
    (
        "rl-update",
        "the speed of TRL's `GRPOTrainer` in an update of reinforcement learning, with the same model, prompts, reward "
        "and optimiser",
    ),
    (
        "real-pairs",
        "the speed of `transformers.Trainer` with PEFT on SmolLM2-135M, on pairs of uneven lengths",
    ),
    (
        "real-sampling",
        "the speed of `peft_model.generate` on SmolLM2-135M with its adapter, 16 rows at a time, where there is a C "
        "compiler",
    ),
    (
        "dp-step-llama",
        "the time of a plain step is what a step with differential privacy takes, on a Llama of 10 layers",
    ),
)
Measured = dict[str, Any]


def load() -> Measured:
    """Return what is kept: `runs` by the time they began, `rows`, and `skipped` with the reason."""
    kept: Measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    return kept


def merged(
    kept: Measured, about: Facts, rows: Mapping[str, Row | Skipped], names: Mapping[str, str]
) -> Measured:
    """Return `kept` with the rows of a run in place of older ones, in the order of `names`, without those gone.

    A row that was skipped takes no figure's place: what it needed was not there this time.
    """
    run = about["date"]
    found = kept["rows"] | {
        name: plain(row) | {"run": run} for name, row in rows.items() if isinstance(row, Row)
    }
    why = kept["skipped"] | {name: str(row) for name, row in rows.items() if isinstance(row, Skipped)}
    ordered = {name: found[name] for name in names if name in found}
    runs = kept["runs"] | {run: dict(about)}
    return {
        "runs": {date: runs[date] for date in sorted({row["run"] for row in ordered.values()})},
        "rows": ordered,
        "skipped": {name: why[name] for name in names if name in why and name not in ordered},
    }


def write(kept: Measured, names: Mapping[str, str]) -> list[str]:
    """Write what is kept, the tables, and the README's numbers; return the names of the files."""
    MEASURED.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for page, mark, content in (
        (TABLES, "bench", tables(kept, names)),
        (README, "headlines", headlines(kept)),
    ):
        page.write_text(
            between_marks(page.read_text(encoding="utf-8"), content, page.name, mark), encoding="utf-8"
        )
    return [path.relative_to(ROOT).as_posix() for path in (MEASURED, TABLES, README)]


def tables(kept: Measured, names: Mapping[str, str]) -> str:
    """Return a section for each subject, and what ran where at the end; `names` says where rows are measured."""
    numbers = {date: f"{number}" for number, date in enumerate(kept["runs"], 1)}
    return "\n".join([*_sections(kept, names, numbers), "## The runs", "", *_runs(kept)])


def _sections(kept: Measured, names: Mapping[str, str], numbers: Mapping[str, str]) -> Iterator[str]:
    for module, of in groupby(names, lambda name: names[name].partition(":")[0]):
        known = [name for name in of if name in kept["rows"] or name in kept["skipped"]]
        if known:
            yield f"## {SECTIONS[module]}\n"
            yield from (_line(COLUMNS), _line(["---"] * len(COLUMNS)))
            yield from (_line(_cells(name, kept, numbers)) for name in known)
            yield ""


def _runs(kept: Measured) -> Iterator[str]:
    for number, about in enumerate(kept["runs"].values(), 1):
        yield f"{number}. Commit {about.get('commit') or 'unknown'}, {machine_line(about)}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(name: str, kept: Measured, numbers: Mapping[str, str]) -> tuple[str, ...]:
    if name in kept["skipped"]:
        return (f"**{name}**<br>not measured: {kept['skipped'][name]}", *["–"] * (len(COLUMNS) - 1))
    row = kept["rows"][name]
    circumstances = ", ".join(filter(None, (row["precision"], row["sizes"])))
    against = f"against {row['peer']}" if row["peer"] else ""
    cpu = "" if row["cpu_ratio"] is None else f" [{row['cpu_ratio']:.3g}]"
    return (
        "<br>".join(filter(None, (f"**{name}**", row["what"], against, circumstances))),
        amount(row["ours"], row["unit"]),
        "–" if row["theirs"] is None else amount(row["theirs"], row["unit"]),
        "–" if row["ratio"] is None else f"{row['ratio']:.3g}{cpu}, {row['compares']}",
        row["target"].replace("missed", "**missed**"),
        numbers[row["run"]],
    )


def headlines(kept: Measured) -> str:
    """Return the numbers of the README; a speed is the peer's time over ours, whichever way a row has it."""
    return "\n".join(
        f"- **{_headline(name, kept['rows'][name]):.3g} ×** {said}."
        for name, said in HEADLINES
        if name in kept["rows"]
    )


def _headline(name: str, row: Mapping[str, Any]) -> float:
    speed = name != "dp-step-llama"  # of that one the time is told
    ratio: float = row["ratio"]
    return ratio if (row["compares"] == FASTER) == speed else 1 / ratio


def check_marks() -> None:
    """Refuse pages that have no place for what will be measured.

    Raises:
        ValueError: Not exactly one pair of marks, in order.
    """
    for page, mark in ((TABLES, "bench"), (README, "headlines")):
        between_marks(page.read_text(encoding="utf-8"), "", page.name, mark)


def between_marks(text: str, content: str, where: str, mark: str) -> str:
    """Return the text with `content` in place of what stands between the two marks."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"{where} has no place for what was measured: write the lines {begin} and {end}, once each and in this "
            f"order, where it belongs."
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
