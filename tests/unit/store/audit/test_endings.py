"""An audit log that was altered is not continued, and says how to go on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tensafe_nb.errors import (
    AuditLogError,
    KeyUnavailableError,
)
from tensafe_nb.store.audit.log import AuditLog, verify_file
from tensafe_nb.store.sealed.envelope import canonical
from tests.unit.store.audit.logs import (
    RECORDS,
    again,
    cut_after,
    key_file,
    put,
    quiet_keys,
    records,
    rehashed,
    write,
)


def _cut(log: AuditLog) -> None:
    cut_after(log, RECORDS - 1)


def _last_altered(log: AuditLog) -> None:
    log.path.write_bytes(log.path.read_bytes().replace(b'"seq":6', b'"seq":7'))


def _last_garbled(log: AuditLog) -> None:
    log.path.write_bytes(log.path.read_bytes()[:-9] + b"garbled}\n")


def _strange_record(log: AuditLog) -> None:
    strange = rehashed([*records(log), dict(records(log)[-1])])[-1]
    with log.path.open("ab") as file:
        file.write(canonical(strange) + b"\n")


def _no_key_file(log: AuditLog) -> None:
    key_file(log).unlink()


def _empty(log: AuditLog) -> None:
    log.path.write_bytes(b"")


def _something_inserted(log: AuditLog) -> None:
    write(log, [records(log)[0], *records(log)])


DAMAGES = {
    _cut: "its end was cut off",
    _empty: "its end was cut off",
    _last_altered: "record 6 is not the one",
    _last_garbled: "record 6 is not the one",
    _something_inserted: "record 6 is not the one",
    _strange_record: "record 7 is not a continuation of it: its MAC is wrong",
    _no_key_file: "its key file is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_log_is_not_continued_until_it_is_moved_away(
    log: AuditLog, damage: Callable[[AuditLog], None]
) -> None:
    damage(log)
    broken = log.path.read_bytes()
    with pytest.raises(AuditLogError, match=f"{DAMAGES[damage]}.*move the folder"):
        put(again(log))
    assert log.path.read_bytes() == broken
    assert not log.verify().ok
    log.path.parent.rename(log.path.parent.with_name("evidence"))
    assert put(log).seq == 1
    assert log.verify().ok


@pytest.mark.parametrize("damage", [_cut, _empty, _something_inserted, _strange_record, _no_key_file])
def test_a_process_that_wrote_the_log_sees_it_too(log: AuditLog, damage: Callable[[AuditLog], None]) -> None:
    damage(log)
    with pytest.raises(AuditLogError, match="move the folder"):
        put(log)


def test_what_a_process_goes_on_behind_without_reading_it_again_is_found_by_verifying(log: AuditLog) -> None:
    _last_altered(log)  # the size is as before
    put(log)
    assert (log.verify().ok, log.verify().first_bad_seq) == (False, RECORDS - 1)


def test_a_key_file_that_claims_what_is_no_number_is_refused(log: AuditLog) -> None:
    public, sealed = key_file(log).read_bytes().split(b"\n")[:2]
    for claim in ({"seq": "7"}, {"size": True}, {"stanzas": []}, {"stanzas": [{}]}):
        page = canonical(json.loads(public) | claim) + b"\n" + sealed.rstrip()
        key_file(log).write_bytes(page.ljust(4095) + b"\n")
        assert not log.verify().ok and not verify_file(log.path, None).ok
        with pytest.raises(AuditLogError, match="altered"):
            log.key_ids()


def test_a_log_whose_key_is_not_here_is_not_continued(log: AuditLog, tmp_path: Path) -> None:
    stranger = AuditLog(log.path.parent, quiet_keys(tmp_path / "other"))
    with pytest.raises(KeyUnavailableError, match=log.key_ids()[0]):
        put(stranger)
    assert log.verify().records == RECORDS


def test_a_listing_of_something_else_says_so(log: AuditLog) -> None:
    for line in (b"not json\n", b"[]\n", b"{}\n"):
        log.path.write_bytes(line)
        with pytest.raises(AuditLogError, match="verify_audit_log"):
            log.entries()
