"""`tensafe-nb artifacts | keys | audit`: look after what the home folder keeps; no notebook and no torch needed."""

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

from tensafe_nb.display import visible
from tensafe_nb.errors import DecryptionError, ValidationError
from tensafe_nb.protocol.results import AuditVerification, SaveStateResult
from tensafe_nb.service import ServiceClient

KEYS_HELP = (
    "where the key comes from: file (the local key file), env (TENSAFE_KEK) or passphrase (TENSAFE_PASSPHRASE, "
    "else asked for); default: TENSAFE_KEK where it is set, else the file"
)


def add_commands(commands: Any) -> None:
    """Add the three commands to the parser of `tensafe-nb`."""
    _add_artifacts(commands)
    _add_keys(commands)
    audit = commands.add_parser("audit", help="check the audit log").add_subparsers(required=True)
    verify = _verb(
        audit, "verify", _verify_audit, "check every record of the log; exit status 1 if one does not fit"
    )
    verify.add_argument(
        "path", type=Path, nargs="?", help="a copy of a log; default: the log of the home folder"
    )
    verify.add_argument(
        "--anchor", action="append", default=[], help="a head noted earlier: must be in the log"
    )
    verify.add_argument(
        "--artifact",
        action="append",
        type=Path,
        default=[],
        help="a sealed file: the head it names must be in the log",
    )


def _add_artifacts(commands: Any) -> None:
    artifacts = commands.add_parser(
        "artifacts",
        help="list, verify, decrypt or export checkpoints",
        description="Checkpoints lie sealed in the home folder (TENSAFE_HOME). Every command takes their ids or names.",
    ).add_subparsers(required=True, metavar="list|verify|decrypt|export")
    _verb(artifacts, "list", _list, "show what there is, newest first")
    verify = _verb(
        artifacts, "verify", _verify, "read artifacts whole and check every byte; exit status 1 if one is bad"
    )
    verify.add_argument("artifact", nargs="*", help="ids or names; default: all")
    decrypt = _verb(
        artifacts, "decrypt", _decrypt, "write the content of an artifact in the clear, for you to look at"
    )
    decrypt.add_argument("artifact", help="id, name, or the path of a sealed file")
    decrypt.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    export = _verb(
        artifacts, "export", _export, "write an adapter that plain PEFT loads, or with --merged a whole model"
    )
    export.add_argument("artifact", help="id or name")
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    export.add_argument("--merged", action="store_true", help="add the adapter into the base weights")


def _add_keys(commands: Any) -> None:
    keys = commands.add_parser(
        "keys",
        help="list, make or rotate the keys that seal checkpoints",
        description="Back up the key file that `list` names: without it your checkpoints cannot be opened.",
    ).add_subparsers(required=True, metavar="list|new|rotate")
    _verb(keys, "list", _list_keys, "show the ids of the keys that are here; never the keys")
    _verb(keys, "new", _new_key, "make a new key for what is saved from now on; older ones go on opening")
    _verb(keys, "rotate", _rotate, "make a new key and wrap everything that is stored with it")


def _verb(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    parser.add_argument("--keys", choices=("file", "env", "passphrase"), metavar="SOURCE", help=KEYS_HELP)
    parser.set_defaults(run=run)
    return parser


def _vault(chosen: argparse.Namespace) -> Any:
    from tensafe_nb.store.home import Home
    from tensafe_nb.store.vault import Vault

    return Vault(Home.of_environment(), chosen.keys)


def _list(chosen: argparse.Namespace) -> int:
    vault = _vault(chosen)
    stored: list[SaveStateResult] = vault.list()
    for found in stored:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.created_at))
        print(
            f"{found.artifact_id}  {when}  step {found.step:6d}  {_size(found.size_bytes):>9}  "
            f"{visible(f'{found.model_ref}  key {found.encryption.key_id}  {_description(found)}')}"
        )
    for path, reason in vault.artifacts.damaged():
        print(f"damaged: {visible(f'{path}: {reason}')}", file=sys.stderr)
    if not stored:
        print("There are no artifacts yet: tc.save_state() makes one.")
    return 0


