"""Headers of artifacts: the fields that one must have, and the entry that a listing makes of them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.results import Encryption, SaveStateResult
from tensafe_nb.store.artifacts.folder import hash_of, id_of, is_id
from tensafe_nb.store.keys.keyring import refused
from tensafe_nb.store.sealed.envelope import Header
from tensafe_nb.store.sealed.payload import Manifest

SCHEMA = 1
_KINDS: Mapping[str, Any] = {
    "artifact_id": str,
    "artifact_type": str,
    "tenant": str,
    "created_at": int | float,
    "schema": int,
    "training_client": str,
    "step": int,
    "base_model": str,
    "revision": str | None,
    "ledger_head": Mapping | None,
}
_LONGEST = 4096  # characters of a text: a path, at the most
_YEAR_9999 = 253_370_764_800
_LIMITS: Mapping[str, float] = {"created_at": _YEAR_9999, "step": 2**53, "schema": 2**31}


def unfit(fields: Mapping[str, Any]) -> list[str]:
    """Return the header fields that are missing, of a wrong kind or out of bounds: a stranger may have written it."""

    def fits(value: Any, kind: Any, limit: float | None) -> bool:
        if not isinstance(value, kind):
            return False
        if isinstance(value, str):
            return len(value) <= _LONGEST
        return limit is None or 0 <= value <= limit  # false of NaN

    wrong = [
        name for name, kind in _KINDS.items() if not fits(fields.get(name, ...), kind, _LIMITS.get(name))
    ]
    return wrong or ([] if is_id(fields["artifact_id"]) else ["artifact_id"])


def claimed_id(header: Header) -> str:
    """Return the id that a header gives, which is fit to be part of a path.

    Raises:
        DecryptionError: It is not the header of an artifact.
    """
    if unfit(header.fields):
        raise refused("header")
    return str(header.fields["artifact_id"])


def describe(file: BinaryIO, path: Path, header: Header, manifest: Manifest | None) -> SaveStateResult:
    """Return what a listing tells of a stored file.

    Raises:
        DecryptionError: Its header is not that of an artifact, or is of another one than its name says.
    """
    if claimed_id(header) != id_of(path):
        raise refused("header")
    return describe_file(file, header, hash_of(path), manifest)


def describe_file(
    file: BinaryIO, header: Header, content_hash: str, manifest: Manifest | None
) -> SaveStateResult:
    """Return what a listing would tell of a file that lies anywhere.

    Raises:
        DecryptionError: Its header is not that of an artifact.
    """
    claimed_id(header)
    size = os.fstat(file.fileno()).st_size
    return listed(header.fields, header.key_id, size, content_hash, manifest)


def listed(
    fields: Mapping[str, Any], key_id: str, size: int, content_hash: str, manifest: Manifest | None
) -> SaveStateResult:
    """Return what a listing tells of a sealed file; without its manifest, no metadata and no name."""
    return SaveStateResult(
        artifact_id=fields["artifact_id"],
        artifact_type=fields["artifact_type"],
        size_bytes=size,
        content_hash=content_hash,
        encryption=Encryption("AES-256-GCM", key_id),
        metadata=None if manifest is None else manifest.metadata,
        created_at=fields["created_at"],
        name=None if manifest is None else manifest.name,
        step=fields["step"],
        model_ref=fields["base_model"],
        saved_by=fields["training_client"],
    )


def check_schema(info: SaveStateResult, header: Header) -> None:
    """Refuse an artifact whose parts this version does not know how to read.

    Raises:
        ValidationError: It was written by another version.
    """
    if header.fields["schema"] != SCHEMA:
        raise ValidationError(
            f"{info.artifact_id} was written by another version of tensafe_nb (schema {header.fields['schema']}, "
            f"this one reads {SCHEMA}). Update tensafe_nb to read it."
        )
