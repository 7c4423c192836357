"""Every public call with wrong values: answered, or refused by an error of our family; never a foreign one, never "
f"a hang.

The calls are generated: each parameter of each public callable takes each wild value in turn, the others keep values
that fit. A wrong *signature* stays Python's `TypeError`; a wrong value is not one.
"""

import inspect
import random
import resource
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, get_origin

import numpy as np
import pytest
import torch

import tensafe_nb as tn
from tensafe_nb import data, rlvr
from tensafe_nb.data.text import Example
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup, Trajectory

BATCH = {"input_ids": [[5, 6, 7, 8], [9, 10, 11, 12]]}
PROMPT = "12+34="
IN_CI = 0.15  # of the calls; all of them in soak
MEMORY = (
    5 << 30
)  # bytes on top of what the process has: a call that would take the machine's fails in it instead


class Unspeakable:
    """Nothing about it can be asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


def deep(levels: int = 2000) -> Any:
    inner: Any = 1
    for _ in range(levels):
        inner = [inner]
    return inner


def ring() -> Any:
    made: list[Any] = []
    made.append(made)
    return made


def asks_once(row: Any) -> Any:
    """An environment."""
    yield PROMPT
    return 1.0


class Tries:
    """An environment of TRL's kind, and a data set of reasoning-gym's."""

    def reset(self, **columns: Any) -> None: ...

    def get_reward(self) -> float:
        return 1.0

    def score_answer(self, answer: Any, entry: Any) -> float:
        return 1.0


def add(a: int, b: int) -> int:
    """A tool."""
    return a + b


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield (number := number + 1)


class Endless:
    """A sequence, says its length; and there is no end to it."""

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> int:
        return index


def tangle() -> Any:
    made: list[Any] = []
    made += [made, made]  # 2 ** n paths of length n
    return made


WILD: Mapping[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "10**30": lambda: 10**30,
    "10**5000": lambda: 10**5000,
    "0.5": lambda: 0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1j": lambda: 1j,
    "''": lambda: "",
    "a word": lambda: "wild",
    "a surrogate": lambda: "\ud800",
    "a NUL": lambda: "a\x00b",
    "a long text": lambda: "x" * 100_000,
    "bytes": lambda: b"\xff\x00",
    "[]": list,
    "{}": dict,
    "()": tuple,
    "a set": lambda: {1, "a"},
    "[None]": lambda: [None],
    "[[]]": lambda: [[]],
    "[['a', 1], {}]": lambda: [["a", 1], {}],
    "{None: nan}": lambda: {None: float("nan")},
    "deep": deep,
    "ring": ring,
    "tangle": tangle,
    "a dict in itself": lambda: (lambda made: made.update(a=made) or made)({}),
    "range(10**12)": lambda: range(10**12),
    "range(10**30)": lambda: range(10**30),
    "endless": endless,
    "an endless sequence": Endless,
    "-10**5000": lambda: -(10**5000),
    "a long double": lambda: np.longdouble(0.5),
    "no date": lambda: np.datetime64("nat"),
    "a tensor": lambda: torch.full((2, 2), float("nan")),
    "out of the folder": lambda: "../../../etc/passwd",
    "markup": lambda: "<script>\x1b[2J</script>",
    "object": object,
    "unspeakable": Unspeakable,
    "a class": lambda: Unspeakable,
    "a function": lambda: lambda *a, **k: Unspeakable(),
    "an array": lambda: np.array([[1.5, np.nan]]),
    "an empty array": lambda: np.zeros((0, 3)),
    "an array of objects": lambda: np.array([object(), "a"], dtype=object),
    "a huge view": lambda: np.broadcast_to(np.int64(1), (10**6, 10**6)),
    "a path": lambda: Path("/no/such/place"),
    "a folder": lambda: Path("/"),
    "an exception": lambda: ValueError("x"),
}


@dataclass(frozen=True)
class Of:
    """An argument that only the world can give."""

    make: Callable[["World"], Any]


TOKENIZER, CLIENT = Of(lambda w: w.tc.tokenizer), Of(lambda w: w.tc)


@dataclass(frozen=True)
class Call:
    """A public callable, and arguments that fit it.

    Attributes:
        make: Gives the callable; it may need a client.
        fitting: Its arguments.
        skip: Parameters for which a wild value is a fair order that takes for ever or ends the test's own world.
    """

    make: Callable[["World"], Callable[..., Any]]
    fitting: Mapping[str, Any] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()


class World:
    """A service with a small client that has taken a step and saved a state; made when first asked for."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.folder = folder
        self.service = stack.enter_context(tn.ServiceClient())
        self.tc = self._client(lora_config=tn.LoRAConfig(rank=2))
        self.saved = self.tc.save_state(name="fits").result()
        self.private = self._client(
            lora_config=tn.LoRAConfig(rank=2), dp_config=tn.DPConfig(dataset_size=50, target_epsilon=None)
        )
        self.run = self.tc.fit([tn.BatchData(**BATCH)], steps=1, show=False)
        self.run.result()
        self.done = self.tc.forward(BATCH)
        self.done.result()
        self.pulled = self.service.pull_artifact("fits", to=folder / "pulled.tsnb")
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text("training: {mode: sft}\n")

    def save(self) -> str:
        """Return the id of a new artifact."""
        return self.tc.save_state().result().artifact_id

    def trainer(self) -> rlvr.RLVRTrainer:
        """Return a trainer that has taken a step."""
        trainer = rlvr.RLVRTrainer(self.tc, [PROMPT], "length_penalty", **SMALL)
        run = trainer.run(steps=1, show=False)
        run.result(timeout=60)
        return trainer

    def _client(self, **fields: Any) -> tn.TrainingClient:
        return self.service.create_training_client(model_ref="builtin:sums", batch_size=2, **fields)


