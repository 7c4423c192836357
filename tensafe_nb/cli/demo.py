"""`tensafe-nb demo`: two small trainings, one of each kind, and a page in which both play again."""

import argparse
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensafe_nb import datasets
from tensafe_nb.config import LoRAConfig, OptimizerConfig
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.service import ServiceClient

if TYPE_CHECKING:
    from tensafe_nb.widgets.page import Chapter

PROMPTS = ["shutil.copyfile(src, dst)\n", "statistics.median(data)\n", "shlex.quote(s)\n"]
IMPORTS = "from tensafe_nb import LoRAConfig, OptimizerConfig, ServiceClient, TrainingRun, datasets\n"
SAMPLES = 3  # prompts of each step, with their answers
ON_THE_PAGE = (
    "Press Play, or drag the slider. A click on a point of a curve chooses its step: where there are samples, those of "
    "that step appear. Drag across a curve to zoom in, double-click to zoom out."
)


def add_demo(commands: Any) -> None:
    """Add `demo` to the parser of `tensafe-nb`."""
    demo = commands.add_parser(
        "demo", help="train two small models in less than a minute, and leave a page that shows it"
    )
    demo.add_argument(
        "--to", type=Path, default=Path("build/demo.html"), help="the page (default: %(default)s)"
    )
    demo.set_defaults(run=run_demo)


def run_demo(chosen: argparse.Namespace) -> int:
    """Train, say what improved, and write the page."""
    from tensafe_nb.widgets.page import write_page

    started = time.perf_counter()
    print("Two small models learn on this machine's processor. Nothing is downloaded.", flush=True)
    with ServiceClient() as service:
        chapters = [demonstrate_fine_tuning(service), demonstrate_reinforcement(service)]
        page = write_page(
            chosen.to, chapters, "Two trainings, as they went", samples=SAMPLES, words=[ON_THE_PAGE]
        )
    print(
        f"\nDone in {time.perf_counter() - started:.0f} s. Open {page} in a browser: both play again in it."
    )
    print("tensafe-nb lab opens the notebooks; tensafe_nb.list_runs() finds these two runs again.")
    return 0


def demonstrate_fine_tuning(service: ServiceClient) -> "Chapter":
    """Fine-tune, and tell of it."""
    from tensafe_nb.widgets.page import Chapter

    what = "Fine-tuning: a model learns to describe functions"
    _announce(1, what)
    run, before, after = fine_tune(service, PROMPTS)
    start, end = run.history["eval/loss"][[0, -1]]
    outcome = (
        f"Loss on functions it has not seen: {start:.2f} → {end:.2f} ({100 * (end / start - 1):+.0f} %), "
        f"after {run.steps_done} steps."
    )
    print(f"  {outcome}")
    words = [
        "builtin:tiny has 1.6 million parameters. It reads signatures from this Python's standard library and learns "
        "the first sentence of their docstrings. Whole modules are held out.",
    ]
    answers = list(zip(PROMPTS, before, after, strict=True))
    return Chapter(run, what, words, outcome, answers, _code_of(fine_tune))


def fine_tune(service: ServiceClient, prompts: list[str]) -> tuple[TrainingRun, list[str], list[str]]:
    """Train a LoRA adapter; return the run, and what the model says before and after."""
    tc = service.create_training_client(
        model_ref="builtin:tiny",
        lora_config=LoRAConfig(rank=8, alpha=16),
        optimizer=OptimizerConfig(learning_rate=2e-3),
    )
    batches = tc.batches(datasets.docstring_pairs("train"), seed=0)
    heldout = list(tc.batches(datasets.docstring_pairs("heldout"), seed=0))[:12]

    before = tc.sample(prompts, max_new_tokens=24, temperature=0.3, seed=1).result()
    run = tc.fit(batches, steps=120, eval_batches=heldout, eval_every=20)
    run.result()
    after = tc.sample(prompts, max_new_tokens=24, temperature=0.3, seed=1).result()
    return run, list(before.texts), list(after.texts)


def demonstrate_reinforcement(service: ServiceClient) -> "Chapter":
    """Reinforce, and tell of it."""
    from tensafe_nb.widgets.page import Chapter

    what = "Reinforcement learning: a model learns to add, from nothing but whether it was right"
    _announce(2, what)
    run = reinforce(service)
    sampled, greedy = (run.history[name][[0, -1]] for name in ("eval/reward", "eval/greedy"))
    outcome = (
        f"Right answers to sums it has not seen: {100 * sampled[0]:.0f} → {100 * sampled[1]:.0f} % when drawn, "
        f"{100 * greedy[0]:.0f} → {100 * greedy[1]:.0f} % at its best guess, after {run.steps_done} steps."
    )
    print(f"  {outcome}")
    words = [
        "builtin:sums has stopped learning too early: it adds two-digit numbers, and errs about half the time. Each "
        "step asks 32 sums eight times, and raises the probability of what was better than the other tries. A tenth "
        "of all sums is held out. Blue answers were made likelier, orange ones less likely.",
    ]
    return Chapter(run, what, words, outcome, code=_code_of(reinforce))


def reinforce(service: ServiceClient) -> TrainingRun:
    """Train all weights by a reward of 1 for the right answer, else 0."""
    from tensafe_nb.rlvr import REINFORCE, REINFORCEConfig, RLVRTrainer

    steps = 80
    tc = service.create_training_client(
        model_ref="builtin:sums",
        optimizer=OptimizerConfig(
            learning_rate=3e-4, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0,
            schedule="linear", warmup_steps=5, total_steps=steps,
        ),
    )  # fmt: skip
    trainer = RLVRTrainer(
        tc, datasets.sums(4096, seed=0), "exact_match", REINFORCE(REINFORCEConfig(baseline="rloo")),
        prompts_per_step=32, group_size=8, max_new_tokens=4,
        eval_prompts=datasets.sums(300, seed=0, split="heldout"), eval_every=20,
    )  # fmt: skip
    run = trainer.run(steps=steps)
    run.result()
    return run


def _announce(number: int, what: str) -> None:
    print(f"\n{number} · {what}", flush=True)


def _code_of(function: Callable[..., Any]) -> str:
    return f"{IMPORTS}\n\n{inspect.getsource(function)}"
