"""The keyring: what wraps, what opens, and what is retired or forgotten."""

import json
from pathlib import Path

import pytest

from tensafe_nb.errors import DecryptionError, KeyUnavailableError, ValidationError
from tensafe_nb.store.keys.keyring import REFUSED, Keys
from tests.unit.store.keys.roots import SECRET, kek, posix, stanza_of_a_stranger


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

        with pytest.raises(
            ValidationError, match=r"5 artifact\(s\) and journal\(s\): art-0, art-1, art-2, …\. Rotate"
        ):
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
