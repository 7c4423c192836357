"""Which prompts a step takes: what was measured of each prompt, and policies that choose by it.

A policy keeps nothing of its own. What it reads is saved with a run, and its random numbers depend on the seed and on
how many prompts were dealt: a run that is resumed, or forked, chooses as the first one did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pydantic

from tensafe_nb.checks import is_whole
from tensafe_nb.config import Config, Positive
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.protocol.batch import Array
from tensafe_nb.rlvr.rollouts.trajectories import NO_SIGNAL

RECENT = 0.5  # what earlier answers to a prompt count, once it is answered again: the policy has moved on


@runtime_checkable
class PromptPolicy(Protocol):
    """Chooses the prompts of a step. Write your own: a class with this one method will do.

    Four further attributes are read where it has them. `reads_rewards`, True unless it says otherwise: such a policy
    is refused with differential privacy. `replaces`, 0 unless it says otherwise: how often a step's prompts that taught
    nothing are replaced before the update. `keeps(rewards, scores)`, of one prompt's answers: whether they teach
    something; without it, whether their rewards differ. And `bias`, what the panel says of it, in a few words.

    Example:
        >>> class Hardest:
        ...     def choose(self, seen, count, rng):
        ...         return seen.first(np.argsort(seen.chance), count)
        >>> trainer = RLVRTrainer(tc, rows, "math", prompt_policy=Hardest())
    """

    def choose(self, seen: "PromptRecord", count: int, rng: np.random.Generator, /) -> Sequence[int]:
        """Return the numbers of `count` prompts.

        Args:
            seen: The prompts, and what was measured of them.
            count: How many.
            rng: Seeded by the trainer's seed and the place in the run: the only source of chance.
        """


PolicyName: TypeAlias = Literal["uniform", "curriculum", "adaptive", "dynamic"]
PromptPolicySpec: TypeAlias = PromptPolicy | str


@dataclass(slots=True, eq=False)
class PromptRecord:
    """The prompts of a trainer, and what the answers to each have scored so far. P is the number of prompts.

    What was measured of a prompt is measured by a policy that learns: each time a prompt is answered again, its earlier
    answers count half.

    Attributes:
        prompts: As they were given.
        seed: The trainer's.
        dealt: How many prompts were dealt so far, repetitions counted.
        in_step: Numbers of the prompts that the present step has taken already.
        times: (P,) how often each was answered.
        scored: (P,) how many of its answers were scored, the earlier ones counting less.
        solved: (P,) how many of those were right.
        total: (P,) the sum of their rewards.
    """

    prompts: Sequence[Any]
    seed: int = 0
    dealt: int = 0
    in_step: list[int] = field(default_factory=list)
    times: Array = None  # type: ignore[assignment]  # filled below, like the others
    scored: Array = None  # type: ignore[assignment]
    solved: Array = None  # type: ignore[assignment]
    total: Array = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.times = np.zeros(len(self.prompts), np.int64)
        self.forget_rewards()

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return f"<PromptRecord {len(self)} prompts, {int((self.times > 0).sum())} of them answered>"

    @property
    def solve_rate(self) -> Array:
        """(P,) the share of right answers; NaN where none was scored."""
        return self._per_answer(self.solved)

    @property
    def mean_reward(self) -> Array:
        """(P,) the mean reward; NaN where no answer was scored."""
        return self._per_answer(self.total)

    def _per_answer(self, sums: Array) -> Array:
        means: Array = np.full(len(self), np.nan)
        return np.divide(sums, self.scored, out=means, where=self.scored > 0)

    @property
    def chance(self) -> Array:
        """(P,) how likely an answer is right, (solved + 1) / (scored + 2): ½ before anything is known (Laplace)."""
        chance: Array = (self.solved + 1) / (self.scored + 2)
        return chance

    def column(self, name: str) -> Array:
        """Return (P,) the numbers that a column of the prompts holds.

        Raises:
            ValidationError: A prompt has no such column, or no number in it.
        """
        values = np.zeros(len(self))
        for number, prompt in enumerate(self.prompts):
            value = prompt.get(name) if isinstance(prompt, Mapping) else None
            if not isinstance(value, int | float | np.number) or value != value:
                known = nearest(name, map(str, prompt)) if isinstance(prompt, Mapping) else ""
                raise ValidationError(
                    f"prompts: row {number}: the column {as_given(name)} is {as_given(value)}; a number is expected."
                    f"{known if value is None else ''}"
                )
            values[number] = value
        return values

    def first(self, order: Sequence[int] | Array, count: int) -> list[int]:
        """Return the first `count` of an order, those that this step has taken already at its end; again if it ends."""
        taken = set(self.in_step)
        given = [int(number) for number in order]
        ordered = [n for n in given if n not in taken] + [n for n in given if n in taken]
        return [ordered[place % len(ordered)] for place in range(count)]

    def observe(self, number: int, rewards: Array, scores: Array, threshold: float) -> None:
        """Take in the answers to a prompt.

        Args:
            number: Of the prompt.
            rewards: (G,), NaN where an answer was not scored.
            scores: (G,) what decides whether an answer is right, NaN likewise.
            threshold: From which score it is.
        """
        self.times[number] += 1
        known = np.isfinite(scores) & np.isfinite(rewards)
        if known.any():
            self.scored[number] = RECENT * self.scored[number] + known.sum()
            self.solved[number] = RECENT * self.solved[number] + (scores[known] >= threshold).sum()
            self.total[number] = RECENT * self.total[number] + rewards[known].sum()

    def forget_rewards(self) -> None:
        """Let go of what another reward has said; how often each prompt was answered stays."""
        self.scored, self.solved, self.total = (np.zeros(len(self.prompts)) for _ in range(3))

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, as plain data: of the prompts that were answered only."""
        answered = np.flatnonzero(self.times)
        columns = (self.times, self.scored, self.solved, self.total)
        return {
            "prompts": len(self),
            "answered": {str(number): [column[number].item() for column in columns] for number in answered},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned; nothing, of a checkpoint that has none.

        Raises:
            ValidationError: It was measured of another number of prompts.
        """
        answered: Mapping[str, Any] = state.get("answered", {})
        if answered and state["prompts"] != len(self):
            raise ValidationError(
                f"The checkpoint was saved by a run on {state['prompts']} prompts; there are {len(self)} now, and what "
                f"it measured of each would be taken for another's. Go on with the prompts of the original run, or "
                f"load_state() the checkpoint and start a new run."
            )
        self.times = np.zeros(len(self), np.int64)
        self.forget_rewards()
        for number, (times, scored, solved, total) in answered.items():
            at = int(number)
            self.times[at], self.scored[at], self.solved[at], self.total[at] = times, scored, solved, total


class UniformPrompts(Config):
    """Every prompt as often as any other: shuffled anew in every epoch, none twice before all have been dealt.

    Unbiased: what is maximised is the mean reward over all prompts.
    """

    reads_rewards: ClassVar[bool] = False
    bias: ClassVar[str] = ""

    def choose(self, seen: PromptRecord, count: int, rng: np.random.Generator) -> Sequence[int]:
        """Return the next prompts of the shuffles."""
        size, end = len(seen), seen.dealt + count
        chosen: list[int] = []
        for epoch in range(seen.dealt // size, (end - 1) // size + 1):
            order = np.random.default_rng([seen.seed, epoch]).permutation(size)
            chosen += order[max(seen.dealt - epoch * size, 0) : end - epoch * size].tolist()
        return chosen


class CurriculumPrompts(Config):
    """Easy prompts first, harder ones as the run goes on.

    First every prompt is dealt once, shuffled, which measures how hard it is for this model. Then a pool of the easiest
    grows, from the share `start` of all prompts to all of them, while `passes` times as many prompts are dealt as there
    are; of the pool those come first that were answered least. Once the pool is whole, every prompt is as likely as
    any other again.

    Its bias: until the pool is whole the mean reward of the easier prompts is maximised, and `reward` is that of easier
    prompts, so that it falls as the pool grows. Compare `eval/reward`.

    Args:
        by: A column of numbers that says how hard a prompt is, in place of measuring it; the smallest is the easiest.
        start: Share of the prompts in the first pool.
        passes: Over how many times as many prompts as there are it grows.
    """

    bias: ClassVar[str] = "easy ones first; compare eval/reward"

    by: str | None = None
    start: float = pydantic.Field(default=0.25, gt=0.0, le=1.0)
    passes: pydantic.PositiveFloat = 2.0

    def choose(self, seen: PromptRecord, count: int, rng: np.random.Generator) -> Sequence[int]:
        """Return those of the pool that were answered least; before that, those not answered yet."""
        size, first = len(seen), []
        if self.by is None:
            shuffled = np.random.default_rng([seen.seed, 0]).permutation(size)
            taken = set(seen.in_step)
            first = [int(n) for n in shuffled if not seen.times[n] and int(n) not in taken][:count]
        if len(first) == count:
            return first
        measuring = size if self.by is None else 0
        grown = min(max(seen.dealt - measuring, 0) / (self.passes * size), 1.0)
        share = self.start + (1 - self.start) * grown
        difficulty = 1 - seen.chance if self.by is None else seen.column(self.by)
        pool = np.argsort(difficulty, kind="stable")[: max(count, int(np.ceil(share * size)))]
        least = pool[np.lexsort((rng.random(len(pool)), seen.times[pool]))]
        return first + seen.first(least, count - len(first))


class AdaptivePrompts(Config):
    """More of the prompts that are solved half of the time: they teach most.

    Prompts are drawn without repetition within a step, each with the weight `floor + (1 − floor) · 4p(1 − p)`, where p
    is the chance that an answer is right as far as was measured: ½ before anything is known, so that new prompts are
    tried. p(1 − p) is the variance of a right-or-wrong reward, by which the gradient of a group grows.

    Its bias: the objective changes, to a mean over prompts that is weighted by what they teach, and nothing corrects
    for it; prompts that are always or never solved are asked for seldom, and `reward` tends to one half by itself.
    Compare `eval/reward`. The floor keeps every prompt in play: what has become easier or harder is noticed.

    Args:
        floor: Weight of a prompt that is always or never solved, against 1 of one that is half solved; above 0.
    """

    bias: ClassVar[str] = "more of what is half solved; compare eval/reward"

    floor: float = pydantic.Field(default=0.1, gt=0.0, le=1.0)

    def weights(self, seen: PromptRecord) -> Array:
        """Return (P,) the weights by which prompts are drawn."""
        weights: Array = self.floor + (1 - self.floor) * 4 * seen.chance * (1 - seen.chance)
        return weights

    def choose(self, seen: PromptRecord, count: int, rng: np.random.Generator) -> Sequence[int]:
        """Draw prompts in proportion to their weights, without repetition."""
        # the largest log w + Gumbel noise: draws without replacement (Kool et al. 2019, arXiv:1903.06059)
        keys = np.log(self.weights(seen)) + rng.gumbel(size=len(seen))
        return seen.first(np.argsort(-keys), count)


class DynamicSampling(Config):
    """Prompts whose answers teach nothing are replaced before the update (DAPO, Yu et al. 2025, arXiv:2503.14476).

    A step is sampled and scored; for each prompt whose answers all scored the same another one is dealt, at most
    `rounds` times. What could not be replaced stays in the batch and counts in its normaliser: it teaches nothing, and
    the size of an update does not depend on luck. What was sampled and thrown away is counted: `resample/groups`; and
    `resample/reward` is the mean over all that was sampled.

    Its bias: a step is conditioned on having a signal. The gradient of a prompt is weighted by how likely it has one
    (1 − pᴳ − (1 − p)ᴳ for G answers), which favours half-solved prompts, and `reward` is that of the prompts that were
    kept: it says less about the policy than `resample/reward` and `eval/reward` do. A step costs up to 1 + `rounds`
    times the answers.

    Args:
        rounds: How often those without signal are replaced, at most. The paper and verl go on until the batch is full;
            verl gives up after `max_num_gen_batches`.
        base: How prompts are chosen: a policy, or its name.
        on: What has to differ: the "reward", or with "true" what says whether an answer is right (the part marked
            `true=True`, where the reward has one), as in the paper.
    """

    bias: ClassVar[str] = "those without signal are replaced; compare resample/reward and eval/reward"

    rounds: Positive = 3
    base: Any = UniformPrompts()
    on: Literal["reward", "true"] = "reward"

    @pydantic.field_validator("base")
    @classmethod
    def _a_name_is_looked_up(cls, base: Any) -> PromptPolicy:
        return prompt_policy_of(base)

    @property
    def replaces(self) -> int:
        """How often a step's prompts without signal are replaced."""
        return self.rounds

    def choose(self, seen: PromptRecord, count: int, rng: np.random.Generator) -> Sequence[int]:
        """Choose as `base` does."""
        return self.base.choose(seen, count, rng)  # type: ignore[no-any-return]

    def keeps(self, rewards: Array, scores: Array) -> bool:
        """Whether the answers to a prompt differ."""
        return differ(rewards if self.on == "reward" else scores)


def differ(values: Array) -> bool:
    """Whether the numbers of a group differ, those that are there."""
    known = values[np.isfinite(values)]
    return known.size > 1 and bool(np.ptp(known) > NO_SIGNAL)


POLICIES: dict[str, type[Any]] = {
    "uniform": UniformPrompts,
    "curriculum": CurriculumPrompts,
    "adaptive": AdaptivePrompts,
    "dynamic": DynamicSampling,
}


def prompt_policy_of(spec: PromptPolicySpec) -> PromptPolicy:
    """Return the policy that a name or the policy itself stands for.

    Raises:
        ValidationError: There is none of this name, or it chooses nothing.
    """
    if isinstance(spec, str):
        if spec not in POLICIES:
            raise ValidationError(
                f"There is no prompt_policy {as_given(spec)}.{nearest(spec, POLICIES)} Choose one of "
                f"{', '.join(POLICIES)}, or give an object with choose(seen, count, rng)."
            )
        return POLICIES[spec]()  # type: ignore[no-any-return]
    if isinstance(spec, type) or not callable(getattr(spec, "choose", None)):
        made = f" Call it: {spec.__name__}()." if isinstance(spec, type) else ""
        raise ValidationError(
            f"prompt_policy={as_given(spec)} is neither a name ({', '.join(map(repr, POLICIES))}) nor an object with "
            f"choose(seen, count, rng).{made}"
        )
    return spec


def replacements(policy: PromptPolicy) -> int:
    """Return how often a policy has the prompts of a step replaced that taught nothing.

    Raises:
        ValidationError: It says so with what is no number.
    """
    replaces = getattr(policy, "replaces", 0)
    if not is_whole(replaces) or replaces < 0:
        raise ValidationError(
            f"prompt_policy {as_given(policy)}: replaces={as_given(replaces)} must be a whole number, 0 or more."
        )
    return int(replaces)


def bias_of(policy: PromptPolicy) -> str:
    """Return what a reader of its curves must know of a policy, in a few words; nothing, where it has no bias."""
    return str(getattr(policy, "bias", f"chosen by {type(policy).__name__}; compare eval/reward"))


def teaches(policy: PromptPolicy, rewards: Array, scores: Array) -> bool:
    """Whether a policy keeps the answers to a prompt: by its own `keeps`, else where their rewards differ."""
    keeps = getattr(policy, "keeps", None)
    return differ(rewards) if keeps is None else bool(keeps(rewards, scores))


def chosen_by(policy: PromptPolicy, seen: PromptRecord, count: int) -> list[int]:
    """Return the prompts that a policy chooses, checked.

    Raises:
        ValidationError: It chose another number of them, or one that does not exist.
    """
    rng = np.random.default_rng([seen.seed, seen.dealt, 1])
    chosen = list(policy.choose(seen, count, rng))
    if len(chosen) != count or not all(is_whole(number) and 0 <= number < len(seen) for number in chosen):
        raise ValidationError(
            f"prompt_policy {as_given(policy)}: choose() returned {as_given(chosen)}; {count} whole numbers from 0 to "
            f"{len(seen) - 1} were asked for."
        )
    return [int(number) for number in chosen]
