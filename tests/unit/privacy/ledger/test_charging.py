"""Charges to the privacy ledger: paid before the step, added up, and never taken back."""

import errno
import math
import os
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import (
    DPBudgetExceededError,
    StorageError,
    ValidationError,
)
from tensafe_nb.privacy import accounting
from tensafe_nb.store.audit.files import LogFiles
from tests.forking import Forker
from tests.unit.privacy.homes import ACCOUNT, DELTA, Home, step, turn
from tests.unit.privacy.ledger.accounts import as_saved, epsilon_of, records_in

# charging


def test_an_account_without_a_step_has_spent_nothing_and_writes_nothing(home: Home) -> None:
    spent = home.ledger().state()
    assert (spent.total_epsilon, spent.steps, spent.void, spent.head, spent.opened_at) == (
        0.0,
        0,
        None,
        None,
        None,
    )
    assert not home.folder.exists()


def test_a_charge_is_in_the_audit_log_with_everything_it_was_computed_from(home: Home) -> None:
    charged = home.ledger().charge(step(7))
    record = records_in(home)[-1]
    assert (record["kind"], record["seq"], record["record_hash"]) == (
        "dp_charge",
        charged.seq,
        charged.record_hash,
    )
    version = record["dp"].pop("accountant_version")
    assert version.startswith("opacus ")
    assert record["dp"] == {
        "what": "charge",
        "account": ACCOUNT,
        "mode": "poisson",
        "sigma": 1.0,
        "C": 0.5,
        "L": 10,
        "N": 1_000,
        "q": 0.01,
        "delta": DELTA,
        "unit": "example",
        "noise_source": "chacha20/1",
        "sampling": "toolkit sampler",
        "accountant": "rdp",
        "epsilon_after": epsilon_of(1),
        "step": 7,
    }
    assert home.log.verify().ok


def test_the_listed_record_of_a_charge_leaves_the_operators_view_empty(home: Home) -> None:
    home.ledger().charge(step())
    entry = home.log.entries(operation="dp_charge")[0]
    assert entry.dp_metrics == {
        "noise_applied": True,
        "epsilon_spent": epsilon_of(1),
        "total_epsilon": epsilon_of(1),
        "delta": DELTA,
        "grad_norm_before_clip": None,
        "grad_norm_after_clip": None,
        "num_clipped": None,
    }


def test_what_the_steps_of_a_run_spent_adds_up_to_its_total(home: Home) -> None:
    ledger = home.ledger()
    charges = [ledger.charge(step(number)) for number in range(1, 8)]
    assert sum(charged.epsilon_spent for charged in charges) == pytest.approx(epsilon_of(7))
    assert ledger.state().total_epsilon == charges[-1].total_epsilon == epsilon_of(7)


def test_a_quote_is_what_the_charge_then_costs_and_writes_nothing(home: Home) -> None:
    ledger = home.ledger()
    for number in range(1, 4):
        before = len(records_in(home))
        quoted = ledger.quote(step(number))
        assert len(records_in(home)) == before
        assert ledger.charge(step(number)).total_epsilon == quoted
    quoted = ledger.quote(turn(4, "a"))
    assert ledger.charge(turn(4, "a")).total_epsilon == quoted


def test_a_step_over_budget_is_refused_and_not_written(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step(1), target_epsilon=1.0)
    budget = (epsilon_of(1) + epsilon_of(2)) / 2
    before = home.log.path.read_bytes()
    with pytest.raises(DPBudgetExceededError, match="No weight has moved") as refused:
        ledger.charge(step(2), target_epsilon=budget)
    assert refused.value.details == {
        "current_epsilon": epsilon_of(1),
        "max_epsilon": budget,
        "next_epsilon": epsilon_of(2),
        "step": 2,
    }
    assert home.log.path.read_bytes() == before
    assert ledger.state().total_epsilon == epsilon_of(1)