def trajectories() -> rlvr.TrajectoryBatch:
    rollouts = [Trajectory(PROMPT, "046", tokens=[3, 4], logprobs=[-0.1, -0.2], reward=1.0) for _ in range(2)]
    return rlvr.TrajectoryBatch([RolloutGroup("p", PROMPT, rollouts)], tn.SamplingConfig())


PACKED = [Trajectory(PROMPT, "046", prompt_tokens=[5, 6], tokens=[3, 4], reward=1.0) for _ in range(2)]
MADE_BY_US = (
    tn.TrainingClient, tn.FutureHandle, tn.TrainingRun, tn.ModelChat, data.Encoded, data.Example, rlvr.UpdateResult,
    rlvr.Trajectory, rlvr.TrajectoryBatch, rlvr.RolloutGroup, rlvr.Reward, rlvr.Part, rlvr.ScoreReport,
    rlvr.RewardPreview, rlvr.TurnRecord, rlvr.Rehearsal, rlvr.PromptRecord, rlvr.PromptPolicy, tn.losses.Loss,
    tn.losses.LossOutputs, data.check_fit, data.padding_of,
)  # fmt: skip
NEED_A_PACKAGE = (
    rlvr.verifiers_environment,
    rlvr.verifiers_prompts,
)  # and what fits needs it too: tests/soak
SMALL: Any = {"group_size": 2, "prompts_per_step": 1, "max_new_tokens": 2, "temperature": 1.0}
ROWS = [{"prompt": PROMPT, "completion": "046"}] * 3


def no_run(service: tn.ServiceClient, seed: int) -> None:
    """What an arm is that returns nothing."""


