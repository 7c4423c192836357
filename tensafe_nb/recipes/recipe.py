"""Recipes: a training run as a YAML file describes it; `load_config` names the line of whatever is wrong."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal, Self

import pydantic

from tensafe_nb.checks import checked
from tensafe_nb.client import TrainingClient
from tensafe_nb.config import (
    Config,
    Keywords,
    LossConfig,
    Positive,
    Precision,
    SamplingEngine,
    TextList,
    TrainingConfig,
)
from tensafe_nb.data import Batches, OnBadRows, Rows
from tensafe_nb.data.poisson import PoissonDraws
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.recipes.yaml_file import Keys, Problem, YamlFile, to_yaml
from tensafe_nb.registry import load_dotted
from tensafe_nb.rlvr import Environment, RLVRTrainer, resolve_environment, resolve_reward
from tensafe_nb.rlvr.algorithms.policy_gradient import Algorithm, algorithm_of
from tensafe_nb.rlvr.algorithms.presets import options_of
from tensafe_nb.rlvr.rollouts.choosing import PolicyName
from tensafe_nb.runs.run import TrainingRun

# Where a file says what: keys in the file → fields of a Recipe.
LAYOUT: dict[Keys, Keys] = {
    ("training", "mode"): ("mode",),
    ("training", "steps"): ("steps",),
    ("training", "epochs"): ("epochs",),
    ("training", "eval_every"): ("eval_every",),
    ("training", "checkpoint_every"): ("checkpoint_every",),
    ("training", "keep_last"): ("keep_last",),
    ("training", "keep_best"): ("keep_best",),
    ("training", "on_bad_rows"): ("on_bad_rows",),
    ("training", "seed"): ("training", "seed"),
    ("model", "model_ref"): ("training", "model_ref"),
    ("model", "dtype"): ("training", "dtype"),
    ("model", "device"): ("training", "device"),
    ("model", "value_head"): ("training", "value_head"),
    ("model", "ignore_weights"): ("training", "ignore_weights"),
    ("model", "resize_embeddings"): ("training", "resize_embeddings"),
    ("lora",): ("training", "lora_config"),
    ("dp",): ("training", "dp_config"),
    ("optimizer",): ("training", "optimizer"),
    ("batch", "batch_size"): ("training", "batch_size"),
    ("batch", "gradient_accumulation_steps"): ("training", "gradient_accumulation_steps"),
    ("batch", "micro_batch_tokens"): ("training", "micro_batch_tokens"),
    ("batch", "gradient_checkpointing"): ("training", "gradient_checkpointing"),
    ("batch", "max_length"): ("max_length",),
    ("batch", "truncate"): ("truncate",),
    ("loss",): ("training", "loss"),
    ("rlvr",): ("rlvr",),
}
SFT_ONLY: set[Keys] = {
    ("epochs",),
    ("max_length",),
    ("truncate",),
    ("training", "batch_size"),
    ("training", "gradient_accumulation_steps"),
    ("training", "loss"),
}
SHORT = {"model": "model_ref", "loss": "type"}  # `model: builtin:tiny` is `model: {model_ref: builtin:tiny}`


class RewardConfig(Config):
    """A reward function by name.

    Args:
        type: A registered name, or "package.module:attribute".
        kwargs: Its keywords beyond prompt, response and meta.
    """

    type: str
    kwargs: Keywords = pydantic.Field(default_factory=dict)


class EnvironmentConfig(Config):
    """An environment by name: what the policy speaks with, for several turns.

    Args:
        type: A registered name, or "package.module:attribute".
        kwargs: Keywords of its function beyond the row.
        max_turns: How often the policy speaks at most, where that is to be different.
        max_tokens: How many tokens it may say in all its turns, likewise.
    """

    type: str
    kwargs: Keywords = pydantic.Field(default_factory=dict)
    max_turns: Positive | None = None
    max_tokens: Positive | None = None

    def environment(self) -> Environment:
        """Return the environment."""
        made = resolve_environment(self.type, **self.kwargs)
        return replace(
            made, max_turns=self.max_turns or made.max_turns, max_tokens=self.max_tokens or made.max_tokens
        )


class AlgoConfig(Config):
    """How rewards become optimiser steps.

    Args:
        type: "reinforce", "ppo", or a preset: "grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo", "reinforce_pp",
            "reinforce_pp_baseline", "ppo_value".
        kwargs: Fields of REINFORCEConfig or PPOConfig that are to be different.
    """

    type: str = "reinforce"
    kwargs: Keywords = pydantic.Field(default_factory=dict)

    @pydantic.field_validator("type")
    @classmethod
    def _type_is_known(cls, name: str) -> str:
        options_of(name)  # raises
        return name

    @pydantic.field_validator("kwargs")
    @classmethod
    def _kwargs_fit(cls, kwargs: dict[str, Any], info: pydantic.ValidationInfo) -> dict[str, Any]:
        if "type" in info.data:
            options_of(info.data["type"]).replace(**kwargs)
        return kwargs

    def algorithm(self) -> Algorithm:
        """Return the algorithm."""
        return algorithm_of(options_of(self.type).replace(**self.kwargs))


class RLVRConfig(Config):
    """Reinforcement learning with verifiable rewards: what `RLVRTrainer` is made of.

    Args:
        reward: How an answer is scored.
        environment: What the policy speaks with for several turns, and what rewards it; instead of a reward.
        algo: How to update.
        prompt: The column that is asked, like the four after it as for `RLVRTrainer`.
        answer: The column that holds the right answer.
        answer_after: What stands before the answer in it: "####" for GSM8K.
        template: A text that becomes the prompt, with names of columns in braces.
        held_out: A share of the prompts to evaluate on and never to train on.
        prompt_policy: Which prompts a step takes: "uniform", "curriculum", "adaptive" or "dynamic".
        prompts_per_step: Prompts drawn for each step.
        group_size: Rollouts per prompt.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the rollouts.
        stop: Strings that end a completion.
        fixed_length: Every completion has `max_new_tokens`.
        precision: Of the weights that sample; as for `RLVRTrainer`.
        engine: What computes the rollouts; as for `RLVRTrainer`.
        eval_samples: Sampled answers per held-out prompt.
        eval_pass_at: The k of `eval/pass@k`; as for `RLVRTrainer`.
        good_threshold: Score from which an answer counts as right; as for `RLVRTrainer`.
    """

    reward: RewardConfig | None = None
    environment: EnvironmentConfig | None = None
    algo: AlgoConfig = AlgoConfig()
    prompt: str | None = None
    answer: str | None = None
    answer_after: str | None = None
    template: str | None = None
    held_out: float | None = pydantic.Field(default=None, gt=0.0, lt=1.0)
    prompt_policy: PolicyName | None = None
    prompts_per_step: Positive = 16
    group_size: Positive = 8
    max_new_tokens: Positive = 64
    temperature: pydantic.PositiveFloat = 1.0
    stop: TextList = ()
    fixed_length: bool = False
    precision: Precision = "exact"
    engine: SamplingEngine = "torch"
    eval_samples: Positive = 1
    eval_pass_at: tuple[Positive, ...] | None = None
    good_threshold: float = 0.5

    @pydantic.field_validator("reward", "environment", "algo", mode="before")
    @classmethod
    def _a_word_is_the_type(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @pydantic.field_validator("algo", mode="before")
    @classmethod
    def _none_is_the_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @pydantic.model_validator(mode="after")
    def _one_of_both_rewards(self) -> Self:
        if (self.reward is None) == (self.environment is None):
            raise ValueError(
                "an environment rewards its conversations itself: name a reward or an environment, and not both"
                if self.reward is not None
                else "name a reward, or an environment for several turns"
            )
        return self


class Recipe(Config):
    """What to train and how, as a file says it; made by `load_config`.

    Args:
        mode: "sft" learns from examples, "rlvr" from rewards.
        training: What the training client is made of. In mode rlvr dtype "auto" is float32 on a CPU.
        steps: Optimiser steps; needed in mode rlvr.
        epochs: Passes over the rows, in mode sft; 1 when `steps` is not given either.
        eval_every: Steps between evaluations on held-out rows.
        checkpoint_every: Save the state every so many steps, and after the last.
        keep_last: Keep the newest so many of these checkpoints; None keeps all.
        keep_best: Keep the one with the best value of this metric as well.
        max_length: How many tokens a row may have, in mode sft; a longer one is refused.
        truncate: Cut longer rows at the end instead.
        on_bad_rows: "raise" refuses the first row that cannot be used, "skip" leaves such rows out and says so.
        rlvr: Rewards and rollouts, in mode rlvr.

    Example:
        >>> recipe = load_config("recipe.yaml")
        >>> tc = service.create_training_client(recipe.training)
        >>> run = recipe.start(tc, "rows.jsonl")
    """

    mode: Literal["sft", "rlvr"] = "sft"
    training: TrainingConfig = pydantic.Field(default=TrainingConfig(), validate_default=True)
    steps: Positive | None = None
    epochs: Positive | None = None
    eval_every: Positive | None = None
    checkpoint_every: Positive | None = None
    keep_last: Positive | None = None
    keep_best: str | None = None
    max_length: Positive | None = None
    truncate: bool = False
    on_bad_rows: OnBadRows = "raise"
    rlvr: RLVRConfig | None = None

    @pydantic.field_validator("training")
    @classmethod
    def _rewards_take_float32_on_a_cpu(
        cls, training: TrainingConfig, info: pydantic.ValidationInfo
    ) -> TrainingConfig:
        """In bfloat16 a CPU samples from one policy and trains another; how far apart, a run measures at its start."""
        if info.data.get("mode") != "rlvr" or training.dtype != "auto":
            return training
        if training.device != "cpu" and not importlib.util.find_spec("torch"):
            return training  # a core elsewhere knows its device
        is_cpu = load_dotted("tensafe_nb.engine.models.load:is_cpu")
        return training.replace(dtype="float32") if is_cpu(training.device) else training

    @pydantic.model_validator(mode="after")
    def _nothing_goes_unread(self) -> Self:
        problems = list(self._unread())
        if problems:
            raise ValidationError(" ".join(text for _, text in problems), details={"problems": problems})
        return self

    def _unread(self) -> Iterator[Problem]:
        if self.mode == "sft":
            if self.rlvr is not None:
                yield ("rlvr",), "The section rlvr is for mode rlvr, and the mode is sft."
            return
        if self.rlvr is None:
            yield ("mode",), "Mode rlvr needs a section rlvr that names a reward, or an environment."
        # "not read" is told by value: whoever writes the default out means nothing by it
        values: Any = self.model_dump()
        defaults: Any = Recipe.model_construct().model_dump()
        for place, at in LAYOUT.items():
            if at in SFT_ONLY and reduce(getitem, at, values) != reduce(getitem, at, defaults):
                yield at, f"{'.'.join(map(str, place))} is not read in mode rlvr: leave it out."

    def start(
        self,
        training_client: TrainingClient,
        data: Rows,
        eval_data: Rows | None = None,
        *,
        resume_from: str | None = None,
        name: str | None = None,
        tags: str | Sequence[str] = (),
        notes: str = "",
        show: bool = True,
    ) -> TrainingRun:
        """Train a client made of `training`. Returns at once with the run.

        Args:
            training_client: What to train.
            data: Rows, as for `data.batches`: examples in mode sft, prompts with their columns in mode rlvr.
            eval_data: Held-out rows of the same kind.
            resume_from: A checkpoint of a run of this recipe on these rows: go on where it stood.
            name: What the run is called; see `TrainingClient.fit`, as for `tags` and `notes`.
            tags: Words to find it by.
            notes: What there is to say of it.
            show: Show the progress.

        Raises:
            ValidationError: Rows, steps or a function named in the recipe that do not fit.
        """
        takes_some = self.rlvr is not None and self.rlvr.held_out is not None
        if self.eval_every is not None and eval_data is None and not takes_some:
            raise ValidationError(
                f"training.eval_every is {self.eval_every}, but there are no held-out rows."
            )
        train = train_on_rows if self.rlvr is None else train_on_rewards
        return train(
            self,
            training_client,
            data,
            eval_data,
            checkpoint_every=self.checkpoint_every,
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            resume_from=resume_from,
            name=name,
            tags=tags,
            notes=notes,
            show=show,
        )

    def to_yaml(self) -> str:
        """Return the text of a file that `load_config` reads as this recipe.

        Raises:
            ValidationError: A keyword holds what YAML cannot say, such as a Python function.
        """
        values: Any = self.model_dump()
        document: dict[str | int, Any] = {}
        for place, at in LAYOUT.items():
            value = reduce(getitem, at, values)
            if value is not None:
                section = document if len(place) == 1 else document.setdefault(place[0], {})
                section[place[-1]] = value
        return to_yaml(document)


def train_on_rows(
    recipe: Recipe, client: TrainingClient, data: Rows, eval_data: Rows | None, **how: Any
) -> TrainingRun:
    """Fit a client to rows; `how` says what is saved and shown."""
    reading: dict[str, Any] = {
        "max_length": recipe.max_length,
        "truncate": recipe.truncate,
        "on_bad_rows": recipe.on_bad_rows,
    }
    held_out = None if eval_data is None else client.batches(eval_data, **reading)
    batches: Batches | PoissonDraws
    if "differential_privacy:poisson" in client.capabilities:
        batches = client.dp_batches(data, **reading)
    else:
        batches = client.batches(data, seed=recipe.training.seed, **reading)
    return client.fit(
        batches,
        epochs=recipe.epochs,
        steps=recipe.steps,
        eval_batches=held_out,
        eval_every=recipe.eval_every,
        **how,
    )


def train_on_rewards(
    recipe: Recipe, client: TrainingClient, prompts: Rows, eval_prompts: Rows | None, **how: Any
) -> TrainingRun:
    """Reinforce a client on prompts, as the section rlvr says; `how` says what is saved and shown."""
    rlvr = recipe.rlvr
    assert rlvr is not None  # else the recipe has rows
    if recipe.steps is None:
        raise ValidationError("Mode rlvr needs a number of steps, and training.steps is not given.")
    trainer = RLVRTrainer(
        client,
        prompts,
        None if rlvr.reward is None else resolve_reward(rlvr.reward.type, **rlvr.reward.kwargs),
        rlvr.algo.algorithm(),
        environment=None if rlvr.environment is None else rlvr.environment.environment(),
        eval_prompts=eval_prompts,
        eval_every=recipe.eval_every,
        seed=recipe.training.seed,
        on_bad_rows=recipe.on_bad_rows,
        on_reward_errors="fail",  # nobody sits before a file: a pause would wait for ever
        **{name: value for name, value in rlvr if name not in ("reward", "environment", "algo")},
    )
    return trainer.run(steps=recipe.steps, **how)


@checked
def load_config(path: str | Path) -> Recipe:
    """Read a training run from a YAML file.

    Sections: `training` (mode, steps, epochs, eval_every, seed), `model`, `lora`, `optimizer`, `batch`, `dp`, `loss`,
    `rlvr`; all have defaults. Reading a file runs no code of yours: what it names as "package.module:attribute"
    is imported when training starts.

    Args:
        path: The file.

    Raises:
        ValidationError: An unknown key, a wrong value, or no such file; says the line and the nearest spelling.
    """
    file = YamlFile.read(Path(path))
    file.refuse(misplaced(file.data))
    try:
        recipe = Recipe(**recipe_fields(file.data))
    except ValidationError as error:
        problems: list[Problem] = error.details["problems"]
        raise file.error([(file_keys(at), text) for at, text in problems]) from None
    file.refuse(unknown_functions(recipe))
    return recipe


def misplaced(data: Any) -> Iterator[Problem]:
    """Find what has no place in a recipe."""
    if not isinstance(data, Mapping):
        yield (), f"A recipe is a mapping of sections; this is {'empty' if data is None else repr(data)}."
        return
    sections = {str(place[0]) for place in LAYOUT}
    for section, value in data.items():
        if section not in sections:
            yield (
                (str(section),),
                f"There is no section {as_given(section)}.{nearest(str(section), sections)}",
            )
        else:
            yield from misplaced_keys(section, value)


def misplaced_keys(section: str, value: Any) -> Iterator[Problem]:
    """Find what has no place in a section."""
    keys = [str(place[1]) for place in LAYOUT if place[0] == section and len(place) == 2]
    if not keys or (section in SHORT and isinstance(value, str)):
        return
    if not isinstance(value, Mapping):
        yield (
            (section,),
            f"The section {section} is a mapping of {', '.join(keys)}; this is {as_given(value)}.",
        )
        return
    for key in value:
        if key not in keys:
            problem = f"The section {section} has no key {as_given(key)}.{nearest(str(key), keys)}"
            yield (section, str(key)), problem


def recipe_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the file's sections into the fields of a Recipe."""
    fields: dict[Any, Any] = {"training": {}}
    for place, at in LAYOUT.items():
        section = data.get(str(place[0]), {})
        if isinstance(section, str) and place[0] in SHORT:
            section = {SHORT[str(place[0])]: section}
        owner = fields if len(at) == 1 else fields["training"]
        if len(place) == 1 and place[0] in data:
            owner[at[-1]] = section
        elif len(place) == 2 and place[1] in section:
            owner[at[-1]] = section[place[1]]
    return fields


