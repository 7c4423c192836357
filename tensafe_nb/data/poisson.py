"""Poisson draws: each privacy unit joins each step independently, with one probability, by secret randomness.

This is what makes a step cheap: an attacker does not know whether an example was in it. A shuffled epoch looks alike
and is not (Annamalai et al. 2024, arXiv:2411.10614): its epsilon can be several times as large.
"""

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tensafe_nb.config import TrainingConfig
from tensafe_nb.data.rows import OnBadRows, Rows
from tensafe_nb.data.text import Example, collate, encode_rows, padding_of
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.privacy.tickets import sealed, ticket
from tensafe_nb.protocol.batch import TICKET, Array, BatchData

logger = logging.getLogger(__name__)
MOST_UNITS = 1 << 31  # more than any account names
FAR_OFF = 0.1  # of the declared number of units: more than rounding it to a public figure


class PoissonDraws:
    """Draws of examples for private training, one per step; made by `tc.dp_batches`.

    Every pass over it draws anew; no seed repeats a draw, and none is saved. A draw may be empty: it is a step too. One
    that is left out is charged all the same, with the next that is used.

    Args:
        examples: What to draw from.
        units: (examples,) the number of each example's privacy unit; a unit is drawn with all its examples.
        sample_rate: q, the probability with which a unit comes into a step.
        unit: What a unit is: "example" or "user".
        group: So many examples, one after the other, are of one row: 2 for pairs.
        steps: Draws per pass.
        pad_token_id: Fills up shorter rows.
        client_id: The training client that the draws are for.
        enter: Numbers each draw before it is made, from then on owed; gives the number and the key of its ticket.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        units: Array,
        sample_rate: float,
        *,
        unit: str = "example",
        group: int = 1,
        steps: int,
        pad_token_id: int,
        client_id: str,
        enter: Callable[[str], tuple[int, bytes]],
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValidationError(f"dp_batches: steps={as_given(steps)} must be a whole number, at least 1.")
        self.examples, self.sample_rate, self.steps, self.unit = list(examples), sample_rate, steps, unit
        self.group = group
        self._units, self._count = units, int(units.max()) + 1
        self._pad_token_id, self._client_id, self._enter = pad_token_id, client_id, enter
        self._sampler = secrets.randbits(62)  # tells the draws of two samplers of one client apart

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[BatchData]:
        return self.rest(0)

    def rest(self, dealt: int) -> Iterator[BatchData]:
        """Yield what is left of a pass of which so many were dealt; none is drawn to be thrown away."""
        for _ in range(dealt, self.steps):
            yield self.draw()

    def draw(self) -> BatchData:
        """Return the next draw, whole: all its rows must come into one step, each once.

        It is numbered. When a later draw of the same account is used before it, it is charged as left out.
        """
        number, key = self._enter(self.unit)
        # one coin for each unit, (units,), read at each example's unit, (examples,): a unit comes with all its rows
        rows = np.flatnonzero(coins(self._count, self.sample_rate)[self._units])
        units, names = self._units[rows], (self._client_id, self._sampler, number)
        if not len(rows):  # a step all the same: to leave it out would tell that nobody was drawn
            return BatchData.nothing(sealed(ticket(*names, units, self.unit), None, key))
        batch = collate([self.examples[row] for row in rows], self._pad_token_id)
        owners = {"unit_ids": units} if self.unit == "user" else {}
        mark = sealed(ticket(*names, units, self.unit), batch, key)
        return batch.labelled_with(**{TICKET: mark, **owners})

    def __repr__(self) -> str:
        return f"<PoissonDraws {self.steps} of {self._count} units at rate {self.sample_rate:.4g}>"


def coins(count: int, sample_rate: float) -> Array:
    """Return (count,) whether each coin fell; 53 random bits of the operating system for each."""
    # u = k · 2⁻⁵³ with k uniform below 2⁵³ is uniform in [0, 1), and P(u < q) = q to within 2⁻⁵³
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    fell: Array = bits * 2.0**-53 < sample_rate
    return fell


def poisson_draws(
    sample_rate: float,
    rows: Rows,
    tokenizer: Any,
    *,
    context: int | None,
    declared: int | None,
    client_id: str,
    enter: Callable[[str], tuple[int, bytes]],
    steps: int | None = None,
    unit_ids: Sequence[object] | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    on_bad_rows: OnBadRows = "raise",
) -> PoissonDraws:
    """Tokenise rows and return the draws of them; `TrainingClient.dp_batches` says what the arguments are.

    Args:
        sample_rate: q, see `sample_rate_of`.
        rows: As for `batches`.
        tokenizer: The model's.
        context: How many tokens the model reads at most.
        declared: N, the number of units that the accounting was told.
        client_id: The training client that the draws are for.
        enter: See `PoissonDraws`.
        steps: Draws per pass; None takes 1/q, which use each unit once on average.
        unit_ids: Whose each row is; None takes each row for itself.
        max_length: How many tokens a row may have.
        truncate: Cut longer rows at the end.
        on_bad_rows: "skip" leaves out rows that cannot be used, and their `unit_ids`.
    """
    encoded = encode_rows(
        rows, tokenizer, max_length=max_length, truncate=truncate, on_bad_rows=on_bad_rows, context=context
    )
    if encoded.skipped and unit_ids is not None:
        unit_ids = encoded.kept(unit_ids, "dp_batches: unit_ids")
    return PoissonDraws(
        encoded.examples,
        units_of(len(encoded.examples), encoded.group, unit_ids, declared),
        sample_rate,
        unit="user" if unit_ids is not None else "example",
        group=encoded.group,
        steps=max(1, round(1 / sample_rate)) if steps is None else steps,
        pad_token_id=padding_of(tokenizer),
        client_id=client_id,
        enter=enter,
    )


def sample_rate_of(config: TrainingConfig) -> float:
    """Return q = min(1, L / N) of a configuration for Poisson draws.

    Raises:
        ValidationError: It has no differential privacy, another sampling, or does not say N.
    """
    dp = config.dp_config
    if dp is None or not dp.enabled:
        raise ValidationError(
            "dp_batches() draws for private training, and this client has no DPConfig. Use batches() instead."
        )
    if dp.sampling != "poisson":
        raise ValidationError(
            "dp_batches() draws for DPConfig(sampling='poisson'); this client accounts for batches of your own."
        )
    assert dp.dataset_size is not None  # a configuration without it is refused
    return min(1.0, config.expected_units / dp.dataset_size)


def units_of(examples: int, group: int, unit_ids: Sequence[object] | None, declared: int | None) -> Array:
    """Return (examples,) the number of each example's unit.

    Args:
        examples: How many there are.
        group: How many of them each row of the source made.
        unit_ids: One for each row of the source; None makes each row a unit.
        declared: N, to be compared with what there is.

    Raises:
        ValidationError: Not one id per row, or ids that are neither whole numbers nor texts.
    """
    rows = examples // group
    names = range(rows) if unit_ids is None else checked_names(unit_ids, rows)
    numbers: dict[str, int] = {}  # 7 and "7" name one person
    units = [numbers.setdefault(str(name), len(numbers)) for name in names]
    if declared is not None and abs(len(numbers) - declared) > FAR_OFF * declared:
        logger.warning(
            "dp_batches: DPConfig(dataset_size=%d) was declared, and %d privacy units were given: epsilon is computed "
            "for the rate of the declared number, and steps hold other numbers of units than planned",
            declared, len(numbers),
        )  # fmt: skip
    return np.repeat(np.asarray(units, dtype=np.int64), group)


def checked_names(unit_ids: Sequence[object], rows: int) -> Sequence[object]:
    """Return what names the unit of each row; refuse what is not one whole number or text for each."""
    too_long = isinstance(unit_ids, range) and bool(unit_ids) and unit_ids[-1] - unit_ids[0] >= MOST_UNITS
    if isinstance(unit_ids, str) or too_long or not hasattr(unit_ids, "__len__"):
        raise ValidationError(
            f"dp_batches: unit_ids is a list with one id for each row, not {as_given(unit_ids)}."
        )
    if len(unit_ids) != rows:
        raise ValidationError(f"dp_batches: unit_ids names {len(unit_ids)} rows, there are {rows}.")
    for row, name in enumerate(unit_ids):
        if isinstance(name, bool) or not isinstance(name, str | int | np.integer):
            raise ValidationError(
                f"dp_batches: unit_ids[{row}] is {as_given(name)}: name each row's owner by a whole number or a "
                f"text. A row whose owner is unknown gets a name of its own."
            )
    return unit_ids
