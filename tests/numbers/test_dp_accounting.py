"""Epsilon against another library's figures, closed forms, and the laws that every accountant has to keep.

The figures of `PLD` were computed with dp-accounting 0.6.0, which does not install beside this project's pins:

    python -m venv /tmp/dpa && /tmp/dpa/bin/pip install dp-accounting==0.6.0
    /tmp/dpa/bin/python -c "
    from dp_accounting import NeighboringRelation, dp_event as e
    from dp_accounting.pld import PLDAccountant
    def epsilon(*steps, relation=NeighboringRelation.ADD_OR_REMOVE_ONE):
        pld = PLDAccountant(relation)
        for sigma, q, count in steps:
            pld.compose(e.PoissonSampledDpEvent(q, e.GaussianDpEvent(sigma)), count)
        return pld.get_epsilon(1e-5)
    print(epsilon((1.0, 0.01, 1000)), epsilon((1.0, 0.01, 500), (0.8, 0.02, 100)))
    print(epsilon((1.0, 0.01, 1000), relation=NeighboringRelation.REPLACE_ONE))"

Those of `FAR`, at the ends of what is used, on a grid ten times as fine; prints them in the form they have here:

    /tmp/dpa/bin/python -c "
    import ast, re
    from dp_accounting import NeighboringRelation, dp_event as e
    from dp_accounting.pld import PLDAccountant
    text = open('tests/numbers/test_dp_accounting.py').read()
    for steps, delta, _ in ast.literal_eval(re.search(r'^FAR = (.*?^])', text, re.M | re.S)[1]):
        pld = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-5)
        for sigma, q, count in steps:
            pld.compose(e.PoissonSampledDpEvent(q, e.GaussianDpEvent(sigma)), count)
        print((steps, delta, pld.get_epsilon(delta)))"
"""

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from tensafe_nb.errors import ValidationError
from tensafe_nb.privacy import accounting
from tensafe_nb.privacy.accounting import Step
from tensafe_nb.privacy.what_if import what_if

DELTA = 1e-5
FIGURES = [  # sigma, q, steps: RDP as designed, PLD by dp-accounting
    ((1.0, 0.01, 1000), 2.101, 1.8282436455855091),
    ((0.8, 0.064, 468), 16.740, 15.175536075084208),
    ((0.6, 0.01, 100), 4.831, 3.8155992155997733),
]
PLD = [
    ([(1.0, 0.01, 13_623)], 7.3933017417933025),
    ([(1.0, 0.1, 30)], 4.178223609042274),
    ([(0.8, 0.0256, 117)], 3.3728808685731844),
    ([(1.0, 0.01, 500), (0.8, 0.02, 100)], 2.838685041641227),
]

FAR = [
    ([(0.3, 0.0001, 1)], 1e-05, 0.590046459165495),
    ([(0.3, 0.0001, 1000)], 1e-10, 18.136639642357206),
    ([(0.3, 0.01, 10)], 1e-10, 30.439336942313517),
    ([(0.3, 1.0, 1)], 1e-05, 19.13076783481632),
    pytest.param([(0.3, 0.0001, 100000)], 1e-05, 23.314816808858254, marks=pytest.mark.soak),  # 4 s
    ([(0.5, 0.001, 10000)], 1e-10, 10.671478408885147),
    ([(1.0, 0.01, 1000)], 1e-10, 3.290452992884023),
    ([(1.0, 0.0001, 100000)], 1e-10, 0.23548763675598225),
    ([(20.0, 0.0001, 100000)], 1e-05, 0.00448900836910266),
    ([(20.0, 1.0, 100)], 1e-10, 3.099430996069082),
    ([(20.0, 0.1, 100000)], 1e-05, 7.518595303037538),
    ([(1.0, 1.0, 2), (1.0, 0.01, 1000)], 1e-05, 6.918810752060411),
    ([(20.0, 1.0, 1000), (0.8, 0.02, 100)], 1e-10, 11.557451044035318),
    ([(20.0, 1.0, 1), (20.0, 0.0001, 100000)], 1e-05, 0.16018745239973647),
]

sigmas = st.sampled_from([0.4, 0.6, 0.8, 1.0, 1.3, 2.0, 5.0])
rates = st.sampled_from([1e-6, 1e-3, 0.01, 0.1, 0.5, 1.0])
counts = st.integers(0, 2_000)
histories = st.lists(st.tuples(sigmas, rates, counts), max_size=5)


