"""Keys that wrap other keys.

    key source (versioned root) -HKDF(tenant)-> key-encryption key -AES-KW (RFC 3394)-> the secret of one artifact

What wraps is always the primary key of one source; what opens is any key that is here. So a key that was replaced, or
a source that was left for another one, goes on opening what it wrapped.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from tensafe_nb.errors import DecryptionError, KeyUnavailableError, ValidationError
from tensafe_nb.store.disk import Files
from tensafe_nb.store.keys.key_file import KeyFile
from tensafe_nb.store.keys.sources import (
    HKDF_ONLY,
    MAKE_ONE,
    Passphrase,
    Root,
    check_scrypt,
    derive,
    environment_roots,
)

logger = logging.getLogger(__name__)

SOURCES = ("file", "env", "passphrase")
MAX_STANZAS = 8
REFUSED = (
    "This does not open: the key is not the right one, or the file was altered or cut. Nothing of it was used. "
    "`tensafe-nb keys list` shows the keys that are here; an altered file can only come back from a backup."
)
_HOW_TO_ROTATE = {
    "env": f"Make a new one with {MAKE_ONE}, set TENSAFE_KEK to it, and put the old one into "
    f"TENSAFE_KEK_PREVIOUS (several with commas) until everything is rewrapped.",
    "passphrase": "Rewrap everything for another source first (source 'file', TENSAFE_PASSPHRASE set to the old "
    "passphrase), then remove passphrase.json from the keys folder and start again with the new one.",
}


def refused(where: str) -> DecryptionError:
    """Return the one error for a wrong key and for an altered file; `where` goes into its details."""
    return DecryptionError(REFUSED, details={"where": where})


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key that is here; never the key itself.

    Attributes:
        key_id: Names the key, in artifacts too.
        source: "file", "env" or "passphrase".
        created_at: Unix seconds; None where the source does not say.
        primary: Whether new artifacts are sealed with it.
        retired: Kept only to open what it once sealed.
    """

    key_id: str
    source: str
    created_at: float | None
    primary: bool
    retired: bool


