"""Evaluation on held-out prompts: mean reward, sampled and greedy, and pass@k."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tensafe_nb.checks import is_whole
from tensafe_nb.config import SamplingConfig
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle, completed
from tensafe_nb.rlvr.environments.play import RowItem, Wait
from tensafe_nb.rlvr.environments.sampler import EnvironmentSampler
from tensafe_nb.rlvr.policy import PolicyClient
from tensafe_nb.rlvr.rollouts.prompts import Chat, PromptItem, prompt_specs
from tensafe_nb.rlvr.rollouts.samplers import submit_rollouts
from tensafe_nb.rlvr.rollouts.trajectories import GOOD, RolloutGroup, TrajectoryBatch, mean
from tensafe_nb.rlvr.scoring.scorer import ScoreReport
from tensafe_nb.rlvr.watch.metrics import Goal, Row


class HeldOut:
    """Held-out prompts, and how they are answered: sampled and greedily, with the same seed every time.

    Args:
        client: Whose policy answers.
        prompts: What it is asked.
        sampling: How it answers.
        chat: As for `PolicySampler`.
        pass_at: The k of `eval/pass@k`; 1, 2, 4, … up to the number of samples, and that number itself, when None.
        threshold: Score from which an answer counts as right.
        environment: What the policy speaks with instead, where there is one.

    Raises:
        ValidationError: A k below 1, or above the number of samples.
    """

    def __init__(
        self,
        client: PolicyClient,
        prompts: Any,
        sampling: SamplingConfig,
        chat: Chat,
        pass_at: Sequence[int] | None = None,
        threshold: float = GOOD,
        environment: EnvironmentSampler | None = None,
    ) -> None:
        read = PromptItem.of if environment is None else RowItem.of
        self.specs = prompt_specs(prompts, what="eval_prompts", read=read)
        self._environment = environment
        self._client, self._sampling, self._chat = client, sampling, chat
        self._pass_at, self._threshold = ks_of(pass_at, sampling.num_samples), threshold

    def submit(self, wait: Wait) -> list[FutureHandle[TrajectoryBatch]]:
        """Queue the sampled and the greedy answers; with an environment play both, in which `wait` waits."""
        greedy = self._sampling.replace(num_samples=1, temperature=0.0)
        if self._environment is not None:
            return [
                completed(
                    self._environment.play(self.specs, sampling, self._sampling.seed or 0, wait),
                    operation="sample",
                    training_client_id=self._client.training_client_id,
                )
                for sampling in (self._sampling, greedy)
            ]
        return [
            submit_rollouts(self._client, self.specs, sampling, self._chat)
            for sampling in (self._sampling, greedy)
        ]

    def measure(
        self,
        sampled: TrajectoryBatch,
        greedy: TrajectoryBatch,
        score: Callable[[TrajectoryBatch], ScoreReport],
    ) -> Row:
        """Score the answers and return their metrics; NaN where nothing was scored."""
        report = score(sampled)
        score(greedy)
        values = {"eval/reward": sampled.mean_reward, "eval/greedy": greedy.mean_reward}
        for name, part in report.functions.items():
            values[f"eval/rewards/{name}"] = part.mean
        goal = Goal(report.true, self._threshold)  # when an answer is right
        if goal.true is not None:
            scores = goal.scores(sampled)
            values["eval/rewards/true"] = mean(scores[np.isfinite(scores)])
        for k in self._pass_at:
            values[f"eval/pass@{k}"] = mean_pass_at(k, sampled.groups, goal)
        return values


def joined(greedy: TrajectoryBatch, sampled: TrajectoryBatch) -> TrajectoryBatch:
    """Return both as one batch: of each prompt the greedy answer first, then those that were sampled."""
    groups = [
        replace(group, rollouts=[*first.rollouts, *group.rollouts])
        for first, group in zip(greedy.groups, sampled.groups, strict=True)
    ]
    return replace(sampled, groups=groups)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased estimate of pass@k: whether one of k answers is right (Chen et al. 2021, arXiv:2107.03374).

    1 − C(n−c, k) / C(n, k): of all ways to take k of n samples, the share that holds one of the c right ones.

    Args:
        samples: n answers that were sampled.
        right: c of them are right.
        k: How many one may give; at most n.

    Raises:
        ValidationError: Not 1 ≤ k ≤ n, or not 0 ≤ c ≤ n.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValidationError(
            f"pass@{k} of {right} right in {samples}: give 1 ≤ k ≤ samples and right ≤ samples."
        )
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_pass_at(k: int, groups: Iterable[RolloutGroup], goal: Goal) -> float:
    """Return the mean of pass@k over the prompts of which k answers or more were scored; NaN without any."""
    scored = [scores[np.isfinite(scores)] for scores in (goal.scores(group.rollouts) for group in groups)]
    return mean(
        np.array(
            [pass_at_k(s.size, int((s >= goal.threshold).sum()), k) for s in scored if s.size >= k],
            dtype=np.float64,
        )
    )


def ks_of(given: Sequence[int] | None, samples: int) -> tuple[int, ...]:
    """Return the k to estimate pass@k for: those asked for, else the powers of 2 up to the samples, and these.

    Raises:
        ValidationError: One below 1, or above the samples.
    """
    if given is None:
        # pass@1 of one sample is the mean reward.
        return () if samples == 1 else tuple(sorted({*(2**i for i in range(samples.bit_length())), samples}))
    if not all(is_whole(k) and 1 <= k <= samples for k in given):
        raise ValidationError(
            f"eval_pass_at={as_given(given)}: each k is a whole number from 1 to eval_samples={samples}; raise "
            f"eval_samples to estimate a larger one."
        )
    return tuple(map(int, given))
