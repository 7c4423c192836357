"""`tensafe-nb artifacts`: list, verify, decrypt or export the checkpoints that lie sealed in the home folder."""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensafe_nb.cli.vault import opened_vault, vault_command
from tensafe_nb.display import size_text, visible
from tensafe_nb.errors import DecryptionError, ValidationError
from tensafe_nb.protocol.results import SaveStateResult
from tensafe_nb.service import ServiceClient


def add_artifacts(commands: Any) -> None:
    """Add `artifacts` to the parser of `tensafe-nb`."""
    artifacts = commands.add_parser(
        "artifacts",
        help="list, verify, decrypt or export checkpoints",
        description="Checkpoints lie sealed in the home folder (TENSAFE_HOME). Every command takes their ids or names.",
    ).add_subparsers(required=True, metavar="list|verify|decrypt|export")
    vault_command(artifacts, "list", list_artifacts, "show what there is, newest first")
    verify = vault_command(
        artifacts,
        "verify",
        verify_artifacts,
        "read artifacts whole and check every byte; exit status 1 if one is bad",
    )
    verify.add_argument("artifact", nargs="*", help="ids or names; default: all")
    clear = vault_command(
        artifacts, "decrypt", decrypt, "write the content of an artifact in the clear, for you to look at"
    )
    clear.add_argument("artifact", help="id, name, or the path of a sealed file")
    clear.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    folder = vault_command(
        artifacts, "export", export, "write an adapter that plain PEFT loads, or with --merged a whole model"
    )
    folder.add_argument("artifact", help="id or name")
    folder.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    folder.add_argument("--merged", action="store_true", help="add the adapter into the base weights")


def list_artifacts(chosen: argparse.Namespace) -> int:
    vault = opened_vault(chosen)
    stored: list[SaveStateResult] = vault.list()
    for found in stored:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.created_at))
        words = "(its key is not here: name and metadata stay sealed)"
        if found.metadata is not None:
            metadata = json.dumps(found.metadata, ensure_ascii=False) if found.metadata else ""
            words = f"{found.name or ''} {metadata}".strip()
        print(
            f"{found.artifact_id}  {when}  step {found.step:6d}  {size_text(found.size_bytes):>9}  "
            f"{visible(f'{found.model_ref}  key {found.encryption.key_id}  {words}')}"
        )
    for path, reason in vault.artifacts.damaged():
        print(f"damaged: {visible(f'{path}: {reason}')}", file=sys.stderr)
    if not stored:
        print("There are no artifacts yet: tc.save_state() makes one.")
    return 0


def verify_artifacts(chosen: argparse.Namespace) -> int:
    vault = opened_vault(chosen)
    wanted = chosen.artifact or [found.artifact_id for found in vault.list()]
    damaged = [] if chosen.artifact else list(vault.artifacts.damaged())
    for path, reason in damaged:
        print(f"BAD  {visible(f'{path}: {reason}')}")
    bad = len(damaged)
    for artifact in wanted:
        try:
            found = vault.artifacts.verify(vault.artifacts.resolve(artifact))
            print(f"ok   {found.artifact_id}  {found.content_hash}")
        except DecryptionError as error:
            bad += 1
            print(f"BAD  {visible(f'{artifact}: {error}')}")
    return 1 if bad else 0


def decrypt(chosen: argparse.Namespace) -> int:
    if chosen.to.exists() and (not chosen.to.is_dir() or any(chosen.to.iterdir())):
        raise ValidationError(f"{chosen.to} exists and is not an empty folder. Choose another one.")
    with artifact_content(opened_vault(chosen), chosen.artifact) as (metadata, parts):
        chosen.to.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, _, stream in parts:
            with _private_file(chosen.to / name) as file:
                shutil.copyfileobj(stream, file, 4 << 20)
    with _private_file(chosen.to / "metadata.json") as file:
        file.write(json.dumps(dict(metadata), indent=2, ensure_ascii=False).encode())
    print(f"{chosen.to} now holds, in the clear: {', '.join(sorted(p.name for p in chosen.to.iterdir()))}")
    return 0


@contextmanager
def artifact_content(vault: Any, artifact: str) -> Iterator[tuple[Any, Any]]:
    """Open an artifact by id, name or path: its metadata, and its parts as (name, size, stream)."""
    path = Path(artifact)
    if path.is_file():
        from tensafe_nb.store.artifacts.artifacts import open_file

        with open_file(path, vault.keys) as found:
            yield found.metadata, found.parts()
    else:
        with vault.artifacts.open(vault.artifacts.resolve(artifact)) as found:
            found.check()  # before any of it is in the clear on a disk
            yield found.metadata, found.parts()


def _private_file(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")


def export(chosen: argparse.Namespace) -> int:
    with ServiceClient(key_source=chosen.keys) as service:
        print(service.export_adapter(chosen.artifact, chosen.to, chosen.merged))
    return 0
