"""How good the policy is on prompts it does not train on."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tensafe_nb.config import SamplingConfig
from tensafe_nb.futures import FutureHandle
from tensafe_nb.rlvr.metrics import Row
from tensafe_nb.rlvr.rollouts import GOOD, PolicyClient, TrajectoryBatch, mean
from tensafe_nb.rlvr.samplers import Chat, prompt_specs, submit_rollouts


class HeldOut:
    """Held-out prompts, and how they are answered: sampled and greedily, with the same seed every time.

    Args:
        client: Whose policy answers.
        prompts: What it is asked.
        sampling: How it answers.
        chat: As for `PolicySampler`.
    """

    def __init__(self, client: PolicyClient, prompts: Any, sampling: SamplingConfig, chat: Chat) -> None:
        self.specs = prompt_specs(prompts, what="eval_prompts")
        self._client, self._sampling, self._chat = client, sampling, chat

    def submit(self) -> list[FutureHandle[TrajectoryBatch]]:
        """Queue the sampled and the greedy answers."""
        greedy = self._sampling.replace(num_samples=1, temperature=0.0)
        return [
            submit_rollouts(self._client, self.specs, sampling, self._chat)
            for sampling in (self._sampling, greedy)
        ]

    def measure(
        self, sampled: TrajectoryBatch, greedy: TrajectoryBatch, score: Callable[[TrajectoryBatch], Any]
    ) -> Row:
        """Score the answers and return their metrics; NaN where nothing was scored."""
        for batch in (sampled, greedy):
            score(batch)
        values = {"eval/reward": sampled.mean_reward, "eval/greedy": greedy.mean_reward}
        if self._sampling.num_samples > 1:
            scored = [group.rewards for group in sampled.groups if np.isfinite(group.rewards).any()]
            solved = np.array([(rewards >= GOOD).any() for rewards in scored], dtype=float)
            values[f"eval/pass@{self._sampling.num_samples}"] = mean(solved)
        return values
