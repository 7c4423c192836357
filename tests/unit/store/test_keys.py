"""Keys: made once, kept private, never replaced, and old ones go on opening."""

import base64
import getpass
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.errors import DecryptionError, KeyUnavailableError, StorageError, ValidationError
from tensafe_nb.store.disk import DRAFTS, Files
from tensafe_nb.store.keys import key_file
from tensafe_nb.store.keys import sources as key_sources
from tensafe_nb.store.keys.keyring import REFUSED, Keys

SECRET = bytes(range(32))
posix = pytest.mark.skipif(os.name != "posix", reason="rights are those of POSIX")


def kek(fill: int, size: int = 32) -> str:
    return base64.b64encode(bytes([fill]) * size).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "keys"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def keys(folder: Path, said: list[str]) -> Keys:
    return Keys(folder, announce=said.append)


@pytest.fixture(autouse=True)
def _environment_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TENSAFE_KEK", "TENSAFE_KEK_PREVIOUS", "TENSAFE_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _quick_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sources, "SCRYPT", {"n": 2**4, "r": 1, "p": 1})


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Someone at a terminal who types these answers, one per prompt."""
    answers: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(getpass, "getpass", lambda _: answers.pop(0))
    return answers


def test_nothing_is_read_or_made_before_the_first_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSAFE_KEK", "garbage")
    for source in (None, "file", "env", "passphrase"):
        Keys(folder, source)
    assert not folder.exists()


def test_an_unknown_source_is_refused(folder: Path) -> None:
    with pytest.raises(ValidationError, match=r"'keychain'.*file, env, passphrase"):
        Keys(folder, "keychain")


def test_looking_makes_nothing(keys: Keys, folder: Path) -> None:
    assert keys.infos() == []
    assert not keys.can_open([stanza_of_a_stranger()])
    assert not folder.exists()


def stanza_of_a_stranger() -> dict[str, Any]:
    return {"kek_id": "key-00", "source": "file", "kdf": {"name": "HKDF-SHA256"}, "wrapped": "00" * 40}


class TestTheKeyFile:
    def test_it_is_made_at_the_first_use_and_announced_once(
        self, keys: Keys, folder: Path, said: list[str]
    ) -> None:
        key_id = keys.primary_id()
        assert keys.unwrap([keys.wrap(SECRET)]) == SECRET
        assert Keys(folder, announce=said.append).primary_id() == key_id
        (message,) = said
        assert str(folder / "local-keys.json") in message and key_id in message
        assert "Back this up: without it your checkpoints cannot be opened" in message

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


class TestRotation:
    def test_a_new_key_seals_and_old_ones_open(self, keys: Keys, said: list[str]) -> None:
        old = keys.wrap(SECRET)
        made = keys.new()
        assert made.primary and keys.primary_id() == made.key_id
        assert keys.wrap(SECRET)["kek_id"] == made.key_id
        assert keys.unwrap([old]) == SECRET
        assert [info.primary for info in keys.infos()] == [False, True]
        assert made.key_id in said[-1]

    def test_a_retired_key_still_opens(self, keys: Keys) -> None:
        old = keys.wrap(SECRET)
        keys.new()
        keys.retire(old["kek_id"])
        assert keys.unwrap([old]) == SECRET and keys.can_open([old])
        assert [info.retired for info in keys.infos()] == [True, False]

    def test_forgetting_refuses_while_an_artifact_needs_the_key(self, keys: Keys) -> None:
        old = keys.wrap(SECRET)
        keys.new()
        asked: list[str] = []

        def needed(key_id: str) -> list[str]:
            asked.append(key_id)
            return [f"art-{n}" for n in range(5)]

        with pytest.raises(ValidationError, match=r"5 artifact\(s\): art-0, art-1, art-2, …\. Rotate"):
            keys.forget(old["kek_id"], needed)
        assert asked == [old["kek_id"]]
        assert keys.unwrap([old]) == SECRET

    def test_a_forgotten_key_is_gone_from_the_disk_and_opens_nothing(self, keys: Keys, folder: Path) -> None:
        old = keys.wrap(SECRET)
        root = json.loads((folder / "local-keys.json").read_text())["keys"][0]["root"]
        keys.new()
        keys.forget(old["kek_id"], lambda _: [])
        with pytest.raises(KeyUnavailableError, match=old["kek_id"]):
            keys.unwrap([old])
        assert all(root not in path.read_text() for path in folder.iterdir())

    def test_the_key_that_seals_is_neither_retired_nor_forgotten(self, keys: Keys) -> None:
        primary = keys.primary_id()
        for act in (lambda: keys.retire(primary), lambda: keys.forget(primary, lambda _: [])):
            with pytest.raises(ValidationError, match="Make a new one first"):
                act()
        assert keys.primary_id() == primary

    def test_a_key_that_is_not_there_is_said_with_the_nearest(self, keys: Keys) -> None:
        primary = keys.primary_id()
        for act in (lambda: keys.retire(primary[:-1]), lambda: keys.forget(primary[:-1], lambda _: [])):
            with pytest.raises(ValidationError, match=f"Did you mean '{primary}'"):
                act()

    def test_a_retired_key_never_becomes_the_one_that_seals(
        self, keys: Keys, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = keys.primary_id()
        monkeypatch.setenv("TENSAFE_KEK", kek(1))
        Keys(folder).retire(old)
        monkeypatch.delenv("TENSAFE_KEK")
        assert keys.primary_id() != old

    @pytest.mark.parametrize(
        ("source", "says"), [("env", "TENSAFE_KEK_PREVIOUS"), ("passphrase", "passphrase.json")]
    )
    def test_other_sources_say_how_they_are_rotated(self, folder: Path, source: str, says: str) -> None:
        with pytest.raises(ValidationError, match=says):
            Keys(folder, source).new()


class TestTheEnvironment:
    def test_it_comes_before_the_file_and_makes_none(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TENSAFE_KEK", kek(1))
        keys = Keys(folder)
        stanza = keys.wrap(SECRET)
        assert stanza["source"] == "env" and Keys(folder, "env").unwrap([stanza]) == SECRET
        assert [(info.source, info.primary, info.created_at) for info in keys.infos()] == [
            ("env", True, None)
        ]
        assert not folder.exists()

    @pytest.mark.parametrize(
        "value", ["", " ", kek(1, 31), kek(1, 33), kek(1, 16), kek(1)[:-1], "!" + kek(1), "ff" * 32]
    )
    @pytest.mark.parametrize("source", [None, "env"])
    def test_any_other_length_or_form_raises_and_the_file_does_not_stand_in(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, value: str, source: str | None
    ) -> None:
        monkeypatch.setenv("TENSAFE_KEK", value)
        with pytest.raises(KeyUnavailableError, match="exactly 32 random bytes") as raised:
            Keys(folder, source).wrap(SECRET)
        assert not value.strip() or value not in str(raised.value)
        assert not folder.exists()

    def test_it_raises_when_it_is_asked_for_and_not_set(self, folder: Path) -> None:
        with pytest.raises(KeyUnavailableError, match="TENSAFE_KEK is not set"):
            Keys(folder, "env").primary_id()

    def test_one_that_goes_away_is_not_replaced_by_the_file(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TENSAFE_KEK", kek(1))
        keys = Keys(folder)
        keys.primary_id()
        monkeypatch.delenv("TENSAFE_KEK")
        with pytest.raises(KeyUnavailableError, match="not set"):
            keys.wrap(SECRET)

    def test_previous_keys_open_and_do_not_seal(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stanzas = []
        for fill in (1, 2):
            monkeypatch.setenv("TENSAFE_KEK", kek(fill))
            stanzas.append(Keys(folder).wrap(SECRET))
        monkeypatch.setenv("TENSAFE_KEK", kek(3))
        monkeypatch.setenv("TENSAFE_KEK_PREVIOUS", f"{kek(1)}, {kek(2)},")
        keys = Keys(folder)
        assert [keys.unwrap([stanza]) for stanza in stanzas] == [SECRET, SECRET]
        assert keys.wrap(SECRET)["kek_id"] not in {stanza["kek_id"] for stanza in stanzas}
        assert [(info.primary, info.retired) for info in keys.infos()] == [
            (True, False),
            (False, True),
            (False, True),
        ]

    def test_a_broken_previous_key_is_named_as_such(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TENSAFE_KEK", kek(1))
        monkeypatch.setenv("TENSAFE_KEK_PREVIOUS", "garbage")
        with pytest.raises(KeyUnavailableError, match="TENSAFE_KEK_PREVIOUS"):
            Keys(folder).unwrap([stanza_of_a_stranger()])

    def test_tenants_derive_other_keys_from_the_same_root(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TENSAFE_KEK", kek(1))
        stanza = Keys(folder, tenant="one").wrap(SECRET)
        with pytest.raises(DecryptionError) as raised:
            Keys(folder, tenant="two").unwrap([stanza])
        assert str(raised.value) == REFUSED


class TestThePassphrase:
    def test_it_opens_in_another_process_and_another_home(self, folder: Path, tmp_path: Path) -> None:
        stanza = Keys(folder, "passphrase", passphrase="correct horse").wrap(SECRET)
        for where in (folder, tmp_path / "elsewhere"):
            assert Keys(where, "passphrase", passphrase="correct horse").unwrap([stanza]) == SECRET
        assert not (folder / "local-keys.json").exists()

    def test_a_wrong_one_opens_nothing(self, tmp_path: Path, folder: Path) -> None:
        stanza = Keys(folder, "passphrase", passphrase="correct horse").wrap(SECRET)
        for where in (folder, tmp_path / "elsewhere"):
            wrong = Keys(where, "passphrase", passphrase="battery staple")
            assert not wrong.can_open([stanza])
            with pytest.raises(DecryptionError, match=stanza["kek_id"]) as raised:
                wrong.unwrap([stanza])
            assert "battery" not in str(raised.value)

    def test_a_wrong_one_seals_nothing(self, folder: Path) -> None:
        Keys(folder, "passphrase", passphrase="correct horse").primary_id()
        with pytest.raises(KeyUnavailableError, match="not the one"):
            Keys(folder, "passphrase", passphrase="correct hrose").wrap(SECRET)

    def test_it_may_come_from_the_environment(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TENSAFE_PASSPHRASE", "correct horse")
        stanza = Keys(folder, "passphrase").wrap(SECRET)
        assert Keys(folder, "passphrase", passphrase="correct horse").unwrap([stanza]) == SECRET

    def test_the_same_text_in_another_encoding_of_its_accents_is_the_same(self, folder: Path) -> None:
        stanza = Keys(folder, "passphrase", passphrase="caf\u00e9").wrap(SECRET)
        assert Keys(folder, "passphrase", passphrase="cafe\u0301").unwrap([stanza]) == SECRET

    @pytest.mark.parametrize("given", ["", None])
    def test_none_to_be_had_is_said(
        self, folder: Path, given: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdin", None)
        with pytest.raises(KeyUnavailableError, match="TENSAFE_PASSPHRASE"):
            Keys(folder, "passphrase", passphrase=given).primary_id()
        assert not (folder / "passphrase.json").exists()

    def test_it_is_derived_once_per_salt(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        derived: list[bytes] = []
        real = key_sources.Scrypt

        def counted(salt: bytes, *args: Any, **kwargs: Any) -> Any:
            derived.append(salt)
            return real(salt, *args, **kwargs)

        monkeypatch.setattr(key_sources, "Scrypt", counted)
        keys = Keys(folder, "passphrase", passphrase="correct horse")
        stanzas = [keys.wrap(SECRET) for _ in range(3)]
        assert [keys.unwrap([stanza]) for stanza in stanzas] == [SECRET] * 3
        assert len(derived) == 1

    def test_the_cost_is_that_of_the_design(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()  # the real parameters
        monkeypatch.setattr(key_sources, "stretched", lambda text, kdf: bytes(32))
        kdf = Keys(folder, "passphrase", passphrase="correct horse").wrap(SECRET)["kdf"]
        assert {"n": 2**17, "r": 8, "p": 1, "name": "scrypt"}.items() <= kdf.items()
        assert len(bytes.fromhex(kdf["salt"])) == 16

    def test_two_homes_have_two_salts(self, tmp_path: Path) -> None:
        one, two = (Keys(tmp_path / name, "passphrase", passphrase="same").wrap(SECRET) for name in "ab")
        assert one["kdf"]["salt"] != two["kdf"]["salt"] and one["kek_id"] != two["kek_id"]

    @pytest.mark.parametrize("change", [{"n": 2**21}, {"salt": "00"}, {"r": None}])
    def test_a_record_that_was_tampered_with_is_refused(self, folder: Path, change: dict[str, Any]) -> None:
        Keys(folder, "passphrase", passphrase="correct horse").primary_id()
        path = folder / "passphrase.json"
        content = json.loads(path.read_text())
        content["kdf"] |= change
        path.write_text(json.dumps(content))
        with pytest.raises(KeyUnavailableError, match="damaged"):
            Keys(folder, "passphrase", passphrase="correct horse").primary_id()

    def test_parameters_made_cheap_behind_our_back_are_noticed(self, folder: Path) -> None:
        Keys(folder, "passphrase", passphrase="correct horse").primary_id()
        path = folder / "passphrase.json"
        content = json.loads(path.read_text())
        content["kdf"]["n"] = 2
        path.write_text(json.dumps(content))
        with pytest.raises(KeyUnavailableError, match="not the one"):
            Keys(folder, "passphrase", passphrase="correct horse").wrap(SECRET)

    def test_the_record_of_another_process_that_was_first_counts(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        winner, publish = Keys(folder, "passphrase", passphrase="same"), key_sources.publish

        def beaten(path: Path, data: bytes, files: Files, *, fresh: bool) -> None:
            monkeypatch.setattr(key_sources, "publish", publish)
            monkeypatch.setattr("fcntl.flock", lambda *_: None)
            winner.primary_id()
            publish(path, data, files, fresh=fresh)

        monkeypatch.setattr(key_sources, "publish", beaten)
        assert Keys(folder, "passphrase", passphrase="same").primary_id() == winner.primary_id()

    def test_it_is_asked_for_twice_when_it_is_new_and_once_after(
        self, folder: Path, terminal: list[str]
    ) -> None:
        terminal += ["correct horse", "correct horse"]
        keys = Keys(folder, "passphrase")
        stanza = keys.wrap(SECRET)
        assert terminal == [] and keys.unwrap([stanza]) == SECRET
        terminal += ["correct horse"]
        assert Keys(folder, "passphrase").unwrap([stanza]) == SECRET

    def test_a_slip_when_it_is_new_writes_nothing(self, folder: Path, terminal: list[str]) -> None:
        terminal += ["correct horse", "correct hrose"]
        with pytest.raises(KeyUnavailableError, match="differ"):
            Keys(folder, "passphrase").wrap(SECRET)
        assert not (folder / "passphrase.json").exists()

    def test_a_wrong_answer_is_asked_again_the_next_time(self, folder: Path, terminal: list[str]) -> None:
        stanza = Keys(folder, "passphrase", passphrase="correct horse").wrap(SECRET)
        keys = Keys(folder, "passphrase")
        terminal += ["battery", "correct horse"]
        with pytest.raises(DecryptionError):
            keys.unwrap([stanza])
        assert keys.unwrap([stanza]) == SECRET

    def test_looking_asks_nobody(self, folder: Path, terminal: list[str]) -> None:
        stanza = Keys(folder, "passphrase", passphrase="correct horse").wrap(SECRET)
        keys = Keys(folder, "passphrase")
        assert not keys.can_open([stanza])
        (info,) = keys.infos()
        assert (info.key_id, info.source, info.primary) == (stanza["kek_id"], "passphrase", True)

    def test_where_nobody_is_there_to_answer_it_says_so(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def hangs_up(_: str) -> str:
            raise EOFError

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr(getpass, "getpass", hangs_up)
        with pytest.raises(KeyUnavailableError, match="nobody can be asked"):
            Keys(folder, "passphrase").primary_id()


class TestChangingTheSource:
    def test_what_the_file_sealed_opens_under_the_environment_and_back(
        self, keys: Keys, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        by_file = keys.wrap(SECRET)
        monkeypatch.setenv("TENSAFE_KEK", kek(1))
        by_env = Keys(folder).wrap(SECRET)
        for source in ("file", "env"):
            now = Keys(folder, source)
            assert now.unwrap([by_file]) == now.unwrap([by_env]) == SECRET

    def test_a_passphrase_that_is_at_hand_opens_whatever_seals_now(
        self, keys: Keys, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stanza = Keys(folder, "passphrase", passphrase="correct horse").wrap(SECRET)
        with pytest.raises(KeyUnavailableError, match="TENSAFE_PASSPHRASE"):
            keys.unwrap([stanza])
        monkeypatch.setenv("TENSAFE_PASSPHRASE", "correct horse")
        assert keys.unwrap([stanza]) == SECRET

    def test_a_root_carried_from_the_file_into_the_environment_opens_elsewhere(
        self, keys: Keys, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stanza = keys.wrap(SECRET)
        root = json.loads((folder / "local-keys.json").read_text())["keys"][0]["root"]
        monkeypatch.setenv("TENSAFE_KEK", root)
        assert Keys(tmp_path / "elsewhere").unwrap([stanza]) == SECRET

    def test_a_source_that_is_set_and_broken_raises_even_where_another_would_open(
        self, keys: Keys, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        by_file = keys.wrap(SECRET)
        monkeypatch.setenv("TENSAFE_KEK", "garbage")
        with pytest.raises(KeyUnavailableError, match="TENSAFE_KEK must be"):
            Keys(folder).unwrap([by_file])

    @posix
    def test_a_key_file_out_of_order_does_not_stop_another_source(
        self, keys: Keys, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        by_file = keys.wrap(SECRET)
        (folder / "local-keys.json").chmod(0o644)
        monkeypatch.setenv("TENSAFE_KEK", kek(1))
        now = Keys(folder)
        assert now.unwrap([now.wrap(SECRET)]) == SECRET
        with pytest.raises(KeyUnavailableError, match=by_file["kek_id"]):
            now.unwrap([by_file])


class TestStanzas:
    def test_the_first_one_that_opens_counts(self, keys: Keys, tmp_path: Path) -> None:
        stranger = Keys(tmp_path / "elsewhere", announce=lambda _: None).wrap(SECRET)
        mine = keys.wrap(SECRET)
        altered = mine | {"wrapped": "00" * 40}
        assert keys.unwrap([stranger, altered, mine]) == SECRET
        assert keys.can_open([stranger, mine]) and not keys.can_open([stranger])

    def test_when_none_is_here_all_are_named(self, keys: Keys) -> None:
        strangers = [stanza_of_a_stranger() | {"kek_id": name} for name in ("key-a", "key-b")]
        with pytest.raises(KeyUnavailableError, match=r"key-a, key-b; here: none") as raised:
            keys.unwrap(strangers)
        assert raised.value.details["key_ids"] == ["key-a", "key-b"]

    @pytest.mark.parametrize("wrapped", ["", "00", "00" * 40, "00" * 39])
    def test_an_altered_one_does_not_open(self, keys: Keys, wrapped: str) -> None:
        with pytest.raises(DecryptionError) as raised:
            keys.unwrap([keys.wrap(SECRET) | {"wrapped": wrapped}])
        assert str(raised.value) == REFUSED

    def test_a_stanza_is_plain_json_and_holds_no_secret(self, keys: Keys) -> None:
        stanza = keys.wrap(SECRET)
        assert json.loads(json.dumps(stanza)) == stanza
        assert SECRET.hex() not in json.dumps(stanza)
        assert set(stanza) == {"kek_id", "source", "kdf", "wrapped"}

    def test_no_stanza_at_all_is_refused(self, keys: Keys) -> None:
        with pytest.raises(DecryptionError):
            keys.unwrap([])
        assert not keys.can_open([])