def _description(found: SaveStateResult) -> str:
    if found.metadata is None:
        return "(its key is not here: name and metadata stay sealed)"
    return f"{found.name or ''} {json.dumps(found.metadata, ensure_ascii=False) if found.metadata else ''}".strip()


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _verify(chosen: argparse.Namespace) -> int:
    vault = _vault(chosen)
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


def _decrypt(chosen: argparse.Namespace) -> int:
    _refuse_if_used(chosen.to)
    with _opened(_vault(chosen), chosen.artifact) as (metadata, parts):
        chosen.to.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, _, stream in parts:
            with _private(chosen.to / name) as file:
                shutil.copyfileobj(stream, file, 4 << 20)
    with _private(chosen.to / "metadata.json") as file:
        file.write(json.dumps(dict(metadata), indent=2, ensure_ascii=False).encode())
    print(f"{chosen.to} now holds, in the clear: {', '.join(sorted(p.name for p in chosen.to.iterdir()))}")
    return 0


@contextmanager
def _opened(vault: Any, artifact: str) -> Iterator[tuple[Any, Any]]:
    path = Path(artifact)
    if path.is_file():
        from tensafe_nb.store.artifacts.artifacts import open_file

        with open_file(path, vault.keys) as found:
            yield found.metadata, found.parts()
    else:
        with vault.artifacts.open(vault.artifacts.resolve(artifact)) as found:
            yield found.metadata, found.parts()


def _private(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")


def _refuse_if_used(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValidationError(f"{folder} exists and is not an empty folder. Choose another one.")


def _export(chosen: argparse.Namespace) -> int:
    with ServiceClient(key_source=chosen.keys) as service:
        print(service.export_adapter(chosen.artifact, chosen.to, chosen.merged))
    return 0


def _list_keys(chosen: argparse.Namespace) -> int:
    from tensafe_nb.store.home import Home

    infos = _vault(chosen).keys.infos()
    for info in infos:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.created_at)) if info.created_at else "?"
        role = "seals new artifacts" if info.primary else "retired" if info.retired else "opens"
        print(f"{info.key_id}  {info.source}  made {made}  {role}")
    print(
        f"The key file is kept in {Home.of_environment().keys()}."
        if infos
        else "There are no keys yet: the first save makes one."
    )
    return 0


def _new_key(chosen: argparse.Namespace) -> int:
    info = _vault(chosen).keys.new()
    print(
        f"{info.key_id} seals from now on. What is stored keeps its key: `tensafe-nb keys rotate` changes that."
    )
    return 0


def _rotate(chosen: argparse.Namespace) -> int:
    vault = _vault(chosen)
    count = vault.rotate()
    print(f"{count} artifacts now open with {vault.keys.primary_id()}. Back up the key again.")
    return 0


def _verify_audit(chosen: argparse.Namespace) -> int:
    from tensafe_nb.store.audit.verify import verify_file
    from tensafe_nb.store.sealed.envelope import read_header

    anchors = list(chosen.anchor)
    for path in chosen.artifact:
        with path.open("rb") as file:
            head = read_header(file).fields.get("ledger_head")
        if head is not None:
            anchors.append(head["record_hash"])
    vault = _vault(chosen)
    try:
        found = (
            vault.verify(anchors) if chosen.path is None else verify_file(chosen.path, vault.keys, anchors)
        )
    except OSError as error:
        raise ValidationError(f"{chosen.path} cannot be read: {error.strerror}.") from error
    _print_verification(found)
    return 0 if found.ok else 1


def _print_verification(found: AuditVerification) -> None:
    print(f"{'ok' if found.ok else 'NOT OK'}: {found.records} records checked")
    if not found.ok:
        print(f"first bad record: {found.first_bad_seq}: {visible(str(found.reason))}")
    for anchor in found.anchors_matched:
        print(f"anchor found: {anchor}")
    for text in found.not_checked:
        print(f"not checked: {text}")
    if found.head:
        print(f"head: {found.head}  (note it elsewhere: it is the anchor of the next check)")
