"""Tickets of Poisson draws: which rows were drawn together, so that a step is what its epsilon is computed for.

A ticket travels with the rows as the batch entry `dp_ticket` (B, 7). Whoever checks it sees a row that is missing,
repeated, altered, or brought along from elsewhere, a draw that is used twice, and a unit whose rows were torn apart.
Its last column is a keyed hash of the row and of the ticket's other columns: neither can be written anew.
Draws are numbered, so that one that was left out is seen too: it is charged as it was drawn.
"""

import hashlib
import os
import threading
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tensafe_nb.errors import PrivacyUnitError
from tensafe_nb.protocol.batch import TICKET, Array, BatchData

if TYPE_CHECKING:
    from tensafe_nb.privacy.ledger.charges import Charge

CLIENT, SAMPLER, DRAW, ROW, ROWS, UNIT, SEAL = range(7)
USERS = -1  # the unit in the ticket of an empty draw whose units are users; that of examples has 0


def ticket(client_id: str, sampler: int, draw: int, units: Array, unit: str = "example") -> Array:
    """Return the ticket of one draw: (rows, 6), or of an empty draw (1, 6) with 0 rows; `sealed` makes it one of seven.

    Without a seal it does for an engine that keeps no register of draws, and for no training client.

    Args:
        client_id: The training client that the draw is for.
        sampler: Names the sampler.
        draw: Its number.
        units: (rows,) the privacy unit of each row.
        unit: What a unit is: "example" or "user".
    """
    rows = len(units)
    columns = np.zeros((max(rows, 1), SEAL), dtype=np.int64)
    columns[:, :ROW] = number_of(client_id), sampler, draw
    columns[:, ROWS] = rows
    if rows:
        columns[:, ROW], columns[:, UNIT] = np.arange(rows), units
    elif unit == "user":
        columns[:, UNIT] = USERS
    return columns


def sealed(columns: Array, batch: BatchData | None, key: bytes) -> Array:
    """Return a ticket with its last column, (rows, 7); `batch` is None for an empty draw."""
    return np.column_stack([columns, seals_of(columns, batch, key)])


def number_of(client_id: str) -> int:
    """Return a number that stands for a client."""
    return int.from_bytes(hashlib.blake2b(client_id.encode(), digest_size=7).digest(), "big")


def seals_of(columns: Array, batch: BatchData | None, key: bytes) -> Array:
    """Return (rows,) keyed hashes: of the ticket's other columns, and of the row's tokens, labels, and targets.

    Padding does not count, nor what is added to a batch after it was drawn.
    """
    # 8 bytes of BLAKE2b each: with a secret key, none can be guessed
    seals = np.zeros(len(columns), dtype=np.int64)
    for row, place in enumerate(columns[:, :SEAL]):
        digest = hashlib.blake2b(place.astype("<i8").tobytes(), digest_size=8, key=key)
        if batch is not None and len(batch):
            tokens = batch.attention_mask[row] == 1
            digest.update(batch.input_ids[row, tokens].tobytes())
            digest.update(batch.labels[row, tokens].tobytes())
            if (targets := batch.extras.get("targets")) is not None:
                digest.update(np.asarray(targets[row], dtype=np.float64).tobytes())
        seals[row] = int.from_bytes(digest.digest(), "big", signed=True)
    return seals


class DrawRegister:
    """The Poisson draws that this process made for the accounts of a ledger, numbered as they were made.

    A draw is paid for when it is used, or when a later one of its account is: who looks at draws, and uses those that
    suit, would otherwise use a probability that nobody computed with.

    Attributes:
        key: Of the rows' hashes in the tickets; it never leaves the process.
    """

    def __init__(self) -> None:
        self.key = os.urandom(32)
        self._lock = threading.Lock()
        self._made = 0
        self._owed: dict[int, tuple[str, Charge]] = {}
        self._unused: set[int] = set()

    def enter(self, account: str, charge: "Charge") -> int:
        """Number a draw that is about to be made, and what it will cost."""
        with self._lock:
            self._made += 1
            self._owed[self._made] = account, charge
            self._unused.add(self._made)
            return self._made

    def is_unused(self, draw: int) -> bool:
        """Whether there is such a draw, and no step has used it yet."""
        return draw in self._unused

    def use(self, draw: int) -> None:
        """Note that a step has used a draw."""
        with self._lock:
            self._unused.discard(draw)

    def owed(self, accounts: Container[str], draw: int) -> "Mapping[int, Charge]":
        """Return the draws of some accounts, up to this one, that are not paid for yet, in their order."""
        with self._lock:
            return {n: charge for n, (name, charge) in self._owed.items() if n <= draw and name in accounts}

    def pay(self, draw: int) -> None:
        """Note that a draw is paid for."""
        with self._lock:
            self._owed.pop(draw, None)

    def waive(self, draw: int) -> None:
        """Forget a draw that the budget refused: no look at the data had a part in that, and it cannot be used now."""
        self.pay(draw)
        self.use(draw)


