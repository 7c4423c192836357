"""Participation tables: how often each privacy unit took part in worst-case steps, keyed hashes in place of ids.

    magic | u64 steps | f64 offset | u64 count | key, 32 bytes | count · hash, 16 bytes | count · f64 mu²

The key lies in the table, so the table has to be sealed where it is kept; then a hash says nothing about an id to
whoever has the file alone, and the same id has the same hash wherever the table goes.
"""

import hashlib
import os
import struct
from collections.abc import Mapping

import numpy as np

from tensafe_nb.errors import LedgerError
from tensafe_nb.privacy.accounting import mu_squared_of

_MAGIC = b"TNBPART1"
_HEAD = struct.Struct(">8sQdQ32s")
_HASH = 16


class Participation:
    """mu² of every unit of one account over its worst-case steps.

    Attributes:
        steps: How many steps were taken in.
        key: Of the hashes.
        offset: Largest mu² of tables whose ids cannot be told apart from these: it counts for every unit.
    """

    def __init__(
        self,
        key: bytes | None = None,
        steps: int = 0,
        offset: float = 0.0,
        units: dict[bytes, float] | None = None,
    ) -> None:
        self.key = os.urandom(32) if key is None else key
        self.steps = steps
        self.offset = offset
        self._units = {} if units is None else units
        self._largest = max(self._units.values(), default=0.0)

    @property
    def mu_squared(self) -> float:
        """The largest mu² of a unit."""
        return self.offset + self._largest

    def quote(self, participants: Mapping[str, int], sigma: float) -> float:
        """Return the largest mu² after a step that holds each unit so often. Nothing is taken in."""
        # mu² = Σ_t (m_t / sigma_t)² only grows, so what the step does not touch cannot become the largest
        after = (self._after(unit, multiplicity, sigma)[1] for unit, multiplicity in participants.items())
        return self.offset + max(self._largest, max(after, default=0.0))

    def take(self, participants: Mapping[str, int], sigma: float) -> None:
        """Take in a step that holds each unit so often."""
        for unit, multiplicity in participants.items():
            name, value = self._after(unit, multiplicity, sigma)
            self._units[name] = value
            self._largest = max(self._largest, value)
        self.steps += 1

    def merge(self, other: "Participation") -> None:
        """Take in another table of the same account, adding up: steps that both hold then count twice."""
        if other.key == self.key:  # the same hash is the same unit
            for name, value in other._units.items():
                self._units[name] = self._units.get(name, 0.0) + value
            self.offset += other.offset
        else:  # nobody can tell whose units they are: each here may be the one that did most often there
            self.offset += other.mu_squared
        self._largest = max(self._units.values(), default=0.0)
        self.steps += other.steps

    def _after(self, unit: str, multiplicity: int, sigma: float) -> tuple[bytes, float]:
        name = hashlib.blake2b(unit.encode(), digest_size=_HASH, key=self.key).digest()
        return name, self._units.get(name, 0.0) + mu_squared_of(multiplicity, sigma)

    def __bytes__(self) -> bytes:
        head = _HEAD.pack(_MAGIC, self.steps, self.offset, len(self._units), self.key)
        values = np.fromiter(self._units.values(), dtype=">f8", count=len(self._units))
        return head + b"".join(self._units) + values.tobytes()

    @classmethod
    def parse(cls, data: bytes) -> "Participation":
        """Read a table.

        Raises:
            LedgerError: It is none.
        """
        try:
            magic, steps, offset, count, key = _HEAD.unpack_from(data)
        except struct.error as error:
            raise LedgerError("This is not a participation table.") from error
        names, values = data[_HEAD.size : _HEAD.size + count * _HASH], data[_HEAD.size + count * _HASH :]
        if magic != _MAGIC or len(names) != count * _HASH or len(values) != count * 8:
            raise LedgerError("This is not a participation table.")
        keys = [names[at : at + _HASH] for at in range(0, len(names), _HASH)]
        return cls(key, steps, offset, dict(zip(keys, np.frombuffer(values, ">f8").tolist(), strict=True)))
