"""A store of artifacts, its folder and its keys."""

from pathlib import Path

import pytest

from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.keys.keyring import Keys
from tests.unit.store.faults import Unsynced


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys", announce=lambda text: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artifacts" / "local"


@pytest.fixture
def store(folder: Path, keys: Keys) -> ArtifactStore:
    return ArtifactStore(folder, keys, files=Unsynced())