def file_keys(at: Keys) -> Keys:
    """Turn fields of a Recipe into keys of the file."""
    return next(
        ((*keys, *at[len(field) :]) for keys, field in LAYOUT.items() if at[: len(field)] == field), ()
    )


def unknown_functions(recipe: Recipe) -> Iterator[Problem]:
    """Find what names no loss or reward. Only the core knows its losses: without torch here, it will say."""
    if recipe.rlvr is not None:
        if recipe.rlvr.reward is not None:
            yield from _unresolved(("rlvr", "reward"), recipe.rlvr.reward, resolve_reward)
        if recipe.rlvr.environment is not None:
            yield from _unresolved(("rlvr", "environment"), recipe.rlvr.environment, resolve_environment)
    elif importlib.util.find_spec("torch"):
        from tensafe_nb.losses import resolve_loss

        yield from _unresolved(("loss",), recipe.training.loss, resolve_loss)


def _unresolved(
    at: Keys, named: LossConfig | RewardConfig | EnvironmentConfig, resolve: Callable[..., Any]
) -> Iterator[Problem]:
    if ":" in named.type:
        return  # code of the user's: nothing of it is imported before training starts
    calls: list[tuple[Keys, dict[str, Any]]] = [((*at, "type"), {})]
    # by itself first, then with each keyword alone: so the line of the wrong one is known
    calls += [((*at, "kwargs", key), {key: value}) for key, value in named.kwargs.items()]
    for place, kwargs in calls:
        try:
            resolve(named.type, **kwargs)
        except ValidationError as error:
            yield place, str(error)
            return
