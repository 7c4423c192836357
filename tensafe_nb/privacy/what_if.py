"""Plans and their cost, before anything is trained: noise to epsilon and back."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from tensafe_nb.config import DPConfig, TrainingConfig
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.privacy import accounting
from tensafe_nb.privacy.accounting import Adjacency, Epsilon


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A plan, and what it costs. Nothing of it was spent.

    Attributes:
        epsilon: Of the whole plan, at `delta`, when one unit is added or removed.
        epsilon_replace_one: The same, when one unit is replaced by another.
        delta: Of both.
        accountant: Whose bound `epsilon` is: "rdp", "prv" or "gaussian".
        sampling: "poisson" or "worst_case".
        noise_multiplier: Sigma.
        sample_rate: q = L/N.
        expected_batch_size: L.
        dataset_size: N.
        steps: Optimiser steps.
        epochs: How often the plan uses a unit, on average.
        noise_to_signal: Norm of the noise over the largest norm that the signal can have, sigma · sqrt(d) / L, for
            d trained parameters; None where d is not known.
    """

    epsilon: float
    epsilon_replace_one: float
    delta: float
    accountant: str
    sampling: Literal["poisson", "worst_case"]
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: int
    dataset_size: int
    steps: int
    epochs: float
    noise_to_signal: float | None


def what_if(
    *,
    dataset_size: int,
    expected_batch_size: int,
    steps: int | None = None,
    epochs: float | None = None,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    delta: float = 1e-5,
    accountant_type: str = "rdp",
    sampling: Literal["poisson", "worst_case"] = "poisson",
    parameters: int | None = None,
) -> WhatIf:
    """Return what a plan costs, or how much noise it needs.

    Args:
        dataset_size: N.
        expected_batch_size: L.
        steps: Optimiser steps; or give `epochs`.
        epochs: How often to use a unit, on average.
        noise_multiplier: Sigma, to get epsilon.
        target_epsilon: Or epsilon, to get sigma.
        delta: Of the guarantee.
        accountant_type: "rdp" or "prv".
        sampling: "poisson"; or "worst_case", for batches that use every unit equally often.
        parameters: How many are trained, for the noise-to-signal ratio.

    Raises:
        ValidationError: An argument does not fit, or too many or too few are given.

    Example:
        >>> what_if(dataset_size=10_000, expected_batch_size=100, steps=1_000, noise_multiplier=1.0).epsilon
        >>> what_if(dataset_size=10_000, expected_batch_size=100, epochs=10, target_epsilon=2.0).noise_multiplier
    """
    accounting.check_accountant(accountant_type)
    if sampling not in ("poisson", "worst_case"):
        raise ValidationError(f'sampling is "poisson" or "worst_case"; it is {as_given(sampling)}.')
    given: dict[str, object] = {
        "noise_multiplier": noise_multiplier,
        "target_epsilon": target_epsilon,
        "epochs": epochs,
    }
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValidationError(f"what_if: {name}={as_given(value)} must be a number.")
    if (noise_multiplier is None) == (target_epsilon is None):
        raise ValidationError(
            "Give noise_multiplier to get epsilon, or target_epsilon to get the noise multiplier."
        )
    q = accounting.sample_rate(expected_batch_size, dataset_size)
    steps = planned_steps(steps, epochs, q)
    plan = Plan(q, steps, delta, accountant_type, sampling)
    sigma = plan.noise_for(target_epsilon) if noise_multiplier is None else float(noise_multiplier)
    epsilon = plan.epsilon(sigma)
    return WhatIf(
        epsilon=epsilon.value,
        epsilon_replace_one=plan.epsilon(sigma, "replace_one").value,
        delta=delta,
        accountant=epsilon.by,
        sampling=sampling,
        noise_multiplier=sigma,
        sample_rate=q,
        expected_batch_size=expected_batch_size,
        dataset_size=dataset_size,
        steps=steps,
        epochs=steps * q,
        noise_to_signal=None
        if parameters is None
        else noise_to_signal(sigma, parameters, expected_batch_size),
    )


