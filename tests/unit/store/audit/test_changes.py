"""Changes inside an audit log: whatever was edited, added, removed or put in another order is found."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import (
    AuditLogError,
    KeyUnavailableError,
)
from tensafe_nb.protocol.results import AuditLogEntry
from tensafe_nb.store.audit import chain, verify
from tensafe_nb.store.audit.key import Secrets, key_page
from tensafe_nb.store.audit.log import AuditLog, verify_file
from tensafe_nb.store.sealed.envelope import canonical
from tests.unit.store.audit.logs import (
    RECORDS,
    again,
    key_file,
    other,
    put,
    quiet_keys,
    records,
    rehashed,
    write,
)

Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


FIELDS = sorted([*(field.name for field in dataclasses.fields(AuditLogEntry)), "ts", "mac"])


def test_the_fields_that_are_edited_below_are_all_there_are(log: AuditLog) -> None:
    assert sorted(records(log)[1]) == FIELDS
    assert sorted(records(log)[0]) == sorted([*FIELDS, "stanzas"])


@pytest.mark.parametrize("field", FIELDS)
def test_an_edit_of_any_field_of_any_record_is_found(log: AuditLog, field: str) -> None:
    whole = records(log)
    for number in range(RECORDS):
        changed = [dict(record) for record in whole]
        changed[number][field] = other(changed[number][field])
        write(log, changed)
        found = log.verify()
        assert (found.ok, found.first_bad_seq, found.records) == (False, number, number)
    write(log, whole)
    assert log.verify().ok


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in ("mac", "record_hash")])
def test_an_edit_is_found_too_when_the_records_hash_is_made_to_fit(log: AuditLog, field: str) -> None:
    changed = records(log)
    changed[3][field] = other(changed[3][field])
    changed[3]["record_hash"] = chain.record_hash(changed[3])
    write(log, changed)
    assert (log.verify().ok, log.verify().first_bad_seq) == (False, 3)
    blind = verify_file(log.path, None)
    assert (blind.ok, blind.first_bad_seq) == (False, 3 if field in ("seq", "prev_hash") else 4)


def test_a_field_added_or_removed_is_found(log: AuditLog) -> None:
    whole = records(log)
    for changed in (whole[2] | {"note": 1}, {k: v for k, v in whole[2].items() if k != "error_code"}):
        write(log, [*whole[:2], changed, *whole[3:]])
        assert log.verify().first_bad_seq == 2


@pytest.mark.parametrize(
    "line",
    [b"\n", b"[]\n", b"7\n", b"{}\n", b'{"seq":2}\n', b'{"seq": 2}\n', b"[" * 100_000 + b"\n", b"\xff\n"],
)
def test_a_line_that_is_no_record_is_found(log: AuditLog, line: bytes) -> None:
    whole = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([*whole[:2], line, *whole[3:]]))
    assert (log.verify().ok, log.verify().first_bad_seq) == (False, 2)


def test_another_text_of_the_same_record_is_found(log: AuditLog) -> None:
    whole = log.path.read_bytes()
    for text in (whole.replace(b'"seq":2', b'"seq": 2'), whole.replace(b'"seq":2', b'"seq":2,"seq":2')):
        assert text != whole
        log.path.write_bytes(text)
        assert log.verify().first_bad_seq == 2


@pytest.mark.parametrize("number", range(RECORDS - 1))
def test_a_record_removed_from_the_middle_is_found(log: AuditLog, number: int) -> None:
    whole = records(log)
    write(log, whole[:number] + whole[number + 1 :])
    found = log.verify()
    assert (found.ok, found.first_bad_seq) == (False, number)
    assert "not what comes next" in (found.reason or "")


def test_records_in_another_order_are_found(log: AuditLog) -> None:
    whole = records(log)
    write(log, [*whole[:2], whole[3], whole[2], *whole[4:]])
    assert (log.verify().ok, log.verify().first_bad_seq) == (False, 2)


@pytest.mark.parametrize("number", range(1, RECORDS + 1))
def test_a_record_put_in_twice_is_found(log: AuditLog, number: int) -> None:
    whole = records(log)
    write(log, [*whole[:number], whole[number - 1], *whole[number:]])
    assert (log.verify().ok, log.verify().first_bad_seq) == (False, number)


CHANGES: dict[str, Change] = {
    "edited": lambda whole: [*whole[:2], whole[2] | {"operation": "sample"}, *whole[3:]],
    "removed": lambda whole: [*whole[:2], *whole[3:]],
    "inserted": lambda whole: [*whole[:2], whole[4] | {"entry_id": "log-x"}, *whole[2:]],
    "swapped": lambda whole: [*whole[:2], whole[3], whole[2], *whole[4:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_chain_computed_anew_without_the_key_is_found_with_it(log: AuditLog, change: str) -> None:
    write(log, rehashed(CHANGES[change](records(log))))
    found = log.verify()
    assert (found.ok, found.first_bad_seq) == (False, 2)
    assert "MAC" in (found.reason or "")


@pytest.mark.parametrize("change", CHANGES)
def test_without_the_key_such_a_chain_is_found_by_an_anchor_or_else_named_as_unchecked(
    log: AuditLog, change: str
) -> None:
    anchor = records(log)[4]["record_hash"]
    key_file(log).unlink()
    write(log, rehashed(CHANGES[change](records(log))))
    blind = verify_file(log.path, None)
    assert blind.ok and verify.NO_KEY in blind.not_checked
    found = verify_file(log.path, None, [anchor])
    assert (found.ok, found.anchors_matched) == (False, ())
    assert anchor in (found.reason or "")


@pytest.mark.parametrize("size", [32, 40, 48])
def test_a_whole_log_forged_with_a_known_secret_of_something_else_is_found(log: AuditLog, size: int) -> None:
    """An artifact's data key that leaked is wrapped under the same key as the log's secret."""
    keys = quiet_keys(log.path.parents[2] / "keys")
    leaked = b"k" * 32
    stanzas = (keys.wrap(b"k" * size),)
    tip, forged = chain.first_tip(leaked), []
    for record in records(log):
        record |= {"stanzas": list(stanzas)} if tip.seq == 0 else {}
        forged.append(tip.record(record)[0])
        tip = tip.moved(forged[-1], canonical(forged[-1]) + b"\n")
    write(log, forged)
    key_file(log).write_bytes(key_page(tip, Secrets.of(leaked, stanzas)))
    assert not log.verify().ok
    with pytest.raises(AuditLogError):
        put(again(log))


@given(data=st.data())
@settings(max_examples=150)
def test_a_flip_of_any_bit_of_the_log_is_found(sample: AuditLog, data: st.DataObject) -> None:
    with copied(sample) as log:
        flip(log.path, data)
        assert not log.verify().ok
        key_file(log).unlink()
        found = verify_file(log.path, quiet_keys(sample.path.parents[2] / "keys"))
        torn = [note for note in found.not_checked if "unfinished record" in note]
        assert not found.ok or (torn and found.records == RECORDS - 1)


@given(data=st.data())
@settings(max_examples=80)
def test_a_flip_of_any_bit_of_the_key_file_is_found_and_ends_the_log(
    sample: AuditLog, data: st.DataObject
) -> None:
    with copied(sample) as log:
        flip(key_file(log), data)
        assert not log.verify().ok
        with pytest.raises((AuditLogError, KeyUnavailableError)):
            put(log)
        assert log.path.read_bytes() == sample.path.read_bytes()


def test_a_key_file_of_another_length_or_spelling_is_refused(log: AuditLog) -> None:
    page = key_file(log).read_bytes()
    public, sealed = page.split(b"\n")[:2]
    shouted = (public + b"\n" + sealed.rstrip().upper()).ljust(4095) + b"\n"
    for altered in (page[:-1], page + b"\n", page[:-1] + b"\x0b", shouted):
        key_file(log).write_bytes(altered)
        assert (log.verify().ok, verify_file(log.path, None).ok) == (False, False)


def test_a_key_file_of_another_history_of_this_log_is_found(log: AuditLog) -> None:
    with copied(log) as twin:
        put(twin, 1)
        page = key_file(twin).read_bytes()
    put(log, 2)
    key_file(log).write_bytes(page)
    assert (log.verify().ok, log.verify().reason) == (False, "the key file does not fit the records")


@contextmanager
def copied(log: AuditLog) -> Iterator[AuditLog]:
    folder = log.path.parent.with_name("copy")
    shutil.copytree(log.path.parent, folder)
    try:
        yield AuditLog(folder, quiet_keys(log.path.parents[2] / "keys"))
    finally:
        shutil.rmtree(folder)


def flip(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