@pytest.mark.parametrize(("step", "rdp", "pld"), FIGURES)
def test_epsilon_by_rdp_is_the_pinned_figure(step: Step, rdp: float, pld: float) -> None:
    assert accounting.epsilon_rdp(*step, DELTA) == pytest.approx(rdp, abs=0.005)
    assert accounting.epsilon_rdp(*step, DELTA) >= pld


@pytest.mark.parametrize(("history", "pld"), [([step], pld) for step, _, pld in FIGURES] + PLD)
def test_epsilon_by_prv_is_never_below_dp_accountings_and_hardly_above(
    history: list[Step], pld: float
) -> None:
    assert pld <= accounting.epsilon_prv(history, DELTA) <= pld + 0.02


@pytest.mark.parametrize(("history", "delta", "pld"), FAR, ids=str)
def test_epsilon_by_prv_stays_within_two_hundredths_of_dp_accountings_at_the_ends_too(
    history: list[Step], delta: float, pld: float
) -> None:
    found = accounting.epsilon_prv(history, delta)
    assert pld - 1e-5 * (1 + pld) <= found <= pld + 0.02  # dp-accounting rounds up, by its grid
    account = accounting.epsilon_of_account(history, 0.0, delta, "prv")
    assert account == (
        found,
        "prv" if found < accounting.epsilon_of_account(history, 0.0, delta).value else "rdp",
    )


def test_steps_with_every_unit_in_them_among_others_are_composed_and_not_left_to_rdp() -> None:
    mixed = [(2.0, 1.0, 4), (1.0, 0.01, 1000)]
    by_rdp, by_prv = (accounting.epsilon_of_account(mixed, 0.0, DELTA, name) for name in ("rdp", "prv"))
    assert by_prv.by == "prv" and by_prv.value < by_rdp.value - 0.3
    alone = [accounting.epsilon_prv([step], DELTA) for step in mixed]
    assert max(alone) < by_prv.value < sum(alone)
    replaced = accounting.epsilon_prv(mixed, DELTA, "replace_one")
    assert (
        by_prv.value < replaced < accounting.epsilon_of_account(mixed, 0.0, DELTA, "rdp", "replace_one").value
    )


def test_the_privacy_loss_of_whole_batches_is_that_of_sampling_at_rate_almost_1() -> None:
    t = np.linspace(-3, 8, 50)
    gaussian = accounting.GaussianPRV(1 / 1.3).cdf(t)
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    assert gaussian == pytest.approx(PoissonSubsampledGaussianPRV(1 - 1e-9, 1.3).cdf(t), abs=1e-6)
    replaced = accounting.GaussianPRV(2 / 1.3).cdf(t)
    assert replaced == pytest.approx(accounting.ReplaceOnePRV(1 - 1e-9, 1.3).cdf(t), abs=1e-6)


def test_replacing_a_unit_costs_what_dp_accounting_says() -> None:
    pld = 2.8434458118173023
    assert pld <= accounting.epsilon_prv([(1.0, 0.01, 1000)], DELTA, "replace_one") <= pld + 0.02
    by_rdp = accounting.epsilon_of_account([(1.0, 0.01, 1000)], 0.0, DELTA, "rdp", "replace_one")
    assert pld <= by_rdp.value <= pld + 0.3


@pytest.mark.parametrize(("mu", "epsilon"), [(0.5, 1.993), (1.0, 4.377), (2.0, 9.997)])
def test_the_gaussian_mechanism_has_its_closed_form(mu: float, epsilon: float) -> None:
    assert accounting.epsilon_gaussian(mu, DELTA) == pytest.approx(epsilon, abs=0.001)
    assert accounting.mu_of_epsilon(accounting.epsilon_gaussian(mu, DELTA), DELTA) == pytest.approx(
        mu, rel=1e-9
    )


def test_a_unit_may_take_part_in_two_worst_case_steps_at_noise_1_and_budget_8() -> None:
    taken = [
        accounting.epsilon_gaussian(accounting.mu_of_participation([(1, 1.0)] * n), DELTA) for n in (1, 2, 3)
    ]
    assert taken == pytest.approx([4.38, 6.57, 8.39], abs=0.005)
    assert accounting.projected_participations(8.0, DELTA, 0.0, 1.0) == 2
    assert accounting.projected_participations(8.0, DELTA, 2.0, 1.0) == 0
    assert accounting.projected_participations(8.0, DELTA, 0.0, 0.0) is None


