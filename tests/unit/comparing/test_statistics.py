"""What seeds can say: intervals that hold their level where nothing differs, and arms given up only when far behind."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import scipy.stats

from tensafe_nb.comparing.results import Measure, Standings, Track
from tensafe_nb.comparing.statistics import LOOKS, cannot_win, interval_of, paired

DRAWS = 1000
STEPS = 40
NOISES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.standard_t(3, size=size),
    "coarse": lambda rng, size: rng.binomial(20, 0.6, size=size) / 20,
}


def histories(rng: np.random.Generator, noise: str, arms: int, seeds: int) -> np.ndarray:
    """Return curves of arms that do not differ, (arms, seeds, steps): what the seed does to all, and noise of each."""
    draw = NOISES[noise]
    common = draw(rng, (1, seeds, 1)) + np.linspace(0, 3, STEPS)
    drift = np.cumsum(draw(rng, (arms, seeds, STEPS)), axis=2) / np.sqrt(STEPS)  # runs wander
    return common + drift + draw(rng, (arms, seeds, STEPS)) / 4


def calls(curves: np.ndarray) -> bool:
    """Whether a comparison says that any two arms differ: its race looks three times on the way, and at its end."""
    steps = np.arange(1, STEPS + 1)
    names = [f"arm {number}" for number in range(len(curves))]
    measure = Measure("reward", 4, higher=True, planned=STEPS)
    tracks = [
        Track(name, seed, f"{name}/{seed}", "FINISHED", STEPS, None, steps, curves[number, seed])
        for number, name in enumerate(names)
        for seed in range(curves.shape[1])
    ]
    told = Standings("null", measure, {name: {} for name in names}, tracks, "FINISHED")
    for before, now in pairwise(int(look * STEPS) for look in LOOKS):
        gone = {arm: (now, why) for arm, why in told.who_cannot_win(now, before).items()}
        told = replace(told, given_up={**told.given_up, **gone})
    return any(difference.seen for difference in told.result().differences)


IN_CI = (("normal", 3), ("heavy tails", 3), ("heavy tails", 5), ("coarse", 10))


@pytest.mark.parametrize(
    ("noise", "seeds"),
    [
        pytest.param(*case, marks=() if case in IN_CI else pytest.mark.soak)
        for case in product(NOISES, (3, 5, 10))
    ],
)
def test_where_nothing_differs_one_comparison_in_twenty_says_it_does(noise: str, seeds: int) -> None:
    rng = np.random.default_rng([seeds, *noise.encode()])
    found = sum(calls(histories(rng, noise, 2, seeds)) for _ in range(DRAWS)) / DRAWS
    assert 0.03 <= found <= 0.07


def test_several_arms_share_the_level() -> None:
    rng = np.random.default_rng(0)
    found = sum(calls(histories(rng, "normal", 4, 5)) for _ in range(DRAWS)) / DRAWS
    assert 0.02 <= found <= 0.07  # Bonferroni is cautious


def test_the_interval_is_students() -> None:
    values = np.array([0.3, 0.5, 0.1, 0.7, np.nan])  # a seed without a value is left out
    known = values[:4]
    expected = scipy.stats.ttest_1samp(known, 0.0)
    low, high = expected.confidence_interval(0.95)
    found = interval_of(values)
    assert (found.low, found.high, found.p) == pytest.approx((low, high, expected.pvalue))
    assert found.seeds == 4 and not found.excludes_zero
    widened = interval_of(values, family=6)
    low, high = expected.confidence_interval(1 - 0.05 / 6)
    assert (widened.low, widened.high) == pytest.approx((low, high))


def test_pairs_are_told_apart_where_the_seeds_differ_more_than_the_arms() -> None:
    hard = np.array([0.0, 10.0, 20.0, 30.0, 40.0])
    small = np.array([1.0, 1.1, 0.9, 1.0, 1.05])
    assert paired(hard + small, hard).excludes_zero
    assert not interval_of(hard + small).excludes_zero or hard.std() > 10


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0], [np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0]])
def test_of_fewer_than_three_seeds_there_is_no_interval(values: list[float]) -> None:
    found = interval_of(np.array(values))
    assert found.low is None and found.high is None and not found.excludes_zero
    assert found.mean == (None if not values else np.mean([v for v in values if np.isfinite(v)]))


def test_seeds_that_agree_to_the_last_digit_are_not_taken_for_certainty() -> None:
    assert not interval_of(np.full(4, 0.25)).excludes_zero  # four coins on one side: one time in eight
    assert interval_of(np.full(10, 0.25)).excludes_zero
    assert not interval_of(np.full(10, 0.25), family=1000).excludes_zero
    nothing = interval_of(np.zeros(5))
    assert (nothing.low, nothing.high, nothing.p) == (0.0, 0.0, 1.0) and not nothing.excludes_zero


def test_an_arm_is_given_up_when_it_is_far_behind_and_falls_back() -> None:
    behind = np.array([1.0, 1.1, 0.9, 1.05, 0.95])
    assert cannot_win(behind + 0.2, behind, family=1)
    assert not cannot_win(behind, behind + 0.2, family=1)  # it has come nearer
    assert not cannot_win(-behind, -behind, family=1)  # it leads
    assert not cannot_win(behind * [1, 1, 1, 1, -1], behind, family=1)  # not so far
    assert not cannot_win(behind[:2], behind[:2], family=1)  # nobody knows
