"""The audit log: what it holds, what it survives, and which changes of it are found."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import (
    AuditLogError,
    KeyUnavailableError,
    StorageError,
    ValidationError,
)
from tensafe_nb.protocol.results import AuditLogEntry
from tensafe_nb.store.audit import chain as audit_chain
from tensafe_nb.store.audit import files as audit_files
from tensafe_nb.store.audit import verify as audit_check
from tensafe_nb.store.audit.key import KeyPage, Secrets, unwrap_secret
from tensafe_nb.store.audit.log import AuditLog, verify_file
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import canonical

CLIENTS = ("tc-1", "tc-2")
VERBS = ("forward_backward", "optim_step", "save_state")
RECORDS = 7  # the first one is the log's own

Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def quiet_keys(folder: Path) -> Keys:
    return Keys(folder, "file", announce=lambda _: None)


def put(log: AuditLog, number: int = 0, **more: Any) -> AuditLogEntry:
    given_fields: dict[str, Any] = {
        "operation": VERBS[number % 3],
        "training_client_id": CLIENTS[number % 2],
        "request": [b"request", bytes([number])],
        "started_at": 100.0 + number,
        "completed_at": 100.5 + number,
    }
    return log.append(**given_fields | more)


def made(folder: Path) -> AuditLog:
    log = AuditLog(folder / "audit" / "local", quiet_keys(folder / "keys"))
    for number in range(RECORDS - 1):
        put(log, number)
    return log


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> AuditLog:
    """A log that tests copy and never change."""
    return made(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def log(sample: AuditLog, tmp_path: Path) -> AuditLog:
    """A log of a test's own, as the process that wrote it has it."""
    shutil.copytree(sample.path.parents[2], tmp_path, dirs_exist_ok=True)
    own = AuditLog(tmp_path / "audit" / "local", quiet_keys(tmp_path / "keys"))
    own._secrets, own._seen = sample._secrets, sample._seen
    return own


def again(log: AuditLog) -> AuditLog:
    """The same log as another process finds it."""
    return AuditLog(log.path.parent, quiet_keys(log.path.parents[2] / "keys"))


def key_file(log: AuditLog) -> Path:
    return log.path.with_suffix(".key")


def records(log: AuditLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.path.read_bytes().splitlines()]


def write(log: AuditLog, changed: list[dict[str, Any]]) -> None:
    log.path.write_bytes(b"".join(canonical(record) + b"\n" for record in changed))


def cut_after(log: AuditLog, count: int) -> None:
    write(log, records(log)[:count])


