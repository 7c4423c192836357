"""The losses that ship with the toolkit, besides the policy losses of `policy.py`.

Pairs, for ranking and contrast, are rows that follow each other: 2i and 2i+1. `tensafe_nb.data.batches` lays them out.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.losses.base import register_loss
from tensafe_nb.losses.views import LossOutputs
from tensafe_nb.protocol.batch import IGNORE, REFERENCE

Batch = Mapping[str, Tensor]


@register_loss("token_ce", extras=(), per_row=True)
def token_ce(
    outputs: LossOutputs,
    batch: Batch,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    *,
    per_row: bool = False,
) -> dict[str, Any]:
    """Cross entropy of the labels: -log p(label), the mean over labelled tokens.

    Args:
        outputs: Read at `logprobs` (N,), with smoothing at `map_logits`: of a large vocabulary, a chunk at a time.
        batch: Read at `labels` (N,).
        ignore_index: A further label to leave out.
        label_smoothing: Share of the target spread evenly over all tokens (Szegedy et al. 2016, arXiv:1512.00567).
        per_row: Return (B,) each row's mean over its own labelled tokens.
    """
    kept = batch["labels"] != ignore_index
    smoothed = partial(F.cross_entropy, reduction="none", label_smoothing=label_smoothing)
    losses = outputs.map_logits(smoothed) if label_smoothing else -outputs.logprobs  # (N,)
    if per_row:
        tokens = outputs.sum_rows(kept.to(losses.dtype)).clamp(min=1)
        return {"loss": outputs.sum_rows(torch.where(kept, losses, 0)) / tokens}
    count = int(kept.sum())
    # added up in float64, where the device has it: so the parts of a batch add up to the whole
    exact = None if losses.device.type == "mps" else torch.float64
    return {"loss": torch.where(kept, losses, 0).sum(dtype=exact) / max(count, 1), "weight": count}


@register_loss("margin_ranking", group=2, per="row", extras=())
def margin_ranking(outputs: LossOutputs, batch: Batch, margin: float = 0.5) -> dict[str, Any]:
    """Rank a chosen above a rejected sequence: max(0, margin - (s_chosen - s_rejected)), the mean over pairs.

    The score s is a row's `sequence_logprobs`, not divided by its length. This is the rank loss of SLiC-HF (Zhao et
    al. 2023, arXiv:2305.10425), without the cross entropy that it adds to stay near the first model.
    Metrics: `accuracy`, the share of pairs in the right order; `margin_mean`, the mean of s_chosen - s_rejected; and
    the mean scores of both.

    Args:
        outputs: Read at `sequence_logprobs` (B,): rows 2i are chosen, rows 2i+1 rejected.
        batch: Not read.
        margin: How far ahead, in nats, is far enough.
    """
    chosen, rejected = _pairs(outputs.sequence_logprobs)  # (P,) each
    ahead = chosen - rejected
    metrics = {
        "accuracy": (ahead > 0).float(),
        "margin_mean": ahead,
        "chosen_logprobs": chosen,
        "rejected_logprobs": rejected,
    }
    return {
        "loss": F.relu(margin - ahead).mean(),
        "metrics": {name: values.mean().item() for name, values in metrics.items()},
        "weight": len(ahead),
    }


@register_loss("dpo", group=2, per="row", extras=(), reference=True)
def dpo(
    outputs: LossOutputs,
    batch: Batch,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> dict[str, Any]:
    """Prefer a chosen to a rejected sequence, without going far from a reference: −log σ(β h), the mean over pairs.

    h = (s_chosen − ref_chosen) − (s_rejected − ref_rejected), with a row's `sequence_logprobs` s under the model and
    under the reference policy. Rafailov et al. 2023, arXiv:2305.18290, equation 7; TRL's `loss_type="sigmoid"`.
    Metrics, of the implicit reward β (s − ref): `accuracy`, the share of pairs in which the chosen one has more of it;
    `reward_margin`, by how much, on average; `reward_chosen` and `reward_rejected`; and the mean scores s of both.

    Args:
        outputs: Read at `sequence_logprobs` (B,): rows 2i are chosen, rows 2i+1 rejected.
        batch: Read at `reference_logprobs` (B,), which the engine adds where a batch has none.
        beta: How much a departure from the reference costs; larger stays nearer.
        label_smoothing: ε, how many preferences are believed to be the wrong way round:
            −(1 − ε) log σ(β h) − ε log σ(−β h) (conservative DPO, Mitchell 2023).
        robust: Make that unbiased, (−(1 − ε) log σ(β h) + ε log σ(−β h)) / (1 − 2ε): Chowdhury et al. 2024,
            arXiv:2403.00409; TRL's `loss_type="robust"`.

    Raises:
        ValidationError: beta is not above 0, or label_smoothing not from 0 to below ½.
    """
    _check_preference("dpo", beta, label_smoothing)
    chosen, rejected = _log_ratios("dpo", outputs, batch)  # (P,) each
    margin = beta * (chosen - rejected)
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    losses = (1 - label_smoothing) * right + (-label_smoothing if robust else label_smoothing) * wrong
    if robust:
        losses = losses / (1 - 2 * label_smoothing)
    return _preferred(losses, beta * chosen, beta * rejected, outputs)


@register_loss("ipo", group=2, per="row", extras=(), reference=True)
def ipo(outputs: LossOutputs, batch: Batch, beta: float = 0.1) -> dict[str, Any]:
    """Prefer a chosen to a rejected sequence by a margin of 1/(2β), and no further: (h − 1/(2β))², the mean over pairs.

    h = (s_chosen − ref_chosen) / n_chosen − (s_rejected − ref_rejected) / n_rejected, n the labelled tokens of a row.
    Azar et al. 2023, arXiv:2310.12036, equation 17 (β is its τ), with the mean over tokens that TRL's `loss_type="ipo"`
    takes, on the authors' word. Unlike `dpo`, pairs that all agree do not push the model ever further. Metrics as
    `dpo`.

    Args:
        outputs: Read at `sequence_logprobs` (B,): rows 2i are chosen, rows 2i+1 rejected.
        batch: Read at `reference_logprobs` (B,), which the engine adds where a batch has none.
        beta: The smaller, the larger the margin that is asked for.

    Raises:
        ValidationError: beta is not above 0.
    """
    _check_preference("ipo", beta, 0.0)
    chosen, rejected = _log_ratios("ipo", outputs, batch)  # (P,) each
    n_chosen, n_rejected = _pairs(outputs.sum_rows(torch.ones_like(outputs.logprobs)).clamp(min=1))
    ahead = chosen / n_chosen - rejected / n_rejected
    return _preferred((ahead - 1 / (2 * beta)).square(), beta * chosen, beta * rejected, outputs)


def _check_preference(name: str, beta: float, label_smoothing: float) -> None:
    if not isinstance(beta, int | float) or not 0 < beta < math.inf:
        raise ValidationError(f"{name}: beta={as_given(beta)} must be above 0.")
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing < 0.5:
        raise ValidationError(
            f"{name}: label_smoothing={as_given(label_smoothing)} must be from 0 to below 0.5: at one half a "
            f"preference says nothing."
        )


def _log_ratios(name: str, outputs: LossOutputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (P,) each: log of the model's over the reference's probability, of chosen and of rejected rows."""
    scores, reference = outputs.sequence_logprobs, batch.get(REFERENCE)  # (B,) each
    if reference is None or reference.shape != scores.shape:
        given = "is not there" if reference is None else f"has shape {tuple(reference.shape)}"
        raise ValidationError(
            f"{name}: the batch entry {REFERENCE!r} {given}: it is (B,), the sum of the reference's log-probabilities "
            f"over each row's labels, compute_logprobs(batch, reference=True).logprobs.sum(1). Leave it out, and it is "
            f"computed."
        )
    return _pairs(scores - reference.to(scores.dtype))


