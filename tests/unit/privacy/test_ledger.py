"""The privacy ledger: written before the step, shared by forks and processes, and never taken back."""

import base64
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.core.ledger import TenantLedger
from tensafe_nb.errors import (
    DPBudgetExceededError,
    KeyUnavailableError,
    LedgerError,
    StorageError,
    ValidationError,
)
from tensafe_nb.privacy import accounting
from tensafe_nb.privacy.ledger.account import Ledger, without_tables
from tensafe_nb.privacy.ledger.charges import account_name
from tensafe_nb.privacy.ledger.participation import Participation
from tensafe_nb.store import home as places
from tensafe_nb.store.audit.files import LogFiles
from tensafe_nb.store.audit.log import verify_file
from tensafe_nb.store.sealed.envelope import read_header
from tensafe_nb.store.vault import Vault
from tests.unit.privacy.homes import ACCOUNT, DELTA, Home, step, turn


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "here")


def epsilon_of(steps: int) -> float:
    return accounting.epsilon_rdp(1.0, 0.01, steps, DELTA)


def as_saved(ledger: Ledger) -> dict[str, Any]:
    """What a checkpoint gives back of `carried`."""
    carried: dict[str, Any] = json.loads(json.dumps(ledger.carried(), allow_nan=False))
    return carried


def records_in(home: Home) -> list[dict[str, Any]]:
    if not home.log.path.exists():
        return []
    return [json.loads(line) for line in home.log.path.read_bytes().splitlines()]


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
def test_two_processes_charge_one_account(home: Home, charge: Any) -> None:
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
    command = [sys.executable, "-c", code, str(home.folder), charge.mode]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
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


# void


def test_a_void_account_stays_void_and_has_no_budget_any_more(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))
    ledger.void("trained on without noise")
    spent = ledger.state()
    assert (spent.total_epsilon, spent.void) == (math.inf, "trained on without noise")
    charged = ledger.charge(step(2), target_epsilon=1.0)
    assert (charged.total_epsilon, charged.epsilon_spent) == (math.inf, 0.0)
    assert ledger.projected_step(step(3), 1.0) is None
    assert home.again().ledger().state().void == "trained on without noise"
    with pytest.raises(ValidationError, match="Say why"):
        ledger.void(" ")


def test_a_step_without_noise_is_infinite_for_good(home: Home) -> None:
    ledger = home.ledger()
    charged = ledger.charge(step(1, noise_multiplier=0.0))
    assert (charged.total_epsilon, charged.epsilon_spent) == (math.inf, math.inf)
    ledger.charge(step(2))
    spent = home.again().ledger().state()
    assert spent.total_epsilon == math.inf and spent.void is not None and "without noise" in spent.void
    assert home.log.entries(operation="dp_charge")[1].dp_metrics is not None
    assert home.log.verify().ok


def test_a_step_without_noise_does_not_fit_into_any_budget(home: Home) -> None:
    with pytest.raises(DPBudgetExceededError):
        home.ledger().charge(step(1, noise_multiplier=0.0), target_epsilon=8.0)
    assert home.ledger().state().total_epsilon == 0.0


def test_accounts_are_joined_for_good_and_in_both_directions(home: Home) -> None:
    one, other, third = (home.ledger(f"dataset:{name}") for name in "abc")
    one.charge(step(1))
    other.charge(step(1))
    assert one.state().total_epsilon == epsilon_of(1)
    one.join("dataset:b")
    one.join("dataset:b")
    third.join("dataset:b")
    assert one.state().joined == ("dataset:b", "dataset:c")
    assert [ledger.state().total_epsilon for ledger in (one, other, third)] == [epsilon_of(2)] * 3
    assert sum(record["kind"] == "dp_join" for record in records_in(home)) == 2
    third.void("gone")
    assert one.state().void == other.state().void == "gone"


def test_accounts_are_named_by_data_set_or_by_client() -> None:
    assert account_name("mails", "tc-1") == "dataset:mails"
    assert account_name(None, "tc-1") == "client:tc-1"


# a ledger that was tampered with


def _edited(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"sigma":1.0', b'"sigma":9.0', 1))


def _cut(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))


def _with_a_line_removed(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))


def _without_its_key_file(path: Path) -> None:
    path.with_suffix(".key").unlink()


