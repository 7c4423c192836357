"""Worst-case participation: who took part how often, at home and elsewhere."""

import base64
import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.core.ledger import TenantLedger
from tensafe_nb.errors import (
    DPBudgetExceededError,
    LedgerError,
    StorageError,
)
from tensafe_nb.privacy import accounting
from tensafe_nb.privacy.ledger.account import Ledger, without_tables
from tensafe_nb.privacy.ledger.participation import Participation
from tensafe_nb.store import home as places
from tensafe_nb.store.audit.files import LogFiles
from tensafe_nb.store.sealed.envelope import read_header
from tensafe_nb.store.vault import Vault
from tests.unit.privacy.homes import DELTA, Home, step, turn
from tests.unit.privacy.ledger.accounts import as_saved


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
