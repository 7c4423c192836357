"""Accounts that travel with checkpoints."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.privacy.homes import ACCOUNT, Home, step
from tests.unit.privacy.ledger.accounts import as_saved, epsilon_of, records_in


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
