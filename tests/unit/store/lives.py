"""A process that works on a store until it is killed, and the parent that kills it. Imports only the store.

As a program: for every line on stdin, one life. A life is a fork, so it starts at once, and prints what it has done.
"""

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.disk import DRAFTS
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.rotation import JOURNAL

HEADER = {
    "training_client": "tc-1",
    "step": 3,
    "base_model": "builtin:tiny",
    "revision": None,
    "ledger_head": None,
    "schema": 1,
}
LONGEST = {
    "save": 0.02,
    "rotate": 0.15,
}  # seconds a life goes on after its last save: several more of its kind


def store_in(home: Path) -> ArtifactStore:
    return ArtifactStore(home / "artifacts" / "local", keys_in(home))


def keys_in(home: Path) -> Keys:
    return Keys(home / "keys", announce=lambda text: None)


def content_of(number: int) -> dict[str, bytes]:
    """Parts that say which they are."""
    return {"number": str(number).encode(), "bulk": bytes([number % 256]) * 3000}


def save(store: ArtifactStore, number: int) -> str:
    return store.save(content_of(number), header=HEADER, metadata={"number": number}).artifact_id


def is_intact(store: ArtifactStore, artifact_id: str) -> bool:
    with store.open(artifact_id) as artifact:
        found = {name: stream.read() for name, _, stream in artifact.parts()}
        return found == content_of(artifact.metadata["number"])


def work(home: Path, task: str) -> Iterator[str]:
    """Yield each artifact's id when its save has returned; `rotate` takes a new key before each."""
    store, keys, number = store_in(home), keys_in(home), random.randrange(1 << 30)
    while True:
        if task == "rotate":
            keys.new()
            store.rotate()
        yield save(store, number)
        number += 1


def main(home: str, task: str) -> None:
    assert "torch" not in sys.modules
    for _line in sys.stdin:
        child = os.fork()
        if child == 0:
            for done in work(Path(home), task):
                os.write(1, f"{done}\n".encode())
        os.write(1, f"pid {child}\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"dead\n")


class Lives:
    """The parent's side."""

    def __init__(self, program: "subprocess.Popen[bytes]") -> None:
        self._program = program
        self._unread = b""

    def one(self, saves: int, seconds: float) -> list[str]:
        """Let it save so often and go on for so long, kill it, and return the ids it had printed."""
        assert self._program.stdin
        self._program.stdin.write(b"live\n")
        self._program.stdin.flush()
        done: list[str] = []
        child = 0
        while not child or len(done) < saves:
            line = self._line()
            if line.startswith("pid "):
                child = int(line.removeprefix("pid "))
            else:
                done.append(line)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._has_line(left):
                done.append(self._line())
        os.kill(child, signal.SIGKILL)
        while (line := self._line()) != "dead":
            done.append(line)
        return done

    def _has_line(self, seconds: float) -> bool:
        return b"\n" in self._unread or bool(select.select([self._program.stdout], [], [], seconds)[0])

    def _line(self) -> str:
        assert self._program.stdout
        while b"\n" not in self._unread:
            data = os.read(self._program.stdout.fileno(), 1 << 16)
            assert data, "the child has ended by itself"
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode()


@contextmanager
def lives(home: Path, task: str) -> Iterator[Lives]:
    arguments = [sys.executable, "-m", __name__, str(home), task]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        yield Lives(program)


def survive(home: Path, task: str, count: int, seed: int) -> int:
    """Kill it `count` times at random moments; return how often it left something unfinished."""
    draw, promised, interrupted = random.Random(seed), set(), 0
    store = store_in(home)
    with lives(home, task) as process:
        for _ in range(count):
            new = process.one(draw.randrange(4), draw.uniform(0, LONGEST[task]))
            interrupted += bool(unfinished(home))
            known = {info.artifact_id for info in store.list()}
            promised.update(new)
            assert promised <= known, f"lost (seed {seed}): {promised - known}"
            assert store.damaged() == []
            assert all(is_intact(store, artifact_id) for artifact_id in new)
    assert promised
    assert all(is_intact(store, info.artifact_id) for info in store.list())
    for info in store.list():
        store.verify(info.artifact_id)
    save(store, 0)
    assert unfinished(home) == []
    return interrupted


def unfinished(home: Path) -> list[Path]:
    folder = home / "artifacts" / "local"
    return [*folder.glob(DRAFTS), *folder.glob(JOURNAL)]


if __name__ == "__main__":
    main(*sys.argv[1:])
