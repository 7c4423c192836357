"""Training with differential privacy: units told apart, clipped, added up; the step paid for, then noised, then taken.

A *logical step* is any number of `forward_backward` calls and one `optim_step`. A privacy unit is an example, or all
rows that share a `unit_ids` or `record_id`. Its gradient is clipped whole, whatever piece of the batch it came in.
"""

import contextlib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tensafe_nb.config import DPConfig, TrainingConfig
from tensafe_nb.display import as_given
from tensafe_nb.engine.accumulation import Tally, Tick, Window
from tensafe_nb.engine.models import inputs
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.errors import PrivacyUnitError, ValidationError
from tensafe_nb.losses import Loss, LossOutputs
from tensafe_nb.losses.base import LossValue
from tensafe_nb.losses.views import cut_out
from tensafe_nb.privacy.dp_sgd import ClippedSum, Norms, sum_units
from tensafe_nb.privacy.noise import NoiseSource, gaussian
from tensafe_nb.privacy.per_example import PerExampleGradients, way_for
from tensafe_nb.privacy.row_dropout import OtherRandomness, RowDropout
from tensafe_nb.privacy.tickets import UNIT, DrawBook, DrawRegister, count_units, ids_in
from tensafe_nb.protocol.batch import IGNORE, TICKET, Array, BatchData
from tensafe_nb.protocol.results import DPMetrics, ForwardBackwardResult, OptimStepResult

logger = logging.getLogger(__name__)

IDS = {  # batch entries that say whose row it is, and what that makes a unit; the first that is there counts
    "unit_ids": "user",
    "record_id": "prompt group",
    "example_ids": "example",
}
MAX_GRADIENTS = 2**25  # values of row-by-row gradients that are held at a time: 128 MiB
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, of the probes
ONE_AT_A_TIME = "one at a time"
OURS = "tensafe_nb.losses"  # losses whose rows are known to be their own
LEAST = 1e-2  # a gradient that is smaller counts as this large where two are compared: rounding has no relative bound
PART = 4  # of a piece's rows, one in so many is looked at by itself too


class Core(Protocol):
    """What private training needs of an engine."""

    config: TrainingConfig
    model: LoadedModel
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    window: Window
    step: int
    whole_rows: bool
    has_dropout: bool

    def tensors(self, part: BatchData, batch: BatchData) -> dict[str, Tensor]: ...
    def outputs(self, part: BatchData, tensors: Mapping[str, Tensor]) -> LossOutputs: ...
    def training_mode(self, secret: int | None = None) -> AbstractContextManager[None]: ...
    def apply_gradients(self) -> OptimStepResult: ...
    def discard_gradients(self) -> None: ...


class Account(Protocol):
    """What pays for the steps."""

    @property
    def draws(self) -> DrawRegister | None:
        """Where the Poisson draws of the account are numbered; None where nobody numbers them."""

    def epsilon(self) -> float:
        """Return what is spent so far; infinite where there is no guarantee."""

    def charge(
        self,
        step: int,
        participants: Mapping[str, int],
        unit: str,
        *,
        noised: bool,
        draw: int | None = None,
    ) -> None:
        """Write the step down, durably: it counts from here on, whatever happens to it.

        Args:
            step: Its number.
            participants: How often each unit takes part in it.
            unit: What a unit is, in a word or two.
            noised: Whether noise will be added.
            draw: Number of the Poisson draw that it takes; left out where draws have none.

        Raises:
            PrivacyUnitError: The account's steps so far protect another kind of unit; nothing was written.
            DPBudgetExceededError: It would spend more than the budget; nothing was written.
            LedgerError: It could not be written.
        """


