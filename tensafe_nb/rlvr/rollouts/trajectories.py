"""Trajectories, grouped by prompt: their statistics, and the file they are written to and read from."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np

from tensafe_nb.config import SamplingConfig
from tensafe_nb.display import Facts, as_given, shown
from tensafe_nb.errors import ValidationError
from tensafe_nb.history.table import Table, Tabular
from tensafe_nb.protocol.batch import Array
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.results import (
    Message,
)
from tensafe_nb.store.disk import write_whole

MOCK = "mock"
NO_SIGNAL = 1e-6  # rewards of a group that differ by less teach nothing
GOOD = 0.5  # a rollout with at least this reward counts as solved
FORMAT = "tensafe_nb rollouts 1"


@shown
@dataclass(slots=True)
class TurnRecord:
    """One message of a conversation with an environment, as a trajectory keeps it.

    Attributes:
        role: Who speaks: "assistant" is the policy, all others ("user", "tool", "system") are the environment.
        text: What was said, without what ends a turn.
        start: Where its tokens begin in `Trajectory.tokens`. What the environment tells before the policy first speaks
            is in `prompt_tokens`: such records begin and stop at 0. Of messages told at once, the first has the tokens
            of all (what the chat template puts around them included), and the others begin and stop where it stops.
        stop: Where they stop.
        trained: Whether the loss looks at its tokens: those of the policy, and of nobody else.
        reward: What the environment gave for this turn of the policy (`Turn(text, reward=…)`), beside the outcome.
        meta: What else the environment says of it: a tool's name, its calls, whether it failed. The outcome's `meta` is
            with the last record.
    """

    role: str
    text: str
    start: int = 0
    stop: int = 0
    trained: bool = False
    reward: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@shown
@dataclass(slots=True)
class Trajectory:
    """One prompt, one response, and what became of it.

    A conversation with an environment is one too: `prompt` is what the environment told first, `response` all that was
    said after it, and `tokens` everything behind `prompt_tokens`, in the order in which the policy saw it. What the
    environment said is among them, with mask 0 and logprob 0; `turns` says which tokens are whose.

    Attributes:
        prompt: Text as the reward sees it.
        response: Text without stop string and end token.
        meta: The prompt's further columns (answer, …), given to rewards.
        prompt_tokens: The prompt as the model saw it; empty for a mock until it is tokenised in the update.
        tokens: The completion as sampled, end token included.
        logprobs: Per token, under the distribution sampled from.
        raw_logprobs: Per token, at temperature 1 over the whole vocabulary.
        reward: None until scored, and where scoring failed.
        reward_parts: What each part of a composed reward gave, by name.
        reward_error: Why scoring failed.
        reward_version: Which text of which function scored it.
        finish_reason: "stop", "stop_string", "length" or "fixed".
        policy_version: Weights that sampled it; "mock" when none did.
        seed: Of its random stream.
        advantage: Filled in by the update; one per token where a value head was asked.
        prompt_id: Stable name of the prompt and its columns.
        mask: Per token, 0 for what the loss leaves out besides; None leaves nothing out.
        entropy: Exact, of the distributions it was sampled from, in nats, mean over its tokens; None where unknown.
        messages: The prompt as it was given, where that was chat messages.
        turns: The messages of a conversation with an environment, in order; None of a single answer.
    """

    prompt: str
    response: str
    meta: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    raw_logprobs: list[float] | None = None
    reward: float | None = None
    reward_parts: dict[str, float] | None = None
    reward_error: str | None = None
    reward_version: str | None = None
    finish_reason: str = "stop"
    policy_version: int | str | None = None
    seed: int | None = None
    advantage: float | list[float] | None = None
    prompt_id: str = ""
    mask: list[int] | None = None
    entropy: float | None = None
    messages: list[Message] | None = None
    turns: list[TurnRecord] | None = None

    @property
    def truncated(self) -> bool:
        """Whether it ran into the token limit."""
        return self.finish_reason == "length"

    @property
    def said(self) -> list[bool]:
        """Whether a token was sampled from the policy, per token: an environment's tokens were not."""
        if self.turns is None:
            return [True] * len(self.tokens)
        said = [False] * len(self.tokens)
        for turn in self.turns:
            if turn.role == "assistant":
                said[turn.start : turn.stop] = [True] * (turn.stop - turn.start)
        return said

    @property
    def sampled_logprobs(self) -> list[float]:
        """The log-probabilities of the tokens that were sampled, where they are known."""
        if self.turns is None:
            return self.logprobs or []
        return [logprob for logprob, said in zip(self.logprobs or (), self.said, strict=False) if said]

    @property
    def length(self) -> int:
        """How many tokens were sampled."""
        if self.turns is None:
            return len(self.tokens)
        return sum(turn.stop - turn.start for turn in self.turns if turn.role == "assistant")