@pytest.mark.parametrize(
    ("n", "batch", "sigma", "steps", "expected"),
    [(1_000, 100, 1.0, 30, (4.19, 8.39, 37.6)), (10_000, 256, 0.8, 117, (3.38, 11.0, 148.0))],
)
def test_three_epochs_cost_what_the_modes_promise(
    n: int, batch: int, sigma: float, steps: int, expected: tuple[float, float, float]
) -> None:
    poisson = accounting.epsilon_prv([(sigma, batch / n, steps)], DELTA)
    worst_case = accounting.epsilon_gaussian(math.sqrt(3) / sigma, DELTA)
    whole_batch = accounting.epsilon_prv([(sigma, 1.0, steps)], DELTA)
    assert (poisson, worst_case, whole_batch) == pytest.approx(expected, rel=0.004)


def test_the_budget_ends_at_the_projected_step_and_not_before() -> None:
    step = accounting.rdp_of_step(1.0, 0.01)
    last = accounting.projected_steps(8.0, DELTA, np.zeros_like(step), step)
    assert last == 13_623
    assert (
        accounting.epsilon_rdp(1.0, 0.01, 13_623, DELTA)
        <= 8.0
        < accounting.epsilon_rdp(1.0, 0.01, 13_624, DELTA)
    )
    assert accounting.epsilon_prv([(1.0, 0.01, 13_623)], DELTA) == pytest.approx(7.40, abs=0.01)


def test_a_spent_budget_pays_for_no_step_and_a_free_step_never_ends() -> None:
    step = accounting.rdp_of_step(1.0, 0.01)
    assert accounting.projected_steps(8.0, DELTA, 13_623 * step, step) == 0
    assert accounting.projected_steps(8.0, DELTA, 20_000 * step, step) == 0
    assert accounting.projected_steps(8.0, DELTA, step, accounting.rdp_of_step(1.0, 0.0)) is None
    assert accounting.projected_steps(8.0, DELTA, step, accounting.rdp_of_step(0.0, 0.01)) == 0


def test_the_gaussian_form_stays_exact_at_its_ends() -> None:
    assert accounting.epsilon_gaussian(0.0, DELTA) == 0.0
    assert accounting.epsilon_gaussian(1e-9, DELTA) == 0.0
    assert accounting.epsilon_gaussian(math.inf, DELTA) == math.inf
    assert accounting.epsilon_gaussian(1e4, 1e-12) == pytest.approx(5e7 + 1e4 * 7.034, rel=1e-4)
    assert 0 < accounting.epsilon_gaussian(1e-3, 1e-12) < 0.01


@pytest.mark.parametrize("mu", [0.05, 0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-8, 1e-15])
def test_the_gaussian_form_solves_its_equation(mu: float, delta: float) -> None:
    mpmath = pytest.importorskip("mpmath")
    epsilon = mpmath.mpf(accounting.epsilon_gaussian(mu, delta))
    with mpmath.workdps(60):
        normal = mpmath.ncdf
        spent = normal(-epsilon / mu + mpmath.mpf(mu) / 2) - mpmath.exp(epsilon) * normal(
            -epsilon / mu - mpmath.mpf(mu) / 2
        )
        assert float(spent) <= delta
        assert float(spent) == pytest.approx(delta, rel=1e-6)


def test_no_noise_is_infinite_and_no_draw_is_free() -> None:
    assert accounting.epsilon_rdp(0.0, 0.01, 1, DELTA) == math.inf
    assert accounting.epsilon_prv([(0.0, 0.01, 1)], DELTA) == math.inf
    assert accounting.epsilon_prv([(1e-200, 1.0, 1)], DELTA) == math.inf
    assert accounting.epsilon_rdp(1.0, 0.0, 100, DELTA) == 0.0
    assert accounting.epsilon_rdp(1.0, 0.01, 0, DELTA) == 0.0
    assert accounting.epsilon_prv([], DELTA) == 0.0


def test_a_tiny_sampling_rate_is_not_rounded_down_to_nothing() -> None:
    step = accounting.rdp_of_step(1.0, 1e-9)
    true = accounting.ORDERS * 1e-18 * (math.e - 1) / 2  # to leading order in q
    assert (step >= true).all() and (step[:90] < 2e-9).all()


@pytest.mark.parametrize(("sigma", "q"), [(0.5, 1e-4), (0.8, 0.064), (1.0, 0.01), (3.0, 0.4), (10.0, 0.9)])
def test_rdp_is_never_below_its_own_integral(sigma: float, q: float) -> None:
    x = np.linspace(-40 * sigma, 130 + 40 * sigma, 200_001)
    log_q = -((x / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))
    log_p = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2)) + log_q
    for order, rdp in zip(accounting.ORDERS[:151], accounting.rdp_of_step(sigma, q), strict=False):
        log_moment = logsumexp(order * log_p + (1 - order) * log_q) + math.log(x[1] - x[0])
        exact = max(log_moment, 0.0) / (order - 1)
        assert exact <= rdp <= exact * (1 + 1e-6) + 2e-9


