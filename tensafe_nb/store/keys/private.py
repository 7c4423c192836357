"""Private files of the keys folder: read only while nobody else can, replaced whole."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tensafe_nb.errors import KeyUnavailableError, StorageError
from tensafe_nb.locks import held
from tensafe_nb.store.disk import Draft, Files, make_folder, sweep_drafts


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


@contextmanager
def changing(path: Path, files: Files) -> Iterator[None]:
    """Keep other processes from changing a private file.

    Raises:
        StorageError: The folder cannot be made, or not be written to.
    """
    lock = path.with_suffix(".lock")
    with ExitStack() as stack:
        try:
            if not path.parent.is_dir():
                make_folder(files, path.parent)
            stack.enter_context(held(lock, exclusive=True))
            sweep_drafts(files, path.parent)
            for left in path.parent.glob(f"{path.name}.*.tmp"):  # by a crash of version 0.1
                files.unlink(left)
        except OSError as err:
            raise _unwritable(lock, err) from err
        yield


def publish(path: Path, data: bytes, files: Files, *, fresh: bool) -> None:
    """Write a private file so that it is never seen half-written and survives a crash.

    Raises:
        FileExistsError: `fresh`, and another process was first.
        StorageError: It could not be written; what was there is intact.
    """
    try:
        with Draft(files, path.parent) as draft:
            draft.file.write(data)
            draft.publish(path, fresh=fresh)
    except FileExistsError:
        raise
    except OSError as err:
        raise _unwritable(path, err) from err


def _unwritable(path: Path, err: OSError) -> StorageError:
    return StorageError(
        f"{path} could not be written ({err.strerror}). What was there before is intact. "
        f"Choose another folder with TENSAFE_HOME, or keep the key in TENSAFE_KEK."
    )
