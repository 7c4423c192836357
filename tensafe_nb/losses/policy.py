"""The policy losses of reinforcement learning: Σ weights · (ℓ − entropy_coef · H), never divided afterwards.

All share one shape and differ in ℓ, the loss of a token with advantage A and ratio ρ = π_θ / π_old. With one
pass over fresh rollouts ρ is 1 and they are one and the same gradient, −A · ∇log π.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensafe_nb.losses.base import register_loss
from tensafe_nb.losses.views import LossOutputs

MAX_LOG_RATIO = 20.0  # e^20 = 4.85e8: guards against overflow only
_NEEDED = ("advantages", "weights")
Batch = Mapping[str, Tensor]


class _Tokens(NamedTuple):
    """What a loss sees of the N labelled tokens, each (N,), at the sampling temperature."""

    logprobs: Tensor
    ratio: Tensor  # exactly 1 without old_logprobs, with the gradient of log π
    advantages: Tensor
    entropy: Tensor


@register_loss("policy_reinforce", prenormalised=True, extras=_NEEDED)
def policy_reinforce(
    outputs: LossOutputs, batch: Batch, temperature: float = 1.0, entropy_coef: float = 0.0
) -> dict[str, Any]:
    """REINFORCE (Williams 1992): ℓ = −A · log π.

    Args:
        outputs: Read at `logits` (N, V).
        batch: Read at `labels`, `advantages` and `weights`, each (N,); weight 0 leaves a token out.
        temperature: Divides the logits, as in sampling.
        entropy_coef: Weight of the entropy bonus.
    """
    tokens = _tokens(outputs, batch, temperature, entropy_coef)
    return _weighted(tokens, -tokens.advantages * tokens.logprobs, batch, entropy_coef)


@register_loss("policy_is", prenormalised=True, extras=_NEEDED, optional_extras=("old_logprobs",))
def policy_is(
    outputs: LossOutputs, batch: Batch, temperature: float = 1.0, entropy_coef: float = 0.0
) -> dict[str, Any]:
    """Importance sampling: ℓ = −ρ · A.

    Args:
        outputs: Read at `logits` (N, V).
        batch: As for `policy_reinforce`; `old_logprobs` (N,) at the sampling temperature, else ρ = 1.
        temperature: Divides the logits, as in sampling.
        entropy_coef: Weight of the entropy bonus.
    """
    tokens = _tokens(outputs, batch, temperature, entropy_coef)
    return _weighted(tokens, -tokens.ratio * tokens.advantages, batch, entropy_coef)


@register_loss("policy_clip", prenormalised=True, extras=_NEEDED, optional_extras=("old_logprobs",))
def policy_clip(
    outputs: LossOutputs,
    batch: Batch,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
) -> dict[str, Any]:
    """PPO's clipped loss (Schulman et al. 2017, arXiv:1707.06347): ℓ = −min(ρA, clip(ρ, 1−lo, 1+hi) · A).

    Args:
        outputs: Read at `logits` (N, V).
        batch: As for `policy_is`.
        temperature: Divides the logits, as in sampling.
        entropy_coef: Weight of the entropy bonus.
        clip_low: How far below 1 the ratio counts.
        clip_high: How far above 1 (DAPO's clip-higher, arXiv:2503.14476).
        dual_clip: Where A < 0, ℓ is at most −dual_clip · A, else it has no bound (arXiv:1912.09729).
    """
    tokens = _tokens(outputs, batch, temperature, entropy_coef)
    ratio, advantages = tokens.ratio, tokens.advantages
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return _weighted(tokens, loss, batch, entropy_coef, clip_low=low, clip_high=high, clipped=low | high)


@register_loss("policy_cispo", prenormalised=True, extras=_NEEDED, optional_extras=("old_logprobs",))
def policy_cispo(
    outputs: LossOutputs,
    batch: Batch,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    *,
    ratio_min: float,
    ratio_max: float,
) -> dict[str, Any]:
    """CISPO (MiniMax-M1, arXiv:2506.13585): ℓ = −sg(clip(ρ, min, max)) · A · log π.

    Every token keeps a gradient. Both bounds must be given: four projects have four defaults.

    Args:
        outputs: Read at `logits` (N, V).
        batch: As for `policy_is`.
        temperature: Divides the logits, as in sampling.
        entropy_coef: Weight of the entropy bonus.
        ratio_min: Smallest factor.
        ratio_max: Largest factor.
    """
    tokens = _tokens(outputs, batch, temperature, entropy_coef)
    factor = tokens.ratio.detach().clamp(ratio_min, ratio_max)
    clipped = factor != tokens.ratio
    loss = -factor * tokens.advantages * tokens.logprobs
    return _weighted(tokens, loss, batch, entropy_coef, clipped=clipped)


def _tokens(outputs: LossOutputs, batch: Batch, temperature: float, entropy_coef: float) -> _Tokens:
    distribution = torch.log_softmax(outputs.logits / temperature, -1)  # (N, V)
    logprobs = distribution.gather(1, batch["labels"].unsqueeze(1)).squeeze(1)
    with torch.set_grad_enabled(entropy_coef != 0 and torch.is_grad_enabled()):
        entropy = -(distribution.exp() * distribution).sum(-1)
    log_ratio = logprobs - batch.get("old_logprobs", logprobs.detach())
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return _Tokens(logprobs, ratio, batch["advantages"], entropy)


def _weighted(
    tokens: _Tokens, loss: Tensor, batch: Batch, entropy_coef: float, **events: Tensor
) -> dict[str, Any]:
    """Return the weighted sum, and sums over the tokens that count, to be divided by `tokens`."""
    weights = batch["weights"]
    counted = weights != 0
    sums = {
        "entropy": tokens.entropy,
        "logprob": tokens.logprobs,
        "approx_kl": _k3(tokens.ratio),
        **events,
    }
    metrics = {f"{name}_sum": values.detach()[counted].sum().item() for name, values in sums.items()}
    total = (weights * (loss - entropy_coef * tokens.entropy)).sum()
    return {"loss": total, "metrics": metrics | {"tokens": counted.sum().item()}}


def _k3(ratio: Tensor) -> Tensor:
    """Return ρ − 1 − log ρ: an estimate of KL(old ‖ new) that is never negative (Schulman 2020)."""
    return ratio - 1 - ratio.log()
