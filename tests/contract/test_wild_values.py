"""Every public call with wrong values: answered, or refused by an error of our family; never a foreign one, never a hang.

The calls are generated: each parameter of each public callable takes each wild value in turn, the others keep values
that fit. A wrong *signature* stays Python's `TypeError`; a wrong value is not one.
"""

import inspect
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb import data, rlvr
from tensafe_nb.data.text import Example
from tensafe_nb.rlvr.rollouts import RolloutGroup, Trajectory

BATCH = {"input_ids": [[5, 6, 7, 8], [9, 10, 11, 12]]}
PROMPT = "12+34="
IN_CI = 0.12  # of the calls; all of them in soak


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


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield (number := number + 1)


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
    "range(10**12)": lambda: range(10**12),
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

    def _client(self, **fields: Any) -> tn.TrainingClient:
        tc = self.service.create_training_client(model_ref="builtin:sums", batch_size=2, **fields)
        tc.ready
        return tc


def trajectories() -> rlvr.TrajectoryBatch:
    rollouts = [Trajectory(PROMPT, "046", tokens=[3, 4], logprobs=[-0.1, -0.2], reward=1.0) for _ in range(2)]
    return rlvr.TrajectoryBatch([RolloutGroup("p", PROMPT, rollouts)], tn.SamplingConfig())


ROWS = [{"prompt": PROMPT, "completion": "046"}] * 3
CALLS: Mapping[str, Call] = {
    # values
    "TrainingConfig": Call(lambda w: tn.TrainingConfig),
    "LoRAConfig": Call(lambda w: tn.LoRAConfig),
    "OptimizerConfig": Call(lambda w: tn.OptimizerConfig),
    "SamplingConfig": Call(lambda w: tn.SamplingConfig),
    "LossConfig": Call(lambda w: tn.LossConfig),
    "DPConfig": Call(lambda w: tn.DPConfig),
    "Recipe": Call(lambda w: tn.Recipe),
    "load_config": Call(lambda w: tn.load_config, {"path": "no.yaml"}),
    "BatchData": Call(lambda w: tn.BatchData, BATCH),
    "BatchData(extras)": Call(lambda w: lambda extra: tn.BatchData(**BATCH, extra=extra), {"extra": [[1] * 4] * 2}),
    "REINFORCEConfig": Call(lambda w: rlvr.REINFORCEConfig),
    "PPOConfig": Call(lambda w: rlvr.PPOConfig),
    "ValueOptions": Call(lambda w: rlvr.ValueOptions),
    "REINFORCE": Call(lambda w: rlvr.REINFORCE),
    "PPO": Call(lambda w: rlvr.PPO),
    # data
    "data.read_rows": Call(lambda w: data.read_rows, {"source": ROWS}),
    "data.read_prompts": Call(lambda w: data.read_prompts, {"prompts": [PROMPT]}),
    "data.batches": Call(lambda w: data.batches, {"source": ROWS, "tokenizer": None}, frozenset({"tokenizer"})),
    "data.encode": Call(lambda w: data.encode, {"row": ROWS[0], "tokenizer": None}, frozenset({"tokenizer"})),
    "data.collate": Call(lambda w: data.collate, {"examples": [Example((1, 2), (2, -100))], "pad_token_id": 0}),
    "data.Batches": Call(
        lambda w: data.Batches, {"examples": [Example((1, 2), (2, -100))], "batch_size": 1, "pad_token_id": 0}
    ),
    # registries
    "losses.resolve_loss": Call(lambda w: tn.losses.resolve_loss, {"spec": "token_ce"}),
    "losses.register_loss": Call(lambda w: tn.losses.register_loss, {"name": "a_wild_loss"}),
    "rlvr.resolve_reward": Call(lambda w: rlvr.resolve_reward, {"spec": "exact_match"}),
    "rlvr.register_reward": Call(lambda w: rlvr.register_reward, {"name": "a_wild_reward"}),
    "rlvr.register_preset": Call(
        lambda w: rlvr.register_preset, {"name": "a_wild_preset", "config": rlvr.PPOConfig(), "overwrite": True}
    ),
    "rlvr.register_advantage": Call(lambda w: rlvr.register_advantage, {"name": "a_wild_advantage"}),
    "rlvr.rescore": Call(lambda w: rlvr.rescore, {"batch": trajectories(), "reward": "length"}),
    "rlvr.preview_reward": Call(lambda w: rlvr.preview_reward, {"batch": trajectories(), "reward": "length"}),
    "rlvr.gym_prompts": Call(lambda w: rlvr.gym_prompts, {"dataset": [{"question": PROMPT, "answer": "046"}]}),
    "rlvr.MockRolloutSampler": Call(lambda w: rlvr.MockRolloutSampler),
    # runs
    "load_run": Call(lambda w: tn.load_run, {"run_id": "tc-1/1"}),
    "replay": Call(lambda w: tn.replay, {"run": "tc-1/1", "show": False}),
    # the service
    "ServiceClient": Call(lambda w: closing(tn.ServiceClient)),
    "create_training_client": Call(lambda w: closing(w.service.create_training_client), {"config": None}),
    "restore": Call(lambda w: closing(w.service.restore), {"artifact_id": "fits"}),
    "list_artifacts": Call(lambda w: w.service.list_artifacts),
    "get_artifact": Call(lambda w: w.service.get_artifact, {"artifact_id": "fits"}),
    "pull_artifact": Call(lambda w: w.service.pull_artifact, {"artifact_id": "fits"}),
    "push_artifact": Call(lambda w: w.service.push_artifact, {"path": "no.tsnb"}),
    "delete_artifact": Call(lambda w: w.service.delete_artifact, {"artifact_id": "none such"}),
    "export_adapter": Call(lambda w: w.service.export_adapter, {"artifact_id": "fits", "path": "exported"}),
    "get_audit_logs": Call(lambda w: w.service.get_audit_logs),
    "verify_audit_log": Call(lambda w: w.service.verify_audit_log),
    "get_training_client": Call(lambda w: w.service.get_training_client, {"training_client_id": "tc-1"}),
    # a client
    "forward_backward": Call(lambda w: w.tc.forward_backward, {"batch": BATCH}),
    "forward": Call(lambda w: w.tc.forward, {"batch": BATCH}),
    "optim_step": Call(lambda w: w.tc.optim_step),
    "sample": Call(lambda w: w.tc.sample, {"prompts": [PROMPT], "sampling": None}),
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
    "run.step": Call(lambda w: w.run.step, {"n": 1}),
    "run.rollback": Call(lambda w: w.run.rollback, {"artifact_id": "fits"}),
    "RLVRTrainer": Call(
        lambda w: w_trainer(w),
        {"prompts": [PROMPT], "reward": "length", "group_size": 2, "prompts_per_step": 1, "max_new_tokens": 2},
    ),
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


def w_trainer(world: World) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        trainer = rlvr.RLVRTrainer(world.tc, **arguments)
        run = trainer.run(steps=1, show=False)
        try:
            run.result(timeout=60)
        finally:
            run.stop()
            run.join()

    signature = inspect.signature(rlvr.RLVRTrainer)
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for name, p in signature.parameters.items() if name != "training_client"]
    )
    return call