@pytest.mark.parametrize("tamper", [_edited, _cut, _with_a_line_removed, _without_its_key_file])
def test_a_ledger_that_was_tampered_with_takes_no_charge_and_is_infinite(
    home: Home, tamper: Callable[[Path], None]
) -> None:
    ledger = home.ledger()
    for number in range(1, 5):
        ledger.charge(step(number))
    tamper(home.log.path)
    opened = home.again().ledger()
    assert opened.state().total_epsilon == math.inf
    assert opened.state().void is not None and "audit log" in opened.state().void
    for call in (opened.charge, opened.quote):
        with pytest.raises(LedgerError, match="broken"):
            call(step(5))
    with pytest.raises(LedgerError):
        opened.carried()


def test_a_log_that_was_removed_while_training_is_noticed(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))
    shutil.rmtree(home.folder / "audit")
    with pytest.raises(LedgerError, match="gone"):
        ledger.charge(step(2))
    home.again().log.append(operation="sample", started_at=0.0, completed_at=1.0)  # a new log in its place
    assert ledger.state().total_epsilon == math.inf
    with pytest.raises(LedgerError):
        ledger.charge(step(2))


def test_another_log_put_in_its_place_is_noticed(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))
    saved = tmp_path / "saved"
    shutil.copytree(home.folder / "audit", saved)
    ledger.charge(step(2))
    shutil.rmtree(home.folder / "audit")
    shutil.copytree(saved, home.folder / "audit")
    with pytest.raises(LedgerError):
        ledger.charge(step(3))
    assert ledger.state().total_epsilon == math.inf


def test_without_the_key_nothing_is_charged(home: Home) -> None:
    home.ledger().charge(step(1))
    shutil.rmtree(home.folder / "keys")
    opened = home.again().ledger()
    assert opened.state().total_epsilon == math.inf
    with pytest.raises(LedgerError) as refused:
        opened.charge(step(2))
    assert isinstance(refused.value.__cause__, KeyUnavailableError)


def test_a_record_that_this_version_cannot_read_is_not_passed_over(home: Home) -> None:
    home.ledger().charge(step(1))
    home.log.append(
        kind="dp_charge",
        operation="dp_charge",
        started_at=0.0,
        completed_at=0.0,
        extra={"dp": {"what": "charge", "account": ACCOUNT, "mode": "shuffled"}},
    )
    ledger = home.ledger()
    assert ledger.state().total_epsilon == math.inf
    with pytest.raises(LedgerError, match="not what this version"):
        ledger.charge(step(2))


# checkpoints


def test_a_checkpoint_takes_its_account_to_another_home(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    for number in range(1, 6):
        ledger.charge(step(number))
    carried, head = as_saved(ledger), ledger.state().head
    there = Home(tmp_path / "there")
    other = there.ledger("client:tc-9")
    other.adopt(carried, head, training_client_id="tc-9")
    assert other.state().total_epsilon == epsilon_of(5)
    assert other.state().joined == (ACCOUNT,)
    assert other.state().opened_at == ledger.state().opened_at
    other.adopt(carried, head)
    other.charge(step(6))
    assert there.again().ledger("client:tc-9").state().total_epsilon == epsilon_of(6)
    assert [record["kind"] for record in records_in(there)] == ["genesis", "import", "dp_join", "dp_charge"]
    assert there.log.verify().ok


def test_a_checkpoint_that_comes_back_adds_only_what_is_new(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))
    there = Home(tmp_path / "there").ledger()
    there.adopt(as_saved(ledger), ledger.state().head)
    there.charge(step(2))
    ledger.charge(step(2))
    back = as_saved(there)
    ledger.adopt(back, back["head"])
    assert (ledger.state().steps, ledger.state().total_epsilon) == (3, epsilon_of(3))
    again = as_saved(ledger)
    there.adopt(again, again["head"])
    assert there.state().total_epsilon == epsilon_of(3)


def test_a_log_moved_away_is_made_good_by_a_checkpoint(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))
    carried, head = as_saved(ledger), ledger.state().head
    shutil.rmtree(home.folder / "audit")
    opened = home.again().ledger()
    assert opened.state().total_epsilon == 0.0
    opened.adopt(carried, head)
    assert opened.state().total_epsilon == epsilon_of(1)


