"""The guide is the contract: every code block of it runs as written, and does what it says.

The guide is read where it lies (TENSAFE_GUIDE, default ../shared/guide/training-guide.md) and is no part of this
repository; blocks are known here by their number alone. A preamble defines the names that a block leaves open.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn

ROOT = Path(__file__).parents[2]
GUIDE = Path(os.environ.get("TENSAFE_GUIDE", ROOT.parent / "shared" / "guide" / "training-guide.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
BLOCKS = {
    number: (language, text)
    for number, (language, text) in enumerate(
        FENCE.findall(GUIDE.read_text("utf-8") if GUIDE.exists() else ""), 1
    )
}
DIAGRAMS = {1}
pytestmark = pytest.mark.skipif(not BLOCKS, reason=f"the guide is not here: {GUIDE} (set TENSAFE_GUIDE)")

MY_LOSSES = """
import torch.nn.functional as F

def weighted_ce(outputs, batch):
    return 2 * F.cross_entropy(outputs.logits, batch["labels"])
"""


@dataclass
class Ran:
    """What is left after a block has run: its names, and what it printed."""

    names: dict[str, Any]
    printed: str
    folder: Path

    def __getattr__(self, name: str) -> Any:
        return self.names[name]

    @property
    def numbers(self) -> list[float]:
        """All that were printed, in order."""
        return [float(number) for number in re.findall(r"(?<!\w)-?\d+(?:\.\d+)?(?:e-?\d+)?\b", self.printed)]


@dataclass
class Case:
    """A block, the preamble's changes for it, and what must have come of it."""

    block: int
    check: Callable[[Ran], None]
    given: Callable[[dict[str, Any]], Mapping[str, Any]] = field(default=lambda names: {})


