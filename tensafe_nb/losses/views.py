"""Views of what the model says, computed when a loss reads them; large vocabularies are read a chunk at a time."""

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import IGNORE, Array, BatchData

LogitsFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
CHUNK = 2**23  # logits that are computed at a time: about 32 MiB in float32
SLACK = 0.25  # of a chunk, by which one may be larger: a few positions by themselves take the whole head


class LossOutputs:
    """What the model says about a batch, computed when first read; a view that is not read costs nothing.

    N is the number of labelled positions of all sequences, in row order; B rows, T positions, V tokens, D width.

    Args:
        hidden: (B, T, D) last hidden states.
        head: Turns hidden states (…, D) into logits (…, V), each position by itself.
        labels: (B, T), -100 where nothing is labelled.
        attention_mask: (B, T).
        full_logits: (B, T, V), of a model whose logits cannot be had position by position.
        chunk_rows: Positions, about, whose logits `map_logits` computes at a time; None takes all at once.
        head_is_frozen: The head has no weight that is trained.
        value_head: Turns hidden states (…, D) into values (…,); None for a model without one.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        labels: Tensor,
        attention_mask: Tensor,
        full_logits: Tensor | None = None,
        *,
        chunk_rows: int | None = None,
        head_is_frozen: bool = False,
        value_head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._value_head = value_head
        self._hidden = hidden
        self._head = head
        self._attention_mask = attention_mask
        self._all_labels = labels
        self._where = (labels != IGNORE).nonzero(as_tuple=True)  # rows (N,), columns (N,)
        self._labels = labels[self._where]
        self._given_logits = full_logits
        self._chunk_rows = chunk_rows
        self._head_is_frozen = head_is_frozen

    @cached_property
    def logits(self) -> Tensor:
        """(N, V) logits at the labelled positions only."""
        if self._given_logits is not None:
            return _precise(self._given_logits[self._where])
        return _precise(self._head(self._hidden[self._where]))

    @cached_property
    def logprobs(self) -> Tensor:
        """(N,) log-probability of each label, at temperature 1."""
        return self.map_logits(label_logprobs)

    @cached_property
    def values(self) -> Tensor:
        """(N,) estimates of the value head, from detached hidden states: its loss cannot disturb the policy.

        Raises:
            ValidationError: The model has no value head.
        """
        if self._value_head is None:
            raise ValidationError(
                "This training client has no value head: create it with TrainingConfig(value_head=True)."
            )
        return self._value_head(_precise(self._hidden[self._where].detach()))

    @cached_property
    def sequence_logprobs(self) -> Tensor:
        """(B,) sum of `logprobs` over each row; 0 for a row without labels."""
        return self.sum_rows(self.logprobs)

    @cached_property
    def embeddings(self) -> Tensor:
        """(B, D) mean of the last hidden state over each row's tokens."""
        hidden = _precise(self._hidden)
        mask = self._attention_mask.unsqueeze(-1).to(hidden.dtype)  # (B, T, 1)
        return (hidden * mask).sum(1) / mask.sum(1)

    @cached_property
    def full_logits(self) -> Tensor:
        """(B, T, V) logits at every position; large: prefer `logits`."""
        return _precise(self._head(self._hidden) if self._given_logits is None else self._given_logits)

    @property
    def seen(self) -> tuple[Tensor, ...]:
        """What all views are made from, and gradients go through: logits where they are given, and hidden states."""
        given = () if self._given_logits is None else (self._given_logits,)
        return tuple(tensor for tensor in (*given, self._hidden) if tensor.requires_grad)

    def of_rows(self, batch: BatchData, rows: Array) -> "LossOutputs":
        """Return what is said of some rows of this batch alone, without the columns that are padding in all of them.

        Gradients with respect to it end there.

        Args:
            batch: The batch, whose `take(rows)` the rows are.
            rows: Their numbers.
        """

        def cut(tensor: Tensor) -> Tensor:
            return cut_out(tensor.detach(), batch, rows).requires_grad_(tensor.requires_grad)

        return LossOutputs(
            cut(self._hidden),
            self._head,
            cut(self._all_labels),
            cut(self._attention_mask),
            None if self._given_logits is None else cut(self._given_logits),
            chunk_rows=self._chunk_rows,
            head_is_frozen=self._head_is_frozen,
            value_head=self._value_head,
        )

    def sum_rows(self, values: Tensor) -> Tensor:
        """Return (B,) the sum of values (N,) of the labelled positions over each row; 0 for a row without any."""
        return values.new_zeros(self._hidden.shape[0]).index_add(0, self._where[0], values)

    def map_logits(self, function: LogitsFunction) -> Tensor:
        """Return (N,) values of `function(logits, labels)`, without ever holding all logits of a large vocabulary.

        Args:
            function: Takes logits (n, V) and labels (n,) of some positions, and returns (n,) values. Each value may
                depend on its own position only; keep what needs several positions for afterwards.

        Raises:
            ValidationError: It returns another shape.

        Example:
            >>> entropy = outputs.map_logits(lambda logits, labels: Categorical(logits=logits).entropy())
        """
        count, most = len(self._labels), self._chunk_rows
        if self._given_logits is not None or most is None or count <= most:
            return _one_each(function(self.logits, self._labels), self._labels)
        rows = math.ceil(count / math.ceil(count / most - SLACK))  # chunks of the same size

        def values_of(hidden: Tensor, labels: Tensor) -> Tensor:
            return _one_each(function(_precise(self._head(hidden)), labels), labels)

        hidden = self._hidden[self._where]  # (N, D)
        if not torch.is_grad_enabled():
            return torch.cat([values_of(*chunk) for chunk in _chunks(hidden, self._labels, rows)])
        if self._head_is_frozen:
            return GradientInForward.apply(hidden, self._labels, values_of, rows)  # type: ignore[no-any-return, no-untyped-call]
        # a trained head: each chunk's logits are computed again in the backward pass
        again = partial(checkpoint, values_of, use_reentrant=False)
        return torch.cat([again(*chunk) for chunk in _chunks(hidden, self._labels, rows)])