def test_whole_batches_are_the_gaussian_mechanism_exactly() -> None:
    assert accounting.rdp_of_step(2.0, 1.0) == pytest.approx(accounting.ORDERS / 8)
    exact = accounting.epsilon_gaussian(math.sqrt(10 / 4), DELTA)
    assert accounting.epsilon_prv([(2.0, 1.0, 10)], DELTA) == exact
    assert accounting.epsilon_of_account([(2.0, 1.0, 10)], 0.0, DELTA, "prv") == (exact, "prv")


def test_a_large_epsilon_is_reported_by_rdp_at_once() -> None:
    history = [(0.5, 0.3, 10_000)]
    assert accounting.epsilon_prv(history, DELTA) == accounting.epsilon_rdp(*history[0], DELTA) > 100


def test_both_modes_in_one_account_add_up_by_each_accountant() -> None:
    rdp = 100 * accounting.rdp_of_step(1.0, 0.01) + accounting.ORDERS * 0.5 / 2
    mixed = accounting.epsilon_of_account([(1.0, 0.01, 100)], 0.5, DELTA, "rdp")
    assert mixed.by == "rdp" and mixed.value == pytest.approx(
        accounting.epsilon_of_rdp(rdp, DELTA), rel=1e-12
    )
    by_prv = accounting.epsilon_of_account([(1.0, 0.1, 5)], 0.5, DELTA, "prv")
    pld = 3.5897  # PoissonSampled(0.1, Gaussian(1)) five times and Gaussian(2 ** 0.5) once
    assert by_prv.by == "prv" and pld <= by_prv.value <= pld + 0.02
    assert math.isinf(accounting.epsilon_of_account([(1.0, 0.1, 5)], math.inf, DELTA, "prv").value)
    alone = accounting.epsilon_of_account([], 0.5, DELTA)
    assert alone == (accounting.epsilon_gaussian(math.sqrt(0.5), DELTA), "gaussian")


@settings(max_examples=40)
@given(history=histories, more=st.tuples(sigmas, rates, st.integers(1, 500)))
def test_epsilon_grows_with_every_step(history: list[Step], more: Step) -> None:
    rdp = accounting.rdp_of_history(history)
    both = accounting.rdp_of_history([*history, more])
    assert (both > rdp).all()
    assert accounting.epsilon_of_rdp(both, DELTA) >= accounting.epsilon_of_rdp(rdp, DELTA) >= 0


@settings(max_examples=40)
@given(q=rates, steps=st.integers(1, 2_000), pair=st.tuples(sigmas, sigmas).map(sorted))
def test_epsilon_shrinks_with_noise(q: float, steps: int, pair: list[float]) -> None:
    little, much = (accounting.epsilon_rdp(sigma, q, steps, DELTA) for sigma in pair)
    assert much <= little * (1 + 1e-9)


@settings(max_examples=40)
@given(history=histories, order=st.randoms(use_true_random=False))
def test_the_union_does_not_depend_on_the_order(history: list[Step], order: Any) -> None:
    shuffled = [(sigma, q, 1) for sigma, q, steps in history for _ in range(min(steps, 5))]
    ordered = accounting.merged(shuffled)
    order.shuffle(shuffled)
    assert accounting.merged(shuffled) == ordered
    assert (accounting.rdp_of_history(shuffled) == accounting.rdp_of_history(ordered)).all()


@settings(max_examples=15)
@given(steps=st.integers(1, 200), q=st.sampled_from([0.01, 0.1]), sigma=st.sampled_from([0.8, 1.0, 2.0]))
def test_prv_is_never_above_rdp(steps: int, q: float, sigma: float) -> None:
    assert (
        0
        <= accounting.epsilon_prv([(sigma, q, steps)], DELTA)
        <= accounting.epsilon_rdp(sigma, q, steps, DELTA)
    )


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_rdp_grows_with_its_order_and_is_bounded_by_whole_batches(adjacency: Any) -> None:
    for sigma, q in itertools.product((0.03, 0.1, 0.5, 1.0, 10.0), (1e-9, 1e-3, 0.5, 0.999)):
        rdp = accounting.rdp_of_step(sigma, q, adjacency)
        assert (np.diff(rdp) >= 0).all() and (rdp > 0).all(), (sigma, q)
        whole = accounting.rdp_of_step(sigma, 1.0, adjacency)
        assert (rdp <= whole * (1 + 1e-6) + 2e-9).all(), (sigma, q)


