"""Rotation of keys: every artifact is rewrapped under a new one, and a crash at any moment loses none.

A key slot is overwritten in place, and half a slot opens with no key. So all new slots go into a journal first. From
the moment it has its name until the last slot is on the disk, whoever comes next writes them again.
"""

import io
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensafe_nb.errors import DecryptionError, StorageError
from tensafe_nb.store.disk import Draft, Files
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import (
    canonical,
    open_sealed,
    parse_canonical,
    read_header,
    rewrapped_slot,
    write_slot,
)

logger = logging.getLogger(__name__)

JOURNAL = "rotation.journal"


def rotate(files: Files, folder: Path, paths: Iterable[Path], keys: Keys) -> int:
    """Rewrap artifacts to the primary key; those that do not open are left alone and reported to the log.

    The caller keeps everyone else out of the folder.

    Returns:
        How many were rewrapped: 0 when all were under the primary key already.

    Raises:
        StorageError: A slot cannot be read back as it was written. The journal stays; the next use writes it again.
    """
    primary = keys.primary_id()
    slots = {path.name: slot for path in paths if (slot := _new_slot(path, keys, primary)) is not None}
    if slots:
        write_journal(files, folder, slots)
        _apply(files, folder, slots)
        for name, slot in slots.items():
            _check(folder / name, slot, keys)
        files.unlink(folder / JOURNAL)
        files.fsync_folder(folder)
    return len(slots)


def replay(files: Files, folder: Path) -> None:
    """Finish a rotation that was cut off, if there is one. Needs no key."""
    journal = folder / JOURNAL
    if not journal.exists():
        return
    try:
        _apply(files, folder, read_journal(journal))
    except (DecryptionError, ValueError, TypeError, AttributeError) as error:  # no crash leaves one like this
        logger.warning("%s was altered; it is set aside and not used: %s", journal, error)
        files.replace(journal, journal.with_suffix(".damaged"))
    else:
        logger.warning("a key rotation that was interrupted has been finished in %s", folder)
        files.unlink(journal)
    files.fsync_folder(folder)


def _new_slot(path: Path, keys: Keys, primary: str) -> bytes | None:
    try:
        with path.open("rb") as file:
            header = read_header(file)
            if header.key_id == primary:
                return None
            slot = rewrapped_slot(file, keys)
            open_sealed(io.BytesIO(header.prefix + slot), keys)  # it opens before it replaces one that opens
            return slot
    except DecryptionError as error:
        logger.warning("%s was not rewrapped: %s", path.name, error)
        return None


def write_journal(files: Files, folder: Path, slots: Mapping[str, bytes]) -> None:
    """Put all new slots on the disk, by the names of their files: from now on they are what counts."""
    with Draft(files, folder) as draft:
        draft.file.write(canonical({name: slot.hex() for name, slot in slots.items()}))
        draft.publish(folder / JOURNAL)


def read_journal(journal: Path) -> dict[str, bytes]:
    """Return what `write_journal` wrote; a name with a path in it leads nowhere else.

    Raises:
        DecryptionError: It is not that; so do ValueError, TypeError and AttributeError.
    """
    slots = parse_canonical(journal.read_bytes())
    return {Path(name).name: bytes.fromhex(slot) for name, slot in slots.items()}


def _apply(files: Files, folder: Path, slots: Mapping[str, bytes]) -> None:
    for name, slot in slots.items():
        try:
            with files.update(folder / name) as file:
                write_slot(file, slot)
                files.fsync(file)
        except (DecryptionError, FileNotFoundError) as error:
            # altered or removed by hand: no reason to stop here
            logger.warning("%s could not be rewrapped: %s", name, error)


def _check(path: Path, slot: bytes, keys: Keys) -> None:
    try:
        with path.open("rb") as file:
            written = open_sealed(file, keys).header.slot
    except DecryptionError as err:
        raise StorageError(f"The key slot that was just written to {path} cannot be read back.") from err
    if written != slot:
        raise StorageError(f"{path} does not hold the key slot that was just written to it.")
