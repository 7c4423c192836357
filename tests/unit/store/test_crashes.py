"""Killed, cut off from power, out of space, shared: what was promised is there, and nothing is half there."""

import errno
import itertools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.errors import ArtifactNotFoundError, KeyUnavailableError, StorageError
from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.disk import DRAFTS, Files
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed import rotation
from tests.unit.store import lives
from tests.unit.store.faults import (
    CutDisk,
    FullDisk,
    PowerCut,
    Unsynced,
    WithoutFileSync,
    WithoutFolderSync,
)

Story = Callable[[ArtifactStore, "Promises"], None]


class Promises:
    """What calls that returned have promised."""

    def __init__(self, kept: set[str]) -> None:
        self.kept, self.gone = kept, set[str]()


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Keys on a disk of their own."""
    keys = lives.keys_in(tmp_path)
    keys.primary_id()
    return keys


def folder_in(root: Path) -> Path:
    return root / "artifacts" / "local"


def saves_two(store: ArtifactStore, promises: Promises) -> None:
    for number in range(2):
        promises.kept.add(lives.save(store, number))


def rotates(store: ArtifactStore, promises: Promises) -> None:
    store.rotate()


def deletes_one_and_saves(store: ArtifactStore, promises: Promises) -> None:
    going = min(promises.kept)
    promises.kept.discard(going)
    store.delete(going)
    promises.gone.add(going)
    promises.kept.add(lives.save(store, 9))


def takes_in_a_copy(store: ArtifactStore, promises: Promises, copy: Path) -> None:
    promises.kept.add(store.push(copy).artifact_id)


class Scene:
    """A disk with three artifacts under an old key, and a new primary key."""

    def __init__(self, tmp_path: Path, keys: Keys, artifacts: int = 3) -> None:
        self.keys, self._base, self._made = keys, tmp_path / "base", 0
        self._base.mkdir()
        self._cuts = tmp_path / "cuts"
        store = ArtifactStore(folder_in(self._base), keys, files=Unsynced())
        self.there = {lives.save(store, number) for number in range(artifacts)}
        keys.new()

    def copy(self) -> Path:
        self._made += 1
        return Path(shutil.copytree(self._base, self._cuts / f"disk-{self._made}"))

    def cuts(self, story: Story, disk_type: type[CutDisk] = CutDisk) -> Iterator[tuple[CutDisk, Promises]]:
        """Play the story on a new disk for every step it has, and cut the power before that step; at last, after."""
        steps = self.play(story, disk_type, None)[0].steps
        assert len(steps) > 5
        for at in range(len(steps) + 1):
            yield self.play(story, disk_type, at)

    def play(
        self, story: Story, disk_type: type[CutDisk], at: int | None, root: Path | None = None
    ) -> tuple[CutDisk, Promises]:
        root = root or self.copy()
        disk, promises = disk_type(root, at), Promises(set(self.there))
        with suppress(PowerCut):
            story(ArtifactStore(folder_in(root), self.keys, files=disk), promises)
        return disk, promises

    def leftovers(self, disk: CutDisk) -> Iterator[Path]:
        self._made += 1
        yield from disk.leftovers(self._cuts / f"left-{self._made}")

    def check(self, root: Path, promises: Promises) -> None:
        store = ArtifactStore(folder_in(root), self.keys, files=Unsynced())
        there = {info.artifact_id for info in store.list()}
        assert promises.kept <= there, "a promised artifact is lost"
        assert not promises.gone & there, "a deleted artifact is back"
        assert store.damaged() == [], "something is half there"
        assert all(lives.is_intact(store, artifact_id) for artifact_id in there)
        store.rotate()
        assert {info.encryption.key_id for info in store.list()} <= {self.keys.primary_id()}
        assert all(store.verify(artifact_id) for artifact_id in there)
        newest = lives.save(store, 99)
        assert store.list()[0].artifact_id == newest, "the order is torn"
        left = {path.name for path in folder_in(root).iterdir() if not path.name.startswith("art-")}
        assert left == {".lock", ".order"}, "drafts or journals are left"


STORIES = [saves_two, rotates, deletes_one_and_saves]


@pytest.mark.parametrize("story", STORIES)
def test_a_power_cut_at_any_step_loses_nothing_promised_and_leaves_nothing_half_there(
    tmp_path: Path, keys: Keys, story: Story
) -> None:
    scene, states = Scene(tmp_path, keys), 0
    for disk, promises in scene.cuts(story):
        for left in scene.leftovers(disk):
            scene.check(left, promises)
            states += 1
    assert states > 15


def test_a_power_cut_while_the_first_save_makes_its_folders_is_survived(tmp_path: Path, keys: Keys) -> None:
    scene = Scene(tmp_path, keys, artifacts=0)
    shutil.rmtree(tmp_path / "base" / "artifacts", ignore_errors=True)
    for disk, promises in scene.cuts(saves_two):
        for left in scene.leftovers(disk):
            scene.check(left, promises)


def test_a_power_cut_while_a_file_is_taken_in_is_survived(tmp_path: Path, keys: Keys) -> None:
    scene = Scene(tmp_path, keys, artifacts=1)
    other = ArtifactStore(tmp_path / "other", keys, files=Unsynced())
    copy = other.pull_to(lives.save(other, 5), tmp_path / "copy.tsnb")
    for disk, promises in scene.cuts(lambda store, promises: takes_in_a_copy(store, promises, copy)):
        for left in scene.leftovers(disk):
            scene.check(left, promises)


def test_a_second_power_cut_while_the_first_is_being_repaired_is_survived(tmp_path: Path, keys: Keys) -> None:
    scene, repaired = Scene(tmp_path, keys), 0
    for first, promises in scene.cuts(rotates):
        for number, left in enumerate(scene.leftovers(first)):
            if not (folder_in(left) / rotation.JOURNAL).exists():
                continue
            at = (len(first.steps) + number) % 8
            second, _ = scene.play(lambda store, promises: store.recover(), CutDisk, at, left)
            for again in scene.leftovers(second):
                scene.check(again, promises)
                repaired += 1
    assert repaired > 20


@pytest.mark.parametrize("story", [saves_two, rotates])
@pytest.mark.parametrize("wrong_order", [WithoutFileSync, WithoutFolderSync])
def test_the_check_fails_where_the_order_is_wrong(
    tmp_path: Path, keys: Keys, wrong_order: type[CutDisk], story: Story
) -> None:
    scene = Scene(tmp_path, keys)
    with pytest.raises(AssertionError, match=r"lost|half there|are left"):
        for disk, promises in scene.cuts(story, wrong_order):
            for left in scene.leftovers(disk):
                scene.check(left, promises)


def test_the_check_fails_where_slots_are_overwritten_without_a_journal(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, keys)
    monkeypatch.setattr(
        rotation, "write_journal", lambda files, folder, slots: (folder / rotation.JOURNAL).touch()
    )
    with pytest.raises(AssertionError, match=r"lost|half there|are left"):
        for disk, promises in scene.cuts(rotates):
            for left in scene.leftovers(disk):
                scene.check(left, promises)


def test_the_order_of_a_save_is_file_then_name_then_folder(tmp_path: Path, keys: Keys) -> None:
    store = ArtifactStore(folder_in(tmp_path), keys, files=Unsynced())
    lives.save(store, 0)
    disk = CutDisk(tmp_path)
    lives.save(ArtifactStore(folder_in(tmp_path), keys, files=disk), 1)
    calls = [step.split()[0] for step in disk.steps]
    assert calls[0] == "fsync_folder"  # of the folder above: whoever made this one, its name is on the disk
    assert calls[1:3] == ["create", "write"]
    assert calls[-3:] == ["fsync", "replace", "fsync_folder"]


@pytest.mark.parametrize("once", [False, True], ids=["stays full", "one call fails"])
@pytest.mark.parametrize("story", STORIES)
def test_a_full_disk_at_any_step_is_a_storage_error_and_costs_nothing_that_was_there(
    tmp_path: Path, keys: Keys, story: Story, once: bool
) -> None:
    scene, failures = Scene(tmp_path, keys), 0
    for at in range(len(scene.play(story, CutDisk, None)[0].steps)):
        root, promises = scene.copy(), Promises(set(scene.there))
        disk = FullDisk(at, once)
        try:
            story(ArtifactStore(folder_in(root), keys, files=disk), promises)
        except StorageError as error:
            assert "No space left on device" in str(error) and "intact" in str(error)
            assert error.details["errno"] == errno.ENOSPC
            assert not [*folder_in(root).glob(DRAFTS)]
            failures += 1
        else:
            assert not disk.failed
        scene.check(root, promises)
    assert failures > 5


def test_on_a_full_disk_the_message_says_what_to_do(tmp_path: Path, keys: Keys) -> None:
    with pytest.raises(StorageError, match=r"Could not save the artifact: No space left.*TENSAFE_HOME"):
        lives.save(ArtifactStore(folder_in(tmp_path), keys, files=FullDisk(3)), 1)


def test_where_nothing_may_be_written_the_message_says_so(tmp_path: Path, keys: Keys) -> None:
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="Could not save the artifact"):
        lives.save(ArtifactStore(folder_in(tmp_path), keys), 1)


def test_an_artifact_whose_name_may_not_last_is_taken_back(tmp_path: Path, keys: Keys) -> None:
    class NamesFail(Files):
        def fsync_folder(self, folder: Path) -> None:
            if [*folder.glob("art-*")]:
                raise OSError(errno.EIO, "Input/output error")

    folder = folder_in(tmp_path)
    with pytest.raises(StorageError, match="Input/output error"):
        lives.save(ArtifactStore(folder, keys, files=NamesFail()), 1)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", ".order"]


def test_a_slot_that_cannot_be_read_back_is_written_again_from_the_journal(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(folder_in(tmp_path), keys)
    saved, new = lives.save(store, 1), keys.new().key_id
    with monkeypatch.context() as broken:
        broken.setattr(rotation, "write_slot", lambda file, slot: None)
        with pytest.raises(StorageError, match="just written"):
            store.rotate()
    assert (folder_in(tmp_path) / rotation.JOURNAL).exists()
    assert store.verify(saved).encryption.key_id == new


def test_a_new_slot_that_does_not_open_never_replaces_one_that_does(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ArtifactStore(folder_in(tmp_path), keys)
    saved = lives.save(store, 1)
    keys.new()
    monkeypatch.setattr(rotation, "rewrapped_slot", lambda file, keys: bytes(4096))
    assert store.rotate() == 0
    assert "was not rewrapped" in caplog.text
    assert store.verify(saved)


def test_what_interrupts_a_save_leaves_no_trace(tmp_path: Path, keys: Keys) -> None:
    class Interrupted(Files):
        def fsync(self, file: Any) -> None:
            raise KeyboardInterrupt

    folder = folder_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        lives.save(ArtifactStore(folder, keys, files=Interrupted()), 1)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_rotation_that_stopped_half_way_is_finished_by_whoever_comes_next(
    tmp_path: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path, keys)
    root = scene.copy()
    slots = [step for step in scene.play(rotates, CutDisk, None)[0].steps if step.startswith("write art-")]
    assert len(slots) == 3
    scene.play(rotates, CutDisk, 7, root)  # the first slot is written, the others are not
    assert (folder_in(root) / rotation.JOURNAL).exists()
    strangers_keys = Keys(tmp_path / "no keys", announce=lambda text: None)
    ArtifactStore(folder_in(root), strangers_keys).list()  # needs no key
    assert "has been finished" in caplog.text
    assert not (folder_in(root) / rotation.JOURNAL).exists()
    assert ArtifactStore(folder_in(root), keys).rotate() == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"art-1":1}', '{"art-1":"zz"}', '{"a": "00"}'])
def test_a_journal_that_no_crash_could_leave_is_set_aside(
    tmp_path: Path, keys: Keys, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = ArtifactStore(folder_in(tmp_path), keys)
    saved = lives.save(store, 1)
    (folder_in(tmp_path) / rotation.JOURNAL).write_text(text)
    assert [info.artifact_id for info in store.list()] == [saved]
    assert "set aside" in caplog.text
    assert store.verify(saved)


def test_a_journal_reaches_no_file_beyond_its_folder(tmp_path: Path, keys: Keys) -> None:
    store = ArtifactStore(folder_in(tmp_path), keys)
    lives.save(store, 1)
    outside = store.pull_to(store.list()[0].artifact_id, tmp_path / "outside.tsnb")
    before = outside.read_bytes()
    (folder_in(tmp_path) / rotation.JOURNAL).write_text(f'{{"../../outside.tsnb":"{"00" * 4096}"}}')
    store.list()
    assert outside.read_bytes() == before


def test_killed_at_random_moments_it_keeps_what_it_promised(tmp_path: Path) -> None:
    lives.survive(tmp_path, "save", 20, seed=1)


def test_killed_while_rotating_it_keeps_what_it_promised(tmp_path: Path) -> None:
    lives.survive(tmp_path, "rotate", 6, seed=2)


def test_drafts_of_the_living_are_left_alone_and_those_of_the_dead_swept(tmp_path: Path, keys: Keys) -> None:
    store = ArtifactStore(folder_in(tmp_path), keys)
    lives.save(store, 0)
    dead = folder_in(tmp_path) / DRAFTS.replace("*", "dead")
    dead.touch()
    not_ours = folder_in(tmp_path) / "notes.tmp"
    not_ours.touch()
    with store._folder.draft() as living:
        assert not dead.exists()
        lives.save(store, 1)
        assert [*folder_in(tmp_path).glob(DRAFTS)] == [Path(living.file.name)]
    assert not_ours.exists()


CHURN = """
import random, sys
from pathlib import Path
from tensafe_nb.errors import ArtifactNotFoundError
from tests.unit.store import lives
home, seed = Path(sys.argv[1]), int(sys.argv[2])
store, keys, draw = lives.store_in(home), lives.keys_in(home), random.Random(seed)
for number in range(10):
    print(lives.save(store, number), flush=True)
    if number % 5 == seed:
        keys.new()
        store.rotate()
    for info in draw.sample(store.list(), 1):
        assert lives.is_intact(store, info.artifact_id)
    assert store.damaged() == []
