"""Runs TRL's own losses and advantages beside ours on the same numbers, and fails where they differ.

    make trl-parity                                       # in .venv-trl: TRL, and otherwise what .venv has
    .venv-trl/bin/python -m scripts.trl_parity --figures  # TRL's figures in full, once another TRL is pinned

The fixture, our side and the pinned figures are those of `tests/numbers/test_trl_pinned.py`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from logging import getLogger
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tensafe_nb.engine.models.load import ASSETS
from tests.numbers import test_rlvr_identities as fixture
from tests.numbers import test_trl_pinned as ours

DTYPES = (torch.float64, torch.float32)
IN_DOUBLE, IN_SINGLE = 1e-12, 1e-6
PARTLY_SINGLE = 1e-7  # TRL computes Bessel's correction and its metrics in float32, whatever else is float64
PROMPT, GROUP = "12+34=", ours.REWARDS.shape[1]


class Line(NamedTuple):
    """A comparison: a figure of ours and of TRL, and by how much all that stands behind them differs at most."""

    name: str
    ours: float
    trl: float
    double: float  # ours from TRL in float64
    single: float  # ours from TRL in float32
    pinned: float  # the tests' figures from TRL in float64
    limit: float = IN_DOUBLE

    @property
    def differs(self) -> bool:
        return not (self.double <= self.limit and self.pinned <= self.limit and self.single <= IN_SINGLE)


def main() -> int:
    quieten()
    print(", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")))
    lines = [*losses(), *metrics(), *preferences(), *advantages()]
    width = max(len(line.name) for line in lines)
    columns = ("ours", "TRL", "|ours−TRL|", "in float32", "|pinned−TRL|")
    print(f"{'':{width}}", *(f"{column:>13}" for column in columns))
    for line in lines:
        figures = (
            f"{line.ours:13.9f} {line.trl:13.9f} {line.double:13.1e} {line.single:13.1e} {line.pinned:13.1e}"
        )
        print(f"{line.name:{width}} {figures}{'  DIFFERENT' if line.differs else ''}")
    count = sum(line.differs for line in lines)
    print(
        f"{len(lines)} lines, {count} different. Differences are the largest of value and gradient, of advantages "
        f"the largest of {ours.REWARDS.size}; allowed are {IN_DOUBLE:g} ({PARTLY_SINGLE:g} where TRL itself mixes "
        f"precisions) and {IN_SINGLE:g} in float32."
    )
    return int(count > 0)


def quieten() -> None:
    logging.set_verbosity_error()
    getLogger("trl").setLevel("ERROR")  # advice about options that are only compared here
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def apart(some: Any, other: Any) -> float:
    some, other = np.asarray(some), np.asarray(other)
    return float(np.abs(some - other).max()) if some.shape == other.shape else float("inf")


# losses


def losses() -> Iterator[Line]:
    """Compare values, and gradients by the log-probabilities."""
    for case in ours.LOSSES:
        own, own_gradient, _ = ours.our_loss(**case.options)
        (value, gradient, _), (single, single_gradient, _) = in_both(case.options)
        length = float(np.linalg.norm(gradient))
        show(case.options, value, length)
        yield Line(
            ours.title(case.options),
            own,
            value,
            max(apart(own, value), apart(own_gradient, gradient)),
            max(apart(own, single), apart(own_gradient, single_gradient)),
            apart([case.value, case.gradient], [value, length]),
        )


def metrics() -> Iterator[Line]:
    """Compare what is logged, by name."""
    found = ours.our_loss(**ours.MEASURED)[2]
    double, single = (side[2] for side in in_both(ours.MEASURED))
    for name, figure in ours.METRICS.items():
        own, value = found[name], double[name]
        show(name, value)
        gaps = apart(own, value), apart(own, single[name]), apart(figure, value)
        yield Line(name, own, value, *gaps, limit=PARTLY_SINGLE)


def in_both(options: dict[str, Any]) -> list[tuple[float, np.ndarray, dict[str, float]]]:
    with trainer_of(GRPOTrainer, GRPOConfig, **options) as trainer:
        return [trl_loss(trainer, dtype) for dtype in DTYPES]


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


# preferences


def preferences() -> Iterator[Line]:
    """Compare DPO and IPO: values, gradients by the log-probabilities, and what is logged, by name."""
    for case in ours.PREFERENCES:
        own, own_gradient, found = ours.our_preference(**case.options)
        (value, gradient, logged), (single, single_gradient, _) = (
            trl_preference(case.options, dtype) for dtype in DTYPES
        )
        length = float(np.linalg.norm(gradient))
        show(case.options, value, length)
        yield Line(
            ours.title(case.options),
            own,
            value,
            max(apart(own, value), apart(own_gradient, gradient)),
            max(apart(own, single), apart(own_gradient, single_gradient)),
            apart([case.value, case.gradient], [value, length]),
        )
        if case is ours.PREFERENCES[0]:
            for name, figure in ours.PREFERENCE_METRICS.items():
                show(name, logged[name])
                gap = apart(found[name], logged[name])
                yield Line(
                    name,
                    found[name],
                    logged[name],
                    gap,
                    gap,
                    apart(figure, logged[name]),
                    limit=PARTLY_SINGLE,
                )


def trl_preference(options: dict[str, Any], dtype: torch.dtype) -> tuple[float, np.ndarray, dict[str, float]]:
    """Run `DPOTrainer._compute_loss` on the fixture as `trl_loss` does: value, gradient (9,), metrics."""
    order = [0, 2, 1, 3]  # TRL has all chosen rows first, ours are pairs
    mask = torch.tensor(fixture.MASK)
    new = torch.tensor(np.where(fixture.MASK, fixture.NEW, 0.0), dtype=dtype, requires_grad=True)  # (4, 3)
    reference = torch.tensor(fixture.OLD * fixture.MASK, dtype=dtype).sum(1)  # (4,)
    blank = torch.zeros(4, 3, dtype=dtype)

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=new[order],
            entropy=blank,
            mean_logits=blank,
            is_top1=blank.bool(),
            log_sum_sq_probs=blank,
        )

    with preference_trainer(options) as trainer:
        trainer.precompute_ref_logps = True
        ids = torch.ones(4, 4, dtype=torch.long)
        chosen, rejected = reference[order].chunk(2)
        inputs = {
            "input_ids": ids,
            "attention_mask": ids,
            "completion_mask": torch.cat([torch.zeros(4, 1, dtype=torch.long), mask[order].long()], 1),
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        trainer.model.train()
        loss = trainer._compute_loss(model, inputs, False)
        loss.backward()
        logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), new.grad[mask.bool()].double().numpy(), logged


@contextlib.contextmanager
def preference_trainer(options: dict[str, Any]) -> Iterator[Any]:
    """Make a DPOTrainer on the built-in model; it never trains."""
    with tempfile.TemporaryDirectory(prefix="trl-parity-") as folder:
        arguments = DPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, **options
        )
        rows = {"prompt": [PROMPT] * 2, "chosen": ["046"] * 2, "rejected": ["047"] * 2}
        yield DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(ASSETS / "sums"),
            args=arguments,
            processing_class=AutoTokenizer.from_pretrained(ASSETS / "sums"),
            train_dataset=Dataset.from_dict(rows),
        )


# advantages


def advantages() -> Iterator[Line]:
    for scale, figures in ours.ADVANTAGES.items():
        kind = (RLOOTrainer, RLOOConfig) if scale == "rloo" else (GRPOTrainer, GRPOConfig)
        options = {} if scale == "rloo" else {"scale_rewards": scale}
        with trainer_of(*kind, num_generations=GROUP, beta=0.0, **options) as trainer:
            double, single = (trl_advantages(trainer, dtype) for dtype in DTYPES)
        own, title = ours.our_advantages(scale), "RLOO" if scale == "rloo" else f"scale_rewards={scale}"
        show(title, *double)
        gaps = apart(own, double), apart(own, single), apart(figures, double)
        yield Line(f"first advantage, {title}", own[0], double[0], *gaps, limit=PARTLY_SINGLE)


def trl_advantages(trainer: Any, dtype: torch.dtype) -> np.ndarray:
    """Run `_generate_and_score_completions` with given completions and rewards: advantages (N,)."""
    count = ours.REWARDS.size
    rewards = torch.tensor(ours.REWARDS.reshape(count, 1), dtype=dtype)
    ids = [[3, 4, 5]] * count
    texts = ["046"] * count
    rloo = isinstance(trainer, RLOOTrainer)
    generated = (ids, ids, texts) if rloo else (ids, ids, None, texts, None, {}, None, [])
    trainer._generate = lambda _: generated
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


def show(what: object, *figures: float) -> None:
    """Print what the tests pin, where it is asked for."""
    if "--figures" in sys.argv:
        print(what, [round(float(figure), 12) for figure in figures])


if __name__ == "__main__":
    sys.exit(main())
