"""Cuts of an audit log: records that are missing at its end are found, by what is kept."""

import json

import pytest

from tensafe_nb.store.audit import chain, verify
from tensafe_nb.store.audit.log import AuditLog, verify_file
from tensafe_nb.store.sealed.envelope import canonical
from tests.unit.store.audit.logs import RECORDS, again, cut_after, key_file, put, quiet_keys, records


@pytest.mark.parametrize("kept", [0, 1, 4, RECORDS - 1])
def test_a_cut_is_found_by_the_number_in_the_key_file(log: AuditLog, kept: int) -> None:
    cut_after(log, kept)
    found = log.verify()
    assert (found.ok, found.first_bad_seq, found.records) == (False, kept, kept)
    assert f"{RECORDS - kept} records are missing" in (found.reason or "")
    assert verify_file(log.path, None).first_bad_seq == kept


def test_a_cut_inside_a_record_is_found_by_the_number_in_the_key_file(log: AuditLog) -> None:
    log.path.write_bytes(log.path.read_bytes()[:-20])
    assert (log.verify().ok, log.verify().first_bad_seq) == (False, RECORDS - 1)


def test_a_removed_log_is_found_by_its_key_file(log: AuditLog) -> None:
    log.path.unlink()
    assert (log.verify().ok, log.verify().first_bad_seq) == (False, 0)


def test_a_cut_is_found_when_the_key_file_is_removed(log: AuditLog) -> None:
    cut_after(log, 4)
    key_file(log).unlink()
    assert (log.verify().ok, log.verify().reason) == (False, "its key file is missing")


def test_a_cut_is_found_when_the_key_file_is_made_to_fit_without_the_key(log: AuditLog) -> None:
    cut_after(log, 4)
    public, sealed = key_file(log).read_bytes().split(b"\n")[:2]
    claims = {"seq": 4, "size": log.path.stat().st_size, "head": records(log)[-1]["record_hash"]}
    fitting = canonical(json.loads(public) | claims) + b"\n" + sealed.rstrip()
    key_file(log).write_bytes(fitting.ljust(4095) + b"\n")
    assert not log.verify().ok
    assert verify_file(log.path, None).ok  # without the key, the key file is only a claim


@pytest.mark.parametrize("later", [0, 1, 2])
def test_a_cut_with_an_older_copy_of_the_key_file_is_found_by_an_anchor_alone(
    log: AuditLog, later: int
) -> None:
    older = key_file(log).read_bytes()
    for number in range(4):
        put(log, number)
    anchor = log.entries(limit=1)[0].record_hash
    cut_after(log, RECORDS + later)
    key_file(log).write_bytes(older)
    assert log.verify().ok and verify.NO_ANCHOR in log.verify().not_checked
    found = log.verify([anchor])
    assert (found.ok, found.first_bad_seq) == (False, None)
    assert "cut before that record" in (found.reason or "")
    put(again(log))  # and writing on does not hide it
    assert log.verify().ok and not log.verify([anchor]).ok


def test_an_older_copy_of_the_key_file_does_not_hide_a_cut_before_it(log: AuditLog) -> None:
    older = key_file(log).read_bytes()
    put(log)
    cut_after(log, 4)
    key_file(log).write_bytes(older)
    assert log.verify().first_bad_seq == 4


@pytest.mark.parametrize("with_key", [True, False])
def test_a_cut_before_an_anchored_record_is_found_in_a_bare_copy(log: AuditLog, with_key: bool) -> None:
    keys = quiet_keys(log.path.parents[2] / "keys") if with_key else None
    key_file(log).unlink()
    anchor, earlier = records(log)[4]["record_hash"], records(log)[2]["record_hash"]
    cut_after(log, 5)
    assert verify_file(log.path, keys, [earlier, anchor]).anchors_matched == (earlier, anchor)
    cut_after(log, 4)
    found = verify_file(log.path, keys, [earlier, anchor])
    assert (found.ok, found.anchors_matched) == (False, (earlier,))
    unanchored = verify_file(log.path, keys)
    assert unanchored.ok and verify.NO_KEY_FILE in unanchored.not_checked


def test_an_anchor_that_is_no_record_matches_nothing(log: AuditLog) -> None:
    for anchor in (chain.ZEROS, "", "None"):
        assert not log.verify([anchor]).ok
