"""Root keys, and two places they come from: the environment and a passphrase. The third is `key_file.py`.

A root is named by a hash of itself, whatever source it came from, wraps nothing itself (`keyring.py` derives from it),
and appears in no message and no repr.
"""

import base64
import getpass
import hmac
import json
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from tensafe_nb.errors import KeyUnavailableError
from tensafe_nb.store.disk import Files
from tensafe_nb.store.keys.private import changing, publish, read_versioned

HKDF_ONLY: Mapping[str, Any] = {"name": "HKDF-SHA256"}
SCRYPT: Mapping[str, Any] = {"n": 2**17, "r": 8, "p": 1}  # 128 MiB and half a second
SCRYPT_CAPS: Mapping[str, int] = {"n": 2**20, "r": 16, "p": 4}  # what a file may make us spend
MAKE_ONE = 'python -c "import base64, os; print(base64.b64encode(os.urandom(32)).decode())"'


def derive(secret: bytes, label: str) -> bytes:
    """Return the 32-byte subkey of a secret for one purpose (HKDF-SHA256, RFC 5869).

    Each use of a secret has a label, and so a key, of its own: what one of them gives away opens nothing else. There is
    no salt, since every secret is 32 random bytes, or scrypt's, which had one.
    """
    extracted = hmac.digest(bytes(32), secret, "sha256")  # no salt counts as zeros
    return hmac.digest(extracted, label.encode() + b"\x01", "sha256")  # the first block is as long as a key


@dataclass(frozen=True, slots=True)
class Root:
    """One version of a root key, and how it was had."""

    secret: bytes = field(repr=False)
    source: str
    kdf: Mapping[str, Any] = field(default_factory=lambda: HKDF_ONLY)
    created_at: float | None = None
    retired: bool = False

    @property
    def key_id(self) -> str:
        # 64 bits of a one-way subkey: they name the root and say nothing about it
        return f"key-{derive(self.secret, 'TSNB1/key-id')[:8].hex()}"


def decode_root(text: str) -> bytes:
    """Return the 32 bytes of a root in base64.

    Raises:
        ValueError: It is not that.
    """
    secret = base64.b64decode(text, validate=True)
    if len(secret) != 32:
        raise ValueError(f"it holds {len(secret)} bytes")
    return secret


def environment_roots() -> list[Root]:
    """Return the roots of TENSAFE_KEK, then those of TENSAFE_KEK_PREVIOUS, which only open."""
    roots = []
    if "TENSAFE_KEK" in os.environ:
        roots.append(_from_environment("TENSAFE_KEK", os.environ["TENSAFE_KEK"]))
    previous = os.environ.get("TENSAFE_KEK_PREVIOUS", "").split(",")
    return roots + [
        _from_environment("TENSAFE_KEK_PREVIOUS", text, retired=True) for text in previous if text.strip()
    ]


def _from_environment(name: str, text: str, *, retired: bool = False) -> Root:
    try:
        return Root(decode_root(text.strip()), "env", retired=retired)
    except ValueError as err:
        raise KeyUnavailableError(
            f"{name} must be the base64 of exactly 32 random bytes, and it is not. Make one with {MAKE_ONE}"
        ) from err


