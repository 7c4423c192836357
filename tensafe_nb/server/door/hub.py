"""Users of a JupyterHub: the hub says whose a token is; needs the extra `tensafe_nb[hub]`."""

import asyncio
import hashlib
import os
import re
import time
from collections import OrderedDict
from typing import Any
from urllib.parse import urlsplit

from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.server.door.tokens import PREFIX, Tokens

KEPT_SECONDS = (
    60  # for which the hub's answer counts: a token that was taken back there opens nothing after that
)
KEPT_ANSWERS = 10_000
AT_ONCE = 8  # questions to the hub
TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{8,512}")
LONGEST_NAME = 56  # of a tenant, without what it begins with: a folder has its name


class HubUsers:
    """Says whose a token is: a tenant's own, or that of a user of the hub whose service this is.

    A user may come in whose token has the scope `access:services!service=NAME`.

    Args:
        tokens: The server's own, which are never shown to the hub.
        hub: What asks it: see `hub_auth`.
    """

    def __init__(self, tokens: Tokens, hub: Any) -> None:
        self._hub = hub
        self._tokens = tokens
        self._known: OrderedDict[str, tuple[float, str | None]] = OrderedDict()
        self._asking = asyncio.Semaphore(AT_ONCE)

    async def whose(self, secret: str) -> str | None:
        """Return the tenant of a token; None where it is nobody's, or its user may not come in.

        Raises:
            TGTinkerError: The hub does not answer.
        """
        if secret.startswith(PREFIX):
            return self._tokens.tenant_of(secret)
        if not TOKEN.fullmatch(secret):
            return None
        digest = hashlib.sha256(secret.encode()).hexdigest()
        if self._is_known(digest):
            return self._known[digest][1]
        async with self._asking:
            if self._is_known(digest):  # somebody has asked meanwhile
                return self._known[digest][1]
            tenant = await asyncio.to_thread(self._ask, secret)
            self._known[digest] = (time.monotonic() + KEPT_SECONDS, tenant)
            self._known.move_to_end(digest)
            if len(self._known) > KEPT_ANSWERS:
                self._known.popitem(last=False)
            return tenant

    def _is_known(self, digest: str) -> bool:
        return digest in self._known and time.monotonic() < self._known[digest][0]

    def _ask(self, secret: str) -> str | None:
        from tornado.web import HTTPError

        try:
            user = self._hub.user_for_token(secret, use_cache=False, sync=True)
        except HTTPError as error:
            if error.status_code == 403:  # it is not this user's to come in, or the token is none
                return None
            raise TGTinkerError(
                "The JupyterHub that says whose a token is does not answer. Try again.",
                code="hub_unavailable",
            ) from error
        if user is None or not self._hub.check_scopes(self._hub.access_scopes, user):
            return None
        return tenant_of_user(user["name"]) if user.get("kind") == "user" else None


def hub_auth() -> Any:
    """Return what asks the hub whose service this process is.

    Raises:
        ValidationError: There is no JupyterHub, or this process is no service of one.
    """
    try:
        from jupyterhub.services.auth import HubAuth
    except ImportError as error:
        raise ValidationError(
            f"serve --hub needs JupyterHub ({error}): pip install 'tensafe_nb[hub]'"
        ) from error
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise ValidationError(
            f"serve --hub is started by a JupyterHub as one of its services, which sets {', '.join(missing)}: "
            f"docs/deploy/jupyterhub_config.py shows how."
        )
    return HubAuth()


NEEDED = ("JUPYTERHUB_API_TOKEN", "JUPYTERHUB_API_URL", "JUPYTERHUB_SERVICE_PREFIX", "JUPYTERHUB_SERVICE_URL")


def tenant_of_user(name: str) -> str:
    """Return the tenant of a user of the hub: the name of a folder, and no two users have the same.

    What is no small letter, digit or hyphen is written as _XX for each byte of its UTF-8, for a disk may take "Ada" and
    "ada" for one; a name that is too long ends in a dot, which is in no other, and its digest.
    """
    written = re.sub(r"[^a-z0-9-]", lambda found: "".join(f"_{b:02x}" for b in found[0].encode()), name)
    if len(written) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:31]
        written = f"{written[: LONGEST_NAME - 32]}.{digest}"
    return f"hub-{written}"


def address_from_hub() -> tuple[str, int, str]:
    """Return where the hub wants its service: host, port, and the path under which its proxy offers it."""
    wanted = urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"])
    return (
        wanted.hostname or "127.0.0.1",
        wanted.port or 80,
        os.environ["JUPYTERHUB_SERVICE_PREFIX"].rstrip("/"),
    )
