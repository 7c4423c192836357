"""The trainer: prompts, a reward, an algorithm and a policy, of which `run()` makes a run that learns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

from tensafe_nb.checks import checked
from tensafe_nb.config import Config, Precision, SamplingEngine, TrainingConfig
from tensafe_nb.data import OnBadRows, Rows
from tensafe_nb.data.columns import PromptColumns
from tensafe_nb.data.rows import check_on_bad_rows, parted
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle
from tensafe_nb.lifetimes import Freed
from tensafe_nb.protocol.results import TrainingClientInfo
from tensafe_nb.rlvr.algorithms.options import PolicyConfig, REINFORCEConfig
from tensafe_nb.rlvr.algorithms.policy_gradient import AlgorithmSpec, RemembersRewards, algorithm_of
from tensafe_nb.rlvr.algorithms.private import released
from tensafe_nb.rlvr.environments.environment import Environment, EnvironmentSpec, resolve_environment
from tensafe_nb.rlvr.environments.play import RowItem
from tensafe_nb.rlvr.environments.replay import report
from tensafe_nb.rlvr.environments.sampler import EnvironmentSampler
from tensafe_nb.rlvr.loop import RLVRLoop
from tensafe_nb.rlvr.policy import PRIVATE, PolicyClient
from tensafe_nb.rlvr.rewards.composite import Part
from tensafe_nb.rlvr.rewards.reward import Reward, RewardSpec, resolve_reward
from tensafe_nb.rlvr.rollouts.choosing import (
    DynamicSampling,
    PromptPolicy,
    PromptPolicySpec,
    bias_of,
    prompt_policy_of,
    replacements,
)
from tensafe_nb.rlvr.rollouts.prompts import (
    Chat,
    PromptCursor,
    PromptItem,
    asked,
    check_fit,
    fitting,
    prompt_specs,
)
from tensafe_nb.rlvr.rollouts.samplers import PolicySampler
from tensafe_nb.rlvr.rollouts.store import RolloutStore
from tensafe_nb.rlvr.rollouts.trajectories import GOOD
from tensafe_nb.rlvr.scoring.processes import crew_of
from tensafe_nb.rlvr.scoring.scorer import Scorer, check_scored
from tensafe_nb.rlvr.watch.alarms import Alarms
from tensafe_nb.rlvr.watch.evaluation import HeldOut
from tensafe_nb.rlvr.watch.metrics import known
from tensafe_nb.rlvr.watch.rescoring import Rescored, rescore_steps
from tensafe_nb.rlvr.watch.rules import logprob_gap
from tensafe_nb.runs.alarms import check_schedule
from tensafe_nb.runs.checkpoints import Checkpoints
from tensafe_nb.runs.loop import Loop
from tensafe_nb.runs.run import TrainingRun


class RunningClient(PolicyClient, Protocol):
    """A training client that can drive a loop."""

    @property
    def config(self) -> TrainingConfig: ...

    def refresh(self) -> TrainingClientInfo: ...

    def start_run(
        self,
        loop: Loop,
        *,
        planned_steps: int | None,
        show: bool,
        checkpoints: Checkpoints | None,
        resume_from: str | None,
        name: str | None,
        tags: str | Sequence[str],
        notes: str,
        started_with: Mapping[str, Any] | None,
    ) -> TrainingRun: ...


class RLVRTrainer:
    """Reinforcement learning with verifiable rewards: sample, score, update, and again.

    Every step leaves a row of metrics, its rollouts on the disk, and an alarm where something looks wrong.

    Args:
        training_client: Whose policy to train.
        prompts: Texts, chat messages, or dicts with `prompt` and further columns: the reward's `meta`. A list, a file,
            a frame, a data set: whatever rows are read from. The column `tools` goes into the chat template as well.
        reward: `fn(prompt, response, meta=None) -> float`, its registered name, or several: a list, or a dict with
            weights; see `resolve_reward`.
        environment: What the policy speaks with, for several turns, and what rewards it: see `rlvr.environment`; or its
            registered name. The prompts are the rows it is given, and need no column `prompt`. Instead of a reward.
        algo: How to update: an algorithm, its options, or its name: "reinforce", "ppo", or a preset such as "grpo", see
            `get_presets`. REINFORCE with its defaults when None.
        prompt: The column of `prompts` that is asked, where it is not called "prompt".
        answer: The column that holds the right answer, for rewards that compare: it becomes the column "answer".
        answer_after: Of an answer that ends a solution, what stands before it: "####" for GSM8K.
        template: A text that becomes the prompt, with names of columns in braces: "Question: {question}".
        held_out: A share of the prompts to evaluate on and never to train on, instead of `eval_prompts`. On which side
            a prompt falls depends on what it asks and on the seed alone, so that it stays there when rows are added.
        prompt_policy: Which prompts a step takes, by what their answers have scored so far: "uniform" (every prompt as
            often as any other), "curriculum" (easy ones first), "adaptive" (more of those that are half solved),
            "dynamic" (those that taught nothing are replaced before the update), one of these with options such as
            `AdaptivePrompts(floor=0.2)`, or an object of yours with `choose`: see `PromptPolicy`. All but the first
            change what is maximised: each says how. None takes what the algorithm asks for ("dapo"), else "uniform".
        prompts_per_step: Prompts drawn for each step, without repetition within an epoch.
        group_size: Rollouts per prompt.
        max_new_tokens: Longest completion, in tokens; of an environment, longest turn.
        temperature: Of the rollouts.
        stop: Strings that end a completion.
        fixed_length: Every completion has `max_new_tokens`, and none counts as truncated.
        chat: Whether texts become chat messages: "auto", "never" or "always", as for `PolicySampler`.
        eval_prompts: Held-out prompts.
        eval_every: Steps between evaluations on them; before the first and after the last step always.
        eval_samples: Sampled answers per held-out prompt; from 2 on there is `eval/pass@k` as well.
        eval_pass_at: The k of `eval/pass@k`, each at most `eval_samples`; None takes 1, 2, 4, … and `eval_samples`.
        good_threshold: Score from which an answer counts as right, in `eval/pass@k` and `by_group/…`: of the part
            marked `true=True` where the reward has one, else of the whole reward.
        reward_timeout: Seconds a call of the reward, or a turn of the environment, may take in its process; None calls
            it here, without a limit.
        reward_processes: In how many processes the reward is called, or the environment plays, at most; one for each
            core, and no more than 4, when None.
        reward_cluster: Where these processes are, if not on this machine: RayCluster("auto"), be it that of the service
            or another; see `Scorer`.
        on_reward_errors: When the reward fails on more than half of a step's rollouts: "pause" the run, for you to
            mend the function, or "fail", for scripts that nobody watches.
        on_bad_rows: "skip" leaves out prompts that cannot be read, or that leave no room for an answer, and says so; it
            waits for the model. "raise" refuses them: those that do not fit the model when the run begins.
        precision: Of the weights that sample: "exact" (those that train), "bfloat16", "int8" or "auto", as in
            `SamplingConfig`. Updates correct for the difference, and measure it; evaluation stays exact.
        engine: What computes the rollouts: "torch" or "llama.cpp", as in `SamplingConfig`. Updates correct likewise.
        seed: Fixes the order of prompts and every rollout.

    Example:
        >>> trainer = RLVRTrainer(tc, datasets.sums(512, seed=0), "exact_match", max_new_tokens=4)
        >>> run = trainer.run(steps=100)  # at once
        >>> await run
    """

    @checked
    def __init__(
        self,
        training_client: RunningClient,
        prompts: Rows,
        reward: RewardSpec | None = None,
        algo: AlgorithmSpec | None = None,
        *,
        environment: EnvironmentSpec | None = None,
        prompt: str | None = None,
        answer: str | None = None,
        answer_after: str | None = None,
        template: str | None = None,
        held_out: float | None = None,
        prompt_policy: PromptPolicySpec | None = None,
        prompts_per_step: int = 16,
        group_size: int = 8,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        stop: str | Sequence[str] | None = (),
        fixed_length: bool = False,
        chat: Chat = "auto",
        eval_prompts: Rows | None = None,
        eval_every: int | None = None,
        eval_samples: int = 1,
        eval_pass_at: Sequence[int] | None = None,
        good_threshold: float = GOOD,
        reward_timeout: float | None = 5.0,
        reward_processes: int | None = None,
        reward_cluster: Any = None,
        on_reward_errors: Literal["pause", "fail"] = "pause",
        on_bad_rows: OnBadRows = "raise",
        precision: Precision = "exact",
        engine: SamplingEngine = "torch",
        seed: int = 0,
    ) -> None:
        check_options(eval_prompts, held_out, eval_every, on_reward_errors, good_threshold, seed)
        if not hasattr(training_client, "policy_version"):
            raise ValidationError(
                f"RLVRTrainer: training_client={as_given(training_client)} must be a training client: "
                f"service.create_training_client(…) makes one."
            )
        self.training_client = training_client
        crew_of("RLVRTrainer: reward_", reward_processes, reward_cluster)
        self.reward_timeout = reward_timeout
        self.reward_processes, self.reward_cluster = reward_processes, reward_cluster
        self.on_reward_errors = on_reward_errors
        self.algo = algorithm_of(algo)
        policy = self._policy_of(prompt_policy)
        how: dict[str, Any] = {
            "stop": stop,
            "fixed_length": fixed_length,
            "chat": chat,
            "seed": seed,
            "precision": precision,
            "engine": engine,
        }
        judge = judge_of(reward, environment)
        self.reward: Reward | Environment
        self.sampler: PolicySampler | EnvironmentSampler
        check_on_bad_rows(on_bad_rows)
        columns = PromptColumns(prompt, answer, answer_after, template)
        reading: dict[str, Any] = {"on_bad_rows": on_bad_rows, "columns": columns}
        if isinstance(judge, Environment):
            self.sampler = EnvironmentSampler(
                training_client,
                judge,
                group_size,
                max_new_tokens,
                temperature,
                timeout=reward_timeout,
                processes=reward_processes,
                cluster=reward_cluster,
                **how,
            )
            self.reward = self.sampler.environment = self._punishing(judge)
            reading["read"] = RowItem.of
        else:
            self.sampler = PolicySampler(training_client, group_size, max_new_tokens, temperature, **how)
            self.reward = self._shaped(judge)
            if on_bad_rows == "skip":
                reading["fits"] = fitting(training_client, self.sampler.sampling, chat)
        prompts = prompt_specs(prompts, **reading)
        if eval_prompts is not None:
            eval_prompts = prompt_specs(eval_prompts, what="eval_prompts", **reading)
        if held_out is not None:
            prompts, eval_prompts = parted(prompts, [asked(spec) for spec in prompts], held_out, seed)
        read = reading.get("read", PromptItem.of)
        self.prompts = PromptCursor(prompts, prompts_per_step, seed, policy, read)
        self.prompts_per_step, self.seed = prompts_per_step, seed
        self.eval_every = eval_every
        self.held_out = None
        if eval_prompts is not None:
            sampling = self.sampler.sampling.replace(
                num_samples=eval_samples, seed=seed, precision="exact", engine="torch"
            )
            self.held_out = HeldOut(
                training_client,
                eval_prompts,
                sampling,
                chat,
                eval_pass_at,
                good_threshold,
                self.sampler if isinstance(self.sampler, EnvironmentSampler) else None,
            )
        self.good_threshold = good_threshold
        self.alarms = Alarms(logprob_gap(training_client.config))
        self.store: RolloutStore | None = None  # of the newest run
        self.tokens = 0  # seen by the policy so far
        # Of the newest row: counts this trainer's steps, those without signal too.
        self.row = training_client.step
        self._versions: list[str] = []  # of the rewards used so far, in order
        self._scored_by: str | None = None  # version of the newest

    def __repr__(self) -> str:
        client = self.training_client.training_client_id
        return f"RLVRTrainer({client}, {self.reward.name!r}, {self.algo!r}, {self.sampler.sampling!r})"

    @checked
    def run(
        self,
        *,
        steps: int,
        checkpoint_every: int | None = None,
        keep_last: int | None = None,
        keep_best: str | None = None,
        resume_from: str | None = None,
        name: str | None = None,
        tags: str | Sequence[str] = (),
        notes: str = "",
        show: bool = True,
    ) -> TrainingRun:
        """Start training and return at once.

        Args:
            steps: How many to take; a second call goes on with the next prompts.
            checkpoint_every: Save the state every so many steps, and after the last.
            keep_last: Of the checkpoints this run saved by itself, keep the newest so many; None keeps all.
            keep_best: Keep the one with the best value of this metric as well, for instance "eval/reward".
            resume_from: A checkpoint of a run like this one: go on where it stood; `steps` counts from its beginning.
            name: What the run is called, in `list_runs`, in the panel and in the legend of compared curves.
            tags: Words to find it by.
            notes: What there is to say of it; `run.describe(…)` changes any of the three.
            show: Show the live panel in a notebook.

        Raises:
            ValidationError: Fewer than one step.
        """
        if steps < 1:
            raise ValidationError(f"RLVRTrainer.run: steps={steps} must be at least 1.")
        begun_at = 0 if resume_from is not None else self.training_client.step
        check_schedule(self.training_client.config.optimizer, begun_at + steps, steps)
        return self.training_client.start_run(
            RLVRLoop(self, steps),
            planned_steps=steps,
            show=show,
            checkpoints=Checkpoints(checkpoint_every, keep_last, keep_best),
            resume_from=resume_from,
            name=name,
            tags=tags,
            notes=notes,
            started_with={
                "run": {
                    "kind": "rlvr",
                    "steps": steps,
                    "checkpoint_every": checkpoint_every,
                    "keep_last": keep_last,
                    "keep_best": keep_best,
                    "resume_from": resume_from,
                },
                **self._made_of(),
            },
        )

    def _made_of(self) -> dict[str, Any]:
        """Return, as plain data, what decides how this trainer trains."""
        config = getattr(self.algo, "config", None)
        options = config.model_dump(mode="json") if isinstance(config, Config) else {}
        held_out = None if self.held_out is None else len(self.held_out.specs)
        return {
            "trainer": {
                "prompts": len(self.prompts.specs),
                "prompts_per_step": self.prompts_per_step,
                "prompt_policy": repr(self.prompts.policy),
                "prompt_bias": bias_of(self.prompts.policy),
                "chat": self.sampler.chat,
                "eval_prompts": held_out,
                "eval_every": self.eval_every,
                "good_threshold": self.good_threshold,
                "reward_timeout": self.reward_timeout,
                "seed": self.seed,
            },
            "sampling": self.sampler.sampling.model_dump(mode="json"),
            "algo": {"kind": type(self.algo).__name__, **options},
            "reward" if isinstance(self.reward, Reward) else "environment": {
                "name": self.reward.name,
                "version": self.reward.version,
            },
        }

    def set_reward(self, reward: RewardSpec, **kwargs: Any) -> None:
        """Score with another function from the next step on; the metric `reward_version` marks where.

        What belonged to the old one is forgotten then: the algorithm's running baseline, the alarms' memory of
        rewards; a value head warms up anew.

        Args:
            reward: As for `RLVRTrainer`.
            kwargs: Keywords of the function.

        Raises:
            ValidationError: An unknown name or keyword, or a function with another signature.
        """
        if isinstance(self.reward, Environment):
            raise ValidationError(
                "The rewards of this trainer come from its environment: set_environment(…) takes another one."
            )
        self.reward = self._shaped(resolve_reward(reward, **kwargs))

    def set_environment(self, environment: EnvironmentSpec, **kwargs: Any) -> None:
        """Play with another environment from the next step on; the metric `reward_version` marks where.

        Args:
            environment: As for `RLVRTrainer`.
            kwargs: Keywords of its function.

        Raises:
            ValidationError: This trainer has a reward instead, or it is no environment.
        """
        if not isinstance(self.sampler, EnvironmentSampler):
            raise ValidationError(
                "This trainer has a reward, and no environment: set_reward(…) takes another one; for an environment "
                "make a trainer with environment=…."
            )
        self.reward = self.sampler.environment = self._punishing(resolve_environment(environment, **kwargs))

    @checked
    def rescore(self, last: int = 20, reward: RewardSpec | Environment | None = None) -> Rescored:
        """Ask what a reward says of the rollouts of the last steps, without sampling or training anything.

        An environment is played again over what the policy said; where it tells something else than it did, a
        conversation stays unscored, with the reason.

        Args:
            last: How many steps of the newest run, as far as their rollouts are still on the disk.
            reward: What scores, a reward or an environment; the trainer's own, as it is now, when None.

        Raises:
            ValidationError: There are no rollouts yet.
        """
        if self.store is None:
            raise ValidationError("There are no rollouts yet: start a run first.")
        chosen = self.reward if reward is None else reward
        if not isinstance(chosen, Environment):
            self._refuse_judge(chosen := resolve_reward(chosen))
        where = self.reward_timeout, self.reward_processes, self.reward_cluster
        return rescore_steps(self.store.last(last), chosen, *where)

    def evaluate(self) -> dict[str, float]:
        """Measure the policy on the held-out prompts, and wait for it.

        The random numbers are the same every time, so that what changes is the policy.

        Returns:
            `eval/reward` of sampled answers, `eval/rewards/NAME` of each function and part, `eval/greedy`, and with
            several samples `eval/pass@k`.

        Raises:
            ValidationError: There are no held-out prompts.
            RewardError: Nothing was scored.
        """
        if self.held_out is None:
            raise ValidationError(
                "There is nothing to evaluate on: give RLVRTrainer eval_prompts, or held_out=0.1."
            )
        sampled, greedy = (handle.result() for handle in self.held_out.submit(FutureHandle.result))
        if isinstance(self.reward, Environment):
            values = self.held_out.measure(sampled, greedy, partial(report, self.reward))
            self.sampler.close()
        else:
            with self.new_scorer(self.reward) as scorer:
                values = self.held_out.measure(sampled, greedy, scorer.score)
        check_scored(sampled, self.reward)
        return known(values)

    def new_scorer(self, reward: Reward) -> Scorer:
        """Return what scores by a reward as this trainer does it; to be closed by whoever asked for it."""
        return Scorer(reward, self.reward_timeout, self.reward_processes, self.reward_cluster)

    def _left_behind(self) -> Freed:
        """Return what a notebook's output history keeps of this trainer when nothing else refers to it."""
        return Freed(repr(self))

    # what the algorithm asks for besides an update

    @property
    def _asked_for(self) -> PolicyConfig:
        config = getattr(self.algo, "config", None)
        return config if isinstance(config, PolicyConfig) else REINFORCEConfig()

    def _policy_of(self, spec: PromptPolicySpec | None) -> PromptPolicy:
        """Return the policy that chooses prompts: what was asked for, with the replacing that the algorithm asks for.

        Raises:
            ValidationError: No such policy, or privately one that looks at rewards.
        """
        policy, rounds = (
            prompt_policy_of("uniform" if spec is None else spec),
            self._asked_for.resample_zero_signal,
        )
        if rounds and not replacements(policy):
            policy = DynamicSampling(rounds=rounds, base=policy, on="true")
        looks = getattr(policy, "reads_rewards", True) or replacements(policy)
        if looks and PRIVATE in self.training_client.capabilities:
            raise ValidationError(
                f"prompt_policy={as_given(policy)} chooses prompts by what private answers scored. Which records take "
                f"part would depend on the others, and no noise covers that choice: with differential privacy leave "
                f"prompt_policy out."
            )
        return policy

    def _shaped(self, reward: Reward) -> Reward:
        """Return a reward with the punishment of long answers that the algorithm asks for beside it, as a part.

        A reward that has a part "overlong" already stays as it is.

        Raises:
            ValidationError: There is no length to punish.
        """
        self._refuse_judge(reward)
        names = {reward.name, *(part.name for part in reward.parts)}
        if not self._asked_for.overlong or "overlong" in names:
            return reward
        longest, cache = self._too_long()
        punishment = Part(resolve_reward("overlong", max_length=longest, cache=cache), name="overlong")
        own = reward.parts if reward.true is not None else (Part(reward, name=reward.name, true=True),)
        return resolve_reward([*own, punishment])

    def _punishing(self, environment: Environment) -> Environment:
        """Return an environment that punishes long turns likewise, where the algorithm asks for it.

        Raises:
            ValidationError: There is no length to punish.
        """
        if not self._asked_for.overlong or environment.name == "overlong":
            return environment
        return replace(environment, overlong=self._too_long())

    def _too_long(self) -> tuple[int, int]:
        """Return at how many tokens the punishment is whole, and over how many it grows.

        Raises:
            ValidationError: All answers are as long.
        """
        longest = self.sampler.sampling.max_new_tokens
        if self.sampler.sampling.ignore_end or longest < 2:
            raise ValidationError(
                "overlong punishes answers for being longer than others, and here all are as long (fixed_length, or "
                "max_new_tokens=1): PPO('dapo', overlong=0)."
            )
        return longest, min(max(1, round(self._asked_for.overlong * longest)), longest - 1)

    def _refuse_judge(self, reward: Reward) -> None:
        """Refuse to send what differential privacy protects to somebody else.

        Raises:
            ValidationError: The reward is a judge, and the client is private.
        """
        if reward.judged and PRIVATE in self.training_client.capabilities:
            raise ValidationError(
                f"The reward {as_given(reward.name)} sends prompts and answers to a judge, where no ε covers them, and "
                f"this client trains with differential privacy. Score with a function that runs here."
            )

    # what a run and its checkpoints need

    def check_prompts(self) -> None:
        """Refuse prompts that the model cannot take, all of them before the first is dealt; waits for the model.

        Raises:
            ValidationError: Says which row.
        """
        if isinstance(self.sampler, EnvironmentSampler):
            return  # what its rows become is known once it is played
        held_out = self.held_out.specs if self.held_out is not None else []
        for what, specs in (("prompts", self.prompts.specs), ("eval_prompts", held_out)):
            check_fit(self.training_client, specs, self.sampler.sampling, self.sampler.chat, what)

    def number_of(self, version: str) -> int:
        """Return the number of a reward's version: 1 for the first that was used, and so on."""
        if version not in self._versions:
            self._versions.append(version)
        return self._versions.index(version) + 1

    def scored_by(self, version: str) -> None:
        """Take note of the reward that scores this step; what is known of another one's is of no use any more."""
        if self._scored_by not in (None, version):
            self.alarms.forget_reward()
            self.prompts.record.forget_rewards()
            if isinstance(self.algo, RemembersRewards):
                self.algo.forget_reward()
        self._scored_by = version

    @property
    def imprecise(self) -> bool:
        """Whether the policy computes in bfloat16 on a CPU, as far as its core says."""
        core = self.training_client.refresh()
        return (core.device, core.precision) == ("cpu", "bfloat16")

    def position(self) -> dict[str, Any]:
        """Return, as plain data, where prompts, rollout seeds, rows, baselines and alarms stand."""
        position = {
            "prompts": self.prompts.position,
            "draws": self.sampler.draws,
            "row": self.row,
            "tokens": self.tokens,
            "algo": dict(self.algo.state_dict()),
            "alarms": self.alarms.state_dict(),
            "measured": self.prompts.record.state_dict(),
            "reward_versions": list(self._versions),
            "scored_by": self._scored_by,
        }
        private = PRIVATE in self.training_client.capabilities
        return released(position) if private else position

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to such a place; versions of the reward that came later keep numbers of their own."""
        self.prompts.position, self.sampler.draws = position["prompts"], position["draws"]
        self.row = position["row"]
        if "algo" in position:  # a private client's holds nothing that was measured: here that stays as it is
            self.tokens = position["tokens"]
            self.algo.load_state_dict(position["algo"])
            self.alarms.load_state_dict(position["alarms"])
            # Those of version 0.3 and before know of no measuring.
            self.prompts.record.load_state_dict(position.get("measured", {}))
        versions = position.get("reward_versions", ())
        self._versions = list(dict.fromkeys([*versions, *self._versions]))
        # Version 0.1 kept no such key.
        self._scored_by = position.get("scored_by", versions[-1] if versions else None)


def judge_of(reward: RewardSpec | None, environment: EnvironmentSpec | None) -> Reward | Environment:
    """Return what rewards the rollouts: the one of both that was given.

    Raises:
        ValidationError: Both were, or none.
    """
    if environment is None and reward is None:
        raise ValidationError(
            "RLVRTrainer needs a reward, fn(prompt, response, meta) -> float, or environment=… for several turns."
        )
    if environment is None:
        return resolve_reward(reward)
    if reward is not None:
        raise ValidationError(
            f"RLVRTrainer: environment={as_given(environment)} rewards its conversations itself, and "
            f"reward={as_given(reward)} was given besides: leave one out. Inside the environment, call the reward: "
            f"`return rlvr.resolve_reward(…)(prompt, said, row)`; further numbers are parts of an rlvr.Outcome."
        )
    return resolve_environment(environment)


def check_options(
    eval_prompts: object,
    held_out: object,
    eval_every: int | None,
    on_reward_errors: str,
    good_threshold: object,
    seed: object,
) -> None:
    """Refuse what no run could be made of.

    Raises:
        ValidationError: Says which option, and what it takes.
    """
    if eval_prompts is not None and held_out is not None:
        raise ValidationError("Give eval_prompts, or held_out to take them from the prompts: not both.")
    if eval_every is not None and ((eval_prompts is None and held_out is None) or eval_every < 1):
        raise ValidationError(
            f"eval_every={eval_every} needs eval_prompts or held_out, and a number of steps ≥ 1."
        )
    if on_reward_errors not in ("pause", "fail"):
        raise ValidationError(
            f"RLVRTrainer: on_reward_errors={as_given(on_reward_errors)} must be 'pause' or 'fail'."
        )
    if not isinstance(good_threshold, int | float) or not math.isfinite(good_threshold):
        raise ValidationError(
            f"RLVRTrainer: good_threshold={as_given(good_threshold)} must be a finite number."
        )
    if not isinstance(seed, int) or seed < 0:
        raise ValidationError(f"RLVRTrainer: seed={as_given(seed)} must be a whole number, 0 or more.")