@dataclass(slots=True)
class DrawBook:
    """Checks the rows of each logical step against the draw they come from.

    Args:
        client_id: Only draws for this client count.
        register: Where the draws are numbered; None checks that none comes twice, and nothing of their contents.
    """

    client_id: str
    register: DrawRegister | None = None
    _used: set[tuple[int, int]] = field(default_factory=set)
    _open: tuple[int, int, int] | None = None  # sampler, draw, rows
    _rows: set[int] = field(default_factory=set)
    _units: set[int] = field(default_factory=set)

    @property
    def number(self) -> int | None:
        """The number of the draw that the step has opened; None where there is no register."""
        return None if self.register is None or self._open is None else self._open[1]

    def admit(self, batch: BatchData) -> str:
        """Take in the rows of one forward_backward, and return what a unit is; call `forget` if it then fails.

        Raises:
            PrivacyUnitError: No ticket, another client's, a draw that was used, or rows that do not belong together.
        """
        columns = batch.extras.get(TICKET)
        if columns is None:
            raise PrivacyUnitError(
                "These rows have no ticket of a Poisson draw, so no sampling rate is known and no epsilon could be "
                "computed. Take the batches of tc.dp_batches(examples); or, for batches of your own, set "
                "DPConfig(sampling='worst_case') and give example_ids."
            )
        check_ticket(columns, with_seal=self.register is not None)
        draw, unit = self._draw_of(columns), unit_of(batch, columns)
        rows, units = columns[: len(batch), ROW].tolist(), columns[: len(batch), UNIT].tolist()
        # one step is one draw: that is what the accountant composes
        if self._open not in (None, draw):
            raise PrivacyUnitError("Rows of two draws in one step: call optim_step() after each draw.")
        if len(set(rows)) < len(rows) or self._rows & set(rows):
            raise PrivacyUnitError("A row of the draw came twice: each counts once, whole.")
        # clipping bounds what one call adds of a unit; in two calls, it would add twice that
        if self._units & set(units):
            raise PrivacyUnitError(
                "The rows of one privacy unit came in two calls, so that it would be clipped twice. "
                "Keep them in one forward_backward()."
            )
        if self.register is not None:
            check_seals(columns, seals_of(columns, batch, self.register.key))
        self._open = draw
        self._rows.update(rows)
        self._units.update(units)
        return unit

    def settle(self) -> None:
        """Check that the step holds its draw whole.

        Raises:
            PrivacyUnitError: Rows are missing.
        """
        rows = 0 if self._open is None else self._open[2]
        if len(self._rows) != rows:
            raise PrivacyUnitError(
                f"{len(self._rows)} of the {rows} rows of this draw were given: a step needs all of them, or it is not "
                f"the step that epsilon is computed for. Nothing was spent; the gradients are dropped."
            )

    def spend(self) -> None:
        """The step is taken: its draw is used up."""
        if self._open is not None:
            self._used.add(self._open[:2])
            if self.register is not None:
                self.register.use(self._open[1])
        self.forget()

    def forget(self) -> None:
        """The step is not taken: its draw may come again."""
        self._open = None
        self._rows, self._units = set(), set()

    def _draw_of(self, columns: Array) -> tuple[int, int, int]:
        same = columns[:, [CLIENT, SAMPLER, DRAW, ROWS]]
        if (same != same[0]).any():
            raise PrivacyUnitError("The rows of this batch come from several draws: give one draw at a time.")
        client, sampler, draw, rows = same[0].tolist()
        if client != number_of(self.client_id):
            raise PrivacyUnitError(
                f"This draw is another training client's: a draw counts once. Call dp_batches() of {self.client_id}."
            )
        if (sampler, draw) in self._used or (self.register is not None and not self.register.is_unused(draw)):
            raise PrivacyUnitError(
                "This draw was used in an earlier step: take the next one of dp_batches()."
            )
        return sampler, draw, rows


def check_ticket(columns: Array, *, with_seal: bool) -> None:
    """Refuse what has not the form of a ticket.

    Raises:
        PrivacyUnitError: It is not one.
    """
    widths = (SEAL + 1,) if with_seal else (SEAL, SEAL + 1)
    if columns.ndim != 2 or not len(columns) or columns.shape[1] not in widths or columns.dtype.kind != "i":
        raise PrivacyUnitError(
            f"The batch's {TICKET} is not a draw's: shape {columns.shape} of {columns.dtype}, not (rows, 7) of whole "
            f"numbers. Hand on what tc.dp_batches() gave, as it is."
        )


def check_seals(columns: Array, expected: Array) -> None:
    """Refuse rows that are not the ones that were drawn.

    Raises:
        PrivacyUnitError: A seal is not the row's.
    """
    if other := np.flatnonzero(columns[:, SEAL] != expected).tolist():
        raise PrivacyUnitError(
            f"The rows {', '.join(map(str, other[:8]))} of this batch are not the ones that were drawn: their "
            f"tokens, labels, targets or tickets differ. Change rows before they are drawn: tc.dp_batches(rows)."
        )


def unit_of(batch: BatchData, columns: Array) -> str:
    """Return what a unit of a draw is; refuse owners that were written onto it afterwards."""
    if not len(batch):
        return "user" if columns[0, UNIT] == USERS else "example"
    owners = batch.extras.get("unit_ids")
    if owners is None:
        return "example"
    if not np.array_equal(owners, columns[:, UNIT]):
        raise PrivacyUnitError(
            "This draw was made by other units than its unit_ids say. Give them where it is drawn: "
            "tc.dp_batches(rows, unit_ids=…)."
        )
    return "user"


def ids_in(batch: BatchData, name: str) -> list[object]:
    """Return the ids of a batch's rows.

    Raises:
        PrivacyUnitError: They are not one whole number or text per row: 1 and 1.0 would be two units.
    """
    ids = batch.extras[name]
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise PrivacyUnitError(
            f"The batch's {name} must be (B,) whole numbers or texts, the same for the same unit in every batch; they "
            f"have shape {ids.shape} and are {ids.dtype}."
        )
    found: list[object] = ids.tolist()
    return found


def count_units(batch: BatchData, ids: Iterable[object]) -> tuple[Array, list[str]]:
    """Return (rows,) the number of each row's unit, in the order in which they come, and the units' names."""
    numbers: dict[str, int] = {}
    rows = [numbers.setdefault(str(one), len(numbers)) for one in ids]
    return np.asarray(rows, dtype=np.int64).reshape(len(batch)), list(numbers)
