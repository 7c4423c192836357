"""A training step with differential privacy: units admitted, clipped, added up; paid for, then noised, then taken.

A *logical step* is any number of `forward_backward` calls and one `optim_step`. A privacy unit is an example, or all
rows that share a `unit_ids` or `record_id`. Its gradient is clipped whole, whatever piece of the batch it came in.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from tensafe_nb.config import StepConfig, TrainingConfig
from tensafe_nb.display import as_given
from tensafe_nb.engine.accumulation import Tally, Tick, Window
from tensafe_nb.engine.forward import ForwardPass
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.engine.optimizers import Optimizer
from tensafe_nb.engine.unit_gradients import UnitGradients
from tensafe_nb.errors import PrivacyUnitError, ValidationError
from tensafe_nb.losses import Loss
from tensafe_nb.privacy.dp_sgd import ClippedSum
from tensafe_nb.privacy.noise import NoiseSource, gaussian
from tensafe_nb.privacy.tickets import UNIT, DrawBook, DrawRegister, count_units, ids_in
from tensafe_nb.protocol.batch import IGNORE, TICKET, Array, BatchData
from tensafe_nb.protocol.results import DPMetrics, ForwardBackwardResult, OptimStepResult

IDS = {  # batch entries that say whose row it is, and what that makes a unit; the first that is there counts
    "unit_ids": "user",
    "record_id": "prompt group",
    "example_ids": "example",
}


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


class PrivateStep:
    """DP-SGD: steps on the noised sum of clipped gradients (the equation is in `privacy.dp_sgd`).

    Args:
        forward: The model's forward pass.
        optimizer: Takes the step.
        config: Of the training client; it has a DPConfig.
        account: What pays for the steps.
        client_id: Whose draws count.
        noise: Where noise comes from; tests put a recording one in its place.

    Raises:
        ValidationError: A model that cannot be trained so.
    """

    resumable = False

    def __init__(
        self,
        forward: ForwardPass,
        optimizer: Optimizer,
        config: TrainingConfig,
        account: Account,
        client_id: str,
        noise: NoiseSource = gaussian,
    ) -> None:
        assert config.dp_config is not None
        check_model(forward.model, optimizer)
        self._forward, self._optimizer, self._dp = forward, optimizer, config.dp_config
        self._expected_units = config.expected_units
        self.account, self.noise = account, noise
        self.gradients = UnitGradients(forward, optimizer.parameters)
        self.sum = ClippedSum(optimizer.parameters, self._dp.max_grad_norm)
        self.window = Window()
        self._draws = DrawBook(client_id, account.draws)
        self._participants: Counter[str] = Counter()
        self._unit = "example"

    def forward_backward(
        self, batch: BatchData, loss: Loss, tick: Tick, return_logprobs: bool = False
    ) -> ForwardBackwardResult:
        """Add the clipped gradients of a batch's units to the step's sum; on any failure the sum is dropped.

        Raises:
            PrivacyUnitError: Rows that do not say whose they are, a draw that is not whole, or a loss that mixes rows.
        """
        if len(batch):
            self._forward.check(batch)
            loss.check(batch)
        try:
            self.window.join(loss)
            tally = Tally.of(loss, batch, logprobs=return_logprobs)
            units = self.admit(batch, loss)
            if units:
                self.gradients.add_up(batch, units, loss, self.sum, tally, tick)
            self.window.add(tally)
        except BaseException:
            self.discard()
            raise
        # a draw that drew nothing is a step, and has no loss
        loss_value = tally.loss if units else float("nan")
        labelled = int((batch.labels != IGNORE).sum())
        grad_norm = self.sum.norm / self._expected_units
        return ForwardBackwardResult(
            loss_value, grad_norm, labelled, tally.metrics, tally.weight, tally.logprobs
        )

    def admit(self, batch: BatchData, loss: Loss) -> list[Array]:
        """Return the rows of each unit, having checked that they may be here."""
        numbers, names, unit = self._number(batch)  # numbers: (B,)
        if self._participants and unit != self._unit:
            raise PrivacyUnitError(
                f"This step began with rows whose privacy unit is one {self._unit}, and these rows' is one {unit}: one "
                f"epsilon cannot be true of both. Give all rows the same kind of unit."
            )
        self._unit = unit
        group = loss.declares.group
        if (numbers.reshape(-1, group) != numbers[::group, None]).any():  # (groups, group) beside its first
            raise PrivacyUnitError(
                f"The loss {as_given(loss.name)} takes rows in groups of {group}; the rows of a group must belong "
                f"to one privacy unit: give them the same unit_ids."
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

    def optim_step(self, apply_dp_noise: bool, step: StepConfig) -> OptimStepResult:
        """Pay for the step, add noise, and take it.

        Raises:
            ValidationError: No forward_backward before it, or a step without noise while there is a guarantee.
            PrivacyUnitError: A draw that is not whole.
            DPBudgetExceededError: It would spend more than the budget. No weight has moved.
            LedgerError: It could not be paid for. No weight has moved.
        """
        before, norms = self.account.epsilon(), self.sum.norms
        try:
            step.applied_to(self._optimizer.config)  # a setting that it does not have is refused unpaid
            self._check(apply_dp_noise, before)
            # paid for before anything is released: who dies in between has paid for a step that was not taken
            numbered = {} if (draw := self._draws.number) is None else {"draw": draw}
            self.account.charge(
                self._optimizer.step + 1, self._participants, self._unit, noised=apply_dp_noise, **numbered
            )
            sigma = self._dp.noise_multiplier if apply_dp_noise else 0.0
            # (Σ_u g_u · min(1, C / ‖g_u‖) + N(0, (σC)² I)) / L, for each parameter
            means = self.sum.release(sigma, self._expected_units, self.noise)
            self._draws.spend()
            for parameter, mean in zip(self._optimizer.parameters, means, strict=True):
                parameter.grad = mean
            result = self._optimizer.apply(step)
        finally:
            self.discard()
        if sigma and result.learning_rate and not result.param_delta_norm:
            raise ValidationError(
                "optim_step(): the noised gradient moved no weight, so the optimiser does not train this model. The "
                "step is charged. Create the training client anew."
            )
        total = self.account.epsilon()
        metrics = DPMetrics(
            noise_applied=sigma > 0,
            epsilon_spent=0.0 if before == total else total - before,
            total_epsilon=total,
            delta=self._dp.target_delta,
            grad_norm_before_clip=norms.means[0],
            grad_norm_after_clip=norms.means[1],
            num_clipped=norms.clipped,
        )
        return replace(result, dp_metrics=metrics)

    def _check(self, apply_noise: bool, epsilon: float) -> None:
        if not self.window.batches:
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

    def discard(self) -> None:
        """Drop the step's sum: nothing of it was released, nothing is charged."""
        self._optimizer.clear()
        self.window = Window()
        self.sum.clear()
        self._draws.forget()
        self._participants.clear()

    # for the estimate

    def trial(self, batch: BatchData, loss: Loss) -> tuple[int, Callable[[Callable[[], None]], None]]:
        """Return how many rows are computed at once, and what computes them; every row counts as a unit of its own.

        Nothing is added to the step, nothing is paid, nothing is random.
        """
        rows, add_up = self.gradients.trial(batch, loss)

        def compute(between: Callable[[], None]) -> None:
            add_up(ClippedSum(self._optimizer.parameters, self._dp.max_grad_norm))
            between()

        return rows, compute

    def peak_bytes(self, forward: float, whole: float, gradients: int, pieces: int) -> float:
        """Return the most bytes that a step holds: the sum of clipped gradients stays, and its noise is float64."""
        return max(whole + (pieces > 1) * gradients, 4 * gradients)

    def rehearse(self, gradients: list[Tensor]) -> None:
        """Do to tensors like the gradients what a step does to those."""
        noised = gaussian([torch.empty_like(one, dtype=torch.float64) for one in gradients], 1.0)
        torch._foreach_add_(noised, gradients)
        torch._foreach_div_(noised, 1.0)