class FreshGradients:
    """A training client that has just seen a batch whenever it is asked for a step: block 3 shows steps alone."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._tc, self._batch = names["tc"], names["batch"]

    def optim_step(self, **options: Any) -> Any:
        self._tc.forward_backward(self._batch)
        return self._tc.optim_step(**options)


def check_gradients(ran: Ran) -> None:
    assert ran.batch.shape == (2, 4)
    assert ran.numbers == [ran.result.loss, ran.result.grad_norm, 6]
    assert ran.result.loss > 0 and ran.result.grad_norm > 0
    assert ran.tc.optim_step().step == 1  # both batches are one window


def check_steps(ran: Ran) -> None:
    assert ran.numbers == [1, 1e-4]  # and no ε: nothing was spent
    assert ran.opt_result.step == 2


def check_private_step(ran: Ran) -> None:
    assert ran.numbers == [1, 1e-4, ran.opt_result.dp_metrics.epsilon_spent]


def check_overlap(ran: Ran) -> None:
    assert ran.fb_result.loss > 0
    assert (ran.opt_result.step, ran.tc.step) == (1, 1)


def check_pipeline(ran: Ran) -> None:
    losses = ran.numbers[1::2]  # each behind the number of its batch
    assert len(losses) == len(ran.batches) == ran.tc.step
    assert losses[-1] < losses[0]  # the same batch, four times


def check_in_time(ran: Ran) -> None:
    assert ran.result.loss > 0
    assert ran.printed == ""


def check_lora(ran: Ran) -> None:
    tc = ran.service.create_training_client(model_ref=LLAMA, lora_config=ran.lora)
    assert tc.forward_backward(ran.batch).grad_norm > 0
    assert (ran.lora.rank, ran.lora.alpha, ran.lora.dropout, ran.lora.bias) == (16, 32, 0.05, "none")


def check_full_training(ran: Ran) -> None:
    assert ran.config.lora_config is None
    assert trains(ran, ran.config)


def check_optimizer(ran: Ran) -> None:
    assert trains(ran, tn.TrainingConfig(model_ref=LLAMA, optimizer=ran.optimizer))


def check_builtin_losses(ran: Ran) -> None:
    assert ran.loss_fn.name == "mse"
    targets = {"targets": np.zeros((2, 32))}
    assert ran.tc.forward({"input_ids": ran.tokens, **targets}, loss_fn=ran.loss_fn).loss > 0
    for name, options in (("margin_ranking", {"margin": 0.5}), ("contrastive", {"temperature": 0.07})):
        assert ran.tc.forward({"input_ids": ran.tokens}, name, options).loss >= 0


def check_custom_loss(ran: Ran) -> None:
    result = ran.tc.forward_backward(ran.batch, loss_fn=ran.loss_fn).result()
    assert 0 < result.loss < ran.tc.forward(ran.batch).loss
    assert result.metrics["gamma"] == 2.5
    assert 0 < result.metrics["pt_mean"] < 1


def check_dotted_path(ran: Ran) -> None:
    assert ran.tc.forward(ran.batch, loss_fn=ran.loss_fn).loss == pytest.approx(
        2 * ran.tc.forward(ran.batch).loss
    )


def check_file(ran: Ran) -> None:
    recipe = tn.load_config(ran.folder / "training_config.yaml")
    assert recipe.mode == "sft"
    assert recipe.training.loss == tn.LossConfig(
        type="token_ce", kwargs={"ignore_index": -100, "label_smoothing": 0.1}
    )
    assert trains(ran, recipe.training)


def check_reinforcement(ran: Ran) -> None:
    assert len(ran.numbers) == 10
    assert ran.numbers[-1] == pytest.approx(ran.batch.mean_reward, abs=6e-4)
    assert ran.result.notes == ("off-policy: mock data",)
    assert ran.tc.step == 10 and ran.result.param_delta_norm > 0
    assert {trajectory.reward for trajectory in ran.batch} <= {1.0, -0.5}


def check_ppo(ran: Ran) -> None:
    assert (ran.algo.config.clip_range, ran.algo.config.ppo_epochs) == (0.2, 4)


def check_custom_reward(ran: Ran) -> None:
    assert ran.reward_fn("", "def f(): return 1") == pytest.approx(0.6)
    assert ran.reward_fn("", "x" * 51) == pytest.approx(0.4)


def check_accumulation(ran: Ran) -> None:
    assert (ran.config.batch_size, ran.config.gradient_accumulation_steps) == (8, 4)
    assert ran.tc.config == ran.config
    assert ran.tc.step == 1


def check_saved(ran: Ran) -> None:
    assert ran.checkpoint.size_bytes > 0
    for said in ("artifact_id", "size_bytes", "content_hash"):
        assert str(getattr(ran.checkpoint, said)) in ran.printed


def check_loaded(ran: Ran) -> None:
    assert ran.numbers == [ran.result.step] == [1]
    assert str(ran.result.status) in ran.printed


def check_downloaded(ran: Ran) -> None:
    data = (ran.folder / "checkpoint.bin").read_bytes()
    assert data == ran.data and len(data) > 0
    assert b"model.layers" not in data  # sealed


def check_state(ran: Ran) -> None:
    assert ran.numbers == [0, 0]
    assert re.search(r" (INITIALIZING|READY|BUSY)\n", ran.printed)


def check_batch_sizes(ran: Ran) -> None:
    assert (ran.config.batch_size, ran.config.gradient_accumulation_steps) == (4, 8)
    assert trains(ran, ran.config)


def check_watched(ran: Ran) -> None:
    assert 0 < ran.result.loss < 10 and 0 < ran.result.grad_norm < 100
    assert ran.printed == ""


def check_checkpoints(ran: Ran) -> None:
    assert ran.tc.step == 100
    assert ran.printed.count("\n") == 1 and ran.checkpoint.artifact_id in ran.printed


def check_trained(ran: Ran) -> None:
    assert ran.tc.step == len(ran.dataloader)
    assert ran.printed == ""


def check_emergency(ran: Ran) -> None:
    assert isinstance(ran.raised, tn.ValidationError) and str(ran.raised) in ran.printed
    ran.service.close()  # as the end of the script would: the checkpoint is written first
    with tn.ServiceClient() as service:
        while not (
            found := service.list_artifacts()
        ):  # a server writes it though nobody waits for it any more
            time.sleep(0.01)
    assert "999999" in found[0].metadata["error"]


def trains(ran: Ran, config: tn.TrainingConfig) -> bool:
    """Whether a client of this configuration takes a step that changes its weights."""
    tc = ran.service.create_training_client(config)
    tc.forward_backward(ran.batch)
    return bool(tc.optim_step().param_delta_norm > 0)


def saved(names: dict[str, Any]) -> dict[str, Any]:
    """Save what a block loads or downloads."""
    names["tc"].forward_backward(names["batch"])
    names["tc"].optim_step()
    return {"checkpoint": names["tc"].save_state(name="art-xxx-yyy").result()}


def private(names: dict[str, Any]) -> dict[str, Any]:
    """A client with differential privacy, and a batch that says whose examples it holds."""
    dp = {"target_epsilon": 8.0, "sampling": "worst_case"}
    tc = names["service"].create_training_client(model_ref=LLAMA, dp_config=dp)
    batch = tn.BatchData(names["tokens"], example_ids=[0, 1])
    return {"tc": FreshGradients({"tc": tc, "batch": batch})}


LLAMA = "meta-llama/Llama-3-8B"
CASES = {
    "2 gradients of a batch": Case(2, check_gradients),
    "3 a step": Case(3, check_steps, lambda names: {"tc": FreshGradients(names)}),
    "3 a private step": Case(3, check_private_step, private),
    "4 two operations at once": Case(4, check_overlap),
    "5 a pipeline": Case(5, check_pipeline),
    "6 a timeout": Case(6, check_in_time),
    "7 an adapter": Case(7, check_lora),
    "8 all weights": Case(8, check_full_training),
    "9 AdamW": Case(9, check_optimizer),
    "10 SGD": Case(10, check_optimizer),
    "11 the built-in losses": Case(11, check_builtin_losses),
    "12 a loss of one's own": Case(12, check_custom_loss),
    "13 a loss in a module": Case(13, check_dotted_path),
    "14 a file": Case(14, check_file),
    "15 reinforcement learning": Case(15, check_reinforcement),
    "16 PPO": Case(16, check_ppo),
    "17 a reward of one's own": Case(17, check_custom_reward),
    "18 accumulated gradients": Case(18, check_accumulation),
    "19 saving a checkpoint": Case(19, check_saved),
    "20 loading a checkpoint": Case(20, check_loaded, saved),
    "21 downloading a checkpoint": Case(21, check_downloaded, saved),
    "22 the client's state": Case(22, check_state),
    "23 batch sizes": Case(23, check_batch_sizes),
    "24 watching a loss": Case(24, check_watched),
    "25 a checkpoint every 100 steps": Case(
        25, check_checkpoints, lambda names: {"dataloader": names["batches"] * 25}
    ),
    "26 nothing fails": Case(26, check_trained),
    "26 a checkpoint after a failure": Case(
        26, check_emergency, lambda names: {"dataloader": [*names["batches"], tn.BatchData([[1, 999_999]])]}
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_model: Any) -> Iterator[Path]:
    """The folder a block runs in: a tiny Llama by the big one's name, and a package of one's own."""
    shutil.copytree(random_model("llama"), tmp_path / LLAMA)  # a server follows no link out of its folder
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "losses.py").write_text(MY_LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_package", "my_package.losses"):
        sys.modules.pop(name, None)


def preamble(service: tn.ServiceClient) -> dict[str, Any]:
    """Define what blocks leave open."""
    import torch
    import torch.nn.functional as F

    import tensafe_nb.compat  # noqa: F401

    tokens = [[1, 2, 3, 4], [5, 6, 7, 8]]
    tc = service.create_training_client(model_ref=LLAMA)
    batch = tn.BatchData(tokens)
    return {
        "__name__": "guide",
        **{"torch": torch, "F": F},
        **{"resolve_reward": tn.rlvr.resolve_reward, "resolve_loss": tn.losses.resolve_loss},
        **{name: getattr(tn, name) for name in ("LoRAConfig", "OptimizerConfig", "TrainingConfig")},
        **{"service": service, "tc": tc, "training_client": tc, "tokens": tokens, "batch": batch},
        **{"mask": [[1, 1, 1, 1]] * 2, "labels": [[2, 3, 4, -100], [6, 7, 8, -100]]},
        **dict.fromkeys(("batches", "dataloader", "micro_batches"), [batch] * 4),
    }


@pytest.mark.parametrize("name", CASES)
def test_a_block_of_the_guide_runs_as_written(
    name: str, service: tn.ServiceClient, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, names = CASES[name], preamble(service)
    names |= case.given(names)
    run(case.block, names)
    case.check(Ran(names, capsys.readouterr().out, folder))


def run(block: int, names: dict[str, Any]) -> None:
    """Run a block, or write the file it shows. What its own last `raise` lets out is kept as `raised`."""
    language, text = BLOCKS[block]
    if language == "yaml":
        Path(re.search(r"# (\S+\.yaml)", text)[1]).write_text(text, encoding="utf-8")
        return
    try:
        exec(compile(text, GUIDE.name, "exec"), names)
    except tn.TGTinkerError as error:
        if not text.endswith("raise\n"):
            raise
        names["raised"] = error


def test_every_block_of_the_guide_has_its_case() -> None:
    tested = {case.block for case in CASES.values()}
    assert tested | DIAGRAMS == set(BLOCKS)
    assert {
        number for number, (language, _) in BLOCKS.items() if language not in ("python", "yaml")
    } == DIAGRAMS
