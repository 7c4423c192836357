"""The glossary's line for each label of the panel: its text is that of the notebooks' glossary, read once."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?!word \|)([^|-][^|]*) \| ([^|]+) \|$", re.MULTILINE)
LABELS = {  # as they stand in the panel, and the words of the glossary that say what they mean
    "ε": "ε (epsilon)",
    "A": "advantage",
    "loss": "loss",
    "reward": "reward",
    "held out": "held out",
    "eval/loss": "held out",
    "eval/reward": "held out",
    "groups of answers": "group",
    "length of answers": "token",
    "tokens/s": "token",
    "answers cut off": "truncated, cut",
    "entropy": "entropy",
    "policy KL": "KL",
    "gradient norm": "gradient norm",
    "size of gradient and update": "gradient norm",
    "checkpoints": "checkpoint",
}


@cache
def glossary() -> Mapping[str, str]:
    """Return the words of the glossary and what they mean; nothing in an installation without notebooks."""
    for folder in (PACKAGE, PACKAGE.parent):  # installed, or a clone
        path = folder / "notebooks" / "glossary.md"
        if path.is_file():
            return dict(ROW.findall(path.read_text(encoding="utf-8")))
    return {}


@cache
def explained() -> Mapping[str, str]:
    """Return the labels of the panel, each with a word and its line of the glossary."""
    words = glossary()
    return {label: f"{word}: {words[word]}" for label, word in LABELS.items() if word in words}