def _preferred(losses: Tensor, chosen: Tensor, rejected: Tensor, outputs: LossOutputs) -> dict[str, Any]:
    """Return what a loss of preferences does; `chosen` and `rejected` are the implicit rewards, (P,) each."""
    scores = _pairs(outputs.sequence_logprobs)
    metrics = {
        "accuracy": (chosen > rejected).float(),
        "reward_margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "chosen_logprobs": scores[0],
        "rejected_logprobs": scores[1],
    }
    return {
        "loss": losses.mean(),
        "metrics": {name: values.mean().item() for name, values in metrics.items()},
        "weight": len(losses),
    }


@register_loss("contrastive", group=2, splittable=False, per="row", extras=())
def contrastive(outputs: LossOutputs, batch: Batch, temperature: float = 0.07) -> dict[str, Any]:
    """Tell the two views of a pair from those of all other pairs in the batch: symmetric InfoNCE, the mean over pairs.

    With a_i, b_i the unit embeddings of rows 2i and 2i+1: the mean of -log softmax_j(a_i·b_j / temperature) at j = i
    and of -log softmax_j(b_i·a_j / temperature) at j = i. InfoNCE is van den Oord et al. 2018 (arXiv:1807.03748,
    equation 4), the symmetric form Radford et al. 2021 (arXiv:2103.00020, figure 3), here with a fixed temperature.
    The more pairs a batch has, the harder the task; a single pair has nothing to be told from: its loss is 0.
    Metrics: `accuracy`, the share of rows nearest to their own partner; `similarity`, the mean cosine of partners.

    Args:
        outputs: Read at `embeddings` (B, D).
        batch: Not read.
        temperature: Divides the cosines; smaller looks at the nearest strangers only.

    Raises:
        ValidationError: The temperature is not above 0.
    """
    if not temperature > 0:
        raise ValidationError(f"contrastive: temperature={temperature} must be above 0.")
    first, second = _pairs(F.normalize(outputs.embeddings, dim=-1))  # (P, D) each
    cosines = first @ second.T  # (P, P)
    partner = torch.arange(len(cosines), device=cosines.device)
    ways = torch.stack([cosines, cosines.T])  # (2, P, P): each row looks for its partner among the columns
    losses = F.cross_entropy((ways / temperature).flatten(0, 1), partner.repeat(2))
    metrics = {
        "accuracy": (ways.argmax(-1) == partner).float().mean().item(),
        "similarity": cosines.diagonal().mean().item(),
    }
    return {"loss": losses, "metrics": metrics, "weight": len(cosines)}


