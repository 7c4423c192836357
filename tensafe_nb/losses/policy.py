"""The policy losses of reinforcement learning: Σ weights · (ℓ + KL + value − entropy), never divided afterwards.

All share one shape and differ in ℓ, the loss of a token with advantage A and ratio ρ = π_θ / π_old. With one
pass over fresh rollouts ρ is 1 and they are one and the same gradient, −A · ∇log π.

Keywords that all of them take: `temperature` divides the logits, as in sampling; `entropy_coef` weighs the entropy
bonus; `kl` = {"coef": β, "estimator": "k2" | "k3"} pulls towards `ref_logprobs`; `value` = {"coef": c, "clip": v}
trains the value head towards `returns`; `tis_cap` C multiplies ℓ by min(π_old / π_sampler, C) (truncated importance
sampling), from `sampler_logprobs`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.losses.base import register_loss
from tensafe_nb.losses.views import LossOutputs, label_logprobs, logprobs_and_entropy

MAX_LOG_RATIO = 20.0  # e^20 = 4.85e8: guards against overflow only
MAX_K3 = 10.0  # of |log π_ref − log π_θ| in k3, whose exponential gave NaN gradients elsewhere (verl #751)
NEEDED = ("advantages", "weights")
OPTIONAL = ("old_logprobs", "ref_logprobs", "sampler_logprobs", "returns", "old_values")
Batch = Mapping[str, Tensor]
Terms = Mapping[str, Any]


class PolicyTokens(NamedTuple):
    """The N labelled tokens as a policy loss sees them, each (N,), at the sampling temperature."""

    logprobs: Tensor
    log_ratio: Tensor  # exactly 0 without old_logprobs, with the gradient of log π
    advantages: Tensor
    entropy: Tensor

    @classmethod
    def of(
        cls, outputs: LossOutputs, batch: Batch, temperature: float, entropy_coef: float
    ) -> "PolicyTokens":
        """Read them; the entropy has a gradient only where a bonus asks for it."""
        if entropy_coef and torch.is_grad_enabled():
            logprobs = outputs.map_logits(partial(label_logprobs, temperature=temperature))
            entropy = outputs.map_logits(partial(exact_entropy, temperature=temperature))
        else:
            logprobs, entropy = logprobs_and_entropy(outputs, temperature)
        log_ratio = logprobs - batch.get("old_logprobs", logprobs.detach())
        return cls(logprobs, log_ratio, batch["advantages"], entropy)

    @property
    def ratio(self) -> Tensor:
        """ρ = π_θ / π_old."""
        return self.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@register_loss("policy_reinforce", prenormalised=True, extras=NEEDED, optional_extras=OPTIONAL, per_row=True)
def policy_reinforce(
    outputs: LossOutputs,
    batch: Batch,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    kl: Terms | None = None,
    value: Terms | None = None,
    tis_cap: float | None = None,
    *,
    per_row: bool = False,
) -> dict[str, Any]:
    """REINFORCE (Williams 1992): ℓ = −A · log π.

    Args:
        outputs: Read at `logits` (N, V).
        batch: Read at `labels`, `advantages` and `weights`, each (N,); weight 0 leaves a token out.
        temperature: Divides the logits, as in sampling.
        entropy_coef: Weight of the entropy bonus.
        kl: {"coef": β, "estimator": "k2" or "k3"}: the penalty towards `ref_logprobs`.
        value: {"coef": c, "clip": v or None}: the loss of the value head towards `returns`.
        tis_cap: Bound of the factor π_old / π_sampler.
        per_row: Return (B,) each row's share of the sum.
    """
    tokens = PolicyTokens.of(outputs, batch, temperature, entropy_coef)
    loss = -tokens.advantages * tokens.logprobs
    return _weighted(outputs, tokens, loss, batch, (entropy_coef, kl, value, tis_cap), per_row)


@register_loss("policy_is", prenormalised=True, extras=NEEDED, optional_extras=OPTIONAL, per_row=True)
def policy_is(
    outputs: LossOutputs,
    batch: Batch,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    kl: Terms | None = None,
    value: Terms | None = None,
    tis_cap: float | None = None,
    *,
    per_row: bool = False,
) -> dict[str, Any]:
    """Importance sampling: ℓ = −ρ · A.

    Args:
        outputs: Read at `logits` (N, V).
        batch: As for `policy_reinforce`; `old_logprobs` (N,) at the sampling temperature, else ρ = 1.
        temperature: Divides the logits, as in sampling.
        entropy_coef: Weight of the entropy bonus.
        kl: As for `policy_reinforce`.
        value: As for `policy_reinforce`.
        tis_cap: As for `policy_reinforce`.
        per_row: As for `policy_reinforce`.
    """
    tokens = PolicyTokens.of(outputs, batch, temperature, entropy_coef)
    loss = -tokens.ratio * tokens.advantages
    return _weighted(outputs, tokens, loss, batch, (entropy_coef, kl, value, tis_cap), per_row)


@register_loss("policy_clip", prenormalised=True, extras=NEEDED, optional_extras=OPTIONAL, per_row=True)
def policy_clip(
    outputs: LossOutputs,
    batch: Batch,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
    ratio: str = "token",
    kl: Terms | None = None,
    value: Terms | None = None,
    tis_cap: float | None = None,
    *,
    per_row: bool = False,
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
        ratio: "token", or "sequence": every token has the geometric mean of its sequence (GSPO, arXiv:2507.18071).
        kl: As for `policy_reinforce`.
        value: As for `policy_reinforce`.
        tis_cap: As for `policy_reinforce`.
        per_row: As for `policy_reinforce`.
    """
    tokens = PolicyTokens.of(outputs, batch, temperature, entropy_coef)
    if ratio == "sequence":
        tokens = tokens._replace(log_ratio=sequence_mean(tokens.log_ratio, batch))
    elif ratio != "token":
        raise ValidationError(f"policy_clip: ratio={as_given(ratio)} must be 'token' or 'sequence'.")
    rho, advantages = tokens.ratio, tokens.advantages
    loss = -torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:  # for A < 0 the minimum above has no bound: ρ can grow without end
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    low = (rho < 1 - clip_low) & (advantages < 0)
    high = (rho > 1 + clip_high) & (advantages > 0)
    clips = {"clip_low": low, "clip_high": high, "clipped": low | high}
    return _weighted(outputs, tokens, loss, batch, (entropy_coef, kl, value, tis_cap), per_row, **clips)