@shown
@dataclass(slots=True)
class RolloutGroup:
    """All rollouts of one prompt. Statistics are over the scored ones.

    Attributes:
        prompt_id: Stable name of the prompt and its columns.
        prompt: Its text.
        rollouts: The answers.
        meta: The prompt's further columns.
        policy_version: Weights that answered.
        seed: Of the step.
        answered: How often the prompt was answered before, in this run; None where nobody counts.
        solve_rate: What share of those answers was right, the older ones counting less; None where none was scored.
    """

    prompt_id: str
    prompt: str
    rollouts: list[Trajectory]
    meta: dict[str, Any] = field(default_factory=dict)
    policy_version: int | str | None = None
    seed: int | None = None
    answered: int | None = None
    solve_rate: float | None = None

    @property
    def rewards(self) -> Array:
        """(G,) rewards, NaN where unscored."""
        return _rewards_of(self.rollouts)

    @property
    def mean(self) -> float:
        """Mean reward."""
        return mean(_scored_rewards(self.rollouts))

    @property
    def std(self) -> float:
        """Bessel's; NaN with fewer than two scored."""
        return bessel_std(_scored_rewards(self.rollouts))

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ."""
        scored = _scored_rewards(self.rollouts)
        return scored.size > 1 and bool(np.ptp(scored) > NO_SIGNAL)

    @property
    def p_hat(self) -> float:
        """Share with a reward of 0.5 or more: how likely the policy solves the prompt. NaN with none scored."""
        return mean((_scored_rewards(self.rollouts) >= GOOD).astype(float))


@shown
@dataclass(slots=True, eq=False, repr=False)
class TrajectoryBatch(Sequence[Trajectory], Tabular):
    """All rollouts of a step: a list of trajectories that also knows its groups.

    Statistics are computed when read, since rewards are assigned after sampling; unscored rollouts are left
    out, and with nothing scored they are NaN.

    Attributes:
        groups: One per prompt.
        sampling: How the rollouts were drawn.
        operator_view: Whether a model that trains with differential privacy answered its prompts: of such answers,
            tables, files and frames are marked as `Table` says.
        max_tokens: How many tokens could have been sampled for a rollout of several turns; None: of one turn,
            `sampling.max_new_tokens`.
        thrown_away: How many groups were sampled for the same step, taught nothing, and were replaced by others.
    """

    MADE_BY: ClassVar = " (run.rollouts()[step] is one)"  # for whoever gave something else

    groups: list[RolloutGroup]
    sampling: SamplingConfig
    operator_view: bool = False
    max_tokens: int | None = None
    thrown_away: int = 0

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        return list(self)[index]

    def __iter__(self) -> Iterator[Trajectory]:
        return chain.from_iterable([group.rollouts for group in self.groups])

    def __len__(self) -> int:
        return sum(len(group.rollouts) for group in self.groups)

    def _facts(self) -> Facts:
        scored = _scored_rewards(self)
        return {
            "rollouts": len(self),
            "prompts": len(self.groups),
            "scored": len(scored),
            "mean_reward": self.mean_reward,
            "std_reward": self.std_reward,
            "frac_zero_signal": self.frac_zero_signal,
            "clipped_ratio": self.clipped_ratio,
            "sampling": self.sampling,
        }

    def __repr__(self) -> str:
        mock = ", mock data" if any(trajectory.policy_version == MOCK for trajectory in self) else ""
        return (
            f"<TrajectoryBatch {len(self)} rollouts of {len(self.groups)} prompts, "
            f"mean reward {self.mean_reward:.3f}{mock}>"
        )

    @property
    def rewards(self) -> Array:
        """(N,) rewards, NaN where unscored."""
        return _rewards_of(self)

    @property
    def mean_reward(self) -> float:
        return mean(_scored_rewards(self))

    @property
    def std_reward(self) -> float:
        """Bessel's, over the whole batch: not the spread within groups."""
        return bessel_std(_scored_rewards(self))

    @property
    def reward_std_by_group(self) -> Array:
        """(groups,) Bessel std within each group, NaN with fewer than two scored."""
        return np.array([group.std for group in self.groups])

    @property
    def frac_zero_signal(self) -> float:
        """Share of the scored groups whose rewards are all equal."""
        scored = [group for group in self.groups if np.isfinite(group.rewards).any()]
        return mean(np.array([not group.has_signal for group in scored], dtype=float))

    @property
    def lengths(self) -> Array:
        """(N,) sampled tokens per completion, end tokens included."""
        return np.array([trajectory.length for trajectory in self], dtype=np.int64)

    @property
    def widths(self) -> Array:
        """(N,) tokens behind the prompt: those sampled, and those of an environment."""
        return np.array([len(trajectory.tokens) for trajectory in self], dtype=np.int64)

    @property
    def longest(self) -> int:
        """How many tokens could have been sampled for a rollout."""
        return self.sampling.max_new_tokens if self.max_tokens is None else self.max_tokens

    @property
    def clipped_ratio(self) -> float:
        """Share of the rollouts that ran into the token limit."""
        return mean(np.array([trajectory.truncated for trajectory in self], dtype=float))

    def subset(self, group_size: int) -> "TrajectoryBatch":
        """Return the first `group_size` rollouts of each group; the trajectories are the same objects.

        Raises:
            ValidationError: A group has fewer.
        """
        smallest = min((len(group.rollouts) for group in self.groups), default=0)
        if not 1 <= group_size <= smallest:
            raise ValidationError(
                f"subset({as_given(group_size)}): give a number from 1 to {smallest}, the size of the smallest group."
            )
        groups = [replace(group, rollouts=group.rollouts[:group_size]) for group in self.groups]
        return replace(self, groups=groups, sampling=self.sampling.replace(num_samples=group_size))

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one dict per rollout: the number of its group, then every field of `Trajectory`."""
        return [
            {"group": number} | {f.name: getattr(trajectory, f.name) for f in fields(trajectory)}
            for number, group in enumerate(self.groups)
            for trajectory in group.rollouts
        ]

    def to_frame(self) -> Any:
        """Return `to_rows()` as a pandas DataFrame.

        Raises:
            ValidationError: pandas is not installed.
        """
        return Table.of_rows(self.to_rows(), self.operator_view).to_pandas()

    def flat_rows(self) -> list[dict[str, Any]]:
        """Return one dict per rollout of what can be read in a table: no tokens, a column for each part of a reward."""
        parts = dict.fromkeys(name for trajectory in self for name in trajectory.reward_parts or {})
        return [
            {
                "group": number,
                "prompt": trajectory.prompt,
                "response": trajectory.response,
                "reward": trajectory.reward,
                **{f"rewards/{name}": (trajectory.reward_parts or {}).get(name) for name in parts},
                "advantage": mean_advantage(trajectory),
                "finish_reason": trajectory.finish_reason,
                "length": trajectory.length,
                **(
                    {}
                    if trajectory.turns is None
                    else {"turns": sum(turn.role == "assistant" for turn in trajectory.turns)}
                ),
                "entropy": trajectory.entropy,
                "policy_version": trajectory.policy_version,
                "reward_error": trajectory.reward_error,
                "reward_version": trajectory.reward_version,
                "prompt_id": trajectory.prompt_id,
                "meta": trajectory.meta,
            }
            for number, group in enumerate(self.groups)
            for trajectory in group.rollouts
        ]

    def table(self) -> Table:
        """Return `flat_rows()` as a table."""
        return Table.of_rows(self.flat_rows(), self.operator_view)

    def save(self, path: str | Path) -> Path:
        """Write the batch as JSON lines, readable by its owner only: how it was sampled, then a line per group.

        Columns of a prompt that JSON cannot hold are written as their text.

        Returns:
            The path.

        Raises:
            StorageError: It could not be written; what was there is intact.
        """
        path = Path(path)
        write_whole(path, "".join(f"{line}\n" for line in lines_of(self)))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "TrajectoryBatch":
        """Read what `save` wrote.

        Raises:
            ValidationError: There is no such file, or it is no file of rollouts; says at which line.
        """
        return read_batch(Path(path))


def has_advantage(trajectory: Trajectory) -> bool:
    """Return whether a rollout has an advantage other than 0."""
    advantage = trajectory.advantage
    return any(advantage) if isinstance(advantage, list) else bool(advantage)


def mean_advantage(trajectory: Trajectory) -> float | None:
    """Return the advantage of a rollout; where each token has its own, their mean over those that the loss looks at."""
    advantage = trajectory.advantage
    if not isinstance(advantage, list):
        return advantage
    seen = [
        value
        for value, taken in zip(advantage, trajectory.mask or [1] * len(advantage), strict=True)
        if taken
    ]
    return mean(np.array(seen)) if seen else None


def mean(values: Array) -> float:
    """Return the mean; NaN of nothing."""
    return float(values.mean()) if values.size else float("nan")


def bessel_std(values: Array) -> float:
    """Return the standard deviation with Bessel's correction; NaN of fewer than two."""
    return float(values.std(ddof=1)) if values.size > 1 else float("nan")


