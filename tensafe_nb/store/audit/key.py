"""The secret of an audit log, and the key file that holds the next record's key.

Everything derives from one secret per log: k_0, the key of the request hashes, the key that seals the key file. On
disk it is only ever wrapped (`keyring.py`): in the log's first record, in the key file, and in the log again after a
rotation. A process that appends keeps the second and third, not the secret.
"""

import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tensafe_nb.errors import AuditLogError, DecryptionError
from tensafe_nb.store.audit.chain import Tip
from tensafe_nb.store.keys.keyring import Keys, check_stanzas
from tensafe_nb.store.keys.sources import derive
from tensafe_nb.store.sealed.envelope import canonical, parse_canonical

if TYPE_CHECKING:
    from typing_extensions import Buffer

Stanzas = tuple[Mapping[str, Any], ...]

SIZE = 32
PAGE = 4096  # the key file: one page, written in one piece, so that a process dies before or after it
_NONCE = 12
_MARK = b"TSNBaud1"  # no other wrapped secret, such as an artifact's, passes for a log's
_ALTERED = "the key file was altered, or belongs to another log"


def wrap_secret(secret: bytes, keys: Keys) -> Stanzas:
    """Wrap a log's secret under the primary key."""
    return (keys.wrap(secret + _MARK),)


def unwrap_secret(stanzas: Sequence[Mapping[str, Any]], keys: Keys) -> bytes:
    """Return a log's secret.

    Raises:
        KeyUnavailableError: None of the keys that open it is here.
        DecryptionError: It does not open, or is not the secret of a log.
    """
    secret = keys.unwrap(stanzas)
    if len(secret) != SIZE + len(_MARK) or not secret.endswith(_MARK):
        raise DecryptionError("What is wrapped there is not the secret of an audit log.")
    return secret[:SIZE]


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a process that appends keeps of the log's secret."""

    stanzas: Stanzas
    request: bytes = field(repr=False)
    seal: AESGCM = field(repr=False)
    wrapped: bytes  # the stanzas, as JSON
    keyed: hmac.HMAC = field(repr=False)  # with the key of requests, and nothing yet

    @classmethod
    def of(cls, secret: bytes, stanzas: Stanzas) -> "Secrets":
        """Derive them."""
        page, request = AESGCM(derive(secret, "TSNB1/audit/page")), derive(secret, "TSNB1/audit/request")
        keyed = hmac.new(request, digestmod="sha256")
        return cls(stanzas, request, page, canonical(list(stanzas)), keyed)

    def hash_request(self, pieces: "Iterable[Buffer]") -> tuple[str, int]:
        """Return the keyed hash and the size of a request in pieces; each is framed by its length."""
        mac, size = self.keyed.copy(), 0
        for piece in pieces:
            data = piece if type(piece) is bytes else memoryview(piece).tobytes()
            mac.update(len(data).to_bytes(8, "big"))  # or "ab", "c" would have the hash of "a", "bc"
            mac.update(data)
            size += len(data)
        return mac.hexdigest(), size


@dataclass(frozen=True, slots=True)
class KeyPage:
    """What a key file says: where the log ends, readable; and the key that comes next, sealed with it.

    Attributes:
        claim: Where the log ends, without the key. Unproven until `opened`.
        stanzas: The log's secret, wrapped.
    """

    claim: Tip
    stanzas: Stanzas
    _public: bytes
    _sealed: bytes = field(repr=False)

    @classmethod
    def parse(cls, raw: bytes) -> "KeyPage":
        """Read a key file.

        Raises:
            AuditLogError: It is not one, byte for byte.
        """
        public, _, sealed = raw.rstrip(b" \n").partition(b"\n")
        try:
            fields = parse_canonical(public)
            seq, size, head, stanzas = (fields[name] for name in ("seq", "size", "head", "stanzas"))
            check_stanzas(stanzas)
            if type(seq) is not int or type(size) is not int:
                raise ValueError("number and place are integers")
            page = cls(Tip(seq, size, head, None), tuple(stanzas), public, bytes.fromhex(sealed.decode()))
        except (DecryptionError, ValueError, TypeError, KeyError) as error:
            raise AuditLogError(_ALTERED) from error
        if _whole(public, page._sealed) != raw:
            raise AuditLogError(_ALTERED)
        return page

    def opened(self, secrets: Secrets) -> Tip:
        """Return where the log ends, proven, with the key.

        Raises:
            AuditLogError: The page was altered.
        """
        nonce, sealed = self._sealed[:_NONCE], self._sealed[_NONCE:]
        try:
            key = secrets.seal.decrypt(nonce, sealed, self._public)
        except (InvalidTag, ValueError) as error:
            raise AuditLogError(_ALTERED) from error
        return Tip(self.claim.seq, self.claim.size, self.claim.head, key)


def key_page(tip: Tip, secrets: Secrets) -> bytes:
    """Return the content of the key file for a tip."""
    assert tip.key is not None
    # canonical JSON by hand: what wraps the secret is the same in page after page
    public = b'{"head":"%s","seq":%d,"size":%d,"stanzas":%s}' % (
        tip.head.encode(), tip.seq, tip.size, secrets.wrapped,
    )  # fmt: skip
    # one page for every record, under one key for as long as the log lives: 96 random bits keep two nonces from
    # being equal up to some 2³² records (NIST SP 800-38D, 8.3), where a counter would be set back with an old file
    nonce = os.urandom(_NONCE)
    return _whole(public, nonce + secrets.seal.encrypt(nonce, tip.key, public))


def _whole(public: bytes, sealed: bytes) -> bytes:
    text = public + b"\n" + sealed.hex().encode()
    return text.ljust(PAGE - 1) + b"\n"
