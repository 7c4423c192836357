"""The verdict on an audit log, and what it names as not checked."""

from pathlib import Path

import pytest

from tensafe_nb.errors import (
    AuditLogError,
)
from tensafe_nb.store.audit import verify
from tensafe_nb.store.audit.log import AuditLog, verify_file
from tests.unit.store.audit.logs import RECORDS, key_file, quiet_keys, records, rehashed, write


def test_a_good_log_verifies_with_nothing_left_unchecked_but_what_an_anchor_shows(log: AuditLog) -> None:
    found = log.verify()
    assert (found.ok, found.records, found.first_bad_seq, found.reason) == (True, RECORDS, None, None)
    assert found.head == log.entries(limit=1)[0].record_hash
    assert found.not_checked == (verify.NO_ANCHOR,)
    assert found.head and log.verify([found.head]).not_checked == ()


def test_without_the_key_the_chain_is_checked_and_the_rest_listed(log: AuditLog) -> None:
    found = verify_file(log.path, None)
    assert (found.ok, found.not_checked) == (True, (verify.NO_KEY, verify.NO_ANCHOR))
    changed = records(log)
    changed[3]["success"] = False
    write(log, changed)
    assert verify_file(log.path, None).first_bad_seq == 3


def test_keys_that_do_not_open_the_log_never_give_a_good_result(log: AuditLog, tmp_path: Path) -> None:
    strangers = quiet_keys(tmp_path / "other")
    strangers.primary_id()
    found = verify_file(log.path, strangers)
    assert (found.ok, found.records) == (False, RECORDS)
    assert log.key_ids()[0] in (found.reason or "")
    assert verify.NO_KEY in found.not_checked


def test_a_log_without_its_wrapped_key_is_not_good(log: AuditLog) -> None:
    keys = quiet_keys(log.path.parents[2] / "keys")
    key_file(log).unlink()
    changed = records(log)
    del changed[0]["stanzas"]
    write(log, rehashed(changed))
    assert (verify_file(log.path, None).ok, verify_file(log.path, keys).ok) == (True, False)


def test_a_file_that_is_not_there_is_not_a_good_log(tmp_path: Path) -> None:
    with pytest.raises(AuditLogError, match=r"no\.jsonl"):
        verify_file(tmp_path / "no.jsonl", None)


def test_verifying_and_listing_change_nothing(log: AuditLog) -> None:
    with log.path.open("ab") as file:
        file.write(b'{"torn')
    before = {path: path.read_bytes() for path in log.path.parent.iterdir()}
    log.verify(), log.entries(), log.head(), log.key_ids()
    assert {path: path.read_bytes() for path in log.path.parent.iterdir()} == before