CALLS: Mapping[str, Call] = {
    # values
    "TrainingConfig": Call(lambda w: tn.TrainingConfig),
    "LoRAConfig": Call(lambda w: tn.LoRAConfig),
    "OptimizerConfig": Call(lambda w: tn.OptimizerConfig),
    "StepConfig": Call(lambda w: tn.StepConfig),
    "SamplingConfig": Call(lambda w: tn.SamplingConfig),
    "LossConfig": Call(lambda w: tn.LossConfig),
    "DPConfig": Call(lambda w: tn.DPConfig, {"dataset_size": 50}),
    "Recipe": Call(lambda w: tn.Recipe),
    "full_tracebacks": Call(lambda w: tn.full_tracebacks, {"show": False}),
    "load_config": Call(lambda w: tn.load_config, {"path": Of(lambda w: w.recipe)}),
    "BatchData": Call(lambda w: tn.BatchData, BATCH),
    "BatchData(extras)": Call(
        lambda w: lambda extra: tn.BatchData(**BATCH, extra=extra), {"extra": [[1] * 4] * 2}
    ),
    "REINFORCEConfig": Call(lambda w: rlvr.REINFORCEConfig),
    "PPOConfig": Call(lambda w: rlvr.PPOConfig),
    "ValueOptions": Call(lambda w: rlvr.ValueOptions),
    "REINFORCE": Call(lambda w: rlvr.REINFORCE),
    "PPO": Call(lambda w: rlvr.PPO),
    # data
    "data.read_rows": Call(lambda w: data.read_rows, {"source": ROWS}),
    "data.split_rows": Call(
        lambda w: data.split_rows, {"source": [{"prompt": str(n)} for n in range(9)], "held_out": 0.5}
    ),
    "data.read_prompts": Call(lambda w: data.read_prompts, {"prompts": [PROMPT]}),
    "data.batches": Call(
        lambda w: data.batches, {"source": ROWS, "tokenizer": TOKENIZER}, frozenset({"tokenizer"})
    ),
    "data.encode": Call(
        lambda w: data.encode, {"row": ROWS[0], "tokenizer": TOKENIZER}, frozenset({"tokenizer"})
    ),
    "data.collate": Call(
        lambda w: data.collate, {"examples": [Example((1, 2), (2, -100))], "pad_token_id": 0}
    ),
    "data.Batches": Call(
        lambda w: data.Batches, {"examples": [Example((1, 2), (2, -100))], "batch_size": 1, "pad_token_id": 0}
    ),
    # registries
    "losses.resolve_loss": Call(lambda w: tn.losses.resolve_loss, {"spec": "token_ce"}),
    "losses.register_loss": Call(lambda w: tn.losses.register_loss, {"name": "a_wild_loss"}),
    "rlvr.resolve_reward": Call(lambda w: rlvr.resolve_reward, {"spec": "exact_match"}),
    "rlvr.register_reward": Call(lambda w: rlvr.register_reward, {"name": "a_wild_reward"}),
    "rlvr.register_preset": Call(
        lambda w: rlvr.register_preset,
        {"name": "a_wild_preset", "config": rlvr.PPOConfig(), "overwrite": True},
    ),
    "rlvr.register_advantage": Call(lambda w: rlvr.register_advantage, {"name": "a_wild_advantage"}),
    "rlvr.rescore": Call(lambda w: rlvr.rescore, {"batch": trajectories(), "reward": "length_penalty"}),
    "rlvr.preview_reward": Call(
        lambda w: rlvr.preview_reward, {"batch": trajectories(), "reward": "length_penalty"}
    ),
    "rlvr.pack": Call(lambda w: rlvr.pack, {"trajectories": PACKED, "extras": {"weights": [[1.0, 1.0]] * 2}}),
    "rlvr.unpack": Call(lambda w: rlvr.unpack, {"trajectories": PACKED, "values": [[0.0, 1.0, 2.0]] * 2}),
    "rlvr.loss_mask": Call(lambda w: rlvr.loss_mask, {"batch": trajectories()}),
    "rlvr.token_weights": Call(
        lambda w: rlvr.token_weights, {"mask": [[1, 0]], "aggregation": "token_mean", "max_tokens": 2}
    ),
    "rlvr.UniformPrompts": Call(lambda w: rlvr.UniformPrompts),
    "rlvr.CurriculumPrompts": Call(lambda w: rlvr.CurriculumPrompts),
    "rlvr.AdaptivePrompts": Call(lambda w: rlvr.AdaptivePrompts),
    "rlvr.DynamicSampling": Call(lambda w: rlvr.DynamicSampling, {"base": "adaptive"}),
    "rlvr.judge": Call(
        lambda w: rlvr.judge, {"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "Right."}
    ),
    "rlvr.gym_prompts": Call(
        lambda w: rlvr.gym_prompts, {"dataset": [{"question": PROMPT, "answer": "046", "metadata": {}}]}
    ),
    "rlvr.MockRolloutSampler": Call(lambda w: rlvr.MockRolloutSampler),
    # what lies inside: one entry of what is given is wild
    "a batch's entry": Call(
        lambda w: lambda **entries: w.tc.forward({**BATCH, **entries}),
        {**BATCH, "attention_mask": None, "labels": None},
    ),
    "a batch's value": Call(
        lambda w: lambda value: w.tc.forward({"input_ids": [[5, value, 7]]}), {"value": 6}
    ),
    "a row's cell": Call(
        lambda w: lambda **row: w.tc.batches([row]), {"prompt": PROMPT, "completion": "046", "text": "a"}
    ),
    "a chat": Call(
        lambda w: lambda messages: data.read_prompts([{"messages": messages}]),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ),
    "a message": Call(
        lambda w: lambda **message: data.read_prompts([[message]]),
        {"role": "user", "content": "a", "name": "b"},
    ),
    "a prompt of many": Call(
        lambda w: lambda prompt: w.tc.sample([PROMPT, prompt], max_new_tokens=1), {"prompt": "1"}
    ),
    "a prompt's token": Call(
        lambda w: lambda token: w.tc.sample([[5, token]], max_new_tokens=1), {"token": 5}
    ),
    "a loss's keyword": Call(
        lambda w: lambda **kwargs: w.tc.forward(BATCH, "token_ce", kwargs),
        {"ignore_index": -100, "label_smoothing": 0.1},
    ),
    "a ranking's margin": Call(
        lambda w: lambda margin: w.tc.forward(BATCH, "margin_ranking", {"margin": margin}), {"margin": 1.0}
    ),
    "resolve_loss(keywords)": Call(
        lambda w: lambda **kwargs: tn.losses.resolve_loss("token_ce", **kwargs),
        {"label_smoothing": 0.1},
    ),
    "resolve_reward(keywords)": Call(
        lambda w: lambda **kwargs: rlvr.resolve_reward("keyword_contains", **kwargs), {"keywords": ["a"]}
    ),
    "resolve_reward(parts)": Call(
        lambda w: lambda **kwargs: rlvr.resolve_reward(kwargs["spec"], weights=kwargs["weights"]),
        {"spec": ["length_penalty", "exact_match"], "weights": [1.0, 2.0]},
    ),
    "metadata": Call(lambda w: lambda value: w.tc.save_state(metadata={"note": value}), {"value": "a"}),
    "an optimizer's field": Call(
        lambda w: (
            lambda **fields: closing(w.service.create_training_client)(
                model_ref="builtin:sums", optimizer=fields
            )
        ),
        {"learning_rate": 1e-3, "betas": (0.9, 0.99)},
    ),
    "an adapter's field": Call(
        lambda w: (
            lambda **fields: closing(w.service.create_training_client)(
                model_ref="builtin:sums", lora_config=fields
            )
        ),
        {"target_modules": "all-linear", "rank_pattern": {}, "layers_to_transform": None},
    ),
    "fork(fields)": Call(
        lambda w: lambda **fields: closing(w.tc.fork)(artifact_id="fits", **fields),
        {"optimizer": {}, "batch_size": 2, "seed": 0},
    ),
    # runs
    "check": Call(lambda w: tn.check, {"number": "05.2"}),
    "load_run": Call(lambda w: tn.load_run, {"run_id": Of(lambda w: w.run.run_id)}),
    "list_runs": Call(lambda w: tn.list_runs, {"name": None, "tags": (), "model": None}),
    "plot_runs": Call(
        lambda w: tn.plot_runs, {"runs": Of(lambda w: [w.run.run_id]), "names": "loss", "by": "name"}
    ),
    "diff_runs": Call(
        lambda w: lambda one: tn.diff_runs(one, w.tc.fit([BATCH], steps=1, show=False)),
        {"one": Of(lambda w: w.run.run_id)},
    ),
    "run.table": Call(lambda w: w.run.table, {"names": "loss", "abandoned": False}),
    "run.to_csv": Call(lambda w: w.run.to_csv, {"path": "run.csv", "names": "loss"}),
    "run.plot": Call(lambda w: w.run.plot, {"names": "loss", "x": "step", "smoothing": 0.5}),
    "run.describe": Call(lambda w: w.run.describe, {"name": "a name", "tags": "a", "notes": "a note"}),
    "compare": Call(lambda w: comparing(w), {"arm": no_run, "seeds": 2, "show": False}),
    "load_comparison": Call(
        lambda w: tn.load_comparison,
        {
            "comparison": Of(
                lambda w: tn.compare(no_run, seeds=1, service=w.service, show=False).comparison_id
            )
        },
    ),
    "replay": Call(
        lambda w: tn.replay,
        {"run": Of(lambda w: w.run.run_id), "speed": 1e6, "show": False},
        frozenset({"show"}),
    ),
    "save_page": Call(
        lambda w: tn.save_page, {"to": "page.html", "run": Of(lambda w: w.run.run_id)}, frozenset({"more"})
    ),
    # the service
    "LocalCluster": Call(lambda w: tn.LocalCluster),
    "RayCluster": Call(lambda w: tn.RayCluster),
    "ServiceClient": Call(lambda w: closing(tn.ServiceClient)),
    "create_training_client": Call(lambda w: closing(w.service.create_training_client), {"config": None}),
    "restore": Call(lambda w: closing(w.service.restore), {"artifact_id": "fits"}),
    "list_artifacts": Call(lambda w: w.service.list_artifacts),
    "get_artifact": Call(lambda w: w.service.get_artifact, {"artifact_id": "fits"}),
    "pull_artifact": Call(lambda w: w.service.pull_artifact, {"artifact_id": "fits"}),
    "push_artifact": Call(lambda w: w.service.push_artifact, {"path": Of(lambda w: w.pulled)}),
    "delete_artifact": Call(lambda w: w.service.delete_artifact, {"artifact_id": Of(lambda w: w.save())}),
    "service.sample": Call(
        lambda w: lambda **fields: w.service.sample(**{"max_new_tokens": 2, **fields}),
        {"prompts": [PROMPT], "artifact_id": "fits", "top_logprobs": 1},
    ),
    "export_adapter": Call(lambda w: w.service.export_adapter, {"artifact_id": "fits", "path": "exported"}),
    "get_audit_logs": Call(lambda w: w.service.get_audit_logs),
    "verify_audit_log": Call(lambda w: w.service.verify_audit_log),
    "get_training_client": Call(
        lambda w: w.service.get_training_client, {"training_client_id": Of(lambda w: w.tc.training_client_id)}
    ),
    # a client
    "forward_backward": Call(lambda w: w.tc.forward_backward, {"batch": BATCH}),
    "forward": Call(lambda w: w.tc.forward, {"batch": BATCH}),
    "optim_step": Call(lambda w: w.tc.optim_step),
    "sample": Call(
        lambda w: w.tc.sample, {"prompts": [PROMPT], "sampling": tn.SamplingConfig(max_new_tokens=2)}
    ),
    "sample(fields)": Call(
        lambda w: lambda **fields: w.tc.sample([PROMPT], **{"max_new_tokens": 2, **fields}),
        dict.fromkeys(["temperature", "top_p"], 1.0) | {"stop": (), "seed": 0, "num_samples": 1},
    ),
    "compute_logprobs": Call(lambda w: w.tc.compute_logprobs, {"batch": BATCH}),
    "save_state": Call(lambda w: w.tc.save_state),
    "load_state": Call(lambda w: w.tc.load_state, {"artifact_id": "fits"}),
    "tc.batches": Call(lambda w: w.tc.batches, {"source": ROWS}),
    "tc.dp_batches": Call(lambda w: w.private.dp_batches, {"examples": ROWS * 17}),
    "tc.fit": Call(lambda w: w.tc.fit, {"batches": [tn.BatchData(**BATCH)], "steps": 1, "show": False}),
    "tc.what_if": Call(lambda w: w.tc.what_if, {"dataset_size": 1000, "steps": 10}),
    "tc.estimate": Call(lambda w: w.tc.estimate, {"batch_size": 1, "length": 8}),
    "tc.fork": Call(lambda w: closing(w.tc.fork), {"artifact_id": "fits"}),
    "tc.void_privacy": Call(lambda w: w.private.void_privacy, {"reason": "a test"}),
    "tc.privacy_audit": Call(lambda w: w.private.privacy_audit, {"canaries": 100}),
    "tc.dashboard": Call(lambda w: w.tc.dashboard),
    "history.series": Call(lambda w: w.tc.history.series, {"name": "loss"}),
    "run.step": Call(lambda w: w.run.step, {"steps": 1}),
    "run.rollback": Call(lambda w: w.run.rollback, {"artifact_id": "fits"}),
    "run.checkpoint": Call(lambda w: lambda note: w.run.checkpoint(note=note), {"note": "a"}),
    "run.fork": Call(lambda w: closing(w.run.fork), {"artifact_id": "fits"}),
    "run.result": Call(lambda w: w.run.result, {"timeout": 1.0}),
    "handle.result": Call(lambda w: w.done.result, {"timeout": 1.0}),
    "handle.exception": Call(lambda w: w.done.exception, {"timeout": 1.0}),
    "tc.get_checkpoint": Call(lambda w: w.tc.get_checkpoint, {"artifact_id": "fits"}),
    "tc.delete_checkpoint": Call(lambda w: w.tc.delete_checkpoint, {"artifact_id": Of(lambda w: w.save())}),
    "tc.export_checkpoint": Call(
        lambda w: w.tc.export_checkpoint, {"artifact_id": "fits", "path": "exported as well"}
    ),
    "tc.subscribe": Call(lambda w: w.tc.subscribe, {"subscriber": repr}),
    "tc.publish": Call(
        lambda w: w.tc.publish, {"event": tn.events.Metrics(step=1, values={"a": 1.0}, run_id="mine")}
    ),
    "tc.wait_for_step": Call(lambda w: w.tc.wait_for_step, {"timeout": 0.1}),
    "data.read_prompt": Call(lambda w: data.read_prompt, {"content": PROMPT}),
    "data.encode_rows": Call(
        lambda w: data.encode_rows, {"source": ROWS, "tokenizer": TOKENIZER}, frozenset({"tokenizer"})
    ),
    "datasets.sums": Call(lambda w: tn.datasets.sums, {"count": 3, "seed": 0}),
    "datasets.docstring_pairs": Call(lambda w: tn.datasets.docstring_pairs, {"split": "heldout"}),
    "rlvr.PolicySampler": Call(
        lambda w: rlvr.PolicySampler,
        {"training_client": CLIENT, "max_new_tokens": 2},
        frozenset({"training_client"}),
    ),
    "sampler.generate_trajectories": Call(
        lambda w: rlvr.PolicySampler(w.tc, group_size=1, max_new_tokens=1).generate_trajectories,
        {"prompts": [PROMPT]},
    ),
    "rlvr.environment": Call(lambda w: rlvr.environment, {"max_turns": 1}),
    "rlvr.Environment": Call(lambda w: rlvr.Environment, {"function": asks_once}),
    "rlvr.resolve_environment": Call(lambda w: rlvr.resolve_environment, {"spec": asks_once}),
    "rlvr.Turn": Call(lambda w: rlvr.Turn, {"text": PROMPT}),
    "rlvr.Outcome": Call(lambda w: rlvr.Outcome, {"reward": 1.0}),
    "rlvr.EnvironmentSampler": Call(
        lambda w: closing(rlvr.EnvironmentSampler),
        {"training_client": CLIENT, "environment": asks_once},
        frozenset({"training_client"}),
    ),
    "environment_sampler.generate_trajectories": Call(
        lambda w: (
            rlvr.EnvironmentSampler(
                w.tc, asks_once, group_size=1, max_new_tokens=1, timeout=None
            ).generate_trajectories
        ),
        {"rows": [{"prompt": PROMPT}]},
    ),
    "rlvr.tool_environment": Call(lambda w: rlvr.tool_environment, {"tools": [add], "reward": "exact_match"}),
    "rlvr.trl_environment": Call(lambda w: rlvr.trl_environment, {"factory": Tries}),
    "rlvr.gym_environment": Call(lambda w: rlvr.gym_environment, {"dataset": Tries()}),
    "rlvr.rehearse": Call(lambda w: rlvr.rehearse, {"environment": asks_once, "row": {}, "said": ["046"]}),
    "rlvr.Scorer": Call(lambda w: closing(rlvr.Scorer), {"reward": "length_penalty"}),
    "chat": Call(
        lambda w: lambda **options: tn.chat(tc=w.tc, **options), {"system": "", "max_new_tokens": 2}
    ),
    "chat(a client)": Call(lambda w: lambda client: tn.chat(client), {"client": CLIENT}),
    "tc.chat": Call(lambda w: w.tc.chat),
    "chat.say": Call(lambda w: lambda text: answered(w).say(text), {"text": PROMPT}),
    "chat.edit": Call(lambda w: answered(w).edit, {"text": PROMPT}),
    "chat.regenerate": Call(lambda w: answered(w).regenerate),
    "chat.rate": Call(lambda w: answered(w).rate, {"good": True}),
    "chat.choose": Call(lambda w: answered(w).choose, {"answer": 0}),
    "chat.clear": Call(lambda w: answered(w).clear),
    "chat.messages_of": Call(lambda w: answered(w).messages_of),
    "chat.system": Call(lambda w: lambda text: setattr(w.tc.chat(), "system", text), {"text": ""}),
    "chat.sampling": Call(
        lambda w: lambda sampling: setattr(w.tc.chat(), "sampling", sampling),
        {"sampling": tn.SamplingConfig()},
    ),
    "algo.update": Call(
        lambda w: lambda batch: rlvr.REINFORCE().update(batch, w.tc), {"batch": trajectories()}
    ),
    "trainer.set_reward": Call(lambda w: w.trainer().set_reward, {"reward": "length_penalty"}),
    "trainer.rescore": Call(lambda w: w.trainer().rescore, {"reward": "length_penalty"}),
    "RLVRTrainer": Call(lambda w: training(w), {"prompts": [PROMPT], "reward": "length_penalty", **SMALL}),
}


def closing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Close what the call made, after waiting for it."""

    def call(**arguments: Any) -> None:
        made = function(**arguments)
        if isinstance(made, tn.TrainingClient):
            made.forward(BATCH).exception()
        made.close()

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


def answered(world: World) -> tn.ModelChat:
    """Return a chat in which something was said."""
    chat = world.tc.chat(max_new_tokens=2)
    chat.say(PROMPT).exception()
    return chat


def training(world: World) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        trainer = rlvr.RLVRTrainer(world.tc, **arguments)
        run = trainer.run(steps=1, show=False)
        try:
            run.result(timeout=60)
        finally:
            run.stop()
            run.join(timeout=60)

    signature = inspect.signature(rlvr.RLVRTrainer)
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for name, p in signature.parameters.items() if name != "training_client"]
    )
    return call


def comparing(world: World) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        comparison = tn.compare(service=world.service, **arguments)
        with suppress(tn.ValidationError):  # there is no run in it, as it says
            comparison.result(timeout=60)

    signature = inspect.signature(tn.compare)
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for name, p in signature.parameters.items() if name != "service"]
    )
    return call


def parameters_of(function: Callable[..., Any], call: Call) -> list[str]:
    named = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return [name for name in dict.fromkeys([*named, *call.fitting]) if name not in call.skip]


def complete(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    made = function(**arguments)
    if isinstance(made, tn.FutureHandle | tn.TrainingRun):
        made.result(timeout=60)


def complaint(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    try:
        complete(function, arguments)
    except tn.TGTinkerError as error:
        return str(error)
    return None


def outcome(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    """Return what is wrong with how a call ended, or None."""
    try:
        complete(function, arguments)
    except tn.FutureTimeoutError:
        return "did not end"
    except tn.TGTinkerError as error:
        return None if str(error).strip() else "an error without a message"
    except Exception as error:  # noqa: BLE001  # that is what is looked for
        return f"{type(error).__name__}: {str(error)[:120]}"
    return None


def wild_calls(call: Call, function: Callable[..., Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for parameter in parameters_of(function, call):
        for name, value in WILD.items():
            yield parameter, name, {**call.fitting, parameter: value()}


def fitted(call: Call, world: World) -> Call:
    made = {
        name: value.make(world) if isinstance(value, Of) else value for name, value in call.fitting.items()
    }
    return replace(call, fitting=made)


def faults(world: World, name: str, share: float) -> tuple[int, list[str]]:
    """Return how many calls were made, and what was wrong."""
    call = CALLS[name]
    function = call.make(world)
    call = fitted(call, world)
    draw = random.Random(zlib.crc32(name.encode()))
    made, found = 0, []
    for parameter, wild, arguments in wild_calls(call, function):
        if draw.random() >= share:
            continue
        made += 1
        if wrong := outcome(function, arguments):
            found.append(f"{name}({parameter}={wild}): {wrong}")
    return made, found


@pytest.fixture(scope="module", autouse=True)
def _limited_memory() -> Iterator[None]:
    """A call that would take all memory raises `MemoryError` here, which is a fault."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a wild value is warned of is not the question
        yield World(stack, tmp_path)


def sweep(world: World, share: float) -> list[str]:
    """Make a share of all calls, print the figures, and return what was wrong."""
    begun, found, made = time.monotonic(), [], 0
    for name in CALLS:
        count, wrong = faults(world, name, share)
        made, found = made + count, found + wrong
    seconds = time.monotonic() - begun
    print(
        f"{made:,} wild calls of {len(CALLS)} callables in {seconds:.0f} s: {len(found)} ended in a foreign error"
    )
    assert made > 100
    assert world.tc.forward(BATCH).result(timeout=60).loss > 0, "the client has lived through all of it"
    return found


def test_a_share_of_all_wild_calls_is_answered_or_refused_in_our_words(world: World) -> None:
    assert sweep(world, IN_CI) == []


@pytest.mark.soak
def test_every_wild_call_is_answered_or_refused_in_our_words(world: World) -> None:
    assert sweep(world, 1.0) == []


def test_what_fits_is_answered(world: World) -> None:
    """Otherwise the wild calls would all fail for one reason, and the tests above would test nothing."""
    for name, call in CALLS.items():
        wrong = complaint(call.make(world), fitted(call, world).fitting)
        assert wrong is None, f"{name}: {wrong}"


def test_a_wrong_signature_stays_pythons_type_error(world: World) -> None:
    with pytest.raises(TypeError):
        world.tc.forward_backward(batches=BATCH)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        world.tc.optim_step(1, None, 2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        world.service.get_artifact()  # type: ignore[call-arg]


@pytest.mark.parametrize("module", [tn, data, rlvr, tn.losses], ids=lambda module: module.__name__)
def test_every_public_callable_has_its_wild_calls(module: Any) -> None:
    called = {name.rpartition(".")[2].partition("(")[0] for name in CALLS}
    left = [name for name in module.__all__ if callable(getattr(module, name)) and name not in called]
    assert [name for name in left if not _takes_nothing_of_users(getattr(module, name))] == []


def _takes_nothing_of_users(thing: Any) -> bool:
    """Whether nothing wild can be given: errors, choices, what only the package makes, and what takes no argument."""
    if thing in MADE_BY_US or thing in NEED_A_PACKAGE or thing is Any:
        return True
    if isinstance(thing, type):
        return issubclass(thing, BaseException | Enum)
    return get_origin(thing) is not None or not inspect.signature(thing).parameters
