"""Small private files that are never half-written: the key file, the record of a passphrase."""

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensafe_nb.errors import KeyUnavailableError, StorageError
from tensafe_nb.store.disk import Files

if sys.platform != "win32":
    import fcntl


def read_private(path: Path) -> bytes | None:
    """Return a private file's bytes, or None where there is none.

    Raises:
        KeyUnavailableError: It cannot be read, or others can read it too.
    """
    try:
        with path.open("rb") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                raise KeyUnavailableError(
                    f"{path} can be read or changed by others than its owner and is refused. "
                    f"Run: chmod 600 '{path}', and consider whether the key has leaked."
                )
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as err:
        raise KeyUnavailableError(f"{path} cannot be read ({err.strerror}). It is left as it is.") from err


def read_versioned(path: Path) -> Any:
    """Return the JSON of a private file, or None where there is none.

    Raises:
        KeyUnavailableError: As `read_private`.
        ValueError: It is not JSON of version 1.
    """
    data = read_private(path)
    if data is None:
        return None
    content = json.loads(data)
    if not isinstance(content, dict) or content.get("version") != 1:
        raise ValueError("not a file of version 1")
    return content


def publish(path: Path, data: bytes, *, fresh: bool) -> None:
    """Write a private file so that it is never seen half-written and survives a crash.

    Raises:
        FileExistsError: `fresh`, and another process was first.
        StorageError: It could not be written; what was there is intact.
    """
    temp = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        _write_synced(temp, data)
        if fresh:
            os.link(temp, path)  # unlike a rename, never replaces
        else:
            temp.replace(path)
        Files().fsync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as err:
        raise _unwritable(path, err) from err
    finally:
        temp.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing keys at the same time; on Windows only `fresh` files are so guarded."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as err:
        raise _unwritable(path, err) from err
    try:
        if sys.platform != "win32":
            fcntl.flock(handle, fcntl.LOCK_EX)
            for left_by_a_crash in path.parent.glob(f"{path.stem}.json.*.tmp"):
                left_by_a_crash.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def _unwritable(path: Path, err: OSError) -> StorageError:
    return StorageError(
        f"{path} could not be written ({err.strerror}). What was there before is intact. "
        f"Choose another folder with TENSAFE_HOME, or keep the key in TENSAFE_KEK."
    )
