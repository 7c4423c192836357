"""The key file: made once, private, never half-written, never put in another's place."""

import base64
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.errors import KeyUnavailableError, StorageError
from tensafe_nb.store.disk import DRAFTS, Files
from tensafe_nb.store.keys import key_file
from tensafe_nb.store.keys.keyring import Keys
from tests.unit.store.keys.roots import SECRET, kek, posix


class TestTheKeyFile:
    def test_it_is_made_at_the_first_use_and_announced_once(
        self, keys: Keys, folder: Path, said: list[str]
    ) -> None:
        key_id = keys.primary_id()
        assert keys.unwrap([keys.wrap(SECRET)]) == SECRET
        assert Keys(folder, announce=said.append).primary_id() == key_id
        (message,) = said
        assert str(folder / "local-keys.json") in message and key_id in message
        assert "Keep a copy: without it they cannot be opened" in message

    @posix
    def test_only_its_owner_can_read_it(self, keys: Keys, folder: Path) -> None:
        keys.primary_id()
        keys.new()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}

    @posix
    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660])
    def test_one_that_others_can_reach_is_refused(self, keys: Keys, folder: Path, mode: int) -> None:
        stanza = keys.wrap(SECRET)
        (folder / "local-keys.json").chmod(mode)
        for use in (keys.primary_id, keys.infos, keys.new, lambda: keys.unwrap([stanza])):
            with pytest.raises(KeyUnavailableError, match="chmod 600"):
                use()
        assert not keys.can_open([stanza])

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:-30],
            lambda data: b"\xff" + data,
            lambda data: data.replace(b'"version": 1', b'"version": 2'),
            lambda data: b"[]",
            lambda data: json.dumps({"version": 1, "keys": {"key_id": 1}}).encode(),
            lambda data: b"[" * 100_000,
            lambda data: data.replace(b'"tenant": "local"', b'"tenant": 7'),
            lambda data: data.replace(b'"retired": false', b'"retired": 7'),
        ],
    )
    def test_a_damaged_one_is_refused_and_left_as_it_is(self, keys: Keys, folder: Path, damage: Any) -> None:
        keys.primary_id()
        path = folder / "local-keys.json"
        path.write_bytes(damaged := damage(path.read_bytes()))
        for use in (keys.primary_id, keys.new, Keys(folder).primary_id):
            with pytest.raises(KeyUnavailableError, match=r"damaged.*backup"):
                use()
        assert path.read_bytes() == damaged

    def test_a_key_that_rotted_is_noticed(self, keys: Keys, folder: Path) -> None:
        keys.primary_id()
        path = folder / "local-keys.json"
        content = json.loads(path.read_text())
        content["keys"][0]["root"] = kek(1)
        path.write_text(json.dumps(content))
        with pytest.raises(KeyUnavailableError, match="damaged"):
            keys.primary_id()

    def test_one_that_vanishes_is_not_made_again(self, keys: Keys, folder: Path) -> None:
        keys.primary_id()
        (folder / "local-keys.json").unlink()
        for use in (keys.primary_id, lambda: keys.wrap(SECRET), keys.new):
            with pytest.raises(KeyUnavailableError, match="gone"):
                use()
        assert not (folder / "local-keys.json").exists()

    def test_a_folder_that_cannot_be_written_is_said(self, keys: Keys, folder: Path) -> None:
        (folder / "local-keys.lock").mkdir(parents=True)  # in the way
        with pytest.raises(StorageError, match=r"could not be written.*TENSAFE_HOME"):
            keys.primary_id()

    def test_one_that_cannot_be_read_is_not_replaced(self, keys: Keys, folder: Path) -> None:
        (folder / "local-keys.json").mkdir(parents=True)
        with pytest.raises(KeyUnavailableError, match="cannot be read"):
            keys.primary_id()

    def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
        self, keys: Keys, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = keys.primary_id()

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            keys.new()
        assert keys.primary_id() == before
        assert not list(folder.glob("*.tmp"))

    def test_what_a_crash_left_behind_is_swept_at_the_next_change(self, keys: Keys, folder: Path) -> None:
        keys.primary_id()
        (folder / "local-keys.json.1-dead.tmp").write_text("half a key")  # as version 0.1 left it
        (folder / DRAFTS.replace("*", "dead")).write_text("half a key")
        keys.new()
        assert not list(folder.glob("*.tmp")) and not list(folder.glob(DRAFTS))

    def test_file_and_folder_are_synced_before_the_key_is_used(
        self, keys: Keys, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        real = os.fsync

        def watched(handle: int) -> None:
            kind = "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"  # noqa: PTH112
            synced.append(f"{kind}, published: {(folder / 'local-keys.json').exists()}")
            real(handle)

        monkeypatch.setattr(os, "fsync", watched)
        keys.primary_id()
        above, written = synced[:-2], synced[-2:]
        assert set(above) == {
            "folder, published: False"
        }  # those above: the keys folder's own name is on the disk
        assert written == ["file, published: False", "folder, published: True"]

    def test_tenants_share_the_file_and_no_key(self, keys: Keys, folder: Path) -> None:
        stanza = keys.wrap(SECRET)
        other = Keys(folder, tenant="other", announce=lambda _: None)
        assert other.primary_id() != keys.primary_id()
        assert not other.can_open([stanza])
        assert [info.key_id for info in keys.infos()] == [keys.primary_id()]

    def test_no_key_is_in_a_repr(self, keys: Keys, folder: Path) -> None:
        keys.primary_id()
        root = json.loads((folder / "local-keys.json").read_text())["keys"][0]["root"]
        shown = repr(keys) + repr(keys.infos()) + repr(keys._file.roots())
        assert root not in shown and repr(base64.b64decode(root)) not in shown


class TestTwoProcesses:
    PROGRAM = """
import sys
from pathlib import Path
from tensafe_nb.store.keys.keyring import Keys
print("ready", flush=True)
sys.stdin.readline()
print(Keys(Path(sys.argv[1]), announce=lambda _: print("made")).primary_id())
assert "torch" not in sys.modules
"""

    def test_processes_that_start_together_agree_on_one_key(self, folder: Path) -> None:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", self.PROGRAM, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        lines = [process.communicate()[0].split() for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert len({line[-1] for line in lines}) == 1
        assert sum("made" in line for line in lines) == 1

    def test_threads_that_start_together_agree_on_one_key(self, folder: Path, said: list[str]) -> None:
        start, found = threading.Barrier(6), []

        def use() -> None:
            start.wait()
            found.append(Keys(folder, announce=said.append).primary_id())

        threads = [threading.Thread(target=use) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6 and len(set(found)) == 1 and len(said) == 1

    def test_where_locks_do_not_hold_the_first_file_still_wins(
        self, keys: Keys, folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        winner, publish = Keys(folder, announce=lambda _: None), key_file.publish

        def beaten(path: Path, data: bytes, files: Files, *, fresh: bool) -> None:
            monkeypatch.setattr(key_file, "publish", publish)
            monkeypatch.setattr("fcntl.flock", lambda *_: None)
            winner.primary_id()
            publish(path, data, files, fresh=fresh)

        monkeypatch.setattr(key_file, "publish", beaten)
        assert keys.primary_id() == winner.primary_id()
        assert said == []

    def test_a_key_made_elsewhere_is_used_at_once(self, keys: Keys, folder: Path) -> None:
        old = keys.wrap(SECRET)
        new = Keys(folder, announce=lambda _: None).new()
        assert keys.primary_id() == keys.wrap(SECRET)["kek_id"] == new.key_id != old["kek_id"]
        assert keys.unwrap([old]) == SECRET
