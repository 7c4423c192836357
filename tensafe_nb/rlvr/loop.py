"""The loop of an RL run, step by step: take prompts, sample, score, update, then publish metrics, texts and alarms."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from tensafe_nb.errors import NonFiniteLossError, RewardError, StorageError
from tensafe_nb.events import Alarm, Metrics, Rollouts
from tensafe_nb.futures import FutureHandle
from tensafe_nb.rlvr.algorithms.policy_gradient import Algorithm
from tensafe_nb.rlvr.algorithms.result import UpdateResult
from tensafe_nb.rlvr.environments.environment import Environment
from tensafe_nb.rlvr.environments.replay import report
from tensafe_nb.rlvr.environments.sampler import EnvironmentSampler
from tensafe_nb.rlvr.policy import PolicyClient
from tensafe_nb.rlvr.rewards.conventions import TrainerState
from tensafe_nb.rlvr.rewards.reward import Reward
from tensafe_nb.rlvr.rollouts.choosing import replacements, teaches
from tensafe_nb.rlvr.rollouts.prompts import PromptCursor, PromptSpec
from tensafe_nb.rlvr.rollouts.samplers import PolicySampler
from tensafe_nb.rlvr.rollouts.store import RolloutStore
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup, TrajectoryBatch
from tensafe_nb.rlvr.scoring.scorer import Scorer, ScoreReport, check_scored, report_of_rounds
from tensafe_nb.rlvr.watch.alarms import Alarms
from tensafe_nb.rlvr.watch.evaluation import HeldOut, joined
from tensafe_nb.rlvr.watch.metrics import (
    BY_OPTIM_STEP,
    Goal,
    Row,
    choice_metrics,
    known,
    rollout_metrics,
    update_metrics,
)
from tensafe_nb.rlvr.watch.rules import low_precision, not_finite, not_kept
from tensafe_nb.runs.alarms import Rates
from tensafe_nb.runs.loop import Run

TOO_MANY = 0.5  # share of failed rewards above which nobody should train on the rest


class Trainer(Protocol):
    """What the loop reads and moves of a trainer, whose options may change between two steps."""

    reward: Reward | Environment
    on_reward_errors: Literal["pause", "fail"]
    algo: Algorithm
    prompts: PromptCursor
    sampler: PolicySampler | EnvironmentSampler
    eval_every: int | None
    held_out: HeldOut | None
    alarms: Alarms
    good_threshold: float
    store: RolloutStore | None
    tokens: int
    row: int

    @property
    def training_client(self) -> PolicyClient: ...
    @property
    def imprecise(self) -> bool: ...
    def new_scorer(self, reward: Reward) -> Scorer: ...
    def scored_by(self, version: str) -> None: ...
    def check_prompts(self) -> None: ...
    def number_of(self, version: str) -> int: ...
    def position(self) -> dict[str, Any]: ...
    def seek(self, position: Mapping[str, Any]) -> None: ...


class Clock:
    """The seconds between laps, by name; a name counts once, whoever is first."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = self._last = time.perf_counter()

    def add(self, name: str) -> None:
        """Count the seconds since the last lap to those of a name."""
        now = time.perf_counter()
        self.seconds[name], self._last = self.seconds.get(name, 0.0) + now - self._last, now

    def lap(self, name: str) -> None:
        """Give the seconds since the last lap a name."""
        now = time.perf_counter()
        if name not in self.seconds:
            self.seconds[name], self._last = now - self._last, now

    @property
    def total(self) -> float:
        return time.perf_counter() - self._started


