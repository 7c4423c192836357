"""Artifacts pulled, pushed and deleted."""

import pickle
import struct
from pathlib import Path

import pytest

from tensafe_nb.errors import (
    ArtifactNotFoundError,
    DecryptionError,
    StorageError,
    ValidationError,
)
from tensafe_nb.store.artifacts.artifacts import ArtifactStore, open_file
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import canonical
from tests.unit.store.artifacts.stores import (
    FOREIGN_IDS,
    PARTS,
    contents,
    file_of,
    flip,
    manifest,
    save,
    sealed_by_hand,
    strangers,
)


def test_what_is_pulled_is_the_sealed_file_and_can_be_pushed_where_the_key_is(
    store: ArtifactStore, folder: Path, tmp_path: Path, keys: Keys
) -> None:
    saved = save(store, name="travels")
    assert store.pull(saved.artifact_id) == file_of(folder, saved).read_bytes()
    copy = store.pull_to(saved.artifact_id, tmp_path / "copy.tsnb")
    assert copy.read_bytes() == store.pull(saved.artifact_id)
    assert store.pull_to(saved.artifact_id, tmp_path) == tmp_path / f"{saved.artifact_id}.tsnb"
    elsewhere = ArtifactStore(tmp_path / "elsewhere", keys)
    assert elsewhere.push(copy) == saved
    assert elsewhere.push(copy) == saved
    assert elsewhere.list() == [saved]


def test_a_pulled_file_is_opened_where_it_lies(store: ArtifactStore, tmp_path: Path, keys: Keys) -> None:
    saved = save(store, metadata={"a": 1}, name="travels")
    copy = store.pull_to(saved.artifact_id, tmp_path / "any name.tsnb")
    with open_file(copy, keys) as artifact:
        assert artifact.info == saved
        assert contents(artifact) == PARTS
    flip(copy, -1)
    with pytest.raises(DecryptionError), open_file(copy, keys):
        pass
    with pytest.raises(StorageError, match="Could not read"), open_file(tmp_path / "absent", keys):
        pass
    with (
        pytest.raises(DecryptionError),
        open_file(sealed_by_hand(copy, keys, payload_of(b"x"), step="1"), keys),
    ):
        pass


def test_pulling_to_where_nothing_can_be_written_says_so(store: ArtifactStore, tmp_path: Path) -> None:
    saved = save(store)
    with pytest.raises(StorageError, match="Could not copy"):
        store.pull_to(saved.artifact_id, tmp_path / "absent" / "copy.tsnb")
    with pytest.raises(StorageError, match="Could not take in"):
        store.push(tmp_path / "absent.tsnb")


def test_without_the_key_a_file_is_taken_in_unseen(
    store: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    saved = save(store, name="sealed")
    copy = store.pull_to(saved.artifact_id, tmp_path / "copy.tsnb")
    store.delete(saved.artifact_id)
    pushed = strangers(folder).push(copy)
    assert (pushed.name, pushed.content_hash) == (None, saved.content_hash)
    assert store.verify(saved.artifact_id) == saved


def test_an_altered_file_is_not_taken_in(store: ArtifactStore, tmp_path: Path) -> None:
    saved = save(store)
    copy = store.pull_to(saved.artifact_id, tmp_path / "copy.tsnb")
    store.delete(saved.artifact_id)
    for at in (0, 20, 500, -1):
        flip(copy, at)
        with pytest.raises(DecryptionError):
            store.push(copy)
        flip(copy, at)
    (tmp_path / "a pickle").write_bytes(pickle.dumps(PARTS))
    with pytest.raises(DecryptionError):
        store.push(tmp_path / "a pickle")
    assert (store.list(), store.damaged()) == ([], [])


@pytest.mark.parametrize("foreign", [text for text in FOREIGN_IDS if isinstance(text, str)])
def test_a_header_cannot_name_a_path(store: ArtifactStore, tmp_path: Path, keys: Keys, foreign: str) -> None:
    payload = struct.pack(">I", 2) + b"{}"
    crafted = sealed_by_hand(tmp_path / "crafted.tsnb", keys, payload, artifact_id=foreign)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for stranger in (store, strangers(tmp_path / "artifacts" / "local")):
        with pytest.raises(DecryptionError):
            stranger.push(crafted)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file() and path not in before} <= {".lock"}


def test_an_id_keeps_its_content(store: ArtifactStore, tmp_path: Path, keys: Keys) -> None:
    mine = sealed_by_hand(tmp_path / "mine.tsnb", keys, payload_of(b"mine"))
    theirs = sealed_by_hand(tmp_path / "theirs.tsnb", keys, payload_of(b"theirs"))
    stored = store.push(mine)
    with pytest.raises(ValidationError, match="another content"):
        store.push(theirs)
    assert store.list() == [stored]


def payload_of(part: bytes) -> bytes:
    text = canonical({**manifest, "parts": [["a", len(part)]]})
    return struct.pack(">I", len(text)) + text + part


def test_a_good_copy_repairs_a_damaged_artifact(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    saved = save(store)
    copy = store.pull_to(saved.artifact_id, tmp_path / "backup.tsnb")
    flip(file_of(folder, saved), -1)
    assert store.push(copy) == saved
    assert store.verify(saved.artifact_id) == saved


def test_an_old_copy_does_not_bring_back_the_old_key(
    store: ArtifactStore, tmp_path: Path, keys: Keys
) -> None:
    saved = save(store)
    copy = store.pull_to(saved.artifact_id, tmp_path / "old.tsnb")
    new = keys.new().key_id
    store.rotate()
    assert store.push(copy).encryption.key_id == new


def test_what_is_deleted_is_gone_and_can_be_read_on_by_who_has_it_open(
    store: ArtifactStore, folder: Path
) -> None:
    saved = save(store)
    with store.open(saved.artifact_id) as artifact:
        store.delete(saved.artifact_id)
        assert contents(artifact) == PARTS
    assert store.list() == []
    with pytest.raises(ArtifactNotFoundError):
        store.delete(saved.artifact_id)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", ".order"]
