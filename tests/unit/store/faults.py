"""Disks that fail: one that loses power at a chosen step, one that is full from a chosen step on.

Both work on real files, so locks and reads are the real ones. Beside them, `CutDisk` keeps what would be left if the
power went: of a file what was fsynced, of a folder the names that were fsynced, of everything since then none, all, or
anything in between. That is what POSIX promises and no more.
"""

import errno
import io
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tensafe_nb.store.disk import Files


class PowerCut(BaseException):
    """Nothing of the program under test may catch it."""


class Unsynced(Files):
    """For what only reads the outcome: quick."""

    def fsync(self, file: BinaryIO) -> None:
        file.flush()

    def fsync_folder(self, folder: Path) -> None:
        pass


class Counted(Files):
    """Passes every call through `tick`, the single writes to files too."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def tick(self, call: str, path: Path) -> None:
        self.steps.append(f"{call} {path.name}")

    def mkdir(self, folder: Path) -> None:
        if not folder.is_dir():
            self.tick("mkdir", folder)
            super().mkdir(folder)

    def create(self, path: Path) -> BinaryIO:
        self.tick("create", path)
        return io.BufferedRandom(TickingFile(path, "x+", self))  # type: ignore[return-value]

    def append(self, path: Path) -> BinaryIO:
        self.tick("append", path)
        return io.BufferedRandom(TickingFile(path, "a+", self))  # type: ignore[return-value]

    def update(self, path: Path) -> BinaryIO:
        return io.BufferedRandom(TickingFile(path, "r+", self))  # type: ignore[return-value]

    def fsync(self, file: BinaryIO) -> None:
        file.flush()
        self.tick("fsync", Path(file.name))

    def replace(self, source: Path, target: Path) -> None:
        self.tick("replace", target)
        super().replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        self.tick("link", target)
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self.tick("unlink", path)
        super().unlink(path)

    def fsync_folder(self, folder: Path) -> None:
        self.tick("fsync_folder", folder)

    def written(self, path: Path, at: int, data: bytes) -> None:
        """Hear of bytes that have reached the page cache."""


class TickingFile(io.FileIO):
    def __init__(self, path: Path, mode: str, disk: Counted) -> None:
        super().__init__(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))
        self._disk = disk

    def write(self, data: Any, /) -> int:
        self._disk.tick("write", Path(str(self.name)))
        at = self.tell()
        count = super().write(data)
        self._disk.written(Path(str(self.name)), at, bytes(memoryview(data).cast("B")[:count]))
        return count


class FullDisk(Counted):
    """From step `at` on there is no space left; with `once`, a single call fails, whichever it is."""

    def __init__(self, at: int, once: bool = False) -> None:
        super().__init__()
        self._at, self._once, self.failed = at, once, False

    def tick(self, call: str, path: Path) -> None:
        due = len(self.steps) == self._at if self._once else len(self.steps) >= self._at
        super().tick(call, path)
        if due and call != "unlink" and (self._once or call not in ("replace", "fsync_folder")):
            self.failed = True
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


@dataclass(eq=False)
class Inode:
    synced: bytes = b""
    since: list[tuple[int, bytes]] = field(default_factory=list)

    def content(self, writes: int, torn: bool) -> bytes:
        """What is there when the first so many later writes arrived, the last of them only by half if torn."""
        content = bytearray(self.synced)
        for number, (at, data) in enumerate(self.since[:writes], start=1):
            data = data[: len(data) // 2] if torn and number == writes else data
            content.extend(bytes(max(0, at + len(data) - len(content))))
            content[at : at + len(data)] = data
        return bytes(content)


Names = dict[Path, Inode | None]  # None: a folder
Change = tuple[str, Path, Path | None, Inode | None]  # what happens, to which name, moved from where, to what


class CutDisk(Counted):
    """Loses power before step `at`. What was in `root` when it was made is on the disk."""

    def __init__(self, root: Path, at: int | None = None) -> None:
        super().__init__()
        self._root, self._at, self._off = root, at, False
        self._inodes: Names = {
            path: None if path.is_dir() else Inode(path.read_bytes()) for path in sorted(root.rglob("*"))
        }
        self._synced: Names = dict(self._inodes)
        self._since: list[Change] = []

    def tick(self, call: str, path: Path) -> None:
        if self._off or len(self.steps) == self._at:
            self._off = True
            raise PowerCut
        super().tick(call, path)

    def mkdir(self, folder: Path) -> None:
        if not folder.is_dir():
            super().mkdir(folder)
            self._change("appear", folder, None, None)

    def create(self, path: Path) -> BinaryIO:
        file = super().create(path)
        self._change("appear", path, None, Inode())
        return file

    def append(self, path: Path) -> BinaryIO:
        new = not path.exists()
        file = super().append(path)
        if new:
            self._change("appear", path, None, Inode())
        return file

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._change("move", target, source, self._inodes[source])

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self._change("appear", target, None, self._inodes[source])

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._change("vanish", path, None, None)

    def written(self, path: Path, at: int, data: bytes) -> None:
        inode = self._inodes[path]
        assert inode is not None
        inode.since.append((at, data))

    def fsync(self, file: BinaryIO) -> None:
        super().fsync(file)
        inode = self._inodes[Path(file.name)]
        assert inode is not None
        inode.synced, inode.since = inode.content(len(inode.since), torn=False), []

    def fsync_folder(self, folder: Path) -> None:
        super().fsync_folder(folder)
        for change in [change for change in self._since if change[1].parent == folder]:
            _apply(self._synced, change)
            self._since.remove(change)

    def _change(self, kind: str, path: Path, source: Path | None, inode: Inode | None) -> None:
        self._since.append((kind, path, source, inode))
        _apply(self._inodes, self._since[-1])

    def leftovers(self, target: Path) -> Iterator[Path]:
        """Yield one folder after another that holds what could be there when the power is back."""
        draw = random.Random(len(self.steps))
        seen = set()
        for number, (names, writes) in enumerate(
            itertools.product(("none", "all", "some", "some"), repeat=2)
        ):
            state = self._left(names, writes, draw)
            content = tuple(sorted(state.items()))
            if content not in seen:
                seen.add(content)
                yield _made(target / f"{len(self.steps)}-{number}", state)

    def _left(self, names: str, writes: str, draw: random.Random) -> dict[Path, bytes | None]:
        found = dict(self._synced)
        for change in self._since:
            if names == "all" or (names == "some" and draw.random() < 0.5):
                _apply(found, change)
        state: dict[Path, bytes | None] = {}
        for path, inode in sorted(found.items()):
            parent = path.parent
            if parent == self._root or parent.relative_to(self._root) in state:
                state[path.relative_to(self._root)] = None if inode is None else _content(inode, writes, draw)
        return state


class WithoutFileSync(CutDisk):
    """A wrong order: files get their names before they are on the disk."""

    def fsync(self, file: BinaryIO) -> None:
        Counted.fsync(self, file)


class WithoutFolderSync(CutDisk):
    """A wrong order: the save returns before the name is on the disk."""

    def fsync_folder(self, folder: Path) -> None:
        Counted.fsync_folder(self, folder)


def _apply(names: Names, change: Change) -> None:
    kind, path, source, inode = change
    if kind == "vanish":
        names.pop(path, None)
        return
    if source is not None:
        names.pop(source, None)
    names[path] = inode


def _content(inode: Inode, writes: str, draw: random.Random) -> bytes:
    count = {"none": 0, "all": len(inode.since)}.get(writes, draw.randint(0, len(inode.since)))
    return inode.content(count, torn=writes == "some")


def _made(folder: Path, state: dict[Path, bytes | None]) -> Path:
    folder.mkdir(parents=True)
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
            (folder / path).chmod(0o600)
    return folder
