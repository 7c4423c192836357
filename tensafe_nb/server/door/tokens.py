"""Bearer tokens of a server: each opens one tenant's clients and artifacts; the file keeps digests, never a token."""

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import StorageError, ValidationError
from tensafe_nb.server.door.limits import Limits
from tensafe_nb.store.disk import write_whole
from tensafe_nb.store.home import TENANT, Home

PREFIX = "tsnb_"  # so that a secret scanner, and a person, knows what it is


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of a token.

    Attributes:
        token_id: Names it in lists.
        tenant: Whose clients and artifacts it opens.
        sha256: Of the token; it has 256 random bits, so that a plain digest gives nothing away.
        created_at: Unix seconds.
    """

    token_id: str
    tenant: str
    sha256: str
    created_at: float


class Tokens:
    """The tokens that a server takes. A change of the file counts from the next request on.

    Args:
        path: The file; None keeps tokens in memory, for as long as the server runs.

    Raises:
        StorageError: The file is no list of tokens.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._read_at: tuple[int, int] | None = None
        self._tokens: list[Token] = []
        self._limits: dict[str, dict[str, Any]] = {}
        self.all()

    def all(self) -> list[Token]:
        """Return what is known of every token, oldest first."""
        if self._path is None or not self._path.exists():
            return self._tokens if self._path is None else []
        found = self._path.stat()
        stamp = (found.st_mtime_ns, found.st_size)
        if stamp != self._read_at:
            try:
                read = json.loads(self._path.read_text(encoding="utf-8"))
                self._tokens = [Token(**entry) for entry in read["tokens"]]
                self._limits = dict(read.get("limits", {}))
                [Limits().with_those_of(given) for given in self._limits.values()]
            except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                raise StorageError(
                    f"{self._path} is no file of tokens ({error}). Make one: "
                    f"tensafe-nb tokens new --tokens {self._path}"
                ) from error
            self._read_at = stamp
        return self._tokens

    def limits(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what is set for single tenants."""
        self.all()
        return self._limits

    def limit(self, tenant: str, **limits: int | None) -> dict[str, int]:
        """Set what a tenant may have; None takes a limit back, and the server's own counts again. Return all of its.

        Raises:
            ValidationError: No such limit, or a tenant whose name cannot be one.
            StorageError: The file cannot be written.
        """
        Home(Path(), tenant)
        kept = {**self.limits().get(tenant, {}), **limits}
        own = {name: value for name, value in kept.items() if value is not None}
        Limits().with_those_of(own)
        others = {name: given for name, given in self.limits().items() if name != tenant}
        self._keep(self.all(), others | ({tenant: own} if own else {}))
        return own

    def mint(self, tenant: str = TENANT) -> str:
        """Make a token for a tenant and return it; it is not kept, and cannot be shown again.

        Raises:
            ValidationError: A tenant whose name cannot be that of a folder.
            StorageError: The file cannot be written.
        """
        Home(Path(), tenant)  # refuses a name that is none
        secret = PREFIX + secrets.token_urlsafe(32)
        entry = Token(secrets.token_hex(4), tenant, digest_of(secret), time.time())
        self._keep([*self.all(), entry])
        return secret

    def revoke(self, token_id: str) -> None:
        """Take a token back.

        Raises:
            ValidationError: There is none of that id.
        """
        tokens = self.all()
        left = [token for token in tokens if token.token_id != token_id]
        if len(left) == len(tokens):
            known = ", ".join(token.token_id for token in tokens) or "none"
            raise ValidationError(f"There is no token {as_given(token_id)}. Known: {known}.")
        self._keep(left)

    def tenant_of(self, secret: str) -> str | None:
        """Return whose token this is; None where it is nobody's."""
        digest, found = digest_of(secret), None
        for token in self.all():  # all of them, however early one fits: the time taken tells nothing
            if hmac.compare_digest(token.sha256, digest):
                found = token.tenant
        return found

    async def whose(self, secret: str) -> str | None:
        """Return whose token this is; see `tenant_of`."""
        return self.tenant_of(secret)

    def _keep(self, tokens: list[Token], limits: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._tokens = tokens
        self._limits = {
            name: dict(given) for name, given in (self._limits if limits is None else limits).items()
        }
        if self._path is not None:
            entries: dict[str, Any] = {"version": 1, "tokens": [asdict(token) for token in tokens]}
            if self._limits:
                entries["limits"] = self._limits
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(self._path, json.dumps(entries, indent=1))
            self._read_at = None


def digest_of(secret: str) -> str:
    """Return the digest under which a token is kept."""
    return hashlib.sha256(secret.encode()).hexdigest()