def _rewards_of(trajectories: Sequence[Trajectory]) -> Array:
    """Return (N,) rewards, NaN where unscored."""
    return np.array([_reward_of(t, number) for number, t in enumerate(trajectories)], dtype=np.float64)


def _reward_of(trajectory: Trajectory, number: int) -> float:
    reward: Any = trajectory.reward
    if reward is None:
        return float("nan")
    with contextlib.suppress(ValueError, RuntimeError):  # an array or a tensor of several
        reward = reward.item() if hasattr(reward, "item") else reward
        if isinstance(reward, Real):
            return float(reward)
    raise ValidationError(
        f"The reward of rollout {number} is {as_given(trajectory.reward)}: one number is expected, or None."
    )


def _scored_rewards(trajectories: Sequence[Trajectory]) -> Array:
    """Return the rewards of those that were scored."""
    rewards = _rewards_of(trajectories)
    return rewards[np.isfinite(rewards)]


def lines_of(batch: TrajectoryBatch) -> Iterator[str]:
    """Yield the lines of a batch's file: how it was sampled, then a group each."""
    marked: dict[str, Any] = {"operator_view": True} if batch.operator_view else {}
    if batch.max_tokens is not None:
        marked["max_tokens"] = batch.max_tokens
    if batch.thrown_away:
        marked["thrown_away"] = batch.thrown_away
    yield json.dumps({"format": FORMAT, "sampling": encode(batch.sampling), **marked})
    for group in batch.groups:
        yield strict_json(
            _known_fields(group) | {"rollouts": [_known_fields(rollout) for rollout in group.rollouts]}
        )


