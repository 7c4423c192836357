"""The local key file: the root keys of a home whose user keeps them nowhere else."""

import base64
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensafe_nb.errors import KeyUnavailableError, ValidationError, nearest
from tensafe_nb.store.disk import Files
from tensafe_nb.store.keys.private import changing, publish, read_versioned
from tensafe_nb.store.keys.sources import Root, decode_root


class KeyFile:
    """`local-keys.json`: one list of root versions per tenant, the last one not retired being the primary.

    Changes happen under a lock and replace the file whole, so a reader sees the old one or the new one. A file
    that is there but cannot be used raises; nothing ever puts a new one in its place.
    """

    def __init__(
        self, folder: Path, tenant: str, announce: Callable[[str], None], files: Files | None = None
    ) -> None:
        self.path = folder / "local-keys.json"
        self._files = files or Files()
        self._tenant = tenant
        self._announce = announce
        self._seen = False

    def roots(self) -> list[Root]:
        """Return the tenant's roots, oldest first; none where there is no file."""
        return [root for tenant, root in self._read() or [] if tenant == self._tenant]

    def current(self) -> Root | None:
        """Return the root that wraps, if there is one."""
        return next((root for root in reversed(self.roots()) if not root.retired), None)

    def primary(self) -> Root:
        """Return the root that wraps; on first use it is made, written and announced."""
        return self.current() or self._add(only_first=True)

    def add(self) -> Root:
        """Add a root version, which becomes the primary."""
        return self._add(only_first=False)

    def retire(self, key_id: str) -> None:
        """Mark a version as retired: it goes on opening what it wrapped."""
        self._index(self._read() or [], key_id)  # refused before a folder or a lock is made
        with self._changing() as entries:
            at = self._index(entries, key_id)
            root = entries[at][1]
            entries[at] = (
                self._tenant,
                Root(root.secret, "file", created_at=root.created_at, retired=True),
            )

    def forget(self, key_id: str, needed: Callable[[str], Sequence[str]]) -> None:
        """Remove a version for good, unless `needed` names what only it opens."""
        self._index(self._read() or [], key_id)
        with self._changing() as entries:
            at = self._index(entries, key_id)
            if names := needed(key_id):
                shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
                raise ValidationError(
                    f"The key {key_id} is still needed by {len(names)} artifact(s) and journal(s): {shown}. "
                    f"Rotate or delete the artifacts first. A journal takes the new key when its training client makes "
                    f"its next automatic checkpoint, and goes when that is closed. A forgotten key never comes back."
                )
            del entries[at]

    def _index(self, entries: Sequence[tuple[str, Root]], key_id: str) -> int:
        ids = [root.key_id if tenant == self._tenant else "" for tenant, root in entries]
        if key_id not in ids:
            known = nearest(key_id, filter(None, ids))
            raise ValidationError(f"The key file {self.path} holds no key {key_id!r}.{known}")
        return ids.index(key_id)

    def _add(self, *, only_first: bool) -> Root:
        root = Root(os.urandom(32), "file", created_at=time.time())
        try:
            with self._changing() as entries:
                mine = [held for tenant, held in entries if tenant == self._tenant and not held.retired]
                if only_first and mine:
                    return mine[-1]  # another process was first
                entries.append((self._tenant, root))
        except FileExistsError:
            return self.primary() if only_first else self.add()
        self._seen = True
        self._announce(
            f"A new key seals your checkpoints: {root.key_id} in {self.path}. "
            f"Keep a copy: without it they cannot be opened."
        )
        return root

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[tuple[str, Root]]]:
        with changing(self.path, self._files):
            before = self._read()
            if before is None and self._seen:
                raise KeyUnavailableError(
                    f"The key file {self.path} was there and is gone. Bring it back from your backup; "
                    f"a new process would make a new key, which opens none of your checkpoints."
                )
            entries = list(before or [])
            yield entries
            if entries != before:
                publish(self.path, encoded(entries), self._files, fresh=before is None)

    def _read(self) -> list[tuple[str, Root]] | None:
        try:
            content = read_versioned(self.path)
            if content is None:
                return None
            self._seen = True
            return [entry_of(item) for item in content["keys"]]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
            raise KeyUnavailableError(
                f"The key file {self.path} is damaged. Bring it back from your backup; it is left as it is, "
                f"and no new key is made in its place."
            ) from err


def entry_of(item: Mapping[str, Any]) -> tuple[str, Root]:
    """Return a tenant and its root, as `encoded` wrote them.

    Raises:
        ValueError: They are not; so do KeyError, TypeError and OverflowError.
    """
    tenant, retired = item["tenant"], item["retired"]
    root = Root(decode_root(item["root"]), "file", created_at=float(item["created_at"]), retired=retired)
    if root.key_id != item["key_id"] or not isinstance(tenant, str) or not isinstance(retired, bool):
        raise ValueError("a key does not match its id, or is not said whose it is")
    return tenant, root


def encoded(entries: Sequence[tuple[str, Root]]) -> bytes:
    """Return the key file's content: everything that opens a checkpoint, in a form that a person can back up."""
    keys = [
        {
            "key_id": root.key_id,
            "tenant": tenant,
            "root": base64.b64encode(root.secret).decode(),
            "created_at": root.created_at,
            "retired": root.retired,
        }
        for tenant, root in entries
    ]
    return json.dumps({"version": 1, "keys": keys}, indent=1).encode()
