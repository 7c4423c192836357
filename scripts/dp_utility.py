"""What privacy costs in held-out loss: the docstring task at epsilon 2, 8 and without noise, beside no training.

`python -m scripts.dp_utility` trains, prints the table of docs/explanation/privacy.md, draws
docs/images/dp-utility.png and writes build/dp-utility.json. `--tune` tries the grid that the settings below were chosen
from; each of its runs is a look at the private data that no epsilon printed here covers. Draws and noise are never the
same twice: runs differ.
"""

import argparse
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import tensafe_nb as tn

ROOT = Path(__file__).parent.parent
PICTURE, JSON = ROOT / "docs" / "images" / "dp-utility.png", ROOT / "build" / "dp-utility.json"
EPSILONS, DELTA = (2.0, 8.0, math.inf), 1e-5
GRID = {"learning_rate": (3e-3, 1e-2, 3e-2), "max_grad_norm": (1.0, 5.0)}


@dataclass(frozen=True, slots=True)
class Settings:
    """How every run trains."""

    rank: int = 4
    learning_rate: float = 1e-2
    max_grad_norm: float = 1.0
    expected_batch_size: int = 512
    steps: int = 30
    evaluate_every: int = 5


@dataclass(frozen=True, slots=True)
class Curve:
    """Held-out loss over the steps of one run."""

    epsilon: float
    noise_multiplier: float
    seed: int
    steps: Sequence[int]
    losses: Sequence[float]


def main() -> None:
    asked = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="dp-utility-") as home:
        os.environ["TENSAFE_HOME"] = home
        work(asked)


def work(asked: argparse.Namespace) -> None:
    with tn.ServiceClient() as service:
        if asked.tune:
            tune(service, asked.epsilon)
            return
        settings, runs = Settings(), []
        for seed, epsilon in itertools.product(range(asked.seeds), EPSILONS):
            runs.append(trained(service, settings, epsilon, seed))
            show(runs, settings)


def show(runs: Sequence[Curve], settings: Settings) -> None:
    """Write and print what there is so far, so that a run that is stopped leaves what it has measured."""
    JSON.parent.mkdir(exist_ok=True)
    JSON.write_text(
        json.dumps({"settings": asdict(settings), "runs": [asdict(run) for run in runs]}, indent=1)
    )
    draw(runs, settings)
    print("\n".join(table(runs)), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m scripts.dp_utility", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs for each epsilon (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="try the grid once instead, and print its losses")
    parser.add_argument("--epsilon", type=float, default=8.0, help="of --tune (default: %(default)s)")
    return parser


def tune(service: tn.ServiceClient, epsilon: float) -> None:
    for values in itertools.product(*GRID.values()):
        changes = dict(zip(GRID, values, strict=True))
        curve = trained(service, replace(Settings(), **changes), epsilon, 0)
        print(
            f"epsilon {epsilon:g}, {changes}: {' '.join(f'{loss:.3f}' for loss in curve.losses)}", flush=True
        )


def trained(service: tn.ServiceClient, settings: Settings, epsilon: float, seed: int) -> Curve:
    """Train one client to its epsilon and return its curve."""
    rows, heldout = tn.datasets.docstring_pairs("train"), tn.datasets.docstring_pairs("heldout")
    sigma = noise_for(epsilon, settings, len(rows))
    with service.create_training_client(
        lora_config=tn.LoRAConfig(rank=settings.rank, alpha=2 * settings.rank),
        optimizer={"learning_rate": settings.learning_rate, "weight_decay": 0.0},
        batch_size=64,
        micro_batch_tokens=1024,
        seed=seed,
        dp_config=tn.DPConfig(
            noise_multiplier=sigma,
            max_grad_norm=settings.max_grad_norm,
            target_epsilon=None if math.isinf(epsilon) else epsilon,
            target_delta=DELTA,
            accountant_type="prv",
            dataset_size=len(rows),
            expected_batch_size=settings.expected_batch_size,
        ),
    ) as tc:
        points = list(curve_of(tc, rows, list(tc.batches(heldout)), settings))
        spent = tc.privacy_statement().epsilon
    print(
        f"epsilon {spent}, noise {sigma:.3f}, seed {seed}: {points[0][1]:.3f} → {points[-1][1]:.3f}",
        flush=True,
    )
    steps, losses = zip(*points, strict=True)
    return Curve(epsilon, sigma, seed, steps, losses)


def noise_for(epsilon: float, settings: Settings, size: int) -> float:
    """Return the noise multiplier with which all steps together cost that epsilon; 0 for infinity."""
    if math.isinf(epsilon):
        return 0.0
    from tensafe_nb.privacy.accounting import solve_noise_multiplier

    rate = settings.expected_batch_size / size
    return solve_noise_multiplier(epsilon, DELTA, rate, settings.steps, "prv")


def curve_of(
    tc: tn.TrainingClient, rows: list[dict[str, str]], heldout: list[tn.BatchData], settings: Settings
) -> Iterator[tuple[int, float]]:
    """Yield (step, held-out loss) before the first step and every few steps."""
    yield 0, heldout_loss(tc, heldout)
    draws = tc.dp_batches(rows, steps=settings.steps)
    for step, drawn in enumerate(draws, start=1):
        tc.forward_backward(drawn)
        tc.optim_step().result()
        if step % settings.evaluate_every == 0:
            yield step, heldout_loss(tc, heldout)


def heldout_loss(tc: tn.TrainingClient, heldout: list[tn.BatchData]) -> float:
    """Return the mean over all labelled tokens of the held-out modules."""
    labelled = [int((batch.labels != -100).sum()) for batch in heldout]
    losses = [handle.result().loss for handle in [tc.forward(batch) for batch in heldout]]
    return sum(n * loss for n, loss in zip(labelled, losses, strict=True)) / sum(labelled)


# what is shown


def table(runs: Sequence[Curve]) -> Iterator[str]:
    yield "| ε | σ | held-out loss, mean of the runs | each run |"
    yield "|---|---|---|---|"
    yield f"| no training | – | {fmean(run.losses[0] for run in runs):.3f} | |"
    for epsilon in EPSILONS:
        these = [run for run in runs if run.epsilon == epsilon]
        if not these:
            continue
        last = [run.losses[-1] for run in these]
        name = "∞ (clipped, no noise)" if math.isinf(epsilon) else f"{epsilon:g}"
        each = ", ".join(f"{loss:.3f}" for loss in last)
        yield f"| {name} | {these[0].noise_multiplier:.2f} | {fmean(last):.3f} | {each} |"


def draw(runs: Sequence[Curve], settings: Settings) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(EPSILONS, ("#d55e00", "#0072b2", "#444444"), strict=True))
    for run in runs:
        name = "ε = ∞ (no noise)" if math.isinf(run.epsilon) else f"ε = {run.epsilon:g}"
        axes.plot(
            run.steps, run.losses, color=colours[run.epsilon], lw=1.4, label=name if run.seed == 0 else None
        )
    axes.axhline(fmean(run.losses[0] for run in runs), color="#999999", lw=1, ls=":", label="no training")
    axes.set_xlabel(f"step ({settings.expected_batch_size} examples on average)")
    axes.set_ylabel("held-out loss per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
