"""Artifacts rewrapped under a new key."""

import time
from pathlib import Path

import pytest

from tensafe_nb.errors import (
    ValidationError,
)
from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.keys.keyring import Keys
from tests.unit.store.artifacts.stores import PARTS, contents, file_of, flip, save


def test_rotation_changes_the_key_slot_and_nothing_else(
    store: ArtifactStore, folder: Path, keys: Keys
) -> None:
    saved = [save(store, name=str(number)) for number in range(3)]
    before = {info.artifact_id: file_of(folder, info).read_bytes() for info in saved}
    old, new = keys.primary_id(), keys.new().key_id
    assert store.needing(old) != []
    assert store.rotate() == 3
    assert store.rotate() == 0
    assert store.needing(old) == []
    assert {info.encryption.key_id for info in store.list()} == {new}
    for info in saved:
        assert store.verify(info.artifact_id).content_hash == info.content_hash
        now, then = file_of(folder, info).read_bytes(), before[info.artifact_id]
        changed = [at for at in range(len(then)) if now[at] != then[at]]
        assert len(now) == len(then)
        assert changed[-1] - changed[0] < 4096
    keys.retire(old)
    keys.forget(old, store.needing)
    assert all(store.verify(info.artifact_id) for info in saved)


def test_a_key_that_an_artifact_needs_cannot_be_forgotten(store: ArtifactStore, keys: Keys) -> None:
    saved = save(store)
    old = keys.primary_id()
    keys.new()
    with pytest.raises(ValidationError, match=saved.artifact_id):
        keys.forget(old, store.needing)


def test_rotation_leaves_alone_what_does_not_open_and_says_so(
    store: ArtifactStore, folder: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(store), save(store)
    flip(file_of(folder, bad), 20)
    altered = file_of(folder, bad).read_bytes()
    keys.new()
    assert store.rotate() == 1
    assert file_of(folder, bad).read_bytes() == altered
    assert bad.artifact_id in caplog.text
    assert store.verify(good.artifact_id)


def test_an_artifact_can_be_rotated_while_somebody_reads_it(store: ArtifactStore, keys: Keys) -> None:
    saved = save(store)
    with store.open(saved.artifact_id) as artifact:
        keys.new()
        assert store.rotate() == 1
        assert contents(artifact) == PARTS


def test_old_keys_keep_opening_old_artifacts(store: ArtifactStore, keys: Keys) -> None:
    saved = save(store)
    keys.new()
    assert store.verify(saved.artifact_id) == saved
    assert save(store).encryption != saved.encryption


@pytest.mark.alone  # it measures time
def test_a_rotation_of_a_hundred_takes_less_than_a_second(tmp_path: Path, keys: Keys) -> None:
    store = ArtifactStore(tmp_path / "many", keys)  # with real fsyncs
    for _ in range(100):
        save(store)
    assert best_of_three(store, keys) < 1.0


def best_of_three(store: ArtifactStore, keys: Keys) -> float:
    taken = []
    for _ in range(3):
        keys.new()
        start = time.perf_counter()
        assert store.rotate() == 100
        taken.append(time.perf_counter() - start)
    return min(taken)
