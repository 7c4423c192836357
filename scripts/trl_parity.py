"""Runs TRL's own losses and advantages beside ours on the same numbers, and fails where they differ.

    make trl-parity     # in .venv-trl, which has TRL and otherwise the packages of .venv

The fixture, our side and the pinned figures are those of `tests/numbers/test_trl_pinned.py`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import numpy as np
import torch
from datasets import Dataset
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tensafe_nb.engine.models import ASSETS
from tests.numbers import test_rlvr_identities as fixture
from tests.numbers import test_trl_pinned as ours

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
PROMPT, GROUP = "12+34=", ours.REWARDS.shape[1]


class Line(NamedTuple):
    """What is compared: numbers of ours, of TRL in either precision, and those pinned in the tests."""

    name: str
    ours: np.ndarray
    double: np.ndarray
    single: np.ndarray
    pinned: np.ndarray

    @property
    def wrong(self) -> bool:
        limit = TOLERANCE[torch.float64]
        return (
            apart(self.ours, self.double) > limit
            or apart(self.pinned, self.double) > limit
            or apart(self.ours, self.single) > TOLERANCE[torch.float32]
        )


def main() -> int:
    quieten()
    print(", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")))
    lines = [*losses(), *metrics(), *advantages()]
    width = max(len(line.name) for line in lines)
    columns = ("ours", "TRL", "difference", "in float32", "pinned")
    print(f"{'':{width}}", *(f"{column:>13}" for column in columns))
    for line in lines:
        differences = [apart(line.ours, other) for other in (line.double, line.single, line.pinned)]
        figures = f"{norm(line.ours):13.9f} {norm(line.double):13.9f}", *(f"{d:13.1e}" for d in differences)
        print(f"{line.name:{width}}", *figures, "  DIFFERENT" if line.wrong else "")
    wrong = sum(line.wrong for line in lines)
    print(f"{len(lines)} lines, {wrong} different: more than 1e-12 from TRL in float64, or 1e-6 in float32")
    if "--figures" in sys.argv:
        show_figures(lines)
    return int(wrong > 0)


def quieten() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def apart(some: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(some - other).max()) if some.shape == other.shape else float("inf")


def norm(values: np.ndarray) -> float:
    """Return a number as it is, of several the norm."""
    return float(values) if values.ndim == 0 else float(np.linalg.norm(values))


# losses


def losses() -> Iterator[Line]:
    """Compare values and gradients by the log-probabilities."""
    for case in ours.LOSSES:
        value, gradient, _ = ours.our_loss(**case.options)
        (double, double_gradient, _), (single, single_gradient, _) = in_both(case.options)
        name = ours.title(case.options)
        yield Line(name, *map(np.array, (value, double, single, case.value)))
        scale = case.gradient / max(np.linalg.norm(gradient), 1e-300)
        yield Line(f"{name}: gradient", gradient, double_gradient, single_gradient, gradient * scale)


def metrics() -> Iterator[Line]:
    """Compare what is logged, by name."""
    options = {"loss_type": "dapo", "epsilon": 0.2, "beta": 0.04}
    found = ours.our_loss(**options)[2]
    double, single = (side[2] for side in in_both(options))
    for name, value in ours.METRICS.items():
        yield Line(name, *map(np.array, (found[name], double[name], single[name], value)))


def in_both(options: dict[str, Any]) -> list[tuple[float, np.ndarray, dict[str, float]]]:
    with trainer_of(GRPOTrainer, GRPOConfig, **options) as trainer:
        return [trl_loss(trainer, dtype) for dtype in TOLERANCE]


def trl_loss(trainer: Any, dtype: torch.dtype) -> tuple[float, np.ndarray, dict[str, float]]:
    """Run `_compute_loss` on the fixture: value, gradient (9,), metrics. Only the model's answer is given."""
    new = torch.tensor(np.where(fixture.MASK, fixture.NEW, -1.0), dtype=dtype, requires_grad=True)  # (4, 3)
    rest = torch.log1p(-new.exp())  # of the other of two tokens, as in our fixture
    entropy = -(new.exp() * new + rest.exp() * rest)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (new, entropy, None)
    trainer.current_gradient_accumulation_steps = 1  # what `train()` sets
    mask, ids = torch.tensor(fixture.MASK), torch.ones(4, 3, dtype=torch.long)
    loss = trainer._compute_loss(
        trainer.model.train(),
        {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": mask,
            "num_items_in_batch": mask.sum(),
            "advantages": torch.tensor(fixture.ADVANTAGES, dtype=dtype),
            "old_per_token_logps": torch.tensor(fixture.OLD, dtype=dtype),
            "ref_per_token_logps": torch.tensor(ours.REFERENCE, dtype=dtype),
        },
    )
    loss.backward()
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), new.grad[mask.bool()].double().numpy(), logged


# advantages


def advantages() -> Iterator[Line]:
    for scale, figures in ours.ADVANTAGES.items():
        kind = (RLOOTrainer, RLOOConfig) if scale == "rloo" else (GRPOTrainer, GRPOConfig)
        options = {} if scale == "rloo" else {"scale_rewards": scale}
        with trainer_of(*kind, num_generations=GROUP, beta=0.0, **options) as trainer:
            double, single = (trl_advantages(trainer, dtype) for dtype in TOLERANCE)
        name = "RLOO advantages" if scale == "rloo" else f"advantages, scale_rewards={scale}"
        yield Line(name, ours.our_advantages(scale), double, single, np.array(figures))


def trl_advantages(trainer: Any, dtype: torch.dtype) -> np.ndarray:
    """Run `_generate_and_score_completions` with given completions and rewards: advantages (N,)."""
    count = ours.REWARDS.size
    rewards = torch.tensor(ours.REWARDS.reshape(count, 1), dtype=dtype)
    ids = [[3, 4, 5]] * count
    generated = (ids, ids, None, ["046"] * count, None, {}, None, [])
    trainer._generate = lambda prompts: generated[: trainer.generated]
    trainer._calculate_rewards = lambda *_: rewards
    trainer.model.train()
    found = trainer._generate_and_score_completions([{"prompt": PROMPT}] * count)
    return found["advantages"].double().numpy()


@contextlib.contextmanager
def trainer_of(kind: Any, config: Any, **options: Any) -> Iterator[Any]:
    """Make a trainer of TRL on the built-in model; it never trains."""
    with tempfile.TemporaryDirectory(prefix="trl-parity-") as folder:
        arguments = config(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_completion_length=fixture.MASK.shape[1],
            per_device_train_batch_size=16,
            gradient_checkpointing=False,
            **options,
        )
        yield kind(
            model=str(ASSETS / "sums"),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 16}),
        )


def show_figures(lines: Sequence[Line]) -> None:
    """Print TRL's figures as the test file holds them."""


if __name__ == "__main__":
    sys.exit(main())