def cut_out(tensor: Tensor, batch: BatchData, rows: Array) -> Tensor:
    """Return some rows of (B, T, …), without the columns that are padding in all of them, as `batch.take` does."""
    used = np.flatnonzero(batch.attention_mask[rows].any(axis=0))
    return tensor[torch.from_numpy(rows).to(tensor.device)][:, int(used[0]) : int(used[-1]) + 1]


def chunk_rows(vocab_size: int, width: int, head_is_frozen: bool) -> int:
    """Return how many positions' logits to compute at a time.

    Every chunk adds a gradient of the head's size to that of a trained head. With fewer rows than the head is wide,
    that costs more than the logits do.
    """
    rows = max(1, CHUNK // vocab_size)
    return rows if head_is_frozen else max(rows, width)


def label_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N,) log-probabilities of the labels from logits (N, V) that are divided by the temperature."""
    scaled = logits if temperature == 1 else logits / temperature
    return LabelScores.apply(scaled, labels, False)[0]  # type: ignore[no-any-return, no-untyped-call]


def logprobs_and_entropy(outputs: LossOutputs, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (N,) log-probabilities of the labels and (N,) entropies −Σ p log p, in nats, from one pass of the head.

    The entropies carry no gradient.
    """
    entropies: list[Tensor] = []

    def picked(logits: Tensor, labels: Tensor) -> Tensor:
        scaled = logits if temperature == 1 else logits / temperature
        logprobs, entropy = LabelScores.apply(scaled, labels, True)  # type: ignore[no-untyped-call]
        entropies.append(entropy)
        return logprobs  # type: ignore[no-any-return]

    logprobs = outputs.map_logits(picked)
    return logprobs, torch.cat(entropies)


class LabelScores(torch.autograd.Function):
    """log softmax at the labels, whose gradient, one-hot − softmax, is written once; and the entropies, if asked for.

    Few passes over what is as large as the vocabulary: one that makes p, and log Z = −log max p, which is at least 1/V
    and so as precise as a sum.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        p, places = torch.softmax(logits, -1), labels.unsqueeze(1)  # (N, V), (N, 1)
        largest, log_z = logits.amax(-1, keepdim=True), p.amax(-1).log_().neg_()  # Z = Σ_v exp(z_v − max z)
        ctx.save_for_backward(p, places)
        logprobs = (logits.gather(1, places) - largest).squeeze(1) - log_z
        if not entropy:
            return logprobs, None
        spread = log_z - (logits - largest).mul_(p).sum(-1)  # −Σ p log p
        ctx.mark_non_differentiable(spread)
        return logprobs, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
        p, places = ctx.saved_tensors
        slopes = gradient.unsqueeze(1)
        # ∂ log p_y / ∂ z_v = 1[v = y] − p_v
        return (p * -slopes).scatter_add_(1, places, slopes), None, None


class GradientInForward(torch.autograd.Function):
    """Values of each position with their gradient by its hidden state, (N, D), computed while its logits are there.

    As exact as keeping the logits, and no slower: value i depends on state i alone, so its gradient only has to be
    scaled in the backward pass. It leaves out the head's own weights, which are frozen.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, values_of: LogitsFunction, rows: int) -> Tensor:
        values: list[Tensor] = []
        slopes: list[Tensor] = []
        for states, targets in _chunks(hidden, labels, rows):
            leaf = states.detach().requires_grad_()  # (n, D)
            with torch.enable_grad():
                value = values_of(leaf, targets)
            slopes += torch.autograd.grad(value, leaf, torch.ones_like(value))
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradient.unsqueeze(1) * slopes).to(slopes.dtype), None, None, None


def _chunks(hidden: Tensor, labels: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)


def _precise(values: Tensor) -> Tensor:
    """Losses are computed in float32, whatever the model computes in; float64 stays."""
    return values if values.dtype is torch.float64 else values.float()


def _one_each(values: Tensor, labels: Tensor) -> Tensor:
    if values.shape != labels.shape:
        raise ValidationError(
            f"map_logits: the function returned shape {tuple(values.shape)} for {len(labels)} positions: "
            f"return one value for each, ({len(labels)},)."
        )
    return values
