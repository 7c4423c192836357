"""Artifacts found by id and by name, and listed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.errors import (
    ArtifactNotFoundError,
    DecryptionError,
    KeyUnavailableError,
    ValidationError,
)
from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import CHUNK
from tests.unit.store.artifacts.stores import FOREIGN_IDS, file_of, flip, save, sealed_by_hand, strangers
from tests.unit.store.faults import Unsynced


@pytest.mark.parametrize("foreign", FOREIGN_IDS)
def test_what_is_no_id_is_not_found_and_reaches_no_path(
    store: ArtifactStore, tmp_path: Path, foreign: Any
) -> None:
    saved = save(store)
    shutil.copy(file_of(tmp_path / "artifacts" / "local", saved), tmp_path / "x")
    before = sorted(tmp_path.rglob("*"))
    for call in (store.get, store.delete, store.pull, store.verify, store.resolve):
        with pytest.raises(ArtifactNotFoundError):
            call(foreign)
    with pytest.raises(ArtifactNotFoundError), store.open(foreign):
        pass
    with pytest.raises(ArtifactNotFoundError):
        store.pull_to(foreign, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_means_the_newest_that_has_it_whatever_the_clock_said(store: ArtifactStore) -> None:
    save(store, name="best", created_at=3.0)
    newest = save(store, name="best", created_at=1.0)
    assert store.resolve("best") == newest.artifact_id
    store.delete(newest.artifact_id)
    assert store.get("best").created_at == 3.0


def test_an_artifact_that_is_pushed_again_is_the_newest_one(store: ArtifactStore, tmp_path: Path) -> None:
    first = save(store, name="best")
    elsewhere = store.pull_to(first.artifact_id, tmp_path / "away.tsnb")
    store.delete(first.artifact_id)
    save(store, name="best")
    store.push(elsewhere)
    assert store.resolve("best") == first.artifact_id
    second = save(store, name="best")
    store.push(elsewhere)  # it is there already: nothing moves
    assert [info.artifact_id for info in store.list()][:2] == [second.artifact_id, first.artifact_id]


def test_the_order_outlives_a_half_written_line_and_a_second_store(
    store: ArtifactStore, folder: Path, keys: Keys
) -> None:
    save(store, created_at=9.0)
    with (folder / ".order").open("ab") as order:
        order.write(b"art-0123")  # the process died here
    other = ArtifactStore(folder, keys, files=Unsynced())
    second, third = save(other, created_at=8.0), save(store, created_at=7.0)
    assert [info.artifact_id for info in store.list()][:2] == [third.artifact_id, second.artifact_id]


def test_artifacts_from_before_there_was_an_order_come_last_by_their_time(
    store: ArtifactStore, folder: Path
) -> None:
    for when in (2.0, 5.0, 1.0):
        save(store, created_at=when)
    (folder / ".order").unlink()
    save(store, created_at=0.5)
    assert [info.created_at for info in store.list()] == [0.5, 5.0, 2.0, 1.0]


def test_a_name_may_look_like_an_id_or_a_path_and_be_in_any_script(store: ArtifactStore) -> None:
    for name in ("art-0123", "../../etc/passwd", "nach dem Sweep ✓ 实验", "a\nb", " "):
        saved = save(store, name=name)
        assert store.get(name) == saved


def test_an_id_goes_before_a_name(store: ArtifactStore) -> None:
    first = save(store)
    second = save(store, name=first.artifact_id)
    assert store.resolve(first.artifact_id) == first.artifact_id
    store.delete(first.artifact_id)
    assert store.resolve(first.artifact_id) == second.artifact_id


def test_what_is_not_there_names_what_is_close(store: ArtifactStore) -> None:
    saved = save(store, name="before the sweep")
    with pytest.raises(ArtifactNotFoundError, match="Did you mean 'before the sweep'"):
        store.get("before the swep")
    with pytest.raises(ArtifactNotFoundError, match=f"Did you mean '{saved.artifact_id}'"):
        store.delete(saved.artifact_id[:-1])
    for _ in range(12):
        save(store)
    with pytest.raises(ArtifactNotFoundError, match=r"list_artifacts\(\) shows"):
        store.get("zzzzzz")


def test_the_newest_is_listed_first(store: ArtifactStore) -> None:
    for when in (2.0, 3.0, 1):
        save(store, created_at=when)
    assert [info.created_at for info in store.list()] == [1, 3.0, 2.0]


@pytest.mark.parametrize(
    "fields",
    [
        {"created_at": float("nan")},
        {"created_at": float("inf")},
        {"created_at": -1.0},
        {"created_at": 1e300},
        {"created_at": 10**400},
        {"step": 10**30},
        {"step": -1},
        {"training_client": "x" * 5000},
        {"base_model": "x" * (1 << 20)},
    ],
)
def test_a_header_out_of_bounds_does_not_come_in(
    store: ArtifactStore, tmp_path: Path, keys: Keys, fields: dict[str, Any]
) -> None:
    try:
        path = sealed_by_hand(tmp_path / "strange", keys, b"", **fields)
    except (ValidationError, ValueError):
        return  # not even the envelope takes it
    with pytest.raises(DecryptionError):
        store.push(path)
    assert store.list() == []


def test_without_the_key_a_listing_tells_only_what_everyone_may_read(
    store: ArtifactStore, folder: Path
) -> None:
    saved = save(store, metadata={"a": 1}, name="mine")
    (listed,) = strangers(folder).list()
    assert (listed.metadata, listed.name) == (None, None)
    assert (listed.artifact_id, listed.content_hash, listed.step) == (
        saved.artifact_id,
        saved.content_hash,
        3,
    )
    assert listed.encryption == saved.encryption
    for call in (strangers(folder).verify, lambda name: strangers(folder).open(name).__enter__()):
        with pytest.raises(KeyUnavailableError) as raised:
            call(saved.artifact_id)
        assert raised.value.details["key_ids"] == [saved.encryption.key_id]


def test_a_listing_reads_the_beginning_only_and_verify_the_whole(store: ArtifactStore, folder: Path) -> None:
    saved = save(store, {"bulk": bytes(3 * CHUNK)})
    flip(file_of(folder, saved), -1)
    assert store.list() == [saved]
    with pytest.raises(DecryptionError):
        store.verify(saved.artifact_id)