class Keys:
    """The keys of one tenant. Nothing is read, made or asked for before the first use.

    Args:
        folder: Holds `local-keys.json` and `passphrase.json`.
        source: Of the key that wraps: "file", "env", "passphrase"; None for TENSAFE_KEK if that is set, else the
            file. A source that is named but not usable raises; another one never stands in for it.
        tenant: Whose keys; the same root gives every tenant another key.
        passphrase: Instead of TENSAFE_PASSPHRASE and of asking.
        announce: Told once when a key was made, with what to back up.
        files: How the disk is touched.

    Raises:
        ValidationError: No such source.

    Example:
        >>> keys = Keys(home.keys())
        >>> stanza = keys.wrap(secret)
        >>> assert keys.unwrap([stanza]) == secret
    """

    def __init__(
        self,
        folder: Path,
        source: str | None = None,
        *,
        tenant: str = "local",
        passphrase: str | None = None,
        announce: Callable[[str], None] = logger.warning,
        files: Files | None = None,
    ) -> None:
        if source not in (None, *SOURCES):
            raise ValidationError(f"There is no key source {source!r}. Known: {', '.join(SOURCES)}.")
        self._given_source = source
        self._tenant = tenant
        self._file = KeyFile(folder, tenant, announce, files)
        self._passphrase = Passphrase(folder, passphrase, may_ask=source == "passphrase", files=files)

    @functools.cached_property
    def source(self) -> str:
        """The source of the key that wraps, settled at the first use."""
        return self._given_source or ("env" if "TENSAFE_KEK" in os.environ else "file")

    def primary_id(self) -> str:
        """Return the id of the key that wraps; on first use the local key file is made and announced.

        Raises:
            KeyUnavailableError: The source cannot be used: why, and what to do.
            StorageError: The key file could not be written.
        """
        return self._primary().key_id

    def wrap(self, secret: bytes) -> dict[str, Any]:
        """Return a stanza that holds `secret`, 16 bytes or more in steps of 8, under the primary key."""
        root = self._primary()
        wrapped = aes_key_wrap(self._wrapping_key(root), secret)
        return {
            "kek_id": root.key_id,
            "source": root.source,
            "kdf": dict(root.kdf),
            "wrapped": wrapped.hex(),
        }

    def unwrap(self, stanzas: Sequence[Mapping[str, Any]]) -> bytes:
        """Return the secret that the stanzas hold, from the first one that a key here opens.

        Raises:
            KeyUnavailableError: None of the keys is here; `details["key_ids"]` names them.
            DecryptionError: A key is here and does not open it, or a stanza is not one of ours.
        """
        check_stanzas(stanzas)
        # whose key is not here says nothing about the file; whose key is here and does not open it says it was altered
        held = [(stanza, root) for stanza in stanzas if (root := self._root_for(stanza, ask=True))]
        if not held:
            raise self._unavailable([stanza["kek_id"] for stanza in stanzas])
        for stanza, root in held:
            # AES-KW checks itself: a wrong key or a flipped bit says so
            with contextlib.suppress(InvalidUnwrap):
                return aes_key_unwrap(self._wrapping_key(root), bytes.fromhex(stanza["wrapped"]))
        raise refused("key")

    def can_open(self, stanzas: Sequence[Mapping[str, Any]]) -> bool:
        """Whether one of the stanzas' keys is here; asks nobody for a passphrase."""
        try:
            check_stanzas(stanzas)
            return any(self._root_for(stanza, ask=False) for stanza in stanzas)
        except DecryptionError:
            return False

    def infos(self) -> list[KeyInfo]:
        """Return every key that is here, of all sources; asks for nothing and makes nothing."""
        file, env = self._roots_of("file"), self._roots_of("env")
        infos = [self._info(root, self._file.current()) for root in file]
        infos += [self._info(root, next((r for r in env if not r.retired), None)) for root in env]
        record = self._passphrase.record()
        if record is not None:
            primary = self.source == "passphrase"
            infos.append(
                KeyInfo(record["key_id"], "passphrase", record["created_at"], primary, retired=False)
            )
        return infos

    def new(self) -> KeyInfo:
        """Add a key to the key file and make it the primary one; older ones go on opening.

        Raises:
            ValidationError: The source is not the file; the message says how that source is rotated.
        """
        if self.source != "file":
            raise ValidationError(
                f"A key of source {self.source!r} is not made here. {_HOW_TO_ROTATE[self.source]}"
            )
        root = self._file.add()
        return self._info(root, root)

    def retire(self, key_id: str) -> None:
        """Mark a key of the key file as kept only to open what it once sealed.

        Raises:
            ValidationError: It is the primary key, or there is none of this id.
        """
        self._refuse_primary(key_id)
        self._file.retire(key_id)

    def forget(self, key_id: str, needed: Callable[[str], Sequence[str]]) -> None:
        """Erase a key from the key file: whatever is still sealed with it, copies included, is lost for good.

        Args:
            key_id: The key.
            needed: Returns the names of what needs a key.

        Raises:
            ValidationError: Something needs it, it is the primary key, or there is none of this id.
        """
        self._refuse_primary(key_id)
        self._file.forget(key_id, needed)

    def _primary(self) -> Root:
        if self.source == "file":
            return self._file.primary()
        if self.source == "passphrase":
            return self._passphrase.primary()
        if "TENSAFE_KEK" not in os.environ:
            raise KeyUnavailableError(
                f"TENSAFE_KEK is not set, and it is where the key was to come from. Make one with {MAKE_ONE}"
            )
        return environment_roots()[0]

    def _roots_of(self, source: str) -> list[Root]:
        """Roots that need no passphrase. Only the configured source may fail; others are there to help."""
        try:
            return self._file.roots() if source == "file" else environment_roots()
        except KeyUnavailableError as error:
            if source == self.source:
                raise
            logger.warning("keys of another source are left out: %s", error)
            return []

    def _root_for(self, stanza: Mapping[str, Any], *, ask: bool) -> Root | None:
        for source in sorted(("file", "env"), key=lambda source: source != self.source):
            for root in self._roots_of(source):
                if root.key_id == stanza["kek_id"]:
                    return root
        if stanza["source"] == "passphrase":
            return self._passphrase.matching(stanza["kdf"], stanza["kek_id"], ask=ask)
        return None

    def _wrapping_key(self, root: Root) -> bytes:
        # the tenant is in the label: what one tenant wraps, another's key from the same root does not open
        return derive(root.secret, f"TSNB1/kek/{self._tenant}")

    def _info(self, root: Root, current: Root | None) -> KeyInfo:
        primary = root.source == self.source and current is not None and root.key_id == current.key_id
        return KeyInfo(root.key_id, root.source, root.created_at, primary, root.retired)

    def _refuse_primary(self, key_id: str) -> None:
        current = self._file.current()
        if self.source == "file" and current is not None and current.key_id == key_id:
            raise ValidationError(
                f"{key_id} is the key that seals new artifacts. Make a new one first: `tensafe-nb keys new`."
            )

    def _unavailable(self, key_ids: list[str]) -> KeyUnavailableError:
        here = ", ".join(info.key_id for info in self.infos()) or "none"
        return KeyUnavailableError(
            f"The key that opens this is not here. It would open with: {', '.join(key_ids)}; here: {here}. "
            f"Bring its key file, TENSAFE_KEK or TENSAFE_PASSPHRASE.",
            details={"key_ids": key_ids},
        )


def check_stanzas(stanzas: Any) -> None:
    """Refuse what is no list of stanzas of this format, before anything is derived from it.

    Raises:
        DecryptionError: It is not one, or its key derivation costs more than the caps allow.
    """
    try:
        # a stranger wrote them: without bounds, each might ask for a passphrase and gigabytes of scrypt
        if not 1 <= len(stanzas) <= MAX_STANZAS:
            raise ValueError("1 to 8 stanzas")
        for stanza in stanzas:
            _check_stanza(stanza)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise refused("key slot") from err


def _check_stanza(stanza: Mapping[str, Any]) -> None:
    if set(stanza) != {"kek_id", "source", "kdf", "wrapped"} or stanza["source"] not in SOURCES:
        raise ValueError("not a stanza")
    if not isinstance(stanza["kek_id"], str) or len(stanza["kek_id"]) > 64:
        raise ValueError("a key id is a short text")
    bytes.fromhex(stanza["wrapped"])
    if stanza["source"] == "passphrase":
        check_scrypt(stanza["kdf"])
    elif stanza["kdf"] != HKDF_ONLY:
        raise ValueError("unknown key derivation")
