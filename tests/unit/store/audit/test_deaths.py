"""An audit log whose writer died, or whose disk was full, goes on."""

import os
import resource
import shutil
from pathlib import Path

import pytest

from tensafe_nb.errors import (
    StorageError,
)
from tensafe_nb.store.audit import chain, files
from tensafe_nb.store.audit.key import KeyPage, Secrets, key_page, unwrap_secret
from tensafe_nb.store.audit.log import AuditLog
from tests.unit.store.audit.logs import RECORDS, Died, again, die, key_file, made, put, quiet_keys


@pytest.mark.parametrize("restarted", [True, False])
def test_a_death_between_record_and_key_is_made_good_by_the_next_append(
    log: AuditLog, restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(files.LogFiles, "keep", die)
        put(log)
    assert log.verify().ok
    entry = put(again(log) if restarted else log)
    assert (entry.seq, log.verify().ok, log.verify().records) == (RECORDS + 1, True, RECORDS + 2)


@pytest.mark.parametrize("name", ["append", "keep"])
def test_a_death_at_the_very_start_leaves_a_log_that_can_be_started(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(files.LogFiles, name, die)
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
    key_file(other_log).write_bytes(key_page(chain.first_tip(secret), Secrets.of(secret, stanzas)))
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
    assert counted == [RECORDS + 1]  # at the log's: the key file may be behind


def test_nothing_is_read_again_while_nobody_else_wrote(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(KeyPage, "parse", die)
        put(log)
    put(again(log))
    assert put(log).seq == RECORDS + 2  # and read again when somebody did
    assert log.verify().ok