@register_loss("policy_cispo", prenormalised=True, extras=NEEDED, optional_extras=OPTIONAL, per_row=True)
def policy_cispo(
    outputs: LossOutputs,
    batch: Batch,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    kl: Terms | None = None,
    value: Terms | None = None,
    tis_cap: float | None = None,
    *,
    ratio_min: float,
    ratio_max: float,
    per_row: bool = False,
) -> dict[str, Any]:
    """CISPO (MiniMax-M1, arXiv:2506.13585): ℓ = −sg(clip(ρ, min, max)) · A · log π.

    Every token keeps a gradient. Both bounds must be given: four projects have four defaults.

    Args:
        outputs: Read at `logits` (N, V).
        batch: As for `policy_is`.
        temperature: Divides the logits, as in sampling.
        entropy_coef: Weight of the entropy bonus.
        kl: As for `policy_reinforce`.
        value: As for `policy_reinforce`.
        tis_cap: As for `policy_reinforce`.
        ratio_min: Smallest factor.
        ratio_max: Largest factor.
        per_row: As for `policy_reinforce`.
    """
    tokens = PolicyTokens.of(outputs, batch, temperature, entropy_coef)
    rho = tokens.ratio.detach()
    factor = rho.clamp(ratio_min, ratio_max)
    loss = -factor * tokens.advantages * tokens.logprobs
    terms = (entropy_coef, kl, value, tis_cap)
    low, high = rho < ratio_min, rho > ratio_max  # of either sign of A: the factor is cut for both
    clips = {"clip_low": low, "clip_high": high, "clipped": low | high}
    return _weighted(outputs, tokens, loss, batch, terms, per_row, **clips)


@register_loss(
    "policy_value",
    prenormalised=True,
    extras=("weights", "returns"),
    optional_extras=("old_values", *OPTIONAL),
)
def policy_value(outputs: LossOutputs, batch: Batch, value: Terms | None = None) -> dict[str, Any]:
    """The value loss by itself, ½ (V − R)²: the policy has no gradient while the value head warms up.

    Args:
        outputs: Read at `values` (N,).
        batch: Read at `returns` and `weights`, and with a clip at `old_values`, each (N,).
        value: {"coef": c, "clip": v or None}.
    """
    counted = batch["weights"] != 0
    loss, sums = clipped_value_loss(outputs, batch, value or {"coef": 1.0})
    metrics = {f"{name}_sum": values.detach()[counted].sum().item() for name, values in sums.items()}
    return {"loss": (batch["weights"] * loss).sum(), "metrics": metrics | {"tokens": counted.sum().item()}}


