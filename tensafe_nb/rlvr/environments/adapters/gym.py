"""reasoning-gym's tasks as conversations: a wrong answer may be tried again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.environments.environment import Environment, Outcome, RolloutEnded
from tensafe_nb.rlvr.environments.tool_use import Talk, judged, question_of
from tensafe_nb.rlvr.rewards.reward import Reward, resolve_reward


@dataclass(frozen=True)
class GymUse:
    """A task that may be tried again.

    Attributes:
        reward: The data set's own score.
        tries: How often.
        discount: What a right answer is worth less with each further try: its score times discount ** tries before.
        good: Score from which an answer counts as right.
        again: What the model is told of a wrong answer.
    """

    reward: Reward
    tries: int
    discount: float
    good: float
    again: str

    def identified(self) -> list[Any]:
        """Return what its conversations depend on, for `identity_of`."""
        return [self.reward, self.tries, self.discount, self.good, self.again]

    def __call__(self, row: Mapping[str, Any]) -> Talk:
        told, best, tried = question_of(row), 0.0, 0
        try:
            for tried in range(self.tries):
                said = yield told
                score = judged(self.reward, row, said).reward or 0.0
                best = max(best, score * self.discount**tried)
                if score >= self.good:
                    break
                told = self.again
        except RolloutEnded:
            pass
        return Outcome(best, {"tries": tried + 1})


@checked
def gym_environment(
    dataset: Any,
    *,
    tries: int = 2,
    discount: float = 0.7,
    good: float = 0.99,
    again: str = "That is not right. Try again.",
    max_tokens: int | None = None,
    name: str = "gym",
) -> Environment:
    """Make an environment of a reasoning-gym data set, in which a wrong answer may be tried again.

    The rows are `gym_prompts(dataset)`; each answer is scored by the data set. To let the model call tools before it
    answers, give the data set as the reward of `tool_environment`.

    Args:
        dataset: What `reasoning_gym.create_dataset(name, size=…, seed=…)` returned.
        tries: How often the model may answer.
        discount: An answer at try k is worth its score times discount ** (k - 1); the best one is the reward.
        good: Score from which an answer is right, and nothing more is asked.
        again: What the model is told of an answer that is not.
        max_tokens: How many tokens it may say in all its turns together.
        name: In metrics.

    Raises:
        ValidationError: It is no data set of reasoning-gym's, or a number is out of range.

    Example:
        >>> dataset = reasoning_gym.create_dataset("leg_counting", size=256, seed=0)
        >>> env = rlvr.gym_environment(dataset, tries=3)
        >>> trainer = rlvr.RLVRTrainer(tc, rlvr.gym_prompts(dataset), environment=env)
    """
    if not hasattr(dataset, "score_answer"):
        raise ValidationError(
            f"gym_environment: {as_given(dataset)} has no score_answer: give what reasoning_gym.create_dataset "
            f"returned."
        )
    if tries < 1 or not 0 <= discount <= 1:
        raise ValidationError(
            f"gym_environment: tries={tries}, discount={discount}: expected tries ≥ 1 and a discount from 0 to 1."
        )
    use = GymUse(resolve_reward(dataset), tries, discount, good, again)
    return Environment(use, tries, max_tokens, name)
