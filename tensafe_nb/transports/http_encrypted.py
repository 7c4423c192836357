"""The line for encrypted calls to a server: bundles and ciphertexts go out as they are, and records come back."""

from collections.abc import Sequence
from typing import Any

from tensafe_nb.protocol.encrypted import EncryptedConnection, EncryptedOffer
from tensafe_nb.transports.http_requests import Requests, quoted

BINARY = "application/octet-stream"
SECONDS = 600.0  # that an answer may take


class RemoteEncrypted:
    """See `EncryptedLine`: the other end is a server, which has the adapter and no key that decrypts.

    Args:
        requests: Sends them.
        path: Of the training client.
    """

    keys = None  # each end has a key store of its own
    is_demonstration = False

    def __init__(self, requests: Requests, path: str) -> None:
        self._requests, self._path = requests, f"{path}/encrypted"

    @property
    def most_bytes(self) -> int:
        return self._requests.limit("body_bytes", 1 << 26)

    def offer(self, layers: Sequence[int], modules: Sequence[str] | None) -> EncryptedOffer:
        asked = {"layers": list(layers), "modules": list(modules or ())}
        return self._requests.record("GET", self._path, EncryptedOffer, params=asked, timeout=SECONDS)

    def open(
        self,
        layers: Sequence[int],
        modules: Sequence[str] | None,
        shape: tuple[int, int, int],
        params: str,
        tokens: int | str,
        bundle: bytes,
    ) -> EncryptedConnection:
        asked: dict[str, Any] = {"layers": list(layers), "modules": list(modules or ()), "shape": list(shape)}
        asked |= {"params": params, "tokens": str(tokens)}
        return self._requests.record(
            "POST", self._path, EncryptedConnection, params=asked, **self._sent(bundle)
        )

    def apply(self, connection_id: str, request: bytes) -> bytes:
        # sent once: a second time it would be a replay, and is encrypted anew
        path = f"{self._path}/{quoted(connection_id)}/apply"
        return self._requests.call("POST", path, patience=0.0, **self._sent(request)).content

    def refresh(self, connection_id: str) -> EncryptedConnection:
        path = f"{self._path}/{quoted(connection_id)}/refresh"
        return self._requests.record("POST", path, EncryptedConnection, timeout=SECONDS)

    def close(self, connection_id: str) -> None:
        self._requests.call("DELETE", f"{self._path}/{quoted(connection_id)}", patience=1.0)

    @staticmethod
    def _sent(content: bytes) -> dict[str, Any]:
        return {"content": content, "headers": {"content-type": BINARY}, "timeout": SECONDS}
