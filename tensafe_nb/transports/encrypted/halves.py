"""The client's halves of an encrypted adapter's connections: their keys, what is served, and asking until it is."""

import time
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from tensafe_nb.errors import (
    NotFoundError,
    ServerConnectionError,
    TGTinkerError,
)
from tensafe_nb.privacy.encrypted import HEClient
from tensafe_nb.privacy.encrypted.client import tokens_at_once
from tensafe_nb.privacy.encrypted.packing import packings_of
from tensafe_nb.privacy.encrypted.parameters import parameters_named
from tensafe_nb.privacy.encrypted.scheme import Vector
from tensafe_nb.privacy.encrypted.stacking import unstacked
from tensafe_nb.protocol.encrypted import EncryptedOffer, EncryptedPart, stale
from tensafe_nb.transports.base import EncryptedLine
from tensafe_nb.transports.encrypted.calls import Tick

MAX_ABS = 65_504.0  # of an activation
MOST_MESSAGE = 1 << 25  # bytes of one message; what is larger goes in pieces
PATIENCE = 60.0  # s that a server which does not answer is asked again
LONGEST_PAUSE = 2.0  # s between two tries


@dataclass(slots=True)
class Traffic:
    """What went over a line since some moment."""

    tokens: int = 0
    upload_bytes: int = 0
    download_bytes: int = 0

    def since(self, before: "Traffic") -> dict[str, int]:
        """Return what has gone since, as fields of a result."""
        return {
            "tokens": self.tokens - before.tokens,
            "upload_bytes": self.upload_bytes - before.upload_bytes,
            "download_bytes": self.download_bytes - before.download_bytes,
        }


@dataclass(slots=True)
class Half:
    """The client's half of one connection: the keys, and what the other half serves with them."""

    client: HEClient
    connection_id: str
    parts: dict[str, EncryptedPart]


@dataclass(slots=True)
class Halves:
    """The client's halves of all connections of one adapter; used by one thread.

    Attributes:
        line: To the other halves.
        layers: As they were asked for.
        modules: Likewise.
        params: Name of the parameter set.
        tokens: As of `HEClient`.
        offer: What is served, by shape and version.
        traffic: What went over the line so far.
    """

    line: EncryptedLine
    layers: tuple[int, ...]
    modules: tuple[str, ...] | None
    params: str
    tokens: int | str
    offer: EncryptedOffer
    traffic: Traffic = field(default_factory=Traffic)
    _open: dict[tuple[int, int, int], Half] = field(default_factory=dict)

    def call(self, part: EncryptedPart, x: Vector, tick: Tick) -> dict[str, Vector]:
        """Return (S, d_out) by module for the (S, d_in) that the modules of a part read."""
        parameters, packings = parameters_named(self.params, "lora"), packings_of(self.tokens)
        client = self._half(part).client
        at_once = tokens_at_once(client.shape, packings, parameters, min(MOST_MESSAGE, self.line.most_bytes))
        found = []
        for start in range(0, len(x), at_once):
            tick(start, len(x))
            found.append(self._answered(part, x[start : start + at_once], tick))
        served = self._half(part).parts[part.name]
        deltas = unstacked(np.concatenate(found), served.widths, served.exponents)
        return dict(zip(part.modules, deltas, strict=True))

    def _answered(self, part: EncryptedPart, x: Vector, tick: Tick) -> Vector:
        """Encrypt, ask and decrypt; where no answer came, anew: each request is taken once."""
        began, pause, reopened = time.monotonic(), 0.1, False

        def wanted(_done: int, _total: int) -> None:
            tick(0, 0)

        while True:
            half = self._half(part)
            request = half.client.encrypt(x, part.name, tick=wanted)
            try:
                reply = self.line.apply(half.connection_id, request)
            except NotFoundError:
                del self._open[part.shape]  # its keys, with it: the next connection has its own
                if reopened:
                    raise
                reopened = True
                continue
            except TGTinkerError as error:
                if not is_passing(error) or time.monotonic() - began + pause > PATIENCE:
                    raise
                tick(0, 0)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            found = half.client.decrypt(reply, tick=wanted)
            self.traffic.tokens += len(x)
            self.traffic.upload_bytes += len(request)
            self.traffic.download_bytes += len(reply)
            return found

    def _half(self, part: EncryptedPart) -> Half:
        """Return the half for a part; keys are made with the first call."""
        shape = part.shape
        if shape not in self._open:
            client = HEClient(shape, self.params, tokens=self.tokens, keys=self.line.keys, max_abs=MAX_ABS)
            opened = self.line.open(
                self.layers, self.modules, shape, self.params, self.tokens, client.public_bundle()
            )
            self._open[shape] = Half(client, opened.connection_id, {one.name: one for one in opened.parts})
            self._check(opened.policy_version)
        return self._open[shape]

    def _check(self, version: int) -> None:
        """Refuse weights of another version than was offered.

        Raises:
            EncryptionContextError: The client was trained on meanwhile.
        """
        if version != self.offer.policy_version:
            self.drop()
            raise stale(self.offer.policy_version, version)

    def refresh(self) -> EncryptedOffer:
        """Serve the weights as they are now."""
        self.offer = self.line.offer(self.layers, self.modules)
        for shape, half in list(self._open.items()):
            try:
                served = self.line.refresh(half.connection_id)
            except NotFoundError:
                del self._open[shape]  # it is opened again at the next call
                continue
            half.parts = {one.name: one for one in served.parts}
            self._check(served.policy_version)
        return self.offer

    def drop(self) -> None:
        """Drop all keys, here and at the other end."""
        halves, self._open = list(self._open.values()), {}
        for half in halves:
            with suppress(TGTinkerError):
                self.line.close(half.connection_id)


def is_passing(error: TGTinkerError) -> bool:
    """Whether it is worth asking again."""
    return isinstance(error, ServerConnectionError) or error.code == "too_many_requests"