def test_a_void_account_is_carried_as_void(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    ledger.charge(step(1, noise_multiplier=0.0))
    ledger.void("and again")
    there = Home(tmp_path / "there").ledger("dataset:x")
    there.adopt(as_saved(ledger), ledger.state().head)
    assert there.state().total_epsilon == math.inf
    assert {reason for reason, _ in there.state().voids} == {reason for reason, _ in ledger.state().voids}


def _without_records(carried: dict[str, Any]) -> None:
    carried["accounts"] = {}


def _of_another_format(carried: dict[str, Any]) -> None:
    carried["schema"] = 99


def _with_free_steps(carried: dict[str, Any]) -> None:
    carried["accounts"][ACCOUNT]["groups"][0]["q"] = 0.0


def _with_a_bad_hash(carried: dict[str, Any]) -> None:
    carried["accounts"][ACCOUNT]["groups"][0]["hashes"] = ["x"]


def _without_a_field(carried: dict[str, Any]) -> None:
    del carried["accounts"][ACCOUNT]["groups"][0]["sigma"]


@pytest.mark.parametrize(
    "damage", [_without_records, _of_another_format, _with_free_steps, _with_a_bad_hash, _without_a_field]
)
def test_a_head_that_cannot_be_imported_makes_the_account_void(
    home: Home, tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))
    carried, head = as_saved(ledger), ledger.state().head
    damage(carried)
    there = Home(tmp_path / "there")
    there.ledger().adopt(carried, head)
    spent = there.again().ledger().state()
    assert spent.total_epsilon == math.inf
    assert spent.void is not None and "checkpoint" in spent.void


def test_a_checkpoint_without_records_makes_the_account_void(home: Home) -> None:
    ledger = home.ledger()
    ledger.adopt(None, None)
    assert ledger.state().void is not None and "carries none" in ledger.state().void


def test_a_checkpoint_stays_small_however_many_steps_were_alike(home: Home) -> None:
    ledger = home.ledger()
    for number in range(1, 31):
        ledger.charge(step(number))
    carried = ledger.carried()
    assert len(carried["accounts"][ACCOUNT]["groups"]) == 1
    assert len(json.dumps(carried)) < 1_000 + 30 * 70


# worst-case participation


