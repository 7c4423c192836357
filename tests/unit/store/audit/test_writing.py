"""The audit log as it is written: what a record holds, by one writer or by several at once."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from tensafe_nb.errors import (
    ValidationError,
)
from tensafe_nb.store.audit import chain
from tensafe_nb.store.audit.log import AuditLog
from tensafe_nb.store.disk import Files
from tensafe_nb.store.sealed.envelope import canonical
from tests.unit.store.audit.logs import RECORDS, again, key_file, made, put, quiet_keys, records

# What is written


def test_nothing_is_made_or_asked_before_the_first_append(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", quiet_keys(tmp_path / "keys"))
    assert (log.head(), log.entries(), log.key_ids(), log.rewrap()) == (None, [], (), False)
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


def test_hash_and_mac_take_their_places_in_a_line_whatever_stands_around_them(log: AuditLog) -> None:
    inside = {"mac": "0" * 64, "record_hash": ["mac", {"record_hash": '"mac":"'}]}
    names = ("", "a", "mab", "mac ", "mac2", "maç", "record_hasg", "record_hash2", "zz", '"mac":"')
    put(log, extra=dict.fromkeys(names, inside))
    line = log.path.read_bytes().splitlines()[-1]
    assert line == canonical(records(log)[-1])
    assert (records(log)[-1]["mac2"], log.verify().records) == (inside, RECORDS + 1)
    assert log.entries(limit=1)[0].record_hash == chain.record_hash(records(log)[-1])


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


APPENDER = """
import sys
from pathlib import Path
from tensafe_nb.store.audit.log import AuditLog
from tensafe_nb.store.disk import Files
from tensafe_nb.store.keys.keyring import Keys
home = Path(sys.argv[1])
log = AuditLog(home / "audit" / "local", Keys(home / "keys", "file", announce=lambda _: None))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    end = log.append(operation="sample", training_client_id=sys.argv[2], started_at=1.0, completed_at=2.0)
    print(end.seq - 1, flush=True)
assert "torch" not in sys.modules
"""


def appender(home: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPENDER, str(home), name, str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# Several at once


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


# Files that stay open


class Counted(Files):
    def __init__(self) -> None:
        self.opened: list[str] = []

    def unbuffered(self, path: Path, *, append: bool = False) -> FileIO:
        self.opened.append(path.name)
        return super().unbuffered(path, append=append)


def test_the_files_are_opened_once_for_many_records_and_again_after_closing(log: AuditLog) -> None:
    files = Counted()
    own = AuditLog(log.path.parent, quiet_keys(log.path.parents[2] / "keys"), files=files)
    for number in range(5):
        put(own, number)
    assert files.opened == ["audit.jsonl", "audit.key"]
    own.close()
    put(own)
    assert files.opened == ["audit.jsonl", "audit.key"] * 2
    assert log.verify().records == RECORDS + 6


def test_what_is_put_in_the_place_of_open_files_is_what_goes_on(log: AuditLog, tmp_path: Path) -> None:
    put(log)
    copy = tmp_path / "copy"
    shutil.copytree(log.path.parent, copy)
    put(log, 1)
    log.path.parent.rename(tmp_path / "elsewhere")
    copy.rename(log.path.parent)  # the log as it was before the latest record
    assert put(log, 2).seq == RECORDS + 1
    assert log.verify().records == RECORDS + 2
    key_file(log).replace(tmp_path / "key")
    shutil.copy(tmp_path / "key", key_file(log))
    assert put(log).seq == RECORDS + 2
    assert log.verify().ok


def test_a_forked_child_and_its_parent_keep_each_other_out(log: AuditLog) -> None:
    put(log)
    child = os.fork()
    if child == 0:
        try:
            for number in range(60):
                put(log, number)
        finally:
            os._exit(0)
    for number in range(60):
        put(log, number)
    os.waitpid(child, 0)
    found = log.verify()
    assert (found.ok, found.records) == (True, RECORDS + 121)


def test_a_log_that_is_let_go_leaves_no_file_open(log: AuditLog) -> None:
    own = again(log)
    put(own)
    files = own._files
    assert files._log.file is not None
    del own
    assert files._log.file is None