def parameters_of(function: Callable[..., Any], call: Call) -> list[str]:
    named = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return [name for name in dict.fromkeys([*named, *call.fitting]) if name not in call.skip]


def outcome(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    """Return what is wrong with how a call ended, or None."""
    try:
        made = function(**arguments)
        if isinstance(made, tn.FutureHandle | tn.TrainingRun):
            made.result(timeout=60)
    except tn.FutureTimeoutError:
        return "did not end"
    except tn.TGTinkerError as error:
        return None if str(error).strip() else "an error without a message"
    except Exception as error:  # that is what is looked for
        return f"{type(error).__name__}: {str(error)[:120]}"
    return None


def wild_calls(call: Call, function: Callable[..., Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for parameter in parameters_of(function, call):
        for name, value in WILD.items():
            yield parameter, name, {**call.fitting, parameter: value()}


def faults(world: World, name: str, share: float) -> list[str]:
    call = CALLS[name]
    function = call.make(world)
    if "tokenizer" in call.fitting:
        call = Call(call.make, {**call.fitting, "tokenizer": world.tc.tokenizer}, call.skip)
    draw = random.Random(zlib.crc32(name.encode()))
    found = []
    for parameter, wild, arguments in wild_calls(call, function):
        if draw.random() < share and (wrong := outcome(function, arguments)):
            found.append(f"{name}({parameter}={wild}): {wrong}")
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("wild")
    with pytest.MonkeyPatch.context() as patched, ExitStack() as stack:
        patched.setenv("TENSAFE_HOME", str(folder / "home"))
        patched.chdir(folder)
        yield World(stack, folder)