class AwaitingAccount:
    """The step of a private configuration that nobody pays for yet: it refuses."""

    resumable = False

    def __init__(self) -> None:
        self.window = Window()

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Take no step, and estimate none.

        Raises:
            ValidationError: Always.
        """
        raise ValidationError("This engine was given no privacy account: it cannot train privately.")

    forward_backward = optim_step = trial = peak_bytes = rehearse = refuse

    def discard(self) -> None:
        """Close the window that a restored state brought."""
        self.window = Window()


def check_model(model: LoadedModel, optimizer: Optimizer) -> None:
    """Refuse a model that cannot be trained with differential privacy.

    Raises:
        PrivacyUnitError: It has layers that remember or mix rows, or trains what the optimiser does not.
    """
    if model.value_head is not None:
        raise ValidationError(
            "A value head cannot be trained with differential privacy: set value_head=False."
        )
    for name, module in model.causal.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise PrivacyUnitError(
                f"The layer {as_given(name)} keeps running statistics of the rows it saw, which no noise covers. "
                f"Choose a model without batch normalisation."
            )
    optimised = {id(p) for group in optimizer.torch.param_groups for p in group["params"]}
    for name, parameter in model.trainable:
        if id(parameter) not in optimised:
            raise PrivacyUnitError(
                f"The weight {as_given(name)} is trainable and the optimiser does not know it."
            )
        if parameter.dtype is not torch.float32:
            raise PrivacyUnitError(
                f"The weight {as_given(name)} is {parameter.dtype}; private training needs float32."
            )