WRITTEN: dict[type, list[str]] = {
    kind: [each.name for each in fields(kind) if each.name not in ("rollouts", "turns")]
    for kind in (RolloutGroup, Trajectory)
}


def _known_fields(item: RolloutGroup | Trajectory) -> dict[str, Any]:
    """Return the fields that are not None."""
    kept = {name: value for name in WRITTEN[type(item)] if (value := getattr(item, name)) is not None}
    if isinstance(item, Trajectory) and item.turns is not None:
        kept["turns"] = [
            {name: value for name in turn.__slots__ if (value := getattr(turn, name)) is not None}
            for turn in item.turns
        ]
    return kept


def strict_json(group: dict[str, Any]) -> str:
    """Write a group as strict JSON: as it is, or where it holds what JSON does not know, by `encode`.

    A column that this does not know either is written as its text.
    """
    with contextlib.suppress(TypeError, ValueError):
        text = json.dumps(group, allow_nan=False)
        if '"$' not in text:  # could be taken for one of the marks of encode
            return text
    turns = (turn for rollout in group["rollouts"] for turn in rollout.get("turns", ()))
    for item in (group, *group["rollouts"], *turns):
        item["meta"] = {name: _known_to_json(value) for name, value in item["meta"].items()}
    return json.dumps(encode(group), allow_nan=False)


def _known_to_json(value: Any) -> Any:
    try:
        encode(value)
    except ValidationError:
        return str(value)
    return value


def read_batch(path: Path) -> TrajectoryBatch:
    """Read a batch's file; see `TrajectoryBatch.load`."""
    number = 1
    try:
        with path.open(encoding="utf-8") as lines:
            head = json.loads(next(lines, ""))
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {as_given(head['format'])}")
            groups = []
            for number, line in enumerate(lines, 2):  # noqa: B007
                written = json.loads(line, object_hook=revived)
                rollouts = [_trajectory_of(kept) for kept in written.pop("rollouts")]
                groups.append(RolloutGroup(**written, rollouts=rollouts))
    except OSError as error:
        raise ValidationError(f"The rollouts {path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValidationError(
            f"{path} is no file of rollouts: line {number} does not fit ({error})."
        ) from error
    return TrajectoryBatch(
        groups,
        decode(head["sampling"]),
        head.get("operator_view", False),
        head.get("max_tokens"),
        head.get("thrown_away", 0),
    )


def _trajectory_of(kept: dict[str, Any]) -> Trajectory:
    """Return a rollout from its known fields."""
    turns = kept.pop("turns", None)
    told = None if turns is None else [TurnRecord(**turn) for turn in turns]
    return Trajectory(**{"prompt": "", "response": ""} | kept, turns=told)


def revived(data: dict[str, Any]) -> Any:
    """Undo `encode` for one JSON object; unlike `decode` it leaves lists lists."""
    match data:
        case {"$float": text}:
            return float(text)
        case {"$map": items}:
            return dict(items)
        case {"$array": values, "dtype": dtype}:
            return np.array(values, dtype=dtype)
    return data
