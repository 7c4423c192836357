"""`tensafe-nb audit`: check the chain of records that the home folder keeps, or a copy of it."""

import argparse
from pathlib import Path
from typing import Any

from tensafe_nb.cli.vault import opened_vault, vault_command
from tensafe_nb.display import visible
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.results import AuditVerification


def add_audit(commands: Any) -> None:
    """Add `audit` to the parser of `tensafe-nb`."""
    audit = commands.add_parser("audit", help="check the audit log").add_subparsers(required=True)
    verify = vault_command(
        audit, "verify", verify_audit, "check every record of the log; exit status 1 if one does not fit"
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


def verify_audit(chosen: argparse.Namespace) -> int:
    from tensafe_nb.store.audit.verify import verify_file
    from tensafe_nb.store.sealed.envelope import read_header

    anchors = list(chosen.anchor)
    for path in chosen.artifact:
        with path.open("rb") as file:
            head = read_header(file).fields.get("ledger_head")
        if head is not None:
            anchors.append(head["record_hash"])
    vault = opened_vault(chosen)
    try:
        found = (
            vault.verify(anchors) if chosen.path is None else verify_file(chosen.path, vault.keys, anchors)
        )
    except OSError as error:
        raise ValidationError(f"{chosen.path} cannot be read: {error.strerror}.") from error
    print_verification(found)
    return 0 if found.ok else 1


def print_verification(found: AuditVerification) -> None:
    print(f"{'ok' if found.ok else 'NOT OK'}: {found.records} records checked")
    if not found.ok:
        print(f"first bad record: {found.first_bad_seq}: {visible(str(found.reason))}")
    for anchor in found.anchors_matched:
        print(f"anchor found: {anchor}")
    for text in found.not_checked:
        print(f"not checked: {text}")
    if found.head:
        print(f"head: {found.head}  (note it elsewhere: it is the anchor of the next check)")
