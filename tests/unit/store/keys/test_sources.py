"""Keys from the environment and from a passphrase."""

import getpass
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tensafe_nb.errors import DecryptionError, KeyUnavailableError
from tensafe_nb.store.disk import Files
from tensafe_nb.store.keys import sources
from tensafe_nb.store.keys.keyring import REFUSED, Keys
from tests.unit.store.keys.roots import SECRET, kek, stanza_of_a_stranger


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Someone at a terminal who types these answers, one per prompt."""
    answers: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(getpass, "getpass", lambda _: answers.pop(0))
    return answers


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
        real = sources.Scrypt

        def counted(salt: bytes, *args: Any, **kwargs: Any) -> Any:
            derived.append(salt)
            return real(salt, *args, **kwargs)

        monkeypatch.setattr(sources, "Scrypt", counted)
        keys = Keys(folder, "passphrase", passphrase="correct horse")
        stanzas = [keys.wrap(SECRET) for _ in range(3)]
        assert [keys.unwrap([stanza]) for stanza in stanzas] == [SECRET] * 3
        assert len(derived) == 1

    def test_the_cost_is_that_of_the_design(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()  # the real parameters
        monkeypatch.setattr(sources, "stretched", lambda text, kdf: bytes(32))
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
        winner, publish = Keys(folder, "passphrase", passphrase="same"), sources.publish

        def beaten(path: Path, data: bytes, files: Files, *, fresh: bool) -> None:
            monkeypatch.setattr(sources, "publish", publish)
            monkeypatch.setattr("fcntl.flock", lambda *_: None)
            winner.primary_id()
            publish(path, data, files, fresh=fresh)

        monkeypatch.setattr(sources, "publish", beaten)
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

    def test_it_is_asked_for_while_another_thread_imports_ipython(
        self, folder: Path, terminal: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))  # without get_ipython so far
        terminal += ["correct horse", "correct horse"]
        assert Keys(folder, "passphrase").wrap(SECRET)

    def test_where_nobody_is_there_to_answer_it_says_so(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def hangs_up(_: str) -> str:
            raise EOFError

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr(getpass, "getpass", hangs_up)
        with pytest.raises(KeyUnavailableError, match="nobody can be asked"):
            Keys(folder, "passphrase").primary_id()
