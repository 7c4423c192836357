"""The loop: prompts → sample → score → update → metric row. `TrainingRun` drives, pauses and stops it."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tensafe_nb.config import SamplingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Metrics
from tensafe_nb.futures import FutureHandle
from tensafe_nb.retention import Checkpoints
from tensafe_nb.rlvr.algorithms import REINFORCE, UpdateResult
from tensafe_nb.rlvr.rewards import Reward, RewardFunction, check_scored, resolve_reward, score
from tensafe_nb.rlvr.rollouts import (
    PolicyClient,
    PolicySampler,
    PromptSpec,
    TrajectoryBatch,
    mean,
    prompt_items,
    submit_rollouts,
)
from tensafe_nb.runs import Loop, TrainingRun

GOOD = 0.5  # a rollout with a higher reward counts as solved in pass@k


class Algorithm(Protocol):
    """What turns a scored batch into optimiser steps."""

    def update(self, batch: TrajectoryBatch, training_client: PolicyClient) -> FutureHandle[UpdateResult]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class RunningClient(PolicyClient, Protocol):
    """A training client that can drive a loop."""

    def start_run(
        self,
        loop: Loop,
        *,
        planned_steps: int | None,
        show: bool,
        checkpoints: Checkpoints | None,
        resume_from: str | None,
    ) -> TrainingRun: ...


class RLVRTrainer:
    """Reinforcement learning with verifiable rewards: sample, score, update, and again.

    Args:
        training_client: Whose policy to train.
        prompts: Texts, chat messages, or dicts with `prompt` and further columns: the reward's `meta`.
        reward: `fn(prompt, response, meta=None) -> float`, or its registered name.
        algo: How to update; REINFORCE with its defaults when None.
        prompts_per_step: Prompts drawn for each step, without repetition within an epoch.
        group_size: Rollouts per prompt.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the rollouts.
        stop: Strings that end a completion.
        fixed_length: Every completion has `max_new_tokens`, and none counts as truncated.
        eval_prompts: Held-out prompts.
        eval_every: Steps between evaluations on them; before the first and after the last step always.
        eval_samples: Sampled answers per held-out prompt; from 2 on there is `eval/pass@k` as well.
        seed: Fixes the order of prompts and every rollout.

    Example:
        >>> trainer = RLVRTrainer(tc, datasets.sums(512, seed=0), "exact_match", max_new_tokens=4)
        >>> run = trainer.run(steps=100)  # at once
        >>> await run
    """

    def __init__(
        self,
        training_client: RunningClient,
        prompts: Sequence[PromptSpec],
        reward: str | RewardFunction | Reward,
        algo: Algorithm | None = None,
        *,
        prompts_per_step: int = 16,
        group_size: int = 8,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        fixed_length: bool = False,
        eval_prompts: Sequence[PromptSpec] | None = None,
        eval_every: int | None = None,
        eval_samples: int = 1,
        seed: int = 0,
    ) -> None:
        if eval_every is not None and (eval_prompts is None or eval_every < 1):
            raise ValidationError(f"eval_every={eval_every} needs eval_prompts, and a number of steps ≥ 1.")
        if algo is not None and (isinstance(algo, type) or not hasattr(algo, "update")):
            raise ValidationError(f"RLVRTrainer: algo is an algorithm such as REINFORCE(), not {algo!r}.")
        if not isinstance(seed, int) or seed < 0:
            raise ValidationError(f"RLVRTrainer: seed={seed!r} must be a whole number, 0 or more.")
        self.training_client = training_client
        self.reward = resolve_reward(reward)
        self.algo = algo or REINFORCE()
        self.prompts = PromptCursor(prompts, prompts_per_step, seed)
        self.sampler = PolicySampler(
            training_client,
            group_size,
            max_new_tokens,
            temperature,
            stop=stop,
            fixed_length=fixed_length,
            seed=seed,
        )
        self.eval_every = eval_every
        self._tokens_seen = 0
        self._evaluation = None
        if eval_prompts is not None:
            held_out = self.sampler.sampling.replace(num_samples=eval_samples, seed=seed)
            self._evaluation = _Evaluation(training_client, eval_prompts, self.reward, held_out)
        self._at = (
            training_client.step
        )  # of the last row: counts this trainer's steps, those without signal too

    def __repr__(self) -> str:
        client = self.training_client.training_client_id
        return f"RLVRTrainer({client}, {self.reward.name!r}, {self.algo!r}, {self.sampler.sampling!r})"

    def run(
        self,
        *,
        steps: int,
        checkpoint_every: int | None = None,
        keep_last: int | None = None,
        keep_best: str | None = None,
        resume_from: str | None = None,
        show: bool = True,
    ) -> TrainingRun:
        """Start training and return at once.

        Args:
            steps: How many to take; a second call goes on with the next prompts.
            checkpoint_every: Save the state every so many steps, and after the last.
            keep_last: Of the checkpoints this run saved by itself, keep the newest so many; None keeps all.
            keep_best: Keep the one with the best value of this metric as well, for instance "eval/reward".
            resume_from: A checkpoint of a run like this one: go on where it stood; `steps` counts from its beginning.
            show: Show the live panel in a notebook.

        Raises:
            ValidationError: Fewer than one step.
        """
        if steps < 1:
            raise ValidationError(f"RLVRTrainer.run: steps={steps} must be at least 1.")
        return self.training_client.start_run(
            _RLVRLoop(self, steps),
            planned_steps=steps,
            show=show,
            checkpoints=Checkpoints(checkpoint_every, keep_last, keep_best),
            resume_from=resume_from,
        )

    def evaluate(self) -> dict[str, float]:
        """Measure the policy on the held-out prompts, and wait for it.

        The random numbers are the same every time, so that what changes is the policy.

        Returns:
            `eval/reward` of sampled answers, `eval/greedy`, and with several samples `eval/pass@k`.

        Raises:
            ValidationError: There are no held-out prompts.
        """
        if self._evaluation is None:
            raise ValidationError("There is nothing to evaluate on: give RLVRTrainer eval_prompts.")
        sampled, greedy = (handle.result() for handle in self._evaluation.submit())
        return self._evaluation.measure(sampled, greedy)


class PromptCursor:
    """Deals prompts: shuffled anew in every epoch, none twice before all have been dealt.

    Args:
        prompts: What to deal.
        count: How many at a time.
        seed: Fixes the order.

    Raises:
        ValidationError: No prompts, or what is none.
    """

    def __init__(self, prompts: Sequence[PromptSpec], count: int, seed: int) -> None:
        prompts = list(prompts) if isinstance(prompts, Iterator) else prompts
        prompt_items(prompts)
        if count < 1:
            raise ValidationError(f"prompts_per_step is {count}: a step needs at least one prompt.")
        self._prompts, self._count, self._seed = list(prompts), count, seed
        self.position = 0  # prompts dealt so far: all there is to save

    def take(self) -> list[PromptSpec]:
        """Return the next prompts."""
        start, self.position = self.position, self.position + self._count
        return [self._prompts[index] for index in self._order(start, self.position)]

    def _order(self, start: int, stop: int) -> Iterator[int]:
        size = len(self._prompts)
        for epoch in range(start // size, (stop - 1) // size + 1):
            order = np.random.default_rng([self._seed, epoch]).permutation(size)
            yield from order[max(start - epoch * size, 0) : stop - epoch * size].tolist()


class _Evaluation:
    """Held-out prompts, and how they are answered: sampled and greedily, with the same seed every time."""

    def __init__(
        self, client: PolicyClient, prompts: Sequence[PromptSpec], reward: Reward, sampling: SamplingConfig
    ) -> None:
        prompt_items(prompts)
        self._client, self._prompts, self._reward, self._sampling = client, list(prompts), reward, sampling

    def submit(self) -> list[FutureHandle[TrajectoryBatch]]:
        """Queue the sampled and the greedy answers."""
        greedy = self._sampling.replace(num_samples=1, temperature=0.0)
        return [
            submit_rollouts(self._client, self._prompts, sampling) for sampling in (self._sampling, greedy)
        ]

    def measure(self, sampled: TrajectoryBatch, greedy: TrajectoryBatch) -> dict[str, float]:
        """Score the answers and return their metrics."""
        for batch in (sampled, greedy):
            score(batch, self._reward)
            check_scored(batch, self._reward)
        values = {"eval/reward": sampled.mean_reward, "eval/greedy": greedy.mean_reward}
        if self._sampling.num_samples > 1:
            solved = [bool((group.rewards > GOOD).any()) for group in sampled.groups]
            values[f"eval/pass@{self._sampling.num_samples}"] = float(np.mean(solved))
        return values


@dataclass(slots=True)
class _Step:
    """A step on its way, between `submit` and `collect`."""

    batch: TrajectoryBatch
    seconds: dict[str, float]


class _RLVRLoop:
    """What `TrainingRun` drives. A sample waits for the update before it, so nothing is ever off-policy."""

    lookahead = 0
    curve = "reward"

    def __init__(self, trainer: RLVRTrainer, steps: int) -> None:
        self._trainer, self._steps = trainer, steps
        self._client, self._evaluation = trainer.training_client, trainer._evaluation
        self._under_way: dict[int, _Step] = {}

    def attach(self, run: TrainingRun) -> None:
        self._run = run

    def submit(self, index: int) -> list[FutureHandle[Any]]:
        """Sample, score and queue the update of one step; wait for the samples in between."""
        trainer, clock = self._trainer, _Clock()
        before = self._evaluation.submit() if self._evaluation and index == 0 else []
        try:
            batch = self._run.wait(trainer.sampler.submit(trainer.prompts.take()))
        except BaseException:
            for handle in before:
                handle.cancel()
            raise
        clock.lap("time/sample")
        score(batch, trainer.reward)
        check_scored(batch, trainer.reward)
        clock.lap("time/reward")
        update = trainer.algo.update(batch, self._client)
        update.add_done_callback(lambda _: clock.lap("time/update"))
        self._under_way[index] = _Step(batch, clock.seconds)
        return [update, *before, *self._evaluation_after(index)]

    def collect(self, index: int, results: Sequence[Any]) -> None:
        """Publish the metric rows of one step."""
        trainer, step, (update, *evaluations) = self._trainer, self._under_way.pop(index), results
        measured = [self._measure(*evaluations[at : at + 2]) for at in range(0, len(evaluations), 2)]
        if index == 0 and measured:
            self._publish(trainer._at, measured.pop(0))
        trainer._at += 1
        trainer._tokens_seen += sum(len(t.prompt_tokens) + len(t.tokens) for t in step.batch)
        row = rollout_metrics(step.batch) | update_metrics(update) | step.seconds
        row["num_tokens"] = trainer._tokens_seen
        self._publish(trainer._at, row | (measured[0] if measured else {}))

    def position(self) -> dict[str, Any]:
        """Return where prompts, rollout seeds, rows and baselines stand."""
        trainer = self._trainer
        return {
            "prompts": trainer.prompts.position,
            "draws": trainer.sampler.draws,
            "row": trainer._at,
            "tokens": trainer._tokens_seen,
            "algo": dict(trainer.algo.state_dict()),
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to such a place."""
        trainer = self._trainer
        trainer.prompts.position, trainer.sampler.draws = position["prompts"], position["draws"]
        trainer._at, trainer._tokens_seen = position["row"], position["tokens"]
        trainer.algo.load_state_dict(position["algo"])

    def _evaluation_after(self, index: int) -> list[FutureHandle[TrajectoryBatch]]:
        done, every = index + 1, self._trainer.eval_every
        due = done == self._steps or (every is not None and done % every == 0)
        return self._evaluation.submit() if self._evaluation and due else []

    def _measure(self, sampled: TrajectoryBatch, greedy: TrajectoryBatch) -> dict[str, float]:
        return self._evaluation.measure(sampled, greedy) if self._evaluation else {}

    def _publish(self, step: int, values: Mapping[str, float]) -> None:
        known = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        self._client.publish(Metrics(step=step, values=known, run_id=self._run.run_id))


def rollout_metrics(batch: TrajectoryBatch) -> dict[str, float]:
    """Return what a scored batch says about the policy; NaN where it says nothing."""
    spread = batch.reward_std_by_group
    logprobs = np.array([logprob for t in batch for logprob in t.logprobs or ()])
    return {
        "reward": batch.mean_reward,
        "reward_std": batch.std_reward,
        "group/reward_std": mean(spread[np.isfinite(spread)]),
        "frac_reward_zero_std": batch.frac_zero_signal,
        "rewards/errors": sum(t.reward_error is not None for t in batch),
        "completions/mean_length": mean(batch.lengths),
        "completions/clipped_ratio": batch.clipped_ratio,
        "entropy_sampled": -mean(logprobs),
    }


def update_metrics(update: UpdateResult) -> dict[str, float]:
    """Return what the worker does not publish by itself: nothing but zeros where no step was taken."""
    if update.skipped:
        return {"grad_norm": 0.0, "param_delta_norm": 0.0}
    return {"entropy": math.nan if update.entropy is None else update.entropy}


class _Clock:
    """Names the seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
