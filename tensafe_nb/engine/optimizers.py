"""The optimiser of a training client: which one, its learning rate, and the step that it takes."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensafe_nb.config import ADAMS, UNCHANGED, OptimizerConfig, StepConfig
from tensafe_nb.errors import NonFiniteLossError
from tensafe_nb.protocol.results import OptimStepResult

WATCHED = 4_000_000  # weights whose change is measured; of more, every k-th
HUGE = 1e4  # learning rate, or rate times gradient, from which a step may leave what float32 can hold


class Optimizer:
    """Takes steps with the mean gradient that the parameters hold, and counts them.

    Args:
        config: Which optimiser, its schedule, and where to clip.
        parameters: What is trained.

    Attributes:
        torch: The torch optimiser, with its moments.
        step: How many steps were taken.
        policy_version: Of the weights as they are; no two have the same.
    """

    def __init__(self, config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> None:
        self.config, self.parameters = config, parameters
        self.torch = build(config, parameters)
        self.step = self.policy_version = 0

    def gradients(self) -> list[Tensor]:
        """Return the gradients that there are."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def apply(self, step: StepConfig = UNCHANGED) -> OptimStepResult:
        """Clip the gradient, and take one step with it.

        Args:
            step: What this step does otherwise than the configuration says.

        Raises:
            ValidationError: This optimiser has no such setting. No weight has moved.
            NonFiniteLossError: It is NaN or infinite, or the weights would be. No weight has moved.
        """
        config = step.applied_to(self.config)
        gradients = self.gradients()
        grad_norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(grad_norm):
            raise NonFiniteLossError(f"optim_step(): the gradient is {grad_norm}. No weight has moved.")
        if config.max_grad_norm is not None:
            norm = torch.tensor(grad_norm, device=gradients[0].device)
            nn.utils.clip_grads_with_norm_(self.parameters, config.max_grad_norm, norm)
        rate = learning_rate(config, self.step) if step.learning_rate is None else step.learning_rate
        for group in self.torch.param_groups:
            group |= options_of(config) | {"lr": rate}
        put_back = self._as_it_was() if rate * max(1.0, grad_norm) > HUGE else None
        with measured_change(self.parameters) as change:
            self.torch.step()
        if put_back is not None and not math.isfinite(change[0]):
            put_back()
            raise NonFiniteLossError(
                f"optim_step(): with the learning rate {rate:g} the weights would change by {change[0]}. No weight has "
                f"moved; take a lower rate."
            )
        self.step += 1
        self.policy_version += 1
        return OptimStepResult(self.step, rate, grad_norm, self.policy_version, change[0])

    def _as_it_was(self) -> Callable[[], None]:
        """Return what puts weights and moments back as they are now."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        moments = {name: value.clone() for name, value in self.moments().items()}

        def put_back() -> None:
            with torch.no_grad():
                torch._foreach_copy_(list(self.parameters), weights)
            self.restore_moments(moments)

        return put_back

    def clear(self) -> None:
        """Drop the gradients."""
        self.torch.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """Return what the optimiser remembers, by "state.<number of the parameter>.<name>"."""
        state = self.torch.state_dict()["state"]
        return {
            f"state.{number}.{name}": value
            for number, values in state.items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }

    def restore_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Let the optimiser remember this, and nothing else."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = value
        self.torch.load_state_dict({"state": state, "param_groups": self.torch.state_dict()["param_groups"]})


def build(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the torch optimiser that a configuration names."""
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "adafactor": torch.optim.Adafactor,
    }
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    own = {} if config.name == "adafactor" else {"fused": fused}
    return makers[config.name](list(parameters), **options_of(config), **own)


def options_of(config: OptimizerConfig) -> dict[str, Any]:
    """Return what torch's optimiser takes of a configuration."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.name in ADAMS:
        options |= {"betas": config.betas, "eps": config.eps}
    if config.name == "sgd":
        options |= {"momentum": config.momentum}
    return options


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the rate of optimiser step `step` (0 is the first): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    total = config.total_steps or 1
    done = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    factor = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * factor


@contextlib.contextmanager
def measured_change(parameters: Sequence[nn.Parameter]) -> Iterator[list[float]]:
    """Give a list that holds, afterwards, the norm of what the weights changed by.

    Of many weights every k-th is compared, and the norm is scaled by √k: squares add up over weights.
    """
    total = sum(p.numel() for p in parameters)
    stride = -(-total // WATCHED)
    watched = [p.detach().reshape(-1)[::stride] for p in parameters]
    before = [p.clone() for p in watched]
    change: list[float] = []
    yield change
    deltas = torch._foreach_sub(watched, before)
    share = sum(p.numel() for p in watched) / total
    change.append(float(nn.utils.get_total_norm(deltas)) / math.sqrt(share))