@register_loss("mse", per="row", extras=("targets",))
def mse(
    outputs: LossOutputs,
    batch: Batch,
    readout: Any = None,
    predictions: Callable[[LossOutputs, Batch], Tensor] | None = None,
) -> Tensor:
    """Mean squared error of each row's K numbers, (B,); the loss is the mean over rows, as torch's `mse_loss`.

    Args:
        outputs: Read at `embeddings` (B, D), unless `predictions` reads others.
        batch: Read at `targets` (B, K), or (B,) for K = 1.
        readout: Matrix (D, K), not trained: the prediction is embeddings @ readout. None compares the embeddings.
        predictions: In place of both, a view of your own: `predictions(outputs, batch)` returns (B, K).

    Raises:
        ValidationError: Predictions and targets have different shapes, or there are two ways to the predictions.
    """
    if readout is not None and predictions is not None:
        raise ValidationError(
            "mse takes a readout or predictions, not both: predictions are compared as they are."
        )
    predicted = read_out(outputs, readout) if predictions is None else predictions(outputs, batch)
    targets = batch["targets"].to(predicted.dtype)
    targets = targets.unsqueeze(1) if targets.ndim == 1 else targets
    if predicted.shape != targets.shape:
        raise ValidationError(
            f"mse: the predictions have shape {tuple(predicted.shape)}, the targets {tuple(targets.shape)}. "
            f"A readout of shape (width of the model, numbers per target) turns embeddings into predictions."
        )
    return (predicted - targets).square().mean(1)


def _pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Take (2P, …) apart into rows 2i and rows 2i+1, (P, …) each."""
    return rows[0::2], rows[1::2]


def read_out(outputs: LossOutputs, readout: Any) -> Tensor:
    """Return (B, K) embeddings @ readout; (B, D) the embeddings themselves without one."""
    embeddings = outputs.embeddings
    if readout is None:
        return embeddings
    matrix = torch.as_tensor(readout, dtype=embeddings.dtype, device=embeddings.device)
    if matrix.ndim != 2 or len(matrix) != embeddings.shape[1]:
        raise ValidationError(
            f"mse: readout has shape {tuple(matrix.shape)}: expected ({embeddings.shape[1]}, numbers per target)."
        )
    return embeddings @ matrix
