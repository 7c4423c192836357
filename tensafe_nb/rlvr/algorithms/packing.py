"""Trajectories as a batch of rows, and what a core computed for the rows as values per completion token."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import MockTookPart
from tensafe_nb.protocol.batch import IGNORE, Array, BatchData, array_of
from tensafe_nb.rlvr.policy import PolicyClient
from tensafe_nb.rlvr.rollouts.trajectories import MOCK, Trajectory, TrajectoryBatch

MOST_COLUMNS = 1 << 20


def tokenize_mock(batch: TrajectoryBatch, client: PolicyClient) -> None:
    """Give mock rollouts the tokens that the client's model would read; real ones keep their own.

    Raises:
        ValidationError: The tokenizer knows nothing of a text.
    """
    if any(trajectory.policy_version == MOCK for trajectory in batch):
        client.publish(MockTookPart())
    for trajectory in batch:
        if trajectory.policy_version == MOCK and not trajectory.tokens:
            end = [] if trajectory.truncated else [client.tokenizer.eos_token_id]
            trajectory.prompt_tokens = _encode(client, trajectory.prompt, special=True)
            trajectory.tokens = _encode(client, trajectory.response, special=False) + end


def _encode(client: PolicyClient, text: str, *, special: bool) -> list[int]:
    try:
        tokens = list(client.tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # tokenizers raises bare Exception for letters it does not know
        raise ValidationError(f"The model's tokenizer cannot read {text!r}: {error}.") from error
    if not tokens:
        raise ValidationError(f"The model's tokenizer turns {text!r} into no tokens at all.")
    return tokens


@checked
def loss_mask(batch: TrajectoryBatch, mask_truncated: bool = True) -> Array:
    """Return (N, C): 1 for completion tokens in the loss, the end token included.

    Unscored rollouts are left out, truncated ones when `mask_truncated` says so; a trajectory's own mask leaves out
    what it marks 0, such as what an environment said.

    Args:
        batch: N rollouts, the longest of C tokens.
        mask_truncated: Leave out those that were cut at the token limit.

    Raises:
        ValidationError: It holds no rollout.
    """
    if not len(batch):
        raise ValidationError("loss_mask: the batch holds no rollout.")
    cut = np.array([t.truncated and mask_truncated for t in batch])  # (N,)
    lengths = np.where(cut | ~np.isfinite(batch.rewards), 0, batch.widths)  # (N,)
    positions = np.arange(max(int(batch.widths.max()), 1))  # (C,)
    mask = (positions < lengths[:, None]).astype(np.float64)
    for row, trajectory in enumerate(batch):
        if trajectory.mask is not None:
            mask[row, : len(trajectory.mask)] *= trajectory.mask
    return mask


def checked_trajectories(given: Any, who: str) -> None:
    """Refuse what is no list of rollouts with a prompt.

    Raises:
        ValidationError: Says what it is, or which rollout has no tokens.
    """
    fits = isinstance(given, list | tuple | TrajectoryBatch) and all(isinstance(t, Trajectory) for t in given)
    if not fits or not len(given):
        raise ValidationError(
            f"{who}: trajectories are a TrajectoryBatch, or a list of its rollouts, not {as_given(given)}."
        )
    for number, trajectory in enumerate(given):
        if trajectory.tokens and not trajectory.prompt_tokens:
            raise ValidationError(
                f"{who}: rollout {number} has no prompt_tokens: the first token of an answer is predicted by nothing."
            )


def per_rollout(values: Any, name: str, who: str, count: int, width: int) -> Array:
    """Return values as an array of a row for each rollout, and a column for each token at least."""
    found = array_of(values, name)
    if found.ndim != 2 or len(found) != count or found.shape[1] < width or found.dtype.kind not in "biuf":
        raise ValidationError(
            f"{who}: {name} has shape {found.shape} and type {found.dtype}: numbers, a row for each of the {count} "
            f"rollouts and {width} columns or more, are expected."
        )
    return found


@checked
def pack(
    trajectories: Sequence[Trajectory],
    extras: Mapping[str, Array] | None = None,
    numbers: Array | None = None,
    owners: Array | None = None,
) -> BatchData:
    """Lay trajectories out as rows, padded on the right.

    `labels[t]` is the token at t + 1, so a completion's first label sits at the prompt's last position, and
    its last token (the end token) is a label but never an input. What an environment said is an input and no label: no
    loss, entropy or KL ever sees it.

    Args:
        trajectories: B of them, with tokens.
        extras: (B, C) per completion token: weights, advantages, old_logprobs, …
        numbers: (B,) what an error calls the rows: their numbers in the batch of trajectories.
        owners: (B,) whose privacy unit each row belongs to.

    Returns:
        input_ids, attention_mask, labels and the extras, each (B, T).

    Raises:
        ValidationError: No rollouts, one without a prompt, or an extra of another shape.

    Example:
        >>> mask = loss_mask(batch)
        >>> packed = pack(batch, {"advantages": advantages, "weights": mask / mask.sum()})
        >>> tc.forward_backward(packed, "policy_reinforce")
    """
    checked_trajectories(trajectories, "pack")
    extras = {} if extras is None else extras
    longest = max(len(t.tokens) for t in trajectories)
    extras = {
        name: per_rollout(values, name, "pack", len(trajectories), longest) for name, values in extras.items()
    }
    widest = max(len(t.prompt_tokens) + len(t.tokens) - 1 for t in trajectories)
    shape = (len(trajectories), max(widest, 1))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    laid_out: dict[str, Array] = {name: np.zeros(shape) for name in extras}
    for row, trajectory in enumerate(trajectories):
        if not trajectory.tokens:  # nothing was ever said: a row of padding, without a label
            mask[row, 0] = 1
            continue
        # of length |tokens|; what stands before it is prompt, behind it padding
        completion = span(trajectory)
        ids[row, : completion.stop] = [*trajectory.prompt_tokens, *trajectory.tokens[:-1]]
        mask[row, : completion.stop] = 1
        # shifted: the label at t is the token at t + 1
        labels[row, completion] = np.where(trajectory.said, trajectory.tokens, IGNORE)
        for name, values in extras.items():
            laid_out[name][row, completion] = values[row, : len(trajectory.tokens)]
    if numbers is not None:
        laid_out["example_ids"] = numbers
    if owners is not None:
        laid_out["record_id"] = owners
    return BatchData(ids, mask, labels, laid_out)


@checked
def unpack(trajectories: Sequence[Trajectory], values: Array, width: int | None = None) -> Array:
    """Return (B, C) per completion token what a core computed for a packed batch, (B, T): the way back of `pack`.

    Args:
        trajectories: Those that were packed.
        values: (B, T), such as `compute_logprobs(pack(batch)).result().logprobs`.
        width: C; the longest completion when None. Behind a shorter one stands 0.

    Raises:
        ValidationError: Values of another shape.
    """
    checked_trajectories(trajectories, "unpack")
    longest = max(len(t.tokens) for t in trajectories)
    width = longest if width is None else width
    if not longest <= width <= MOST_COLUMNS:
        raise ValidationError(
            f"unpack: width={as_given(width)} is less than the {longest} tokens of the longest answer, or more than "
            f"{MOST_COLUMNS:,}."
        )
    last = max((span(t).stop for t in trajectories if t.tokens), default=0)
    values = per_rollout(values, "values", "unpack", len(trajectories), last)
    found = np.zeros((len(trajectories), width))
    for row, trajectory in enumerate(trajectories):
        if trajectory.tokens:
            found[row, : len(trajectory.tokens)] = values[row, span(trajectory)]
    return found


def span(trajectory: Trajectory) -> slice:
    """Return where a completion's labels lie in a packed row."""
    start = len(trajectory.prompt_tokens) - 1
    return slice(start, start + len(trajectory.tokens))