@settings(max_examples=15)
@given(sigma=sigmas, q=rates)
def test_replacing_costs_at_least_what_removing_does(sigma: float, q: float) -> None:
    removing, replacing = accounting.rdp_of_step(sigma, q), accounting.rdp_of_step(sigma, q, "replace_one")
    assert (replacing >= removing * (1 - 1e-6) - 2e-9).all()


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_noise_for_a_target_is_the_least_that_reaches_it(accountant: str) -> None:
    sigma = accounting.solve_noise_multiplier(2.0, DELTA, 0.01, 1000, accountant)

    def spends(noise: float) -> float:
        return accounting.epsilon_of_account([(noise, 0.01, 1000)], 0.0, DELTA, accountant).value

    assert spends(sigma) <= 2.0 < spends(sigma * 0.999)


def test_what_if_answers_both_ways() -> None:
    plan: dict[str, Any] = {"dataset_size": 10_000, "expected_batch_size": 100}
    asked = what_if(**plan, steps=1_000, noise_multiplier=1.0, parameters=310_000)
    assert (asked.epsilon, asked.accountant) == (pytest.approx(2.101, abs=0.005), "rdp")
    assert asked.epsilon_replace_one == pytest.approx(3.11, abs=0.01)
    assert asked.noise_to_signal == pytest.approx(math.sqrt(310_000) / 100)
    back = what_if(**plan, epochs=10, target_epsilon=asked.epsilon)
    assert (back.steps, back.epochs) == (1_000, pytest.approx(10))
    assert back.noise_multiplier == pytest.approx(1.0, rel=2e-4)
    assert back.noise_to_signal is None


def test_what_if_counts_participations_of_worst_case_batches() -> None:
    plan: dict[str, Any] = {
        "dataset_size": 1_000,
        "expected_batch_size": 100,
        "sampling": "worst_case",
        "epochs": 3,
    }
    asked = what_if(**plan, noise_multiplier=1.0)
    assert (asked.epsilon, asked.accountant, asked.steps) == (pytest.approx(8.385, abs=0.001), "gaussian", 30)
    assert asked.epsilon_replace_one == pytest.approx(accounting.epsilon_gaussian(2 * math.sqrt(3), DELTA))
    assert what_if(**plan, target_epsilon=asked.epsilon).noise_multiplier == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: accounting.check_accountant("moments"), "report less than is spent"),
        (lambda: accounting.check_accountant("gdp"), "central-limit"),
        (lambda: accounting.check_accountant("pld"), '"prv"'),
        (lambda: accounting.epsilon_rdp(-1.0, 0.1, 1, DELTA), "noise_multiplier"),
        (lambda: accounting.epsilon_rdp(math.nan, 0.1, 1, DELTA), "noise_multiplier"),
        (lambda: accounting.epsilon_rdp(1.0, 1.1, 1, DELTA), "probability"),
        (lambda: accounting.epsilon_rdp(1.0, 0.1, -1, DELTA), "steps"),
        (lambda: accounting.epsilon_rdp(1.0, 0.1, 1.5, DELTA), "steps"),  # type: ignore[arg-type]
        (lambda: accounting.epsilon_rdp(1.0, 0.1, 1, 0.0), "delta"),
        (lambda: accounting.epsilon_gaussian(-1.0, DELTA), "mu"),
        (lambda: accounting.mu_of_epsilon(0.0, DELTA), "epsilon"),
        (lambda: accounting.sample_rate(0, 10), "from 1"),
        (lambda: accounting.solve_noise_multiplier(1e-4, DELTA, 1.0, 1000), "Plan fewer steps"),
        (lambda: accounting.solve_noise_multiplier(1.0, DELTA, 0.1, 0), "nothing is released"),
        (lambda: what_if(dataset_size=10, expected_batch_size=1, steps=1), "to get epsilon"),
        (lambda: what_if(dataset_size=10, expected_batch_size=1, noise_multiplier=1.0), "steps or epochs"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(call: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        call()


def test_accounting_is_imported_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import tensafe_nb.privacy.what_if; "
        "import tensafe_nb.privacy.ledger.statement; "
        "from tensafe_nb.privacy import accounting; print(round(accounting.epsilon_gaussian(1.0, 1e-5), 3))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "4.377"