def what_if_of(
    client: TrainingConfig,
    *,
    noise_multiplier: float | None,
    target_epsilon: float | None,
    steps: int | None,
    epochs: float | None,
    expected_batch_size: int | None,
    dataset_size: int | None,
    parameters: int | None,
) -> WhatIf:
    """Return what a plan costs a training client, whose own settings stand where the plan leaves something out.

    Args:
        client: The client's settings.
        noise_multiplier: Sigma; None and no `target_epsilon` either takes the client's own, or 1.
        target_epsilon: Or epsilon, to get sigma.
        steps: Optimiser steps; or give `epochs`.
        epochs: How often to use a unit, on average; 1 when `steps` is not given either.
        expected_batch_size: L; None takes the client's own.
        dataset_size: N; None takes the client's own.
        parameters: How many are trained, for the noise-to-signal ratio.

    Raises:
        ValidationError: No N, or arguments that do not go together.
    """
    dp = client.dp_config or DPConfig(enabled=False)  # of one without privacy, the defaults
    size = dp.dataset_size if dataset_size is None else dataset_size
    if size is None:
        raise ValidationError("what_if() needs dataset_size, the number of privacy units.")
    if noise_multiplier is None and target_epsilon is None:
        noise_multiplier = dp.noise_multiplier
    return what_if(
        dataset_size=size,
        expected_batch_size=client.expected_units if expected_batch_size is None else expected_batch_size,
        steps=steps,
        epochs=1 if steps is None and epochs is None else epochs,
        noise_multiplier=noise_multiplier,
        target_epsilon=target_epsilon,
        delta=dp.target_delta,
        accountant_type=dp.accountant_type,
        sampling=dp.sampling,
        parameters=parameters,
    )


def noise_to_signal(sigma: float, parameters: int, expected_batch_size: int) -> float:
    """Return sigma · sqrt(d) / L: the noise's norm over that of L clipped gradients which all point one way."""
    return sigma * math.sqrt(parameters) / expected_batch_size


@dataclass(frozen=True, slots=True)
class Plan:
    """So many steps at one sample rate: only the noise is open."""

    q: float
    steps: int
    delta: float
    accountant_type: str
    sampling: str

    def epsilon(self, sigma: float, adjacency: Adjacency = "add_remove") -> Epsilon:
        if self.sampling == "poisson":
            history = [(sigma, self.q, self.steps)]
            return accounting.epsilon_of_account(history, 0.0, self.delta, self.accountant_type, adjacency)
        mu_squared = self._participations * accounting.mu_squared_of(1, sigma)
        return accounting.epsilon_of_account([], mu_squared, self.delta, self.accountant_type, adjacency)

    def noise_for(self, target_epsilon: float | None) -> float:
        assert target_epsilon is not None
        if self.sampling == "poisson":
            return accounting.solve_noise_multiplier(
                target_epsilon, self.delta, self.q, self.steps, self.accountant_type
            )
        # mu = √m / sigma for a unit in m steps
        return math.sqrt(self._participations) / accounting.mu_of_epsilon(target_epsilon, self.delta)

    @property
    def _participations(self) -> int:
        return math.ceil(self.steps * self.q - 1e-9)  # of the unit that takes part most often


def planned_steps(steps: int | None, epochs: float | None, q: float) -> int:
    """Return how many optimiser steps are planned: those given, or enough for so many epochs at rate q."""
    if (steps is None) == (epochs is None):
        raise ValidationError("Give steps or epochs: one of them.")
    if steps is None:
        assert epochs is not None
        if not 0 < epochs < math.inf:
            raise ValidationError(f"epochs is a positive number; it is {as_given(epochs)}.")
        steps = math.ceil(epochs / q - 1e-9)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValidationError(f"steps is a whole number from 1; it is {as_given(steps)}.")
    return steps
