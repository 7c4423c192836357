"""Keys in a folder of their own, an environment without any, and somebody at a terminal."""

from pathlib import Path

import pytest

from tensafe_nb.store.keys import sources
from tensafe_nb.store.keys.keyring import Keys


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
    monkeypatch.setattr(sources, "SCRYPT", {"n": 2**4, "r": 1, "p": 1})
