"""A ledger whose log was tampered with takes no charge; the log around it verifies."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tensafe_nb.errors import (
    KeyUnavailableError,
    LedgerError,
)
from tensafe_nb.store.audit.log import verify_file
from tests.unit.privacy.homes import ACCOUNT, Home, step, turn


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


# a ledger that was tampered with


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


def test_what_a_process_has_chained_itself_is_followed_as_it_stands_in_the_file(home: Home) -> None:
    home.ledger().charge(step(1))
    _, tip = home.log.follow()
    home.ledger().charge(step(2))
    home.again().ledger().charge(step(3))  # another's, between its own
    home.ledger().charge(step(4))
    found, end = home.log.follow(tip)
    assert [record["seq"] for record in found] == [2, 3, 4]
    assert (found, end) == home.again().log.follow(tip)