"""


def test_two_processes_that_start_on_one_empty_home_save_list_and_rotate_together(tmp_path: Path) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CHURN, str(tmp_path), str(seed)], stdout=subprocess.PIPE, text=True
        )
        for seed in range(2)
    ]
    saved = {line for process in both for line in process.communicate()[0].split()}
    assert [process.returncode for process in both] == [0, 0]
    store = lives.store_in(tmp_path)
    assert {info.artifact_id for info in store.list()} == saved
    assert len(saved) == 20
    assert all(lives.is_intact(store, artifact_id) for artifact_id in saved)
    store.rotate()
    assert {info.encryption.key_id for info in store.list()} == {lives.keys_in(tmp_path).primary_id()}


def test_threads_of_one_process_save_list_rotate_and_delete_together(tmp_path: Path, keys: Keys) -> None:
    store, failures = ArtifactStore(folder_in(tmp_path), keys), []

    def work(which: int) -> None:
        try:
            for number in range(8):
                saved = lives.save(store, number)
                if number % 4 == which:
                    keys.new()
                    store.rotate()
                assert lives.is_intact(store, saved)
                if number % 2:
                    store.delete(saved)
                store.list()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(store.list()) == 12
    assert store.damaged() == []


def test_of_two_that_delete_the_same_artifact_one_is_told(tmp_path: Path, keys: Keys) -> None:
    class Late(Files):
        def unlink(self, path: Path) -> None:
            path.unlink()  # the other was quicker
            super().unlink(path)

    saved = lives.save(ArtifactStore(folder_in(tmp_path), keys), 0)
    with pytest.raises(ArtifactNotFoundError, match="a moment ago"):
        ArtifactStore(folder_in(tmp_path), keys, files=Late()).delete(saved)


# Keys


def keys_on(root: Path, files: Files | None = None) -> Keys:
    return Keys(root / "keys", announce=lambda text: None, files=files)


def make_a_key(tmp_path: Path, there: int, disk_type: type[CutDisk]) -> None:
    """Make a key beside those that are there, on a disk that loses power at each step, and look at what is left."""
    base = tmp_path / "base"
    base.mkdir()
    before = [keys_on(base).new().key_id for _ in range(there)]
    for at in itertools.count():
        root = Path(shutil.copytree(base, tmp_path / f"disk-{at}"))
        disk, promised = disk_type(root, at), set[str]()
        with suppress(PowerCut):
            promised.add(keys_on(root, disk).new().key_id)
        for left in disk.leftovers(tmp_path / f"left-{at}"):
            found = [info.key_id for info in keys_on(left).infos()]
            assert found[:there] == before and promised <= set(found), "a key is lost"
            assert len(found) <= there + 1
            keys_on(left).new()
            assert not list((left / "keys").glob(DRAFTS)), "half a key is left lying about"
        if promised:
            assert at >= 5
            return


@pytest.mark.parametrize("there", [0, 1], ids=["the first", "another"])
def test_a_power_cut_while_a_key_is_made_leaves_the_keys_of_before_or_of_after(
    tmp_path: Path, there: int
) -> None:
    make_a_key(tmp_path, there, CutDisk)


@pytest.mark.parametrize("disk_type", [WithoutFileSync, WithoutFolderSync])
def test_the_check_of_keys_fails_where_something_is_not_synced(
    tmp_path: Path, disk_type: type[CutDisk]
) -> None:
    with pytest.raises((AssertionError, KeyUnavailableError), match=r"lost|damaged"):
        make_a_key(tmp_path, 1, disk_type)
