"""How often a comparison sees a difference where there is none: on made-up histories, and on real trainings.

    python -m scripts.null_comparisons           # 1,000 made-up comparisons of each kind, some minutes
    python -m scripts.null_comparisons --real    # ten real pairs that differ in nothing, some minutes

`docs/how-to/comparing.md` has what both print.

A made-up history has what the seed does to all arms, a drift of each run, and noise. Real pairs are two names for one
recipe of reinforcement learning on `builtin:sums`, each with five seeds of its own,
so that the two differ by chance alone. (With the same seeds they would be the same runs, to the last bit.)
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

import tensafe_nb as tn
from tensafe_nb.comparing.results import Measure, Standings, Track
from tensafe_nb.comparing.statistics import LOOKS
from tensafe_nb.protocol.batch import Array
from tensafe_nb.rlvr import RLVRTrainer

DRAWS, STEPS, SEEDS, PAIRS = 1000, 40, 5, 10
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
NOISES: dict[str, Draw] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "t, 3 degrees": lambda rng, size: rng.standard_t(3, size=size),
    "Cauchy": lambda rng, size: rng.standard_cauchy(size=size),
    "skewed (lognormal)": lambda rng, size: rng.lognormal(size=size),
    "coarse (of 20 answers)": lambda rng, size: rng.binomial(20, 0.6, size=size) / 20,
}


def histories(rng: np.random.Generator, draw: Draw, arms: int, seeds: int) -> Array:
    """Return curves of arms that do not differ, (arms, seeds, steps)."""
    common = draw(rng, (1, seeds, 1)) + np.linspace(0, 3, STEPS)
    drift = np.cumsum(draw(rng, (arms, seeds, STEPS)), axis=2) / np.sqrt(STEPS)
    return np.asarray(common + drift + draw(rng, (arms, seeds, STEPS)) / 4)


def standings_of(curves: Array) -> Standings:
    """Return a comparison that has these curves, with its three looks on the way."""
    names = [f"arm {number}" for number in range(len(curves))]
    steps = np.arange(1, curves.shape[2] + 1)
    tracks = [
        Track(name, seed, None, "FINISHED", len(steps), None, steps, curves[number, seed])
        for number, name in enumerate(names)
        for seed in range(curves.shape[1])
    ]
    measure = Measure("reward", max(1, len(steps) // 10), higher=True, planned=len(steps))
    told = Standings("null", measure, {name: {} for name in names}, tracks, "FINISHED")
    for before, now in pairwise(int(look * len(steps)) for look in LOOKS):
        gone = {arm: (now, why) for arm, why in told.who_cannot_win(now, before).items()}
        told = replace(told, given_up={**told.given_up, **gone})
    return told


def called(curves: Array) -> bool:
    """Whether any difference is seen."""
    return any(difference.seen for difference in standings_of(curves).result().differences)


def made_up() -> None:
    """Print the share of comparisons that see a difference, in percent."""
    print(f"| noise, {DRAWS:,} draws each | 2 arms: 3, 5, 10 seeds | 4 arms: 3, 5, 10 seeds |\n|---|---|---|")
    for name, draw in NOISES.items():
        shares = []
        for arms in (2, 4):
            found = []
            for seeds in (3, 5, 10):
                rng = np.random.default_rng([arms, seeds, *name.encode()])
                found.append(sum(called(histories(rng, draw, arms, seeds)) for _ in range(DRAWS)))
            shares.append(", ".join(f"{100 * count / DRAWS:.1f}" for count in found))
        print(f"| {name} | {' | '.join(shares)} |")


def real() -> None:
    """Print what is said of ten pairs of real trainings that differ in nothing."""
    rows = tn.datasets.sums(4096, seed=0)

    def arm(service: tn.ServiceClient, seed: int, half: str) -> Any:
        own = 1000 * (half == "second") + seed
        tc = service.create_training_client(
            model_ref="builtin:sums", optimizer={"learning_rate": 1e-4}, seed=own
        )
        trainer = RLVRTrainer(
            tc, rows, "exact_match", prompts_per_step=8, group_size=8, max_new_tokens=4, seed=own
        )
        return trainer.run(steps=10, show=False)

    seen = 0
    with tn.ServiceClient() as service:
        for pair in range(PAIRS):
            seeds = range(SEEDS * pair, SEEDS * (pair + 1))
            how: dict[str, Any] = {"seeds": seeds, "vary": {"half": ["first", "second"]}, "last": 5}
            result = tn.compare(arm, service=service, show=False, **how).result()
            seen += any(difference.seen for difference in result.differences)
            print(f"pair {pair + 1:2d}: {result.differences[0]}", flush=True)
    print(f"{seen} of {PAIRS} see a difference where there is none")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--real", action="store_true", help="ten real pairs instead")
    if parser.parse_args().real:
        real()
    else:
        made_up()
