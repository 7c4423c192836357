"""Where the real model of the tests and examples lies, and how to get it."""

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "build" / "models"
MISSING = "SmolLM2's GGUF file is not there: run `make models`, or set TENSAFE_SMOLLM2 to its path"


def find_smollm2() -> Path | None:
    """Return the path of SmolLM2-135M-Instruct's GGUF file, if it is there."""
    named = os.environ.get("TENSAFE_SMOLLM2")
    if named:
        return Path(named) if Path(named).is_file() else None
    return next(iter(sorted(FOLDER.glob("SmolLM2-135M-Instruct*.gguf"))), None)


def smollm2() -> Path:
    """Return its path, or end the program with the command that fetches it."""
    path = find_smollm2()
    if path is None:
        raise SystemExit(MISSING)
    return path
