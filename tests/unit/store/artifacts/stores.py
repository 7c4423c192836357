"""Artifacts in a folder, and ways to look at them and to alter them."""

from pathlib import Path
from typing import Any

from tensafe_nb.protocol.results import SaveStateResult
from tensafe_nb.store.artifacts.artifacts import ArtifactStore, StoredArtifact
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import seal
from tests.unit.store.lives import HEADER

PARTS = {"model.bin": b"weights", "trainer.json": b"{}"}


FOREIGN_IDS = [
    "", "art-", "ART-1", "art-1/../../x", "../art-1", "art-1.x", "art-*", "art-?", "art-" + "a" * 65, "/etc/passwd",
    "art-ä", "art-1\n", None, 3,
]  # fmt: skip


def strangers(folder: Path) -> ArtifactStore:
    """The same folder in the hands of somebody without the key."""
    return ArtifactStore(folder, Keys(folder.parents[1] / "other keys", announce=lambda text: None))


def save(store: ArtifactStore, parts: Any = PARTS, **settings: Any) -> SaveStateResult:
    return store.save(parts, header=HEADER, **settings)


def contents(artifact: StoredArtifact) -> dict[str, bytes]:
    return {name: stream.read() for name, _, stream in artifact.parts()}


def file_of(folder: Path, info: SaveStateResult) -> Path:
    (path,) = folder.glob(f"{info.artifact_id}.*")
    return path


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def sealed_by_hand(path: Path, keys: Keys, payload: bytes, **fields: Any) -> Path:
    """A file that is authentic and yet not what the store writes."""
    added = {"artifact_id": "art-1", "artifact_type": "checkpoint", "tenant": "local", "created_at": 1.0}
    with path.open("w+b") as file:
        seal(file, {**HEADER, **added, **fields}, [payload], keys)
    return path


manifest = {"metadata": {}, "name": None, "parts": [["a", 1]]}