class PrivateTraining:
    """DP-SGD on an engine's model.

    Args:
        engine: Whose weights are trained.
        dp: How.
        account: What pays for the steps.
        client_id: Whose draws count.
        noise: Where noise comes from; tests put a recording one in its place.

    Raises:
        ValidationError: A model that cannot be trained so.
    """

    def __init__(
        self, engine: Core, dp: DPConfig, account: Account, client_id: str, noise: NoiseSource = gaussian
    ) -> None:
        check_model(engine)
        self._engine, self._dp, self._account, self._noise = engine, dp, account, noise
        config = engine.config
        self._expected_units = (
            dp.expected_batch_size or config.batch_size * config.gradient_accumulation_steps
        )
        self._sum = ClippedSum(engine.parameters, dp.max_grad_norm)
        self._way = way_for(engine.model.causal, engine.parameters)
        head = engine.model.causal.get_output_embeddings()
        trains_head = any(p.requires_grad for p in head.parameters())
        # every trained layer has to see rows (B, T, …): not the (N, D) labelled positions of all of them
        self._whole_rows = self._way is not None and (self._way.name != "book-keeping" or trains_head)
        self._chosen: dict[tuple[object, str], PerExampleGradients | None] = {}  # by function and keywords
        self._draws = DrawBook(client_id, account.draws)
        self._secrets: Callable[[BatchData], Array] = _fresh_secrets  # tests put known ones in their place
        self._secret_of_row: Array | None = None  # while dropout is on
        self._dice = np.random.default_rng()  # which rows are looked at by themselves: no seed foretells it
        self._participants: Counter[str] = Counter()
        self._unit = "example"
        size = sum(p.numel() for p in engine.parameters)
        self._rows_at_a_time = max(1, MAX_GRADIENTS // size)

    @property
    def ways(self) -> tuple[str, ...]:
        """How gradients were told apart so far."""
        return tuple(sorted({ONE_AT_A_TIME if way is None else way.name for way in self._chosen.values()}))

    # gradients

    def forward_backward(self, batch: BatchData, loss: Loss, tick: Tick) -> ForwardBackwardResult:
        """Add the clipped gradients of a batch's units to the step's sum; on any failure the sum is dropped.

        Raises:
            PrivacyUnitError: Rows that do not say whose they are, a draw that is not whole, or a loss that mixes rows.
        """
        engine = self._engine
        if len(batch):
            inputs.check_batch(batch, engine.model, engine.config.model_ref)
            loss.check(batch)
        try:
            engine.window.join(loss)
            tally = Tally(loss.declares.prenormalised)
            units = self._admit(batch, loss)
            if units:
                way = self._choose(batch, units, loss)
                with self._dropout_of(batch):
                    self._accumulate(batch, units, loss, way, tally, tick)
            engine.window.weight += tally.weight
            engine.window.batches += 1
        except BaseException:
            engine.discard_gradients()
            raise
        loss_value = tally.loss if units else float("nan")
        labelled = int((batch.labels != IGNORE).sum())
        grad_norm = self._sum.norm / self._expected_units
        return ForwardBackwardResult(loss_value, grad_norm, labelled, tally.metrics, tally.weight)

    def trial(self, batch: BatchData, loss: Loss) -> tuple[int, Callable[[], None]]:
        """Return how many rows are computed at once, and a function that computes what a step would, and drops it.

        Every row counts as a unit of its own. Nothing is added to the step, nothing is paid, nothing is random.
        """
        units = [np.array([row]) for row in range(len(batch))]
        key = _key_of(loss)
        way = self._chosen[key] if key in self._chosen else self._probed(batch, units[-2:], loss)
        pieces = list(self._pieces(units, batch.shape[1], one_by_one=way is None))

        def compute() -> None:
            scratch, tally = ClippedSum(self._engine.parameters, self._dp.max_grad_norm), Tally(False)
            for piece in pieces:
                scratch.add(self._gradients_of(piece, batch, loss, way, tally))

        return max(map(len, pieces)), compute

    def discard(self) -> None:
        """Drop the step's sum: nothing of it was released, nothing is charged."""
        self._sum.clear()
        self._draws.forget()
        self._participants.clear()

    def _admit(self, batch: BatchData, loss: Loss) -> list[Array]:
        """Return the rows of each unit, having checked that they may be here."""
        numbers, names, unit = self._number(batch)
        if self._participants and unit != self._unit:
            raise PrivacyUnitError(
                f"This step began with rows whose privacy unit is one {self._unit}, and these rows' is one {unit}: one "
                f"epsilon cannot be true of both. Give all rows the same kind of unit."
            )
        self._unit = unit
        group = loss.declares.group
        if (numbers.reshape(-1, group) != numbers[::group, None]).any():
            raise PrivacyUnitError(
                f"The loss {as_given(loss.name)} takes rows in groups of {group}; the rows of a group must belong "
                f"to one "
                f"privacy unit: give them the same unit_ids."
            )
        self._participants.update(names)
        return [np.flatnonzero(numbers == number) for number in range(len(names))]

    def _number(self, batch: BatchData) -> tuple[Array, list[str], str]:
        """Return (B,) the number of each row's unit, the units' names, and what a unit is."""
        if self._dp.sampling == "poisson":
            unit = self._draws.admit(batch)
            return *count_units(batch, batch.extras[TICKET][: len(batch), UNIT].tolist()), unit
        for name in IDS:
            if name in batch.extras:
                return *count_units(batch, ids_in(batch, name)), IDS[name]
        raise PrivacyUnitError(
            "These rows do not say whose they are: give example_ids (B,) (or unit_ids, where several rows are one "
            "person's) with each batch, the same id for the same example in every epoch. Or let tc.dp_batches() "
            "draw them, which costs less epsilon: DPConfig(sampling='poisson', dataset_size=…)."
        )

    def _accumulate(
        self,
        batch: BatchData,
        units: Sequence[Array],
        loss: Loss,
        way: PerExampleGradients | None,
        tally: Tally,
        tick: Tick,
    ) -> None:
        done = 0
        for piece in self._pieces(units, batch.shape[1], one_by_one=way is None):
            tick(done, len(batch))
            self._sum.add(self._gradients_of(piece, batch, loss, way, tally))
            done += sum(map(len, piece))

    def _gradients_of(
        self,
        piece: Sequence[Array],
        batch: BatchData,
        loss: Loss,
        way: PerExampleGradients | None,
        tally: Tally,
    ) -> list[Tensor]:
        """Return the gradients of some units, for each parameter (units, *shape)."""
        if way is None or sum(map(len, piece)) > self._rows_at_a_time:
            return self._gradients_of_unit(batch, piece[0], loss, tally)
        return self._gradients_by_row(batch, piece, loss, way, tally)

    def _pieces(self, units: Sequence[Array], columns: int, *, one_by_one: bool) -> Iterator[list[Array]]:
        """Yield units together, as many as fit; a unit is never torn apart."""
        fitting = min(self._rows_at_a_time, max(1, self._engine.config.micro_batch_tokens // columns))
        piece: list[Array] = []
        for unit in units:
            if piece and (one_by_one or sum(map(len, piece)) + len(unit) > fitting):
                yield piece
                piece = []
            piece.append(unit)
        yield piece

    def _gradients_by_row(
        self, batch: BatchData, piece: Sequence[Array], loss: Loss, way: PerExampleGradients, tally: Tally
    ) -> list[Tensor]:
        """Return the gradients of some units, for each parameter (units, *shape), by one backward pass."""
        rows = np.concatenate(piece)
        with self._seeing_rows(), way.recording():
            _, outputs, values, metrics = self._evaluated(batch, rows, loss)
            if values.ndim == 0 and len(rows) > 1:
                raise PrivacyUnitError(
                    f"The loss {as_given(loss.name)} returned one value per row before, and now one for {len(rows)} "
                    f"rows. "
                    f"Return one value per row (B,) each time, or a scalar each time."
                )
            foreign = not _is_ours(loss)
            for tensor in outputs.seen if foreign else ():
                tensor.retain_grad()
            values.sum().backward()  # type: ignore[no-untyped-call]
        if foreign:
            self._check_part(rows, batch, outputs, values.detach(), loss)
        _forget_gradients(self._engine.parameters)
        total = float(values.detach().sum())
        tally.add(LossValue(values.detach(), float(len(rows)), metrics), total)
        numbers = np.repeat(np.arange(len(piece)), list(map(len, piece)))
        device = self._engine.model.device
        return sum_units(way.collect(len(rows)), torch.from_numpy(numbers).to(device), len(piece))

    def _gradients_of_unit(
        self, batch: BatchData, unit: Array, loss: Loss, tally: Tally | None
    ) -> list[Tensor]:
        """Return one unit's gradients, for each parameter (1, *shape), by a backward pass for each of its rows."""
        parameters = self._engine.parameters
        _forget_gradients(parameters)
        for rows in np.split(unit, range(loss.declares.group, len(unit), loss.declares.group)):
            if self._secret_of_row is not None:  # whatever else is random: this unit's own, too
                torch.manual_seed(int(self._secret_of_row[rows[0]]))
            part, outputs, value, metrics = self._evaluated(batch, rows, loss, one_unit=True)
            value.sum().backward()  # type: ignore[no-untyped-call]
            if not _is_ours(loss):
                self._check_again(part, batch, outputs, value.detach(), loss)
            if tally is not None:
                tally.add(LossValue(value.detach(), float(len(rows)), metrics), float(value.detach().sum()))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        _forget_gradients(parameters)
        return [gradient.float().unsqueeze(0) for gradient in gradients]

    def _values(self, batch: BatchData, rows: Array, loss: Loss) -> tuple[Tensor, dict[str, float]]:
        return self._evaluated(batch, rows, loss)[2:]

    def _evaluated(
        self, batch: BatchData, rows: Array, loss: Loss, *, one_unit: bool = False
    ) -> tuple[BatchData, LossOutputs, Tensor, dict[str, float]]:
        """Return some rows, what the model says of them, and what the loss says of that."""
        part = batch.take(rows)
        tensors = self._engine.tensors(part, batch)
        with self._streams(rows, one_unit):
            outputs = self._engine.outputs(part, tensors)
        return part, outputs, *loss.row_values(outputs, tensors)

    @contextlib.contextmanager
    def _seeing_rows(self) -> Iterator[None]:
        """Let every layer see (B, T, …), where head, embeddings or norms are trained."""
        self._engine.whole_rows = self._whole_rows
        try:
            yield
        finally:
            self._engine.whole_rows = False

    @contextlib.contextmanager
    def _dropout_of(self, batch: BatchData) -> Iterator[None]:
        """Switch dropout on, from secrets that are made for this batch and kept nowhere."""
        if not self._engine.has_dropout:
            yield
            return
        self._secret_of_row = self._secrets(batch)
        try:
            with self._engine.training_mode(int.from_bytes(os.urandom(8), "big") >> 1):
                yield
        finally:
            self._secret_of_row = None

    def _streams(self, rows: Array, one_unit: bool) -> AbstractContextManager[object]:
        if self._secret_of_row is None:
            return contextlib.nullcontext()
        return RowDropout(torch.from_numpy(self._secret_of_row[rows]), one_unit=one_unit)

    def _check_part(
        self, all_rows: Array, batch: BatchData, outputs: LossOutputs, values: Tensor, loss: Loss
    ) -> None:
        """Ask a loss of the user's about a part of the rows by themselves: values and gradients must stay as they are.

        The model is not asked again: this costs the loss, on a quarter of the rows, in every step. A loss whose value
        is 0 by construction, x - x.detach(), can couple rows by its gradient alone.

        Args:
            all_rows: The rows of the batch that were computed together.
            batch: The batch.
            outputs: What the model said of them.
            values: What the loss said of them.
            loss: The loss.
        """
        group = loss.declares.group
        groups = len(all_rows) // group
        chosen = np.sort(self._dice.choice(groups, max(1, groups // PART), replace=False))
        rows = (chosen[:, None] * group + np.arange(group)).reshape(-1)
        part, few = batch.take(all_rows), batch.take(all_rows[rows])
        cut = outputs.of_rows(part, rows)
        alone, _ = loss.row_values(cut, self._engine.tensors(few, batch))
        together = values if values.ndim == 0 else values[torch.from_numpy(rows).to(values.device)]
        if not self._alike(together, alone.detach()):
            raise self._coupled(loss, alone, together)
        pairs = [pair for pair in zip(outputs.seen, cut.seen, strict=True) if pair[0].grad is not None]
        if not pairs:
            return
        through, own = pairs[0]  # hidden states' gradients hold those of given logits as well
        (gradient,) = torch.autograd.grad(alone.sum(), own, materialize_grads=True)
        beside = cut_out(through.grad, part, rows)  # type: ignore[arg-type]
        finite = (
            gradient.isfinite()
        )  # a row that is not finite counts as zero: it must be so beside others, too
        off = (gradient - beside).where(finite, 0.0).abs().max()
        most = gradient.where(finite, 0.0).abs().max()
        if not (beside.isfinite() == finite).all() or off > self._tolerance * (most + LEAST):
            raise PrivacyUnitError(
                f"The loss {loss.name!r} gives a row another gradient when other rows are beside it, though not "
                f"another value. Clipping would bound nothing. Return one value per row (B,) that is of that row alone."
            )

    @torch.no_grad()
    def _check_again(
        self, part: BatchData, batch: BatchData, outputs: LossOutputs, value: Tensor, loss: Loss
    ) -> None:
        """Ask a loss of the user's twice about the same rows: what it remembers of others would couple them."""
        again, _ = loss.row_values(outputs, self._engine.tensors(part, batch))
        if not self._alike(value, again):
            raise PrivacyUnitError(
                f"The loss {loss.name!r} gives the same rows {value.tolist()}, and {again.tolist()} when it is asked "
                f"again: it remembers what it saw, or draws random numbers for all rows together. Clipping would bound "
                f"nothing. Make it a function of its arguments alone."
            )

    def _alike(self, one: Tensor, other: Tensor) -> bool:
        near = self._tolerance
        return one.shape == other.shape and torch.allclose(one, other, rtol=near, atol=near, equal_nan=True)

    @staticmethod
    def _coupled(loss: Loss, alone: Tensor, together: Tensor) -> PrivacyUnitError:
        return PrivacyUnitError(
            f"The loss {as_given(loss.name)} gives a row another value when other rows are beside it: "
            f"{alone.tolist()} alone, "
            f"{together.tolist()} together. Clipping would bound nothing. Return one value per row (B,) that is of "
            f"that row alone, the same each time."
        )

    # which way

    def _choose(self, batch: BatchData, units: Sequence[Array], loss: Loss) -> PerExampleGradients | None:
        """Return the way to tell this loss's gradients apart: probed once, and then kept."""
        key = _key_of(loss)
        if key in self._chosen:
            return self._chosen[key]
        if not loss.declares.splittable:
            raise PrivacyUnitError(
                f"The loss {as_given(loss.name)} compares each row with all others of the batch: no row's gradient "
                f"is its own, "
                f"so that clipping would bound nothing. Choose another loss under differential privacy."
            )
        probe = [units[0], max(units[1:], key=lambda unit: self._length(batch, unit), default=units[0])]
        if probe[0] is probe[1] or not self._are_finite(batch, probe, loss):
            return (
                None  # nothing to compare with yet: this batch is taken one at a time, which needs no probe
            )
        way = self._probed(batch, probe, loss)
        if way is None and self._way is not None:
            logger.warning("%s is trained one example at a time: exact, and slower", loss.name)
        self._chosen[key] = way
        return way

    def _length(self, batch: BatchData, unit: Array) -> int:
        return int(batch.attention_mask[unit].sum())

    def _probed(self, batch: BatchData, units: Sequence[Array], loss: Loss) -> PerExampleGradients | None:
        if not self._tells_rows_apart(batch, units, loss):
            return None
        return self._way if self._way is not None and self._agrees(self._way, batch, units, loss) else None

    @torch.no_grad()
    def _are_finite(self, batch: BatchData, units: Sequence[Array], loss: Loss) -> bool:
        return bool(self._values(batch, np.concatenate(units), loss)[0].isfinite().all())

    @torch.no_grad()
    def _tells_rows_apart(self, batch: BatchData, units: Sequence[Array], loss: Loss) -> bool:
        """Return whether the loss gives a value per row; refuse one whose values change with their neighbours."""
        together, _ = self._values(batch, np.concatenate(units), loss)
        if together.ndim == 0:
            return False
        alone = torch.cat([self._values(batch, unit, loss)[0] for unit in units])
        if not torch.allclose(together, alone, rtol=self._tolerance, atol=self._tolerance):
            raise self._coupled(loss, alone, together)
        return True

    def _agrees(self, way: PerExampleGradients, batch: BatchData, units: Sequence[Array], loss: Loss) -> bool:
        """Compare a way with one backward pass per unit; with dropout, whose masks must be the rows' own in both."""
        tally = Tally(loss.declares.prenormalised)
        with self._dropout_of(batch):
            try:
                with OtherRandomness() if self._engine.has_dropout else contextlib.nullcontext():  # type: ignore[no-untyped-call]
                    found = self._gradients_by_row(batch, units, loss, way, tally)
                    exact = [self._gradients_of_unit(batch, unit, loss, None) for unit in units]
            except Exception as error:  # noqa: BLE001  # whatever it is, of hooks or of a model: one at a time needs neither
                logger.info("%s cannot tell this model's rows apart: %s", way.name, error)
                _forget_gradients(self._engine.parameters)
                return False
        for number, unit in enumerate(exact):
            off = torch.stack([(f[number] - e[0]).norm() for f, e in zip(found, unit, strict=True)]).norm()
            size = torch.stack([e.norm() for e in unit]).norm()
            if not off <= self._tolerance * size:
                logger.warning("%s differs from one example at a time by %.2g of %.2g", way.name, off, size)
                return False
        return True

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[self._engine.model.compute_dtype]

    # the step

    def optim_step(self, apply_noise: bool) -> OptimStepResult:
        """Pay for the step, add noise, and take it.

        Raises:
            ValidationError: No forward_backward before it, or a step without noise while there is a guarantee.
            PrivacyUnitError: A draw that is not whole.
            DPBudgetExceededError: It would spend more than the budget. No weight has moved.
            LedgerError: It could not be paid for. No weight has moved.
        """
        engine, before = self._engine, self._account.epsilon()
        try:
            self._check(apply_noise, before)
            numbered = {} if (draw := self._draws.number) is None else {"draw": draw}
            self._account.charge(
                engine.step + 1, self._participants, self._unit, noised=apply_noise, **numbered
            )
            norms, sigma = self._sum.norms, self._dp.noise_multiplier if apply_noise else 0.0
            means = self._sum.release(sigma, self._expected_units, self._noise)
            self._draws.spend()
        except BaseException:
            engine.discard_gradients()
            raise
        for parameter, mean in zip(engine.parameters, means, strict=True):
            parameter.grad = mean
        result = engine.apply_gradients()
        if sigma and result.learning_rate and not result.param_delta_norm:
            raise ValidationError(
                "optim_step(): the noised gradient moved no weight, so the optimiser does not train this model. The "
                "step is charged. Create the training client anew."
            )
        return replace(result, dp_metrics=self._metrics(norms, sigma > 0, before))

    def _metrics(self, norms: Norms, noised: bool, before: float) -> DPMetrics:
        total = self._account.epsilon()
        return DPMetrics(
            noise_applied=noised,
            epsilon_spent=0.0 if before == total else total - before,
            total_epsilon=total,
            delta=self._dp.target_delta,
            grad_norm_before_clip=norms.means[0],
            grad_norm_after_clip=norms.means[1],
            num_clipped=norms.clipped,
        )

    def _check(self, apply_noise: bool, epsilon: float) -> None:
        if not self._engine.window.batches:
            raise ValidationError(
                "optim_step() found no gradients: call forward_backward() before each optim_step(). A Poisson draw "
                "that drew nothing is a step too: give it to forward_backward() like the others."
            )
        if not apply_noise and math.isfinite(epsilon):
            raise ValidationError(
                "optim_step(apply_dp_noise=False) would end this client's privacy guarantee. Leave the argument out; "
                "or, if that is what you want, call tc.void_privacy(reason) first: epsilon is infinite from then on."
            )
        if self._dp.sampling == "poisson":
            self._draws.settle()


def check_model(engine: Core) -> None:
    """Refuse a model that cannot be trained with differential privacy.

    Raises:
        PrivacyUnitError: It has layers that remember or mix rows, or trains what the optimiser does not.
    """
    model = engine.model
    if model.value_head is not None:
        raise ValidationError(
            "A value head cannot be trained with differential privacy: set value_head=False."
        )
    for name, module in model.causal.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise PrivacyUnitError(
                f"The layer {as_given(name)} keeps running statistics of the rows it saw, which no noise covers. "
                f"Choose a "
                f"model without batch normalisation."
            )
    optimised = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    for name, parameter in model.trainable:
        if id(parameter) not in optimised:
            raise PrivacyUnitError(
                f"The weight {as_given(name)} is trainable and the optimiser does not know it."
            )
        if parameter.dtype is not torch.float32:
            raise PrivacyUnitError(
                f"The weight {as_given(name)} is {parameter.dtype}; private training needs float32."
            )


def _is_ours(loss: Loss) -> bool:
    return str(getattr(loss.function, "__module__", "")).startswith(OURS)


def _key_of(loss: Loss) -> tuple[object, str]:
    return loss.function, repr(sorted(loss.kwargs.items()))


def _fresh_secrets(batch: BatchData) -> Array:
    """Return (B,) secrets that nobody can foresee and nobody keeps: each row's own for one step."""
    return np.frombuffer(os.urandom(8 * len(batch)), dtype=np.int64)


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