def rehashed(changed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chain records anew, as anybody can who has no key: numbers, links and hashes fit, MACs are what they were."""
    head = audit_chain.ZEROS
    for number, record in enumerate(changed):
        record |= {"seq": number, "prev_hash": head}
        head = record["record_hash"] = audit_chain.record_hash(record)
    return changed


# What is written


def test_nothing_is_made_or_asked_before_the_first_append(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", quiet_keys(tmp_path / "keys"))
    assert (log.head(), log.entries(), log.key_ids(), log.rewrap()) == (None, [], (), None)
    assert log.verify().ok
    assert list(tmp_path.iterdir()) == []


def test_the_first_append_starts_the_log_and_what_it_makes_is_private(log: AuditLog) -> None:
    first = log.entries(limit=RECORDS)[-1]
    assert (first.seq, first.kind, first.prev_hash) == (0, "genesis", "0" * 64)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (log.path, key_file(log), log.path.parent)]
    assert modes == [0o600, 0o600, 0o700]


def test_a_record_says_who_did_what_and_how_it_ended(log: AuditLog) -> None:
    entry = put(
        log, produced=["art-1"], consumed=("art-0",), success=False, error_code="storage_error",
        error_class="StorageError", request=[b"12", b"3"],
    )  # fmt: skip
    assert log.entries(limit=1) == [entry]
    assert (entry.seq, entry.kind, entry.tenant_id) == (RECORDS, "op", "local")
    assert (entry.artifact_ids_produced, entry.artifact_ids_consumed) == (("art-1",), ("art-0",))
    assert (entry.success, entry.error_code, entry.error_message) == (False, "storage_error", "StorageError")
    assert (entry.duration_ms, entry.request_size_bytes) == (500.0, 3)
    assert log.head() == {"account": None, "seq": entry.seq, "record_hash": entry.record_hash}


def test_an_errors_text_is_refused_where_its_class_belongs(log: AuditLog) -> None:
    with pytest.raises(ValidationError, match="name of a class"):
        put(log, error_class="token 17 is not in the vocabulary")
    assert log.verify().records == RECORDS


def test_more_fields_can_be_given_but_none_of_the_records_own(log: AuditLog) -> None:
    put(log, extra={"dp": {"q": 0.1, "sigma": 1.0}})
    assert records(log)[-1]["dp"] == {"q": 0.1, "sigma": 1.0}
    for name in ("seq", "mac", "stanzas", "tenant_id", "request_hash"):
        with pytest.raises(ValidationError, match=name):
            put(log, extra={name: 1})
    assert log.verify().ok


def test_what_is_no_json_is_refused_and_leaves_the_log_as_it_was(log: AuditLog) -> None:
    before = log.path.read_bytes()
    with pytest.raises(ValidationError):
        put(log, completed_at=float("nan"))
    assert log.path.read_bytes() == before
    put(log)
    assert log.verify().ok


# The request


def test_the_request_hash_is_equal_in_one_home_and_differs_between_homes(tmp_path: Path) -> None:
    here, there = made(tmp_path / "here"), made(tmp_path / "there")
    hashes = [put(log, request=[b"a guess"]).request_hash for log in (here, again(here), there)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert put(here, request=[b"another"]).request_hash != hashes[0]


def test_neither_the_request_nor_a_bare_hash_of_it_is_on_disk(log: AuditLog) -> None:
    request = b"the patient's name is Ada"
    put(log, request=[request])
    stored = b"".join(path.read_bytes() for path in log.path.parent.iterdir())
    for trace in (request, request.hex().encode(), hashlib.sha256(request).hexdigest().encode()):
        assert trace not in stored


def test_a_request_of_arrays_is_hashed_by_its_bytes(log: AuditLog) -> None:
    array = np.arange(24, dtype=np.int64).reshape(4, 6)
    plain = put(log, request=[array.tobytes()])
    for same in (array, np.asfortranarray(array), np.repeat(array, 2, axis=1)[:, ::2]):
        assert put(log, request=[same]).request_hash == plain.request_hash  # type: ignore[list-item]
    assert put(log, request=[np.zeros((0, 3))]).request_size_bytes == 0  # type: ignore[list-item]
    assert plain.request_size_bytes == array.nbytes


def test_pieces_do_not_run_into_each_other(log: AuditLog) -> None:
    one, other = put(log, request=[b"ab", b"c"]), put(log, request=[b"a", b"bc"])
    assert one.request_hash != other.request_hash


def test_the_size_can_be_given_for_what_was_not_hashed_whole(log: AuditLog) -> None:
    assert put(log, request_size_bytes=1 << 40).request_size_bytes == 1 << 40


# What is found: changes inside

FIELDS = sorted([*(field.name for field in dataclasses.fields(AuditLogEntry)), "ts", "mac"])


def test_the_fields_that_are_edited_below_are_all_there_are(log: AuditLog) -> None:
    assert sorted(records(log)[1]) == FIELDS
    assert sorted(records(log)[0]) == sorted([*FIELDS, "stanzas"])


def other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return ("1" if value[:1] != "1" else "2") + value[1:]
        case list():
            return [*value, "art-9"]
    return "something"


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
    changed[3]["record_hash"] = audit_chain.record_hash(changed[3])
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
    assert blind.ok and audit_check.NO_KEY in blind.not_checked
    found = verify_file(log.path, None, [anchor])
    assert (found.ok, found.anchors_matched) == (False, ())
    assert anchor in (found.reason or "")


@pytest.mark.parametrize("size", [32, 40, 48])
def test_a_whole_log_forged_with_a_known_secret_of_something_else_is_found(log: AuditLog, size: int) -> None:
    """An artifact's data key that leaked is wrapped under the same key as the log's secret."""
    keys = quiet_keys(log.path.parents[2] / "keys")
    leaked = b"k" * 32
    stanzas = (keys.wrap(b"k" * size),)
    tip, forged = audit_chain.first_tip(leaked), []
    for record in records(log):
        record |= {"stanzas": list(stanzas)} if tip.seq == 0 else {}
        forged.append(tip.record(record))
        tip = tip.moved(forged[-1], canonical(forged[-1]) + b"\n")
    write(log, forged)
    key_file(log).write_bytes(bytes(KeyPage.of(tip, Secrets.of(leaked, stanzas))))
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


# What is found: cuts


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
    assert log.verify().ok and audit_check.NO_ANCHOR in log.verify().not_checked
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
    assert unanchored.ok and audit_check.NO_KEY_FILE in unanchored.not_checked


def test_an_anchor_that_is_no_record_matches_nothing(log: AuditLog) -> None:
    for anchor in (audit_chain.ZEROS, "", "None"):
        assert not log.verify([anchor]).ok


# What verifying says


def test_a_good_log_verifies_with_nothing_left_unchecked_but_what_an_anchor_shows(log: AuditLog) -> None:
    found = log.verify()
    assert (found.ok, found.records, found.first_bad_seq, found.reason) == (True, RECORDS, None, None)
    assert found.head == log.entries(limit=1)[0].record_hash
    assert found.not_checked == (audit_check.NO_ANCHOR,)
    assert found.head and log.verify([found.head]).not_checked == ()


def test_without_the_key_the_chain_is_checked_and_the_rest_listed(log: AuditLog) -> None:
    found = verify_file(log.path, None)
    assert (found.ok, found.not_checked) == (True, (audit_check.NO_KEY, audit_check.NO_ANCHOR))
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
    assert audit_check.NO_KEY in found.not_checked


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


# What it survives


class _Died(BaseException):
    pass


def die(*_: Any) -> None:
    raise _Died


@pytest.mark.parametrize("restarted", [True, False])
def test_a_death_between_record_and_key_is_made_good_by_the_next_append(
    log: AuditLog, restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(_Died):
        patched.setattr(audit_files.LogFiles, "keep", die)
        put(log)
    assert log.verify().ok
    entry = put(again(log) if restarted else log)
    assert (entry.seq, log.verify().ok, log.verify().records) == (RECORDS + 1, True, RECORDS + 2)


@pytest.mark.parametrize("name", ["append", "keep"])
def test_a_death_at_the_very_start_leaves_a_log_that_can_be_started(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(_Died):
        patched.setattr(audit_files.LogFiles, name, die)
        made(tmp_path)
    assert made(tmp_path).verify().records == RECORDS


def test_a_key_file_that_is_behind_catches_up_over_records_with_right_macs(log: AuditLog) -> None:
    behind = key_file(log).read_bytes()
    for number in range(3):
        put(log, number)
    key_file(log).write_bytes(behind)
    assert log.verify().ok
    assert put(again(log)).seq == RECORDS + 3
    assert log.verify().ok


@pytest.mark.parametrize("size", [1, 40, -1])
def test_a_torn_last_line_is_named_set_aside_and_written_over(log: AuditLog, size: int) -> None:
    whole = log.path.read_bytes()
    put(log)
    torn = log.path.read_bytes()[len(whole) :][:size]
    shutil.rmtree(log.path.parent)
    log = made(log.path.parents[2])
    with log.path.open("ab") as file:
        file.write(torn)
    found = log.verify()
    assert found.ok and f"{len(torn)} bytes, an unfinished record" in found.not_checked[-1]
    assert log.entries(limit=1)[0].seq == RECORDS - 1
    assert put(again(log)).seq == RECORDS
    assert log.path.with_name("audit.jsonl.torn").read_bytes() == torn + b"\n"
    assert (log.verify().ok, log.verify().records) == (True, RECORDS + 1)


def test_a_torn_first_line_is_written_over_too(log: AuditLog, tmp_path: Path) -> None:
    other_log = AuditLog(tmp_path / "new", quiet_keys(tmp_path / "keys"))
    secret = unwrap_secret(KeyPage.parse(key_file(log).read_bytes()).stanzas, quiet_keys(tmp_path / "keys"))
    stanzas = KeyPage.parse(key_file(log).read_bytes()).stanzas
    other_log.path.parent.mkdir()
    other_log.path.write_bytes(log.path.read_bytes()[:50])
    key_file(other_log).write_bytes(
        bytes(KeyPage.of(audit_chain.first_tip(secret), Secrets.of(secret, stanzas)))
    )
    assert put(other_log).seq == 1
    assert other_log.verify().ok


def test_a_full_disk_is_an_error_that_leaves_the_log_whole(log: AuditLog) -> None:
    before = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(StorageError, match="intact"):
            put(log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == before
    put(log)
    assert (log.verify().ok, log.verify().records) == (True, RECORDS + 1)


def test_sync_puts_the_record_on_the_disk_before_the_key_moves_on(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(
        os, "fsync", lambda _: counted.append(KeyPage.parse(key_file(log).read_bytes()).claim.seq)
    )
    put(log)
    assert counted == []
    put(log, sync=True)
    assert counted == [RECORDS + 1, RECORDS + 2]  # at the log's, and at the key file's


def test_nothing_is_read_again_while_nobody_else_wrote(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(KeyPage, "parse", die)
        put(log)
    put(again(log))
    assert put(log).seq == RECORDS + 2  # and read again when somebody did
    assert log.verify().ok


# What ends it


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


# The key


def test_the_keys_of_earlier_records_are_not_on_disk(log: AuditLog) -> None:
    keys = quiet_keys(log.path.parents[2] / "keys")
    page = KeyPage.parse(key_file(log).read_bytes())
    secret = unwrap_secret(page.stanzas, keys)
    tips = [audit_chain.first_tip(secret)]
    for line in log.path.read_bytes().splitlines(keepends=True):
        tips.append(tips[-1].after(line))
    stored = b"".join(path.read_bytes() for path in log.path.parent.iterdir())
    for known in [secret, *(tip.key for tip in tips)]:
        assert known is not None
        assert known not in stored and known.hex().encode() not in stored
    assert page.opened(Secrets.of(secret, page.stanzas)) == tips[-1]
    assert len({tip.key for tip in tips}) == RECORDS + 1
    assert sorted(path.name for path in log.path.parent.iterdir()) == ["audit.jsonl", "audit.key"]


def test_keys_do_not_show_in_a_repr(log: AuditLog) -> None:
    put(log)
    assert log._seen and log._secrets and log._seen.tip.key
    shown = repr((log, log._seen, log._secrets))
    assert repr(log._seen.tip.key) not in shown and repr(log._secrets.request) not in shown


def test_after_a_rotation_the_old_key_can_be_forgotten(log: AuditLog, tmp_path: Path) -> None:
    keys = quiet_keys(log.path.parents[2] / "keys")
    (old,) = log.key_ids()
    new = keys.new().key_id
    log = AuditLog(log.path.parent, keys)
    entry = log.rewrap()
    assert entry and (entry.kind, entry.operation) == ("key", "rewrap_log_key")
    assert log.key_ids() == (new,)
    assert log.rewrap() is None
    keys.retire(old)
    keys.forget(old, lambda _: [])
    assert put(again(log)).seq == RECORDS + 1
    assert log.verify().ok
    key_file(log).unlink()
    assert verify_file(log.path, keys).ok


def test_a_rewrapping_that_could_not_be_written_leaves_the_old_one(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = quiet_keys(log.path.parents[2] / "keys")
    (old,) = log.key_ids()
    keys.new()
    with monkeypatch.context() as patched, pytest.raises(_Died):
        patched.setattr(audit_files.LogFiles, "append", die)
        log.rewrap()
    put(log)
    assert log.key_ids() == (old,)
    assert log.rewrap() is not None
    assert log.verify().ok


# Several at once

APPENDER = """
import sys
from pathlib import Path
from tensafe_nb.store.audit.log import AuditLog
from tensafe_nb.store.keys.keyring import Keys
home = Path(sys.argv[1])
log = AuditLog(home / "audit" / "local", Keys(home / "keys", "file", announce=lambda _: None))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    entry = log.append(operation="sample", training_client_id=sys.argv[2], started_at=1.0, completed_at=2.0)
    print(entry.seq, flush=True)
assert "torch" not in sys.modules
"""


def appender(home: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPENDER, str(home), name, str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_and_two_threads_append_to_one_valid_log(tmp_path: Path) -> None:
    processes = [appender(tmp_path, name, 40) for name in ("one", "two")]
    log = AuditLog(tmp_path / "audit" / "local", quiet_keys(tmp_path / "keys"))
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    threads = [threading.Thread(target=lambda: [put(log) for _ in range(20)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for process in processes:
        process.communicate("\n")
    for thread in threads:
        thread.join()
    assert [process.returncode for process in processes] == [0, 0]
    found = log.verify()
    assert (found.ok, found.records) == (True, 1 + 2 * 40 + 2 * 20)
    assert {len(log.entries(training_client_id=name)) for name in ("one", "two")} == {40}


@pytest.mark.parametrize("acknowledged", [1, 30])
def test_a_killed_process_leaves_a_log_with_every_record_it_was_told_of(
    log: AuditLog, acknowledged: int
) -> None:
    with appender(log.path.parents[2], "killed", 1_000_000) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        told = [int(process.stdout.readline()) for _ in range(acknowledged)]
        process.kill()
        told += [int(line) for line in process.stdout if line.endswith("\n")]
    assert told == list(range(RECORDS, RECORDS + len(told)))
    assert log.verify().ok
    assert put(log).seq in (told[-1] + 1, told[-1] + 2)
    assert log.verify().ok


# Listing


def test_a_listing_is_newest_first_and_each_entry_follows_the_next(log: AuditLog) -> None:
    logs = log.entries()
    assert [entry.seq for entry in logs] == list(reversed(range(RECORDS)))
    assert all(newer.prev_hash == older.record_hash for newer, older in itertools.pairwise(logs))


@given(
    client=st.sampled_from([None, *CLIENTS, "tc-9"]),
    operation=st.sampled_from([None, *VERBS]),
    limit=st.integers(0, RECORDS + 2),
    offset=st.integers(0, RECORDS + 2),
)
@settings(max_examples=60)
def test_filters_and_pages_cut_the_listing(
    sample: AuditLog, client: str | None, operation: str | None, limit: int, offset: int
) -> None:
    fitting = [
        entry
        for entry in sample.entries()
        if client in (None, entry.training_client_id) and operation in (None, entry.operation)
    ]
    assert sample.entries(client, operation, limit, offset) == fitting[offset:][:limit]


def test_pages_are_counted_from_zero(log: AuditLog) -> None:
    for wrong in ({"limit": -1}, {"offset": -1}):
        with pytest.raises(ValidationError, match="count records"):
            log.entries(**wrong)


@given(content=st.binary(max_size=60).map(lambda data: data.replace(b"\x00", b"\n")), block=st.integers(1, 9))
@settings(max_examples=200)
def test_reading_backwards_gives_the_finished_lines_in_reverse(content: bytes, block: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(audit_chain, "BLOCK", block)
        backwards = list(audit_chain.lines_newest_first(io.BytesIO(content), len(content)))
    finished = [line for line in io.BytesIO(content) if line.endswith(b"\n")]
    assert backwards == finished[::-1]


class _Counted(io.BytesIO):
    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


def test_the_newest_records_are_had_without_reading_the_others() -> None:
    lines = [b"%d %s\n" % (number, b"x" * 700) for number in range(5000)]
    log = _Counted(b"".join(lines))
    newest = list(itertools.islice(audit_chain.lines_newest_first(log, log.seek(0, 2)), 100))
    assert newest == lines[:-101:-1]
    assert log.taken <= 100 * 710 + 2 * audit_chain.BLOCK
