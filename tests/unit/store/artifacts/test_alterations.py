"""Artifacts that were altered, cut or swapped do not open."""

import contextlib
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import (
    DecryptionError,
    ValidationError,
)
from tensafe_nb.protocol.results import SaveStateResult
from tensafe_nb.store.artifacts.artifacts import ArtifactStore, StoredArtifact
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import CHUNK, canonical
from tensafe_nb.store.sealed.payload import MAX_MANIFEST
from tests.unit.store.artifacts.stores import PARTS, contents, file_of, flip, manifest, save, sealed_by_hand
from tests.unit.store.faults import Unsynced
from tests.unit.store.lives import HEADER


@settings(max_examples=60)
@given(st.data())
def test_any_flipped_bit_is_refused_and_the_others_stay_readable(data: Any) -> None:
    with altered_store() as (store, path, other):
        flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), 1 << data.draw(st.integers(0, 7)))
        assert_refused(store, path)
        assert other in store.list()
        assert store.verify(other.artifact_id) == other


@settings(max_examples=20)
@given(st.data())
def test_a_file_cut_or_extended_anywhere_is_refused(data: Any) -> None:
    with altered_store() as (store, path, _):
        size = path.stat().st_size
        os.truncate(path, data.draw(st.integers(0, size + 5000).filter(lambda length: length != size)))
        assert_refused(store, path)


@contextlib.contextmanager
def altered_store() -> Iterator[tuple[ArtifactStore, Path, SaveStateResult]]:
    with tempfile.TemporaryDirectory() as home:
        keys = Keys(Path(home) / "keys", announce=lambda text: None)
        store = ArtifactStore(Path(home) / "artifacts", keys, files=Unsynced())
        path = file_of(Path(home) / "artifacts", save(store, created_at=1.5))  # as long every time
        yield store, path, save(store)


def assert_refused(store: ArtifactStore, path: Path) -> None:
    artifact_id = path.name.split(".")[0]
    for call in (store.verify, lambda name: store.open(name).__enter__()):
        with pytest.raises(DecryptionError):
            call(artifact_id)


def test_one_artifact_under_the_name_of_another_is_refused(store: ArtifactStore, folder: Path) -> None:
    first, second = file_of(folder, save(store, name="first")), file_of(folder, save(store, name="second"))
    shutil.copy(first, second)
    assert_refused(store, second)
    assert [path for path, _ in store.damaged()] == [second]
    assert [info.name for info in store.list()] == ["first"]


def test_another_hash_in_the_file_name_is_refused(store: ArtifactStore, folder: Path) -> None:
    saved = save(store)
    path = file_of(folder, saved)
    path.rename(path.with_name(f"{saved.artifact_id}.{'0' * 64}.tsnb"))
    with pytest.raises(DecryptionError):
        store.verify(saved.artifact_id)


LARGE = {"trainer.json": b"{}", "bulk": bytes(range(256)) * (2 * CHUNK // 256), "end": b"end"}


def test_what_is_altered_behind_the_first_chunk_is_refused_as_it_is_read_or_passed_over(
    store: ArtifactStore, folder: Path
) -> None:
    saved = save(store, LARGE)
    path = file_of(folder, saved)
    flip(path, path.stat().st_size - CHUNK)
    with store.open(saved.artifact_id) as artifact:
        with pytest.raises(DecryptionError):
            artifact.check()
        for read in (contents, filled, lambda artifact: list(artifact.parts())):
            with pytest.raises(DecryptionError):
                read(artifact)
    with pytest.raises(DecryptionError):
        store.verify(saved.artifact_id)


def test_what_is_cut_off_at_the_end_of_a_chunk_is_refused_before_anything_is_read(
    store: ArtifactStore, folder: Path
) -> None:
    saved = save(store, LARGE)
    os.truncate(file_of(folder, saved), file_of(folder, saved).stat().st_size // 2 // CHUNK * CHUNK)
    assert_refused(store, file_of(folder, saved))


def test_what_is_altered_or_cut_off_while_it_is_open_is_refused(store: ArtifactStore, folder: Path) -> None:
    for alter in (lambda path: flip_in_place(path, -1), lambda path: os.truncate(path, CHUNK)):
        saved = save(store, LARGE)
        with store.open(saved.artifact_id) as artifact:
            alter(file_of(folder, saved))
            for read in (contents, filled):
                with pytest.raises(DecryptionError):
                    read(artifact)


def test_several_buffers_are_filled_with_what_reading_them_one_by_one_gives(store: ArtifactStore) -> None:
    with store.open(save(store, LARGE).artifact_id) as artifact:
        assert filled(artifact) == contents(artifact) == LARGE
        for _, _, stream in artifact.parts():
            with pytest.raises(ValueError, match="shorter"):
                stream.fill([memoryview(bytearray(3 * CHUNK))])


def flip_in_place(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def filled(artifact: StoredArtifact) -> dict[str, bytes]:
    """Each part in three buffers, the last of which is read beside them."""
    found = {}
    for name, size, stream in artifact.parts():
        buffers = [memoryview(bytearray(size // 3)), memoryview(bytearray(size // 2))]
        stream.fill(buffers)
        found[name] = b"".join([*buffers, stream.read()])
    return found


def test_damaged_and_foreign_files_are_told_apart_from_the_rest(store: ArtifactStore, folder: Path) -> None:
    saved = save(store)
    (folder / f"art-1.{'a' * 64}.tsnb").write_bytes(b"")
    (folder / "art-copy.tsnb").write_bytes(file_of(folder, saved).read_bytes())
    (folder / "notes.txt").write_text("mine")
    assert store.list() == [saved]
    reasons = {path.name[:8]: reason for path, reason in store.damaged()}
    assert reasons.keys() == {"art-1.aa", "art-copy"}
    assert "push_artifact" in reasons["art-copy"]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0",
        struct.pack(">I", MAX_MANIFEST + 1) + bytes(MAX_MANIFEST + 1),
        struct.pack(">I", 9) + b"{}",
        pickle.dumps({"parts": []}),
        *(
            struct.pack(">I", len(text)) + text + b"x"
            for text in [
                b"[]",
                b"{ }",
                pickle.dumps(manifest),
                *(
                    canonical(value)
                    for value in [
                        {**manifest, "more": 1},
                        {**manifest, "name": 1},
                        {**manifest, "metadata": []},
                        {**manifest, "parts": {}},
                        {**manifest, "parts": [["a"]]},
                        {**manifest, "parts": [["../a", 1]]},
                        {**manifest, "parts": [["a", -1]]},
                        {**manifest, "parts": [["a", True]]},
                        {**manifest, "parts": [["a", 2]]},
                        {**manifest, "parts": []},
                    ]
                ),
            ]
        ),
    ],
)
def test_an_authentic_file_whose_payload_is_none_is_refused(
    store: ArtifactStore, tmp_path: Path, keys: Keys, payload: bytes
) -> None:
    with pytest.raises(DecryptionError):
        store.push(sealed_by_hand(tmp_path / "x.tsnb", keys, payload))
    assert (store.list(), store.damaged()) == ([], [])


def test_parts_of_another_version_are_not_guessed_at(store: ArtifactStore) -> None:
    saved = store.save(PARTS, header={**HEADER, "schema": 2})
    assert store.list() == [saved]
    with pytest.raises(ValidationError, match="Update tensafe_nb"), store.open(saved.artifact_id):
        pass