@dataclass(slots=True)
class Step:
    """A step on its way, between `submit` and `collect`; without an update where nothing was scored."""

    batch: TrajectoryBatch
    reward: Reward | Environment
    report: ScoreReport
    goal: Goal
    clock: Clock
    chosen: Row  # how its prompts were chosen
    tokens: int  # seen by the policy, those thrown away counted
    update: FutureHandle[UpdateResult] | None = None
    error: NonFiniteLossError | None = None  # of an update that failed while it was being queued

    @property
    def failed(self) -> float:
        """The share without a reward for an error; a failed part of weight 0 takes no reward away."""
        return float(np.mean([t.reward is None and t.reward_error is not None for t in self.batch]))

    def failure(self) -> Exception | None:
        """Return what made the update fail."""
        return self.update.exception() if self.update is not None and self.update.done() else self.error

    def row(self, update: UpdateResult | None) -> Row:
        """Return what was measured: of the rollouts, of their rewards, of the update, and the seconds it took."""
        row = rollout_metrics(self.batch, self.goal) | self.report.metrics | self.chosen
        row |= {} if update is None else update_metrics(update)
        return row | self.clock.seconds | {"time/total": self.clock.total}


class RLVRLoop:
    """What `TrainingRun` drives. A sample waits for the update before it, so nothing is ever off-policy."""

    lookahead = 0
    curve = "reward"

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self._trainer, self._steps = trainer, steps
        self._client, self._held_out = trainer.training_client, trainer.held_out
        self._under_way: dict[int, Step] = {}
        self._scorer: Scorer | None = None
        self._scores: Reward | None = None  # what the scorer was made for
        self._last_row = trainer.row + steps
        self._skipped: list[str] = []  # why updates took no step
        self._refused = False  # whether the disk did not take the last rollouts

    def attach(self, run: Run) -> None:
        """Get to know the run."""
        self._run = run
        self._rates = Rates(run.client.config.optimizer)
        self._points = len(run.client.history.series("learning_rate")[1])  # known of the curve
        self._store = self._trainer.store = RolloutStore(run.run_id, run.client.history.path.parent)
        self._trainer.alarms.forget_announcements()

    def submit(self, index: int) -> list[FutureHandle[Any]]:
        """Sample, score and queue the update of one step; wait for the samples in between."""
        if index == 0:
            self._trainer.check_prompts()
        before = self._held_out.submit(self._run.wait) if self._held_out and index == 0 else []
        try:
            step = self._under_way[index] = self.sample_and_score()
            self.begin_update(index, step)
        except BaseException:
            for handle in before:
                handle.cancel()
            raise
        updates = [] if step.update is None else [step.update]
        done, every = index + 1, self._trainer.eval_every
        due = done == self._steps or (every is not None and done % every == 0)
        after = self._held_out.submit(self._run.wait) if self._held_out and due else []
        return [*updates, *before, *after]

    def collect(self, index: int, results: Sequence[Any]) -> None:
        """Publish the metric rows of one step, and the alarms it sets off."""
        trainer, step = self._trainer, self._under_way.pop(index)
        step.clock.lap("time/update")
        update, evaluations = (None, results) if step.update is None else (results[0], results[1:])
        pairs = zip(evaluations[::2], evaluations[1::2], strict=True)  # of sampled and greedy answers
        measured = [
            self.evaluation(index, trainer.row + (index > 0 or number > 0), step.reward, *pair)
            for number, pair in enumerate(pairs)
        ]
        if index == 0 and measured:
            self._publish(trainer.row, measured.pop(0))
        trainer.row += 1
        trainer.tokens += step.tokens
        version = trainer.number_of(step.report.version)
        row = step.row(update) | {"num_tokens": trainer.tokens, "reward_version": version}
        written = BY_OPTIM_STEP if update is not None and not update.skipped else ()
        self._publish(trainer.row, known(row, without=written) | (measured[0] if measured else {}))
        alarms: list[Alarm] = []
        if update is not None and not update.skipped:
            row["learning_rate"], alarms = self.look_at_rates(index)
        elif update is not None:
            self._skipped.append(update.skipped)
        for alarm in [
            *alarms,
            *trainer.alarms.observe(self._run.run_id, trainer.row, row, step.batch, step.goal),
        ]:
            self._client.publish(alarm)
        if index == 0 and trainer.imprecise:
            self._client.publish(low_precision(known(row)).alarm(self._run.run_id, trainer.row))
        if update is None or step.failed > TOO_MANY:
            self._run.pause()

    def look_at_rates(self, index: int) -> tuple[float, list[Alarm]]:
        """Return the newest learning rate, and what the schedule makes of the updates to come.

        As long as they take as many optimiser steps as those so far.
        """
        _, rates = self._run.client.history.series("learning_rate", self._points)
        self._points += len(rates)
        new = [float(rate) for rate in rates] or [np.nan]
        last = self._run.client.step + (self._steps - index - 1) * self._run.steps_taken
        found = [finding for rate in new for finding in self._rates.observe(rate, last)]
        return new[-1], [finding.alarm(self._run.run_id, self._trainer.row) for finding in found]

    def position(self) -> dict[str, Any]:
        """Return where the trainer stands."""
        return self._trainer.position()

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to such a place."""
        self._trainer.seek(position)

    def interrupt(self) -> None:
        """End the processes of rewards and environments: whoever waits for them waits no more."""
        self._trainer.sampler.close()
        if self._scorer is not None:
            self._scorer.close()

    def close(self) -> None:
        """End their processes; say which rollouts an update without a finite loss was about."""
        self._trainer.sampler.close()
        if self._scorer is not None:
            self._scorer.close()
        if self._rates.remark is not None:
            self._run.remark(self._rates.remark)
        if self._skipped and not self._run.steps_taken:
            cut = self._skipped.count("all truncated")
            self._run.remark(
                f"No optimiser step was taken, so no weight has moved: in {len(self._skipped) - cut} of "
                f"{len(self._skipped)} steps no answer scored better or worse than its baseline"
                + (f", in {cut} every answer that could teach something was cut." if cut else ".")
            )
        for step in self._under_way.values():
            if isinstance(error := step.failure(), NonFiniteLossError):
                found = not_finite(step.batch, error)
                self._client.publish(found.alarm(self._run.run_id, self._trainer.row + 1))

    def sample_and_score(self) -> Step:
        """Sample the next prompts and score the answers; wait for both. Replace what their policy throws away."""
        clock, cursor = Clock(), self._trainer.prompts
        batch = self._sample(cursor.take(), clock)
        reward = self._trainer.reward  # as it is now; it may have been replaced since the step before
        reports = [self._score(batch, reward)]
        self._trainer.scored_by(reports[0].version)
        goal = Goal(reports[0].true, self._trainer.good_threshold)
        self._measure(batch.groups, goal)
        clock.add("time/reward")
        sampled, rounds = list(batch.groups), replacements(cursor.policy)
        while len(reports) <= rounds and (silent := self._silent(batch, goal)):
            more = self._sample(cursor.take(instead_of=len(silent)), clock)
            reports.append(self._score(more, reward))
            self._measure(more.groups, goal)
            clock.add("time/reward")
            sampled += more.groups
            for place, group in zip(silent, more.groups, strict=True):
                batch.groups[place] = group
        batch.thrown_away = len(sampled) - len(batch.groups)
        chosen = choice_metrics(
            cursor.record, sampled, batch.thrown_away, len(reports) - 1 if rounds else None
        )
        tokens = sum(len(t.prompt_tokens) + len(t.tokens) for group in sampled for t in group.rollouts)
        return Step(batch, reward, report_of_rounds(reports, batch), goal, clock, chosen, tokens)

    def _sample(self, prompts: Sequence[PromptSpec], clock: Clock) -> TrajectoryBatch:
        batch = self._trainer.sampler.rollouts(prompts, self._run.wait)
        clock.add("time/sample")
        return batch

    def _measure(self, groups: Sequence[RolloutGroup], goal: Goal) -> None:
        """Note what was known of the prompts that were just answered, and take in what their answers scored."""
        cursor = self._trainer.prompts
        rates = cursor.record.solve_rate
        for number, group in zip(cursor.taken, groups, strict=True):
            group.answered = int(cursor.record.times[number])
            group.solve_rate = None if np.isnan(rates[number]) else float(rates[number])
        for number, group in zip(cursor.taken, groups, strict=True):
            scores = goal.scores(group.rollouts)
            cursor.record.observe(number, group.rewards, scores, goal.threshold)

    def _silent(self, batch: TrajectoryBatch, goal: Goal) -> list[int]:
        """Return the numbers of the groups that the prompts' policy does not keep."""
        policy = self._trainer.prompts.policy
        return [
            number
            for number, group in enumerate(batch.groups)
            if not teaches(policy, group.rewards, goal.scores(group.rollouts))
        ]

    def begin_update(self, index: int, step: Step) -> None:
        """Queue the update where there is something to update on, and keep the rollouts in any case."""
        try:
            if self.can_go_on(index, step):
                step.update = self._trainer.algo.update(step.batch, self._client)
                step.update.add_done_callback(lambda _: step.clock.lap("time/update"))
        except NonFiniteLossError as error:
            step.error = error
            raise
        finally:
            # While the update is under way; and when there will be none, above all.
            self.keep(self._trainer.row + 1, step.batch)

    def can_go_on(self, index: int, step: Step) -> bool:
        """Whether there is something to update on. A run ends here if its first step has nothing at all.

        Raises:
            RewardError: Nothing was scored in the first step, or too little where nobody watches.
        """
        trainer, batch = self._trainer, step.batch
        if index == 0 or trainer.on_reward_errors == "fail":
            check_scored(batch, trainer.reward)
        if trainer.on_reward_errors == "fail" and step.failed > TOO_MANY:
            first = next(t.reward_error for t in batch if t.reward is None and t.reward_error)
            raise RewardError(
                f"The reward {trainer.reward.name!r} failed on {step.failed:.0%} of the rollouts of step "
                f"{trainer.row + 1}, and on_reward_errors='fail'. The first error: {first}"
            )
        return bool(np.isfinite(batch.rewards).any())

    def keep(self, step: int, batch: TrajectoryBatch, *, held_out: bool = False) -> None:
        """Write the rollouts to the disk, and say in which file of the run's folder they are.

        A disk that refuses them costs their texts, not the run: an alarm says so, once until they are kept again.
        """
        try:
            path = self._store.add(step, batch, held_out=held_out)
        except StorageError as error:
            if not self._refused:
                self._client.publish(not_kept(error).alarm(self._run.run_id, step))
            self._refused = True
            return
        self._refused = False
        self._client.publish(
            Rollouts(
                run_id=self._run.run_id,
                step=step,
                rollouts=len(batch),
                path=f"{path.parent.name}/{path.name}",
                held_out=held_out,
            )
        )

    def evaluation(
        self,
        index: int,
        row: int,
        reward: Reward | Environment,
        sampled: TrajectoryBatch,
        greedy: TrajectoryBatch,
    ) -> Row:
        """Measure the held-out answers of a row, by the step's own reward, and keep them.

        What cannot be scored ends a first step only.
        """
        if self._held_out is None:
            return {}
        values = self._held_out.measure(sampled, greedy, lambda batch: self._score(batch, reward))
        self.keep(row, joined(greedy, sampled), held_out=True)
        if index == 0:
            check_scored(sampled, reward)
        return known(values)

    def _score(self, batch: TrajectoryBatch, reward: Reward | Environment) -> ScoreReport:
        if isinstance(reward, Environment):  # it has rewarded its conversations itself
            return report(reward, batch)
        if self._scorer is None or self._scores is not reward:
            if self._scorer is not None:
                self._scorer.close()
            self._scorer, self._scores = self._trainer.new_scorer(reward), reward
        return self._scorer.score(batch, TrainerState(self._trainer.row, self._last_row))

    def _publish(self, step: int, values: Row) -> None:
        self._client.publish(Metrics(step=step, values=values, run_id=self._run.run_id))
