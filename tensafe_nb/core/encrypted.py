"""A core's half of encrypted adapters: the connections of one training client, each with keys that open nothing.

What is served are the weights as they were when the connection was opened, or last refreshed; a call that comes after
they have moved on is refused, not answered with what is no longer so.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tensafe_nb.errors import ClientClosedError, EncryptionContextError, NotFoundError, ValidationError
from tensafe_nb.privacy.encrypted import HEServer
from tensafe_nb.privacy.encrypted.client import steps_of
from tensafe_nb.privacy.encrypted.envelope import MOST_HEADER
from tensafe_nb.privacy.encrypted.packing import Shape, packings_of
from tensafe_nb.privacy.encrypted.parameters import parameters_named
from tensafe_nb.protocol.encrypted import EncryptedConnection, EncryptedOffer, stale
from tensafe_nb.store.audit.log import outcome_of
from tensafe_nb.store.vault import Vault

if TYPE_CHECKING:
    from tensafe_nb.core.worker import Worker

CACHE_MB = 256  # of encoded adapters, of one connection


@dataclass(slots=True)
class Served:
    """A connection that is open.

    Attributes:
        server: Holds rotation keys and weights.
        layers: Which were asked for.
        modules: Which of theirs.
        names: Of the parts it serves: those of one shape.
        version: Of the weights.
        used_at: When it was last used, on the monotonic clock.
    """

    server: HEServer
    layers: tuple[int, ...]
    modules: tuple[str, ...] | None
    names: tuple[str, ...]
    version: int
    used_at: float = field(default_factory=time.monotonic)


class EncryptedConnections:
    """The connections of one training client.

    Args:
        vault: Has the keys that both halves share where they are in one process, and the audit log.
        training_client_id: Whose they are.
        private: Whether it trains with differential privacy.
    """

    def __init__(self, vault: Vault, training_client_id: str, *, private: bool) -> None:
        self.vault, self._client_id, self._private = vault, training_client_id, private
        self.open: dict[str, Served] = {}
        self._ended = False

    def find(self, connection_id: str) -> Served:
        """Return a connection.

        Raises:
            NotFoundError: There is none of that id.
            ClientClosedError: The training client is closed.
        """
        if self._ended:
            raise ClientClosedError(
                f"The training client {self._client_id} is closed, and its encrypted connections with it."
            )
        found = self.open.get(connection_id)
        if found is None:
            raise NotFoundError(
                f"There is no encrypted connection {connection_id!r} here: it was closed, was idle for too long, or "
                f"the server was restarted."
            )
        found.used_at = time.monotonic()
        return found

    def expire(self, seconds: float) -> None:
        """Drop the keys of connections that nobody has used for so long."""
        for name, served in list(self.open.items()):
            if time.monotonic() - served.used_at > seconds:
                self.open.pop(name, None)

    def end(self) -> None:
        """Drop all keys, and the weights that are served."""
        self._ended = True
        self.open.clear()

    @contextmanager
    def on_record(self) -> Iterator[None]:
        """Put on record that a connection was opened, or could not be: whoever has one can work the adapter out."""
        started = time.time()
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.vault.audit.append(
                operation="he_open",
                training_client_id=self._client_id,
                started_at=started,
                completed_at=time.time(),
                to_the_day=self._private,
                **outcome_of(error),
            )


class EncryptedSide:
    """What a core does for encrypted calls, for whoever holds the line to it; each method on the caller's thread.

    Args:
        worker: The training client.
        connections: Its connections.
        served: The client's half is in another process.
    """

    is_demonstration = True  # of who is asked directly: both halves are in one process, and nothing is hidden
    most_bytes = 1 << 26  # of one message

    def __init__(self, worker: "Worker", connections: EncryptedConnections, *, served: bool) -> None:
        self._worker, self._connections = worker, connections
        self.keys = None if served else connections.vault.keys  # the key store that both halves have

    def offer(self, layers: Sequence[int], modules: Sequence[str] | None) -> EncryptedOffer:
        """Say what could be applied; waits for the model, and for the operation that runs.

        Raises:
            ValidationError: Nothing of that name is adapted, or not in a way that can be applied.
        """
        version, found = self._worker.factors(layers, modules)
        return EncryptedOffer(found.parts, version, found.base, found.elsewhere, found.depth)

    def open(
        self,
        layers: Sequence[int],
        modules: Sequence[str] | None,
        shape: tuple[int, int, int],
        params: str,
        tokens: int | str,
        bundle: bytes,
    ) -> EncryptedConnection:
        """Open a connection for the parts of one shape.

        Args:
            layers: As they were asked for.
            modules: Likewise.
            shape: Of the parts.
            params: Of the bundle, in which it stands, authenticated.
            tokens: Likewise.
            bundle: Of the client.

        Raises:
            ValidationError: No part has that shape.
            EncryptionContextError: The bundle is none for these parts.
        """
        with self._connections.on_record():
            if len(bundle) > self.most_of_bundle(shape, params, tokens):
                raise EncryptionContextError(
                    f"No bundle of {params!r} for {shape} is that large. It was not parsed."
                )
            version, found = self._worker.factors(layers, modules)
            parts = tuple(part for part in found.parts if part.shape == tuple(shape))
            if not parts:
                raise ValidationError(f"No adapter of what was asked for has the shape {tuple(shape)}.")
            weights = {part.name: found.matrices[part.name] for part in parts}
            server = HEServer(weights, bundle, keys=self.keys, cache_mb=CACHE_MB)
            connection_id = f"he-{uuid.uuid4().hex}"
            chosen = None if modules is None else tuple(modules)
            names = tuple(weights)
            self._connections.open[connection_id] = Served(server, tuple(layers), chosen, names, version)
            return EncryptedConnection(connection_id, parts, version)

    def most_of_bundle(self, shape: tuple[int, int, int], params: str, tokens: int | str) -> int:
        """Return how many bytes a bundle of these parameters has at most.

        Raises:
            ValidationError: No such shape or packing.
            EncryptionContextError: No such parameter set.
        """
        parameters = parameters_named(params, "lora")
        steps = steps_of(Shape(*shape), packings_of(tokens), parameters)
        return len(steps) * parameters.galois_key_bytes + MOST_HEADER + 1024

    def most_of_request(self, connection_id: str) -> int:
        """Return how many bytes a request of a connection has at most.

        Raises:
            NotFoundError: There is no such connection.
        """
        return self._connections.find(connection_id).server.most_bytes

    def apply(self, connection_id: str, request: bytes) -> bytes:
        """Return the reply to a request.

        Raises:
            NotFoundError: There is no such connection.
            EncryptionContextError: The weights have moved on, or the request is none of this connection.
        """
        served = self._connections.find(connection_id)
        current = self._worker.info().policy_version
        if current != served.version:
            raise stale(served.version, current)
        reply = served.server.apply(request)
        served.used_at = time.monotonic()
        return reply

    def refresh(self, connection_id: str) -> EncryptedConnection:
        """Serve the weights as they are now, under the same keys.

        Raises:
            NotFoundError: There is no such connection.
        """
        served = self._connections.find(connection_id)
        version, found = self._worker.factors(served.layers, served.modules)
        parts = tuple(part for part in found.parts if part.name in served.names)
        served.server.replace({part.name: found.matrices[part.name] for part in parts})
        served.version = version
        return EncryptedConnection(connection_id, parts, version)

    def close(self, connection_id: str) -> None:
        """Drop the keys of a connection; idempotent."""
        self._connections.open.pop(connection_id, None)
