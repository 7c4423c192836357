"""The atomic writer: files and folders get their names whole, and what is there is not lost to a second writer."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.errors import StorageError
from tensafe_nb.store.disk import (
    DRAFTS,
    Draft,
    Files,
    fill,
    publish_folder,
    read_up_to,
    sweep_drafts,
    write_all,
    write_whole,
)
from tests.unit.store.faults import Counted


def write(files: Files, target: Path, data: bytes, **how: bool) -> None:
    with Draft(files, target.parent) as draft:
        draft.file.write(data)
        draft.publish(target, **how)


def test_a_fresh_file_takes_no_name_that_is_taken(tmp_path: Path) -> None:
    target = tmp_path / "keys"
    write(Files(), target, b"first", fresh=True)
    with pytest.raises(FileExistsError):
        write(Files(), target, b"second", fresh=True)
    assert target.read_bytes() == b"first"
    assert [*tmp_path.iterdir()] == [target]


def test_a_fresh_file_whose_name_may_not_last_is_taken_back(tmp_path: Path) -> None:
    class NamesFail(Files):
        def fsync_folder(self, folder: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        write(NamesFail(), tmp_path / "keys", b"first", fresh=True)
    assert not [*tmp_path.iterdir()]


def test_a_draft_is_swept_when_its_process_is_gone_and_not_before(tmp_path: Path) -> None:
    with Draft(Files(), tmp_path) as draft:
        sweep_drafts(Files(), tmp_path)
        assert [*tmp_path.glob(DRAFTS)] == [Path(draft.file.name)]
        left = tmp_path / DRAFTS.replace("*", "left")
        left.touch()
        sweep_drafts(Files(), tmp_path)
        assert not left.exists()


def test_a_folder_has_its_name_once_all_in_it_is_on_the_disk(tmp_path: Path) -> None:
    draft, target, disk = tmp_path / "draft", tmp_path / "model", Counted()
    draft.mkdir()
    target.mkdir()  # an empty one gives way
    (draft / "a").write_bytes(b"a")
    (draft / "b").write_bytes(b"b")
    publish_folder(disk, draft, target)
    assert sorted(disk.steps[:2]) == ["fsync a", "fsync b"]
    assert disk.steps[2:] == ["fsync_folder draft", "replace model", f"fsync_folder {tmp_path.name}"]
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]


def test_a_text_is_its_owners_alone_and_replaces_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_whole(path, "früher")
    write_whole(path, "später")
    assert path.read_text(encoding="utf-8") == "später"
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o600
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_text_for_others_is_as_open_as_the_umask_lets_it_be(tmp_path: Path) -> None:
    path, beside = tmp_path / "loss.csv", tmp_path / "beside"
    path.touch(0o600)
    beside.touch()
    write_whole(path, "step,loss", shared=True)
    assert path.stat().st_mode == beside.stat().st_mode


def test_a_text_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"rollouts\.jsonl could not be written"):
        write_whole(tmp_path / "none" / "rollouts.jsonl", "text")


class Sparing(io.BytesIO):
    """A file that takes and gives three bytes at a time, as an unbuffered one may."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(3, size) if size and size > 0 else 3)

    def readinto(self, buffer: Any, /) -> int:
        return super().readinto(memoryview(buffer)[:3])

    def write(self, data: Any, /) -> int:
        return super().write(bytes(data)[:3])


def test_files_that_take_and_give_a_little_at_a_time_lose_nothing() -> None:
    out = Sparing()
    write_all(out, b"0123456789")
    assert out.getvalue() == b"0123456789"
    assert read_up_to(Sparing(b"0123456789"), 8) == b"01234567"
    assert read_up_to(Sparing(b"0123"), 8) == b"0123"
    assert fill(Sparing(b"0123456789"), bytearray(8)) == b"01234567"
    assert fill(Sparing(b"0123"), bytearray(8)) == b"0123"
