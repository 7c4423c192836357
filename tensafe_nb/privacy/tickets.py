"""Tickets of Poisson draws: which rows were drawn together, so that a step is what its epsilon is computed for.

A ticket travels with the rows as the batch entry `dp_ticket` (B, 6). Whoever checks it sees a row that is missing,
repeated, or brought along from elsewhere, a draw that is used twice, and a unit whose rows were torn apart.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from tensafe_nb.batch import TICKET, Array, BatchData
from tensafe_nb.errors import PrivacyUnitError

CLIENT, SAMPLER, DRAW, ROW, ROWS, UNIT = range(6)
USERS = -1  # the unit in the ticket of an empty draw whose units are users; that of examples has 0


def ticket(client_id: str, sampler: int, draw: int, units: Array, unit: str = "example") -> Array:
    """Return the ticket of one draw: (rows, 6), or of an empty draw (1, 6) with 0 rows.

    Args:
        client_id: The training client that the draw is for.
        sampler: Names the sampler.
        draw: Its number.
        units: (rows,) the privacy unit of each row.
        unit: What a unit is: "example" or "user".
    """
    rows = len(units)
    columns = np.zeros((max(rows, 1), 6), dtype=np.int64)
    columns[:, :ROW] = number_of(client_id), sampler, draw
    columns[:, ROWS] = rows
    if rows:
        columns[:, ROW], columns[:, UNIT] = np.arange(rows), units
    elif unit == "user":
        columns[:, UNIT] = USERS
    return columns


def number_of(client_id: str) -> int:
    """Return a number that stands for a client."""
    return int.from_bytes(hashlib.blake2b(client_id.encode(), digest_size=7).digest(), "big")


@dataclass(slots=True)
class DrawBook:
    """Checks the rows of each logical step against the draw they come from.

    Args:
        client_id: Only draws for this client count.
    """

    client_id: str
    _used: set[tuple[int, int]] = field(default_factory=set)
    _open: tuple[int, int, int] | None = None  # sampler, draw, rows
    _rows: set[int] = field(default_factory=set)
    _units: set[int] = field(default_factory=set)

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
        _check_form(columns)
        draw, unit = self._draw_of(columns), _unit_of(batch, columns)
        rows, units = columns[: len(batch), ROW].tolist(), columns[: len(batch), UNIT].tolist()
        if self._open not in (None, draw):
            raise PrivacyUnitError("Rows of two draws in one step: call optim_step() after each draw.")
        if len(set(rows)) < len(rows) or self._rows & set(rows):
            raise PrivacyUnitError("A row of the draw came twice: each counts once, whole.")
        if self._units & set(units):
            raise PrivacyUnitError(
                "The rows of one privacy unit came in two calls, so that it would be clipped twice. "
                "Keep them in one forward_backward()."
            )
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
        if (sampler, draw) in self._used:
            raise PrivacyUnitError(
                "This draw was used in an earlier step: take the next one of dp_batches()."
            )
        return sampler, draw, rows


def _check_form(columns: Array) -> None:
    if columns.ndim != 2 or not len(columns) or columns.shape[1] != 6 or columns.dtype.kind != "i":
        raise PrivacyUnitError(
            f"The batch's {TICKET} is not a draw's: shape {columns.shape} of {columns.dtype}, not (rows, 6) of whole "
            f"numbers. Hand on what tc.dp_batches() gave, as it is."
        )


def _unit_of(batch: BatchData, columns: Array) -> str:
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
