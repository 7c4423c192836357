"""The key of an audit log: it moves on with each record, and with the keys of the home."""

from pathlib import Path

import pytest

from tensafe_nb.store.audit import chain, files
from tensafe_nb.store.audit.key import KeyPage, Secrets, unwrap_secret
from tensafe_nb.store.audit.log import AuditLog, verify_file
from tests.unit.store.audit.logs import RECORDS, Died, again, die, key_file, put, quiet_keys


def test_the_keys_of_earlier_records_are_not_on_disk(log: AuditLog) -> None:
    keys = quiet_keys(log.path.parents[2] / "keys")
    page = KeyPage.parse(key_file(log).read_bytes())
    secret = unwrap_secret(page.stanzas, keys)
    tips = [chain.first_tip(secret)]
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
    assert log.rewrap()
    (entry,) = log.entries(limit=1)
    assert (entry.kind, entry.operation) == ("key", "rewrap_log_key")
    assert log.key_ids() == (new,)
    assert not log.rewrap()
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
    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(files.LogFiles, "append", die)
        log.rewrap()
    put(log)
    assert log.key_ids() == (old,)
    assert log.rewrap()
    assert log.verify().ok