class Passphrase:
    """Roots from a passphrase, by scrypt (RFC 7914), each derived once.

    `passphrase.json` keeps the salt that new artifacts use, and the id of the key it gives: a mistyped passphrase is
    noticed before anything is sealed with it. Artifacts carry their salt, so losing that file loses nothing.
    """

    def __init__(self, folder: Path, given: str | None, *, may_ask: bool, files: Files | None = None) -> None:
        self._files = files or Files()
        self._path = folder / "passphrase.json"
        self._given = given
        self._may_ask = may_ask
        self._asked: str | None = None
        self._roots: dict[tuple[object, ...], Root] = {}
        self._lock = threading.RLock()

    def record(self) -> Mapping[str, Any] | None:
        """Return salt, parameters and key id of this folder, if a passphrase was ever used here."""
        try:
            content: dict[str, Any] | None = read_versioned(self._path)
            if content is not None:
                check_scrypt(content["kdf"])
                content = {
                    **content,
                    "key_id": str(content["key_id"]),
                    "created_at": float(content["created_at"]),
                }
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as err:
            raise KeyUnavailableError(
                f"{self._path} is damaged. Bring it back from your backup, or remove it: artifacts carry what "
                f"opens them, and new ones will be sealed with a new salt."
            ) from err
        return content

    def primary(self) -> Root:
        """Return the root that wraps.

        Raises:
            KeyUnavailableError: No passphrase can be had, or it is not the one this folder was set up with.
        """
        with self._lock:
            record = self.record()
            if record is None:
                return self._set_up()
            root = self.matching(record["kdf"], record["key_id"], ask=True)
            if root is None:
                raise KeyUnavailableError(
                    f"The passphrase is not the one that {self._path.parent} was set up with. Give that one.",
                    details={"key_ids": [record["key_id"]]},
                )
            return root

    def matching(self, kdf: Mapping[str, Any], key_id: str, *, ask: bool) -> Root | None:
        """Return the root of these parameters if it is the named one; a passphrase typed wrong is dropped."""
        with self._lock:
            at_hand = (self._given, self._asked, os.environ.get("TENSAFE_PASSPHRASE")) != (None, None, None)
            if not at_hand and not (ask and self._may_ask):
                return None
            root = self._derive(kdf, confirm=False)
            if root.key_id != key_id:
                self._asked = None
                return None
            return root

    def _set_up(self) -> Root:
        root = self._derive({"name": "scrypt", "salt": os.urandom(16).hex(), **SCRYPT}, confirm=True)
        content = {"version": 1, "key_id": root.key_id, "kdf": dict(root.kdf), "created_at": time.time()}
        try:
            with changing(self._path, self._files):
                publish(self._path, json.dumps(content, indent=1).encode(), self._files, fresh=True)
        except FileExistsError:
            return self.primary()  # another process was first: its salt counts
        return root

    def _derive(self, kdf: Mapping[str, Any], *, confirm: bool) -> Root:
        # the same letters come composed from one keyboard and decomposed from another
        text = unicodedata.normalize("NFC", self._text(confirm=confirm))
        known = (text, kdf["salt"], kdf["n"], kdf["r"], kdf["p"])
        if known not in self._roots:
            self._roots[known] = Root(stretched(text, kdf), "passphrase", kdf=dict(kdf))
        return self._roots[known]

    def _text(self, *, confirm: bool) -> str:
        text = self._given if self._given is not None else os.environ.get("TENSAFE_PASSPHRASE")
        if text is None:
            text = self._asked = self._asked or ask_passphrase(confirm=confirm)
        if not text:
            raise KeyUnavailableError("The passphrase is empty. Set TENSAFE_PASSPHRASE, or pass one.")
        if not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text):
            raise KeyUnavailableError(
                "The passphrase holds bytes that are no UTF-8. Set TENSAFE_PASSPHRASE in UTF-8."
            )
        return text


def check_scrypt(kdf: Any) -> None:
    """Accept scrypt parameters that this module could have written and that cost a bearable amount.

    Raises:
        ValueError: They are something else, or beyond the caps.
    """
    if set(kdf) != {"name", "salt", "n", "r", "p"} or kdf["name"] != "scrypt":
        raise ValueError("unknown key derivation")
    if len(bytes.fromhex(kdf["salt"])) != 16:
        raise ValueError("a salt has 16 bytes")
    if any(type(kdf[name]) is not int or not 1 <= kdf[name] <= cap for name, cap in SCRYPT_CAPS.items()):
        raise ValueError("parameters beyond the caps")
    if kdf["n"] < 2 or kdf["n"] & (kdf["n"] - 1):
        raise ValueError("n is a power of two")


def stretched(text: str, kdf: Mapping[str, Any]) -> bytes:
    """Return the 32 bytes that scrypt makes of a passphrase: each guess costs a thief as much time and memory.

    Raises:
        KeyUnavailableError: There is not that much memory.
    """
    salt = bytes.fromhex(kdf["salt"])
    try:
        return Scrypt(salt, 32, n=kdf["n"], r=kdf["r"], p=kdf["p"]).derive(text.encode())
    except MemoryError as err:
        needed = 128 * kdf["n"] * kdf["r"] >> 20
        raise KeyUnavailableError(f"The passphrase needs {needed} MiB of memory to become a key.") from err


def ask_passphrase(*, confirm: bool) -> str:
    """Ask whoever sits at the terminal or the notebook.

    Raises:
        KeyUnavailableError: Nobody does, or the two answers differ.
    """
    get_shell = getattr(
        sys.modules.get("IPython"), "get_ipython", None
    )  # none yet while it is being imported
    in_notebook = get_shell is not None and hasattr(get_shell(), "kernel")
    if not in_notebook and not (sys.stdin and sys.stdin.isatty()):
        raise _no_passphrase()
    try:
        text = getpass.getpass("Passphrase of your checkpoints: ")
        if confirm and text and getpass.getpass("The same again: ") != text:
            raise KeyUnavailableError("The two passphrases differ. Nothing was written; try again.")
    except (EOFError, OSError, NotImplementedError) as err:  # the last: a kernel whose front end cannot ask
        raise _no_passphrase() from err
    return text


def _no_passphrase() -> KeyUnavailableError:
    return KeyUnavailableError(
        "A passphrase is needed and nobody can be asked here. Set TENSAFE_PASSPHRASE, or pass one."
    )