def test_worst_case_steps_cost_what_the_busiest_unit_pays(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a", "b"))
    ledger.charge(turn(2, "c"))
    assert ledger.state().mu == 1.0
    ledger.charge(turn(3, "a"))
    assert ledger.state().total_epsilon == accounting.epsilon_gaussian(math.sqrt(2), DELTA)
    ledger.charge(turn(4, "d", participants={"d": 3}))
    assert ledger.state().mu == 3.0
    assert ledger.state().accountant == "gaussian"


def test_the_third_turn_of_a_unit_is_over_a_budget_of_8(home: Home) -> None:
    ledger = home.ledger()
    assert ledger.projected_step(turn(1, "a"), 8.0) == 2
    for number in (1, 2):
        ledger.charge(turn(number, "a"), target_epsilon=8.0)
    assert ledger.projected_step(turn(3, "a"), 8.0) == 2
    with pytest.raises(DPBudgetExceededError):
        ledger.charge(turn(3, "a"), target_epsilon=8.0)
    ledger.charge(turn(3, "b"), target_epsilon=8.0)
    assert ledger.state().mu == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_an_account_with_both_modes_adds_up_by_its_accountant(home: Home, accountant: str) -> None:
    ledger = home.ledger(accountant_type=accountant)
    ledger.charge(step(1))
    ledger.charge(turn(2, "a"))
    by_rdp = accounting.epsilon_of_rdp(accounting.rdp_of_step(1.0, 0.01) + accounting.ORDERS / 2, DELTA)
    total = ledger.state().total_epsilon
    if accountant == "rdp":
        assert total == pytest.approx(by_rdp, rel=1e-12)
    else:
        assert accounting.epsilon_gaussian(1.0, DELTA) < total < by_rdp
    assert ledger.state().accountant == accountant
    assert ledger.projected_step(step(3), 100.0) is not None
    assert ledger.projected_step(turn(3, "a"), 100.0) is not None


def test_ids_are_nowhere_on_the_disk(home: Home) -> None:
    home.ledger().charge(turn(1, "patient-4711"))
    files = [path for path in home.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".tsnb" for path in files)
    assert not [path for path in files if b"patient-4711" in path.read_bytes()]


def test_the_table_follows_the_records_over_restarts_and_forks(home: Home) -> None:
    one, other = home.ledger(), home.ledger()
    one.charge(turn(1, "a"))
    other.charge(turn(1, "a"))
    one.charge(turn(2, "b"))
    home.again().ledger().charge(turn(2, "a"))
    assert one.state().mu == pytest.approx(math.sqrt(3))


def test_a_table_ahead_of_the_records_is_charged(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a"))

    def dies(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched, pytest.raises(StorageError):
        patched.setattr(LogFiles, "append", dies)
        ledger.charge(turn(2, "a"))
    opened = home.again().ledger()
    assert opened.state().mu == 1.0
    opened.charge(turn(2, "b"))
    assert opened.state().mu == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("how", ["missing", "older"])
def test_a_table_behind_the_records_makes_the_account_void(home: Home, tmp_path: Path, how: str) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a"))
    (table,) = (home.folder / "ledger").glob("*.tsnb")
    shutil.copy(table, tmp_path / "older")
    ledger.charge(turn(2, "a"))
    table.unlink()
    if how == "older":
        shutil.copy(tmp_path / "older", table)
    opened = home.again().ledger()
    with pytest.raises(LedgerError, match="who took part"):
        opened.charge(turn(3, "a"))
    assert home.again().ledger().state().total_epsilon == math.inf
    assert home.log.verify().ok


def test_an_altered_table_takes_no_charge(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a"))
    (table,) = (home.folder / "ledger").glob("*.tsnb")
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    with pytest.raises(LedgerError, match="does not open"):
        home.again().ledger().charge(turn(2, "a"))


def test_a_rotation_of_keys_keeps_the_table(home: Home) -> None:
    home.ledger().charge(turn(1, "a"))
    home.keys.new()
    assert (home.tables.rewrap(), home.tables.rewrap()) == (1, 0)
    home.log.rewrap()
    opened = home.again().ledger()
    opened.charge(turn(2, "a"))
    assert opened.state().mu == pytest.approx(math.sqrt(2))


def test_a_vault_rotates_the_table_with_everything_else() -> None:
    vault = Vault(places.Home.of_environment())
    ledger = Ledger(TenantLedger(vault.audit, vault.tables), "dataset:a", delta=DELTA)
    ledger.charge(turn(1, "a"))
    vault.rotate()
    (table,) = places.Home.of_environment().ledger().glob("*.tsnb")
    with table.open("rb") as file:
        assert read_header(file).key_id == vault.keys.primary_id()
    ledger.charge(turn(2, "a"))
    assert ledger.state().mu == pytest.approx(math.sqrt(2))


def as_0_1_saved(home: Home, ledger: Ledger) -> dict[str, Any]:
    """What version 0.1 put into a checkpoint: the table itself, with its key."""
    carried = as_saved(ledger)
    for account in carried["accounts"].values():
        del account["mu_squared"]
    found = home.tables.read(ledger.account)
    assert found is not None
    return carried | {"tables": {ledger.account: base64.b64encode(found[0]).decode()}}


def test_who_took_part_stays_at_home_and_only_the_largest_count_travels(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a", "b")), ledger.charge(turn(2, "a"))
    found = home.tables.read(ledger.account)
    assert found is not None
    key, text = Participation.parse(found[0]).key, json.dumps(ledger.carried())
    assert "tables" not in ledger.carried()
    for secret in (key, *Participation.parse(found[0])._units):
        assert secret.hex() not in text and base64.b64encode(secret).decode()[:20] not in text
    assert ledger.carried()["accounts"][ledger.account]["mu_squared"] == pytest.approx(2.0)


def test_the_account_of_a_checkpoint_goes_on_exactly_at_home_and_conservatively_elsewhere(
    home: Home, tmp_path: Path
) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a")), ledger.charge(turn(2, "a"))
    there = Home(tmp_path / "there").ledger()
    there.adopt(as_saved(ledger), ledger.state().head)
    assert there.state().mu == ledger.state().mu == pytest.approx(math.sqrt(2))
    there.charge(turn(3, "b"))
    assert there.state().mu == pytest.approx(math.sqrt(3)), "b may be the one that took part twice"
    ledger.adopt(as_saved(ledger), ledger.state().head)
    ledger.charge(turn(3, "b"))
    assert ledger.state().mu == pytest.approx(math.sqrt(2)), "here it is known not to be"


def test_what_came_from_two_homes_travels_on_as_the_sum(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a"))
    second, third = (Home(tmp_path / name).ledger() for name in ("second", "third"))
    early = as_saved(ledger)
    second.adopt(early, early["head"])
    second.charge(turn(2, "b"))
    ledger.charge(turn(2, "a"))
    later = as_saved(ledger)
    second.adopt(later, later["head"])  # and no charge after it: no record but the import says the sum
    third.adopt(as_saved(second), second.state().head)
    assert third.state().mu >= second.state().mu >= math.sqrt(3)


def test_a_table_in_a_checkpoint_of_version_0_1_is_read(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a")), ledger.charge(turn(2, "a"))
    there = Home(tmp_path / "there").ledger()
    there.adopt(as_0_1_saved(home, ledger), ledger.state().head)
    there.charge(turn(3, "b"))
    assert there.state().mu == pytest.approx(math.sqrt(2)), "the table says that b is another"


def test_a_table_of_version_0_1_does_not_travel_on(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a")), ledger.charge(turn(2, "a"))
    onwards = without_tables(as_0_1_saved(home, ledger))
    assert "tables" not in onwards
    there = Home(tmp_path / "there").ledger()
    there.adopt(onwards, onwards["head"])
    assert there.state().mu == pytest.approx(math.sqrt(2))
    assert without_tables(as_saved(ledger)) == as_saved(ledger)


def test_a_checkpoint_that_comes_home_is_never_counted_short(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a", "b"))
    there = Home(tmp_path / "there").ledger()
    there.adopt(as_saved(ledger), ledger.state().head)
    there.charge(turn(2, "a"))
    assert there.state().mu == pytest.approx(math.sqrt(2))
    back = as_saved(there)
    ledger.adopt(back, back["head"])
    ledger.charge(turn(3, "a"))
    assert ledger.state().mu == pytest.approx(math.sqrt(3))


def test_a_table_that_went_on_elsewhere_too_is_never_counted_short(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a"))
    there = Home(tmp_path / "there").ledger()
    there.adopt(as_saved(ledger), ledger.state().head)
    for side in (ledger, there):
        side.charge(turn(2, "a"))
    back = as_saved(there)
    ledger.adopt(back, back["head"])
    assert ledger.state().steps == 3
    assert math.sqrt(3) <= ledger.state().mu <= 2.0 + 1e-9
    ledger.charge(turn(3, "a"))
    assert ledger.state().mu >= 2.0


def test_a_checkpoint_that_says_nothing_of_who_took_part_makes_the_account_void(
    home: Home, tmp_path: Path
) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a"))
    carried = as_0_1_saved(home, ledger) | {"tables": {}}
    there = Home(tmp_path / "there").ledger()
    there.adopt(carried, carried["head"])
    assert there.state().total_epsilon == math.inf


def test_tables_of_two_keys_count_as_if_every_unit_were_in_both() -> None:
    one, other = Participation(), Participation()
    one.take({"a": 1}, 1.0)
    other.take({"b": 2}, 1.0)
    one.merge(other)
    assert (one.mu_squared, one.steps) == (5.0, 2)
    assert one.quote({"c": 1}, 1.0) == 5.0
    assert Participation.parse(bytes(one)).mu_squared == 5.0


@pytest.mark.parametrize("cut", [0, 10, 70, -1])
def test_a_damaged_table_is_refused(cut: int) -> None:
    table = Participation()
    table.take({"a": 1, "b": 1}, 1.0)
    with pytest.raises(LedgerError):
        Participation.parse(bytes(table)[:cut])


# the audit log around it


def test_a_copy_of_the_log_verifies_with_its_charges(home: Home, tmp_path: Path) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))
    ledger.charge(turn(2, "a"))
    ledger.void("enough")
    copy = Path(shutil.copytree(home.folder / "audit", tmp_path / "copy"))
    head = ledger.state().head
    assert head is not None
    assert verify_file(copy / "audit.jsonl", home.keys, [head["record_hash"]]).ok


def test_the_log_is_followed_without_reading_it_again(home: Home) -> None:
    home.ledger().charge(step(1))
    records, tip = home.log.follow()
    assert [record["seq"] for record in records] == [0, 1]
    assert home.log.follow(tip) == ([], tip)
    home.again().ledger().charge(step(2))
    assert [record["seq"] for record in home.log.follow(tip)[0]] == [2]
