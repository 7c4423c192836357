"""What a run is called, what its user says of it, and what it was started with."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import RunDescribed
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.store.disk import Files, disk_errors, write_all

MAX_NAME, MAX_TAGS, MAX_NOTES = 200, 50, 10_000  # characters, tags, characters
PACKAGES = ("tensafe_nb", "torch", "transformers", "peft", "opacus", "numpy")  # whose versions a run keeps


def described(
    before: RunDescribed, name: str | None, tags: str | Sequence[str] | None, notes: str | None
) -> RunDescribed:
    """Return a description with what is given changed; None leaves what there was.

    Raises:
        ValidationError: Something that is no text, or too long.
    """
    if name is not None and (not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable()):
        raise ValidationError(
            f"A run's name={as_given(name)} must be one line of at most {MAX_NAME} characters."
        )
    if notes is not None and (not isinstance(notes, str) or len(notes) > MAX_NOTES):
        raise ValidationError(
            f"A run's notes={as_given(notes)} must be a text of at most {MAX_NOTES:,} characters."
        )
    given = [tags] if isinstance(tags, str) else tags
    fits = given is None or (isinstance(given, list | tuple | set | frozenset) and len(given) <= MAX_TAGS)
    if not fits or any(not isinstance(tag, str) or not 0 < len(tag) <= MAX_NAME for tag in given or ()):
        raise ValidationError(
            f"A run's tags={as_given(tags)} must be at most {MAX_TAGS} texts of 1 to {MAX_NAME} characters."
        )
    return replace(
        before,
        seq=0,
        time=time.time(),
        name=before.name if name is None else name.strip() or None,
        tags=before.tags if given is None else tuple(dict.fromkeys(given)),
        notes=before.notes if notes is None else notes,
    )


def file_of(log: Path) -> Path:
    """Return where descriptions lie that came when nobody wrote a log any more: beside it."""
    return log.with_name("descriptions.jsonl")


def keep(log: Path, description: RunDescribed) -> None:
    """Write a description beside a log.

    Raises:
        StorageError: It could not be written.
    """
    with (
        disk_errors(f"keep what is said of the run {description.run_id}"),
        Files().unbuffered(file_of(log), append=True) as file,
    ):
        size = file.seek(0, os.SEEK_END)
        try:
            write_all(file, (json.dumps(encode(description), allow_nan=False) + "\n").encode())
        except OSError:
            file.truncate(size)  # behind half a line, no other could be read
            raise


def kept(log: Path) -> dict[str, RunDescribed]:
    """Return the latest description of each run that lies beside a log."""
    found: dict[str, RunDescribed] = {}
    if file_of(log).exists():
        for line in file_of(log).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a torn line, or one of a newer version: the log itself is whole
                event = decode(json.loads(line), RunDescribed)
                found[event.run_id] = event
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes, as far as they are here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def flattened(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return a configuration with its entries named by their paths: `training.optimizer.learning_rate`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{above}{name}"
        flat |= flattened(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat


def entry(config: Mapping[str, Any], name: str) -> str | None:
    """Return the path that a name means: itself, or the one that ends with it; None where there is none, or two."""
    flat = flattened(config)
    if name in flat:
        return name
    ends = [path for path in flat if path.endswith(f".{name}")]
    return ends[0] if len(ends) == 1 else None