def sampler_logprobs(trajectories: Sequence[Trajectory], width: int) -> Array | None:
    """Return (B, C) log-probabilities as sampled; None unless every rollout brought its own."""
    found = np.zeros((len(trajectories), width))
    for row, trajectory in enumerate(trajectories):
        if trajectory.logprobs is None or len(trajectory.logprobs) != len(trajectory.tokens):
            return None
        found[row, : len(trajectory.tokens)] = trajectory.logprobs
    return found


def entropy_of(batch: TrajectoryBatch) -> float | None:
    """Return −Σ_v p log p of the distributions a batch was sampled from, mean over its tokens; None where unknown.

    All tokens count, those of prompts without signal, cut and unscored ones too: leaving out prompts that are solved
    already would overstate it. The sampler had the logits, so that it costs no further forward pass.
    """
    spoke = [trajectory for trajectory in batch if trajectory.length]
    if not spoke or any(trajectory.entropy is None for trajectory in spoke):
        return None
    return float(np.average([t.entropy for t in spoke], weights=[t.length for t in spoke]))


def group_numbers(batch: TrajectoryBatch) -> Array:
    """Return (N,) the number of each rollout's group."""
    numbers: Any = np.repeat(np.arange(len(batch.groups)), [len(group.rollouts) for group in batch.groups])
    return numbers  # type: ignore[no-any-return]
