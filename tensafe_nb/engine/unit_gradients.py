"""The gradient of each privacy unit of a batch: by one backward pass for many where that is sure, else one at a time.

Nothing is believed of a model or of a loss that has not been tried: a way to tell rows apart is compared with one
backward pass per unit before it is used, and a user's loss is asked again, in every step, about some rows alone.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tensafe_nb.display import as_given
from tensafe_nb.engine.accumulation import Tally, Tick
from tensafe_nb.engine.forward import ForwardPass
from tensafe_nb.engine.models import inputs
from tensafe_nb.errors import PrivacyUnitError
from tensafe_nb.losses import Loss, LossOutputs
from tensafe_nb.losses.base import LossValue
from tensafe_nb.losses.views import cut_out
from tensafe_nb.privacy.dp_sgd import ClippedSum
from tensafe_nb.privacy.per_example import BookKeeping, PerUnit, WrittenOut, way_for
from tensafe_nb.privacy.row_dropout import OtherRandomness, RowDropout
from tensafe_nb.protocol.batch import Array, BatchData

logger = logging.getLogger(__name__)

MAX_GRADIENTS = 2**25  # values of row-by-row gradients that are held at a time: 128 MiB
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, of the probes
ONE_AT_A_TIME = "one at a time"
OURS = "tensafe_nb.losses"  # losses whose rows are known to be their own
LEAST = 1e-2  # a gradient that is smaller counts as this large where two are compared: rounding has no relative bound
ONE_IN = 4  # rows of a user's loss is looked at by itself too, in every piece


class Evaluated(NamedTuple):
    """Some rows, what the model says of them, and what the loss says of that: a value for each row, or one for all."""

    part: BatchData
    outputs: LossOutputs
    values: Tensor  # (B,), or ()
    metrics: dict[str, float]

    @property
    def value(self) -> LossValue:
        # one value for each row, or one for a group of rows, such as a pair
        return LossValue(self.values.detach(), float(self.values.numel()), self.metrics)

    @property
    def total(self) -> float:
        return float(self.values.detach().sum())


class UnitGradients:
    """Tells the gradients of a batch's units apart, and adds them to a clipped sum.

    Args:
        forward: The model's forward pass.
        parameters: What is trained.

    Attributes:
        secrets: Makes (B,) the secrets that the rows' dropout comes from; tests put known ones in its place.
        chosen: The way of each loss that was tried, by function and keywords; None takes one unit at a time.
    """

    def __init__(self, forward: ForwardPass, parameters: Sequence[nn.Parameter]) -> None:
        model = forward.model
        self._forward, self._parameters = forward, parameters
        self._way = way_for(model.causal, parameters)
        trained = set(map(id, parameters))

        def trains(module: nn.Module) -> bool:
            return any(id(p) in trained for p in module.parameters())

        # a trained head has to see rows (B, T, …): not the (N, D) labelled positions of all of them
        self._whole_rows = self._way is not None and trains(model.causal.get_output_embeddings())
        tokens = model.causal.get_input_embeddings()
        others = [m for m in model.causal.modules() if isinstance(m, nn.Embedding) and m is not tokens]
        self._tells_positions = any(map(trains, others)) and inputs.counts_positions_from_zero(model)
        self._tolerance = TOLERANCE[model.compute_dtype]
        # one row's gradient is there in any case, when rows are taken one at a time
        self._room = max(MAX_GRADIENTS, sum(p.numel() for p in parameters))
        self.chosen: dict[tuple[object, str], BookKeeping | None] = {}
        self.secrets: Callable[[BatchData], Array] = fresh_secrets
        self._secret_of_row: Array | None = None  # while dropout is on
        self._dice = np.random.default_rng()  # which rows are looked at by themselves: no seed foretells it

    @property
    def ways(self) -> tuple[str, ...]:
        """How gradients were told apart so far."""
        return tuple(sorted({ONE_AT_A_TIME if way is None else way.name for way in self.chosen.values()}))

    def add_up(
        self, batch: BatchData, units: Sequence[Array], loss: Loss, to: ClippedSum, tally: Tally, tick: Tick
    ) -> None:
        """Clip the gradient of each unit and add it to a sum.

        Args:
            batch: The rows.
            units: The numbers of each unit's rows.
            loss: What is differentiated.
            to: The sum.
            tally: Takes the values of the loss.
            tick: Called before each piece.
        """
        way, done = self.way_of(batch, units, loss), 0
        with self._dropout_of(batch):
            for piece in self._pieces(units, batch.shape[1], one_by_one=way is None):
                tick(done, len(batch))
                to.add(self._gradients_of(piece, batch, loss, way, tally))
                done += sum(map(len, piece))

    def trial(self, batch: BatchData, loss: Loss) -> tuple[int, Callable[[ClippedSum], None]]:
        """Return how many rows are computed at once, and what adds their gradients to a sum; nothing is random."""
        units = [np.array([row]) for row in range(len(batch))]
        key = key_of(loss)
        way = self.chosen[key] if key in self.chosen else self._probed(batch, units[-2:], loss)
        pieces = list(self._pieces(units, batch.shape[1], one_by_one=way is None))

        def add_up(to: ClippedSum) -> None:
            tally = Tally(False)
            for piece in pieces:
                to.add(self._gradients_of(piece, batch, loss, way, tally))

        return max(map(len, pieces)), add_up

    def _pieces(self, units: Sequence[Array], columns: int, *, one_by_one: bool) -> Iterator[list[Array]]:
        """Yield units together, as many as fit; a unit is never torn apart."""
        fitting = 1 if one_by_one else self._fitting(columns)
        piece: list[Array] = []
        for unit in units:
            if piece and sum(map(len, piece)) + len(unit) > fitting:
                yield piece
                piece = []
            piece.append(unit)
        yield piece

    def _fitting(self, columns: int) -> int:
        """Return how many rows of so many tokens fit: a micro-batch, and what is kept of each."""
        assert self._way is not None
        rows = min(self._room // self._way.held(columns), self._forward.micro_batch_tokens // columns)
        return max(1, rows)

    def _gradients_of(
        self,
        piece: Sequence[Array],
        batch: BatchData,
        loss: Loss,
        way: BookKeeping | None,
        tally: Tally,
    ) -> Sequence[PerUnit]:
        """Return the gradients of some units, for each parameter."""
        if way is None or sum(map(len, piece)) > self._fitting(batch.shape[1]):
            return self._of_one_unit(batch, piece[0], loss, tally)
        return self._of_many_units(batch, piece, loss, way, tally)

    def _of_many_units(
        self, batch: BatchData, piece: Sequence[Array], loss: Loss, way: BookKeeping, tally: Tally
    ) -> list[PerUnit]:
        """Return the gradients of some units, for each parameter, by one backward pass."""
        rows, foreign = np.concatenate(piece), not is_ours(loss)
        with way.recording(list(map(len, piece))):
            found = self._evaluated(batch, rows, loss, whole_rows=self._whole_rows)
            if found.values.ndim == 0 and len(rows) > 1:
                raise PrivacyUnitError(
                    f"The loss {as_given(loss.name)} returned one value per row before, and now one for {len(rows)} "
                    f"rows. Return one value per row (B,) each time, or a scalar each time."
                )
            for tensor in found.outputs.seen if foreign else ():
                tensor.retain_grad()
            tally.collect(found.outputs, batch, rows)
            found.values.sum().backward()  # type: ignore[no-untyped-call]
        if foreign:
            self._check_alone(rows, batch, found, loss)
        self._forget_gradients()
        tally.add(found.value, found.total)
        return way.collect()

    def _of_one_unit(
        self, batch: BatchData, unit: Array, loss: Loss, tally: Tally | None
    ) -> list[WrittenOut]:
        """Return one unit's gradients, for each parameter, by a backward pass for each of its rows."""
        self._forget_gradients()
        for rows in np.split(unit, range(loss.declares.group, len(unit), loss.declares.group)):
            if self._secret_of_row is not None:  # whatever else is random: this unit's own, too
                torch.manual_seed(int(self._secret_of_row[rows[0]]))
            found = self._evaluated(batch, rows, loss, one_unit=True)
            found.values.sum().backward()  # type: ignore[no-untyped-call]
            if not is_ours(loss):
                self._check_again(batch, found, loss)
            if tally is not None:
                tally.collect(found.outputs, batch, rows)
                tally.add(found.value, found.total)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        self._forget_gradients()
        return [WrittenOut(gradient.float().unsqueeze(0)) for gradient in gradients]

    def _evaluated(
        self, batch: BatchData, rows: Array, loss: Loss, *, one_unit: bool = False, whole_rows: bool = False
    ) -> Evaluated:
        """Let the model read some rows, with dropout of their own while it is on, and ask the loss."""
        part = batch.take(rows)
        tensors = self._forward.tensors(part, batch)
        positions = None
        if self._tells_positions:  # (B, T): a model numbers them once for all rows
            mask = tensors["attention_mask"]
            positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        dropout = None
        if self._secret_of_row is not None:
            dropout = RowDropout(torch.from_numpy(self._secret_of_row[rows]), one_unit=one_unit)
        outputs = self._forward.outputs(
            part, tensors, whole_rows=whole_rows, position_ids=positions, dropout=dropout
        )
        return Evaluated(part, outputs, *loss.row_values(outputs, tensors))

    @contextlib.contextmanager
    def _dropout_of(self, batch: BatchData) -> Iterator[None]:
        """Switch dropout on, from secrets that are made for this batch and kept nowhere."""
        if not self._forward.has_dropout:
            yield
            return
        self._secret_of_row = self.secrets(batch)
        try:
            with self._forward.training_mode(int.from_bytes(os.urandom(8), "big") >> 1):
                yield
        finally:
            self._secret_of_row = None

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    # which way

    def way_of(self, batch: BatchData, units: Sequence[Array], loss: Loss) -> BookKeeping | None:
        """Return the way to tell this loss's gradients apart: probed once, and then kept."""
        key = key_of(loss)
        if key in self.chosen:
            return self.chosen[key]
        if not loss.declares.splittable:
            raise PrivacyUnitError(
                f"The loss {as_given(loss.name)} compares each row with all others of the batch: no row's gradient is "
                f"its own, so that clipping would bound nothing. Choose another loss under differential privacy."
            )
        longest = max(units[1:], key=lambda unit: int(batch.attention_mask[unit].sum()), default=None)
        if longest is None:
            return None  # nothing to compare with yet: it is taken one at a time, which needs no probe
        probe = [units[0], longest]
        with torch.no_grad():
            values = self._evaluated(batch, np.concatenate(probe), loss).values
        if not bool(values.isfinite().all()):
            return None  # nor is there in this batch
        way = self._probed(batch, probe, loss)
        if way is None and self._way is not None:
            logger.warning("%s is trained one example at a time: exact, and slower", loss.name)
        self.chosen[key] = way
        return way

    def _probed(self, batch: BatchData, units: Sequence[Array], loss: Loss) -> BookKeeping | None:
        if not self._tells_rows_apart(batch, units, loss):
            return None
        return self._way if self._way is not None and self._agrees(self._way, batch, units, loss) else None

    @torch.no_grad()
    def _tells_rows_apart(self, batch: BatchData, units: Sequence[Array], loss: Loss) -> bool:
        """Return whether the loss gives a value per row; refuse one whose values change with their neighbours."""
        together = self._evaluated(batch, np.concatenate(units), loss).values
        if together.ndim == 0:
            return False
        alone = torch.cat([self._evaluated(batch, unit, loss).values for unit in units])
        if not torch.allclose(together, alone, rtol=self._tolerance, atol=self._tolerance):
            raise coupled(loss, alone, together)
        return True

    def _agrees(self, way: BookKeeping, batch: BatchData, units: Sequence[Array], loss: Loss) -> bool:
        """Compare a way with one backward pass per unit; with dropout, whose masks must be the rows' own in both."""
        tally = Tally(loss.declares.prenormalised)
        with self._dropout_of(batch):
            try:
                with OtherRandomness() if self._forward.has_dropout else contextlib.nullcontext():  # type: ignore[no-untyped-call]
                    found = self._of_many_units(batch, units, loss, way, tally)
                    exact = [self._of_one_unit(batch, unit, loss, None) for unit in units]
            except Exception as error:  # noqa: BLE001  # whatever it is, of hooks or of a model: one at a time needs neither
                logger.info("%s cannot tell this model's rows apart: %s", way.name, error)
                self._forget_gradients()
                return False
        squares = torch.stack([gradient.squares() for gradient in found]).sum(0)  # (units,)
        for number, unit in enumerate(exact):  # ‖g − g*‖ ≤ tolerance · ‖g*‖, over all parameters together
            alone = torch.eye(len(exact), device=squares.device)[number]
            off = [-gradient.values[0] for gradient in unit]
            for total, gradient in zip(off, found, strict=True):
                gradient.add_to(total, alone)
            far, size = (
                float(torch.stack([values.norm() for values in many]).norm())
                for many in (off, [gradient.values for gradient in unit])
            )
            far = max(far, abs(float(squares[number].sqrt()) - size))  # what it is clipped by is its norm
            if not far <= self._tolerance * size:
                logger.warning("%s differs from one example at a time by %.2g of %.2g", way.name, far, size)
                return False
        return True

    # whether a user's loss keeps rows apart

    def _check_alone(self, all_rows: Array, batch: BatchData, found: Evaluated, loss: Loss) -> None:
        """Ask a loss of the user's about some of the rows by themselves: values and gradients must stay as they are.

        The model is not asked again: this costs the loss, on a quarter of the rows, in every step. A loss whose value
        is 0 by construction, x - x.detach(), can couple rows by its gradient alone.
        """
        group = loss.declares.group
        groups = len(all_rows) // group
        chosen = np.sort(self._dice.choice(groups, max(1, groups // ONE_IN), replace=False))
        rows = (chosen[:, None] * group + np.arange(group)).reshape(-1)  # whole groups, within `all_rows`
        few, outputs, values = batch.take(all_rows[rows]), found.outputs, found.values.detach()
        cut = outputs.of_rows(found.part, rows)
        alone, _ = loss.row_values(cut, self._forward.tensors(few, batch))
        together = values if values.ndim == 0 else values[torch.from_numpy(rows).to(values.device)]
        if not self._alike(together, alone.detach()):
            raise coupled(loss, alone, together)
        pairs = [pair for pair in zip(outputs.seen, cut.seen, strict=True) if pair[0].grad is not None]
        if not pairs:
            return
        through, own = pairs[0]  # hidden states' gradients hold those of given logits as well
        (gradient,) = torch.autograd.grad(alone.sum(), own, materialize_grads=True)
        beside = cut_out(through.grad, found.part, rows)  # type: ignore[arg-type]
        finite = gradient.isfinite()  # a row that is not counts as zero: it must be so beside others, too
        off = (gradient - beside).where(finite, 0.0).abs().max()
        most = gradient.where(finite, 0.0).abs().max()
        if not (beside.isfinite() == finite).all() or off > self._tolerance * (most + LEAST):
            raise PrivacyUnitError(
                f"The loss {loss.name!r} gives a row another gradient when other rows are beside it, though not "
                f"another value. Clipping would bound nothing. Return one value per row (B,) that is of that row alone."
            )

    @torch.no_grad()
    def _check_again(self, batch: BatchData, found: Evaluated, loss: Loss) -> None:
        """Ask a loss of the user's twice about the same rows: what it remembers of others would couple them."""
        value = found.values.detach()
        again, _ = loss.row_values(found.outputs, self._forward.tensors(found.part, batch))
        if not self._alike(value, again):
            raise PrivacyUnitError(
                f"The loss {loss.name!r} gives the same rows {value.tolist()}, and {again.tolist()} when it is asked "
                f"again: it remembers what it saw, or draws random numbers for all rows together. Clipping would bound "
                f"nothing. Make it a function of its arguments alone."
            )

    def _alike(self, one: Tensor, other: Tensor) -> bool:
        near = self._tolerance
        return one.shape == other.shape and torch.allclose(one, other, rtol=near, atol=near, equal_nan=True)


def key_of(loss: Loss) -> tuple[object, str]:
    """Return what a loss is known by: its function and keywords."""
    return loss.function, repr(sorted(loss.kwargs.items()))


def is_ours(loss: Loss) -> bool:
    """Whether a loss ships with the toolkit; what a user wrote is not taken at its word."""
    return str(getattr(loss.function, "__module__", "")).startswith(OURS)


def coupled(loss: Loss, alone: Tensor, together: Tensor) -> PrivacyUnitError:
    """Return the error about a loss whose values change with their neighbours."""
    return PrivacyUnitError(
        f"The loss {as_given(loss.name)} gives a row another value when other rows are beside it: {alone.tolist()} "
        f"alone, {together.tolist()} together. Clipping would bound nothing. Return one value per row (B,) that is of "
        f"that row alone, the same each time."
    )


def fresh_secrets(batch: BatchData) -> Array:
    """Return (B,) secrets that nobody can foresee and nobody keeps: each row's own for one step."""
    return np.frombuffer(os.urandom(8 * len(batch)), dtype=np.int64)