def exact_entropy(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return (N,) entropies −Σ p log p, in nats, from logits (N, V)."""
    scores = torch.log_softmax(logits / temperature, -1)
    return -(scores.exp() * scores).sum(-1)


def sequence_mean(log_ratio: Tensor, batch: Batch) -> Tensor:
    """Give every token the mean log-ratio of its sequence, over the tokens that count."""
    # (Π_t ρ_t)^(1/|y|) = exp(mean_t log ρ_t), the sequence's importance ratio of GSPO
    rows, counted = batch["sequence_index"], (batch["weights"] != 0).to(log_ratio.dtype)  # (N,) each
    size = len(batch["input_ids"])
    sums = log_ratio.new_zeros(size).index_add(0, rows, log_ratio * counted)
    counts = log_ratio.new_zeros(size).index_add(0, rows, counted)
    return (sums / counts.clamp(min=1))[rows]


def _weighted(
    outputs: LossOutputs,
    tokens: PolicyTokens,
    loss: Tensor,
    batch: Batch,
    terms: tuple[float, Terms | None, Terms | None, float | None],
    per_row: bool,
    **events: Tensor,
) -> dict[str, Any]:
    """Return the weighted sum, and sums over the tokens that count, to be divided by `tokens`."""
    entropy_coef, kl, value, tis_cap = terms
    weights = batch["weights"]
    counted = weights != 0
    sums = {
        "entropy": tokens.entropy,
        "logprob": tokens.logprobs,
        "approx_kl": k3(tokens.log_ratio),
        **events,
    }
    if "sampler_logprobs" in batch:
        loss, more = against_sampler(loss, tokens, batch, tis_cap)
        sums |= more
    if "ref_logprobs" in batch:
        penalty, sums["kl"] = kl_penalty(tokens, batch, kl)
        loss = loss + penalty
    if value is not None:
        term, more = clipped_value_loss(outputs, batch, value)
        loss, sums = loss + term, sums | more
    metrics = {f"{name}_sum": values.detach()[counted].sum().item() for name, values in sums.items()}
    metrics["log_ratio_max"] = _largest(tokens.log_ratio.detach().abs()[counted])
    if "sampler_difference" in sums:
        metrics["sampler_difference_max"] = _largest(sums["sampler_difference"][counted])
        metrics["sampler_ratio_max"] = _largest(sums["sampler_ratio"][counted])
        metrics["sampler_ratio_inverse_max"] = _largest(1 / sums["sampler_ratio"][counted])
    # Σ_i w_i (ℓ_i + KL_i + value_i − c H_i): the weights carry every normalisation, nothing divides afterwards
    shares = weights * (loss - entropy_coef * tokens.entropy)
    total = outputs.sum_rows(shares) if per_row else shares.sum()
    return {"loss": total, "metrics": metrics | {"tokens": counted.sum().item()}}


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def k3(difference: Tensor) -> Tensor:
    """Return e^d − d − 1 of d = log other − log own: an estimate of KL(own ‖ other) ≥ 0 (Schulman 2020)."""
    bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(bounded) - bounded


def kl_penalty(tokens: PolicyTokens, batch: Batch, kl: Terms | None) -> tuple[Tensor, Tensor]:
    """Return the penalty per token, and the k3 estimate that is always shown.

    k2 = d²/2 has the gradient of the reverse KL on-policy; weighed by sg(ρ) it stays unbiased off-policy. k3 as a
    loss descends the forward KL (arXiv:2510.01555). k1 as a loss has no gradient in expectation and is refused.
    """
    difference = batch["ref_logprobs"] - tokens.logprobs
    shown = k3(difference)
    if not kl or not kl.get("coef"):
        return torch.zeros_like(shown), shown
    estimator = kl.get("estimator", "k2")
    if estimator == "k2":
        return kl["coef"] * tokens.ratio.detach() * difference.square() / 2, shown
    if estimator == "k3":
        bounded = difference.clamp(-MAX_K3, MAX_K3)
        return kl["coef"] * (torch.expm1(bounded) - bounded), shown
    raise ValidationError(
        f"kl['estimator']={as_given(estimator)} cannot be a loss: use 'k2', or put k1 into the reward. As a loss, "
        f"k1 has no gradient in expectation."
    )


def against_sampler(
    loss: Tensor, tokens: PolicyTokens, batch: Batch, tis_cap: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compare the training path with the sampler, token by token; correct for it where asked to."""
    old = batch.get("old_logprobs", tokens.logprobs).detach()
    difference = old - batch["sampler_logprobs"]
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    capped: dict[str, Tensor] = {}
    if tis_cap is not None:
        loss = loss * ratio.clamp(max=tis_cap)
        capped["sampler_capped"] = ratio > tis_cap
    compared = {
        "sampler_difference": difference.abs(),
        "sampler_ratio": ratio,
        "mismatch_kl": k3(difference),
    }
    return loss, compared | capped


def clipped_value_loss(outputs: LossOutputs, batch: Batch, value: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """Return c · ½ max((V − R)², (clip(V, V_old ± v) − R)²) per token (PPO's clipped value loss)."""
    values, returns = outputs.values, batch["returns"]
    squares = (values - returns).square()
    clipped = torch.zeros_like(squares, dtype=torch.bool)
    if (
        value.get("clip") is not None and "old_values" in batch
    ):  # the worse of both: no gain from going too far
        near = batch["old_values"] + (values - batch["old_values"]).clamp(-value["clip"], value["clip"])
        other = (near - returns).square()
        clipped = other > squares
        squares = torch.maximum(squares, other)
    return value["coef"] * squares / 2, {"value_loss": squares / 2, "value_clipped": clipped}
