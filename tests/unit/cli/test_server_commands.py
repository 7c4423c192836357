"""The commands of whoever runs a server: tokens, and what each tenant may have."""

import argparse
import re
from pathlib import Path

import pytest

from tensafe_nb.cli.main import main
from tensafe_nb.cli.server import LIMITS, number
from tensafe_nb.server.door.limits import Limits
from tensafe_nb.server.door.tokens import Tokens


def test_a_limit_is_set_shown_and_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens.json"

    def say(*arguments: str) -> str:
        assert main(["tokens", arguments[0], "--tokens", str(file), *arguments[1:]]) == 0
        return capsys.readouterr().out.strip()

    token = say("new", "--tenant", "ada")
    assert say("limit", "ada") == "ada: as the server says for every tenant"
    assert (
        say("limit", "ada", "--max-clients", "4", "--max-stored", "20GB")
        == "ada: clients 4, stored_bytes 20,000,000,000"
    )
    assert Tokens(file).limits() == {"ada": {"clients": 4, "stored_bytes": 20 * 10**9}}
    assert say("limit", "ada", "--max-stored", "usual") == "ada: clients 4" == say("limit", "ada")
    assert Tokens(file).tenant_of(token) == "ada"


def test_numbers_are_written_as_people_write_them() -> None:
    assert [number(text) for text in ("500", "2k", "20 GB", "1T")] == [500, 2_000, 20 * 10**9, 10**12]
    for wrong in ("", "-1", "1.5", "many", "9" * 30):
        with pytest.raises(argparse.ArgumentTypeError, match="is no number"):
            number(wrong)


def test_what_the_command_line_takes_for_usual_is_what_a_server_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert {name: default for name, (_, default) in LIMITS.items()} == {
        name: getattr(Limits(), name) for name in LIMITS
    }
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = capsys.readouterr().out
    assert all(f"--max-{name}" in said for name in ("clients", "queued", "requests", "stored"))


def test_a_loss_that_is_not_there_is_an_error_before_anybody_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--home", str(tmp_path), "--port", "0", "--loss", "no_such.module:loss"]) != 0
    assert re.search(r"no_such", capsys.readouterr().err)