def test_the_projected_step_is_the_last_one_that_the_budget_pays_for(home: Home) -> None:
    ledger = home.ledger()
    budget = (epsilon_of(5) + epsilon_of(6)) / 2
    assert ledger.projected_step(step(1), budget) == 5
    for number in range(1, 6):
        ledger.charge(step(number), target_epsilon=budget)
        assert ledger.projected_step(step(number + 1), budget) == 5
    with pytest.raises(DPBudgetExceededError):
        ledger.charge(step(6), target_epsilon=budget)
    assert ledger.projected_step(step(6), None) is None


def test_a_process_that_dies_between_record_and_step_has_paid(home: Home) -> None:
    home.ledger().charge(step(1))
    assert home.again().ledger().state().total_epsilon == epsilon_of(1)


def test_threads_that_share_a_ledger_lose_no_charge(home: Home) -> None:
    ledger = home.ledger()

    def charge() -> None:
        for number in range(10):
            ledger.quote(step(number))
            ledger.charge(step(number))

    threads = [threading.Thread(target=charge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.state().total_epsilon == home.again().ledger().state().total_epsilon == epsilon_of(40)


def test_a_charge_that_cannot_be_written_is_not_counted(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(LogFiles, "append", full)
        with pytest.raises(StorageError, match="Free some space"):
            ledger.charge(step(2))
        with pytest.raises(StorageError):
            ledger.void("because")
    assert ledger.state().total_epsilon == epsilon_of(1)
    assert ledger.charge(step(2)).total_epsilon == epsilon_of(2)


def test_other_records_of_the_audit_log_are_passed_over(home: Home) -> None:
    ledger = home.ledger()
    for number in range(1, 4):
        home.log.append(operation="forward_backward", started_at=0.0, completed_at=1.0)
        ledger.charge(step(number))
    assert home.again().ledger().state().total_epsilon == epsilon_of(3)


@pytest.mark.parametrize("mode", ["poisson", "worst_case"])
def test_a_charge_without_what_it_is_computed_from_is_refused(mode: Any) -> None:
    with pytest.raises(ValidationError, match="dataset_size"):
        step(1, dataset_size=None)
    with pytest.raises(ValidationError, match="noise_multiplier"):
        step(1, mode=mode, noise_multiplier=-1.0)
    with pytest.raises(ValidationError, match="mode"):
        step(1, mode="shuffled")


# what never goes down


def test_going_back_to_a_checkpoint_gives_nothing_back(home: Home) -> None:
    ledger = home.ledger()
    carried, head = as_saved(ledger), ledger.state().head
    for number in range(1, 6):
        ledger.charge(step(number))
    ledger.adopt(carried, head)
    for number in range(1, 6):
        ledger.charge(step(number))
    assert (ledger.state().steps, ledger.state().total_epsilon) == (10, epsilon_of(10))


def test_two_forks_see_the_union(home: Home) -> None:
    one, other = home.ledger(), home.ledger()
    for number in range(1, 4):
        one.charge(step(number))
        other.charge(step(number))
    assert one.state() == other.state()
    assert one.state().total_epsilon == epsilon_of(6)


@pytest.mark.parametrize("charge", [step(), turn(1, "a", "b")])
def test_two_processes_charge_one_account(forker: Forker, home: Home, charge: Any) -> None:
    code = """
import sys
from pathlib import Path
from tests.unit.privacy.homes import Home, step, turn
ledger = Home(Path(sys.argv[1])).ledger("dataset:shared")
charge = step() if sys.argv[2] == "poisson" else turn(1, "a", "b")
for _ in range(10):
    ledger.charge(charge)
"""
    home.keys.primary_id()  # two first uses at once would be a race of the key file's, not of the ledger's
    processes = [forker.begin(code, str(home.folder), charge.mode) for _ in range(2)]
    assert [forker.status_of(pid) for pid in processes] == [0, 0]
    spent = home.ledger("dataset:shared").state()
    assert spent.steps == 20
    if charge.mode == "poisson":
        assert spent.total_epsilon == epsilon_of(20)
    else:
        assert spent.total_epsilon == pytest.approx(accounting.epsilon_gaussian(math.sqrt(20), DELTA))
    claimed = [record["dp"]["epsilon_after"] for record in records_in(home) if "dp" in record]
    assert claimed == sorted(claimed) and len(set(claimed)) == 20
    assert home.log.verify().ok


Calls = st.lists(
    st.sampled_from(
        [
            "charge",
            "turn",
            "refused",
            "quote",
            "restart",
            "fork",
            "rewind",
            "import",
            "join",
            "prv",
            "state",
            "delta",
        ]
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25)
@given(calls=Calls)
def test_no_sequence_of_calls_lowers_epsilon(
    tmp_path_factory: pytest.TempPathFactory, calls: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    home = Home(folder / "here")
    ledger = home.ledger()
    ledger.charge(step(1))
    early = as_saved(ledger)
    abroad = Home(folder / "abroad").ledger("client:tc-7")
    abroad.charge(step(1))
    seen = {
        "rdp": ledger.state(),
        "prv": home.ledger(accountant_type="prv").state(),
    }  # two bounds, each for itself
    for call in calls:
        if call == "charge":
            ledger.charge(step(2))
        elif call == "turn":
            ledger.charge(turn(2, "a", "b"))
        elif call == "refused":
            with pytest.raises(DPBudgetExceededError):
                ledger.charge(step(2), target_epsilon=1e-9)
        elif call == "quote":
            ledger.quote(step(2))
        elif call == "restart":
            ledger = home.again().ledger()
        elif call == "fork":
            ledger = home.ledger()
        elif call == "rewind":
            ledger.adopt(early, early["head"])
        elif call == "import":
            carried = as_saved(abroad)
            ledger.adopt(carried, carried["head"])
        elif call == "join":
            ledger.join("dataset:empty")
        elif call == "prv":
            ledger = home.ledger(accountant_type="prv")
        elif call == "delta":
            ledger = home.ledger(delta=DELTA)
        for accountant_type, before in seen.items():
            now = seen[accountant_type] = home.ledger(accountant_type=accountant_type).state()
            assert now.total_epsilon >= before.total_epsilon and now.steps >= before.steps
        assert ledger.state().total_epsilon == seen[ledger.accountant_type].total_epsilon
    assert home.log.verify().ok


@settings(max_examples=10)
@given(order=st.permutations([0, 0, 1, 1, 2]))
def test_the_union_does_not_depend_on_who_charged_first(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    home = Home(tmp_path_factory.mktemp("ledger"))
    forks = [home.ledger() for _ in range(3)]
    for number in order:
        forks[number].charge(step(1, noise_multiplier=(0.8, 1.0, 2.0)[number]))
    alike = [(0.8, 0.01, 2), (1.0, 0.01, 2), (2.0, 0.01, 1)]
    expected = accounting.epsilon_of_rdp(accounting.rdp_of_history(alike), DELTA)
    assert [fork.state().total_epsilon for fork in forks] == [expected] * 3


def test_a_tighter_accountant_does_not_take_back_what_was_claimed(home: Home) -> None:
    by_rdp = home.ledger()
    for number in range(1, 31):
        by_rdp.charge(step(number))
    by_prv = home.ledger(accountant_type="prv")
    assert by_prv.quote(step(31)) == by_rdp.state().total_epsilon
    computed = by_prv.computed(by_prv.snapshot()[1]).value
    assert computed < by_rdp.state().total_epsilon == by_prv.state().total_epsilon


def test_a_claim_at_a_smaller_delta_says_nothing_about_a_larger_one(home: Home) -> None:
    home.ledger(delta=1e-9).charge(step(1))
    assert home.ledger(delta=1e-5).state().total_epsilon == epsilon_of(1)
    assert home.ledger(delta=1e-9).state().total_epsilon > epsilon_of(1)
