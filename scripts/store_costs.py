"""Where the time of a checkpoint goes: `python -m scripts.store_costs`.

Prints CPU milliseconds for 512 MiB in 32 tensors: of the steps one by one, on one thread, and of the whole beside
`torch.save` and `torch.load`. And, in seconds by the clock, what a hash of the chunks' hashes would gain: sealing as it
is, beside the same steps with each chunk sealed and hashed by whichever of two threads is free; nothing is written.
"""

import hashlib
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.store import HEADER, SIZE, Sink
from tensafe_nb.engine.state import read_part, tensor_part
from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import CHUNK, TAG, seal
from tensafe_nb.store.sealed.payload import Manifest, payload

MIB, TENSORS, THREADS, TURNS = 1 << 20, 32, 2, 8
NONCE = bytes(12)  # nothing of this is kept


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tensafe-store-costs-") as folder:
        measured = Measured(Path(folder))
        print("CPU milliseconds, the least of several turns")
        for name, times in taken(measured.steps(), time.process_time).items():
            print(f"{name:48} {min(times):5.0f}")
        print("\nmilliseconds by the clock, the least and the median of several turns")
        for name, times in taken(measured.sides(), time.perf_counter).items():
            print(f"{name:48} {min(times):5.0f} {sorted(times)[len(times) // 2]:5.0f}")


def taken(actions: Mapping[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the milliseconds of each action, taken in turns."""
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(TURNS):
        for name, action in actions.items():
            started = clock()
            action()
            times[name].append((clock() - started) * 1e3)
    return times


class Measured:
    """A state, and ways to write and read it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cipher = folder, AESGCM(bytes(32))
        self.state = {f"layer.{number}": torch.randn(SIZE * MIB // 4 // TENSORS) for number in range(TENSORS)}
        self.keys = Keys(folder / "keys", "file", announce=lambda _: None)
        self.store = ArtifactStore(folder / "artifacts", self.keys)
        self.parts = {"model.safetensors": tensor_part(self.state)}
        self.manifest = Manifest.of(self.parts, None, None)
        self.artifact_id = self.store.save(self.parts, header=HEADER | {"schema": 1}).artifact_id
        self.chunks = [
            memoryview(tensor.numpy()).cast("B")[at : at + CHUNK]
            for tensor in self.state.values()
            for at in range(0, SIZE * MIB // TENSORS, CHUNK)
        ]
        self.block, self.chunk = bytearray(CHUNK + TAG), bytearray(CHUNK)
        self.cipher.encrypt_into(NONCE, self.chunks[0], None, self.block)
        self.sealed = next((folder / "artifacts").glob("*.tsnb"))
        self.written, self.peer = folder / "written", folder / "peer.pt"
        self.written.touch()
        self._seal_to_file()  # so that no turn is the first: new pages of a file are the system's work, and vary
        torch.save(self.state, self.peer)

    def steps(self) -> dict[str, Callable[[], object]]:
        return {
            "seal the chunks (AES-256-GCM)": lambda: self._each(
                lambda _: self.cipher.encrypt_into(NONCE, self.chunks[0], None, self.block)
            ),
            "hash them (SHA-256)": lambda: self._each(lambda _: hashlib.sha256(self.block)),
            "write them": self._write,
            "seal, hash and write a state": self._seal_to_file,
            "torch.save, without fsync": self._torch_save,
            "make as much memory one's own": lambda: [
                torch.zeros_like(tensor) for tensor in self.state.values()
            ],
            "read the chunks": self._read,
            "open them (AES-256-GCM)": lambda: self._each(
                lambda _: self.cipher.decrypt_into(NONCE, self.block, None, self.chunk)
            ),
            "read and open a state": self._open,
            "torch.load": lambda: torch.load(self.peer),
        }

    def sides(self) -> dict[str, Callable[[], object]]:
        return {
            "seal a state, nothing written: one hash": lambda: seal(
                Sink(),  # type: ignore[arg-type]
                HEADER,
                payload(self.manifest, self.parts),
                self.keys,
            ),
            "the same: a hash for each chunk, two threads": self._each_chunk_hashed,
        }

    def _each(self, action: Callable[[int], object]) -> None:
        for number in range(len(self.chunks)):
            action(number)

    def _write(self) -> None:
        with self.written.open("r+b", buffering=0) as file:
            self._each(lambda _: file.write(self.block))

    def _read(self) -> None:
        chunk = bytearray(CHUNK + TAG)
        with self.sealed.open("rb", buffering=0) as file:
            while file.readinto(chunk):
                pass

    def _seal_to_file(self) -> None:
        with self.written.open("r+b") as file:
            seal(file, HEADER, payload(self.manifest, self.parts), self.keys)

    def _torch_save(self) -> None:
        with self.peer.open("r+b") as file:
            torch.save(self.state, file)

    def _open(self) -> object:
        with self.store.open(self.artifact_id) as artifact:
            return [read_part(stream, size) for _, size, stream in artifact.parts()]

    def _each_chunk_hashed(self) -> None:
        turn, hashes = count(), [b""] * len(self.chunks)

        def work() -> None:
            block = bytearray(CHUNK + TAG)
            while (number := next(turn)) < len(self.chunks):
                self.cipher.encrypt_into(NONCE, self.chunks[number], None, block)
                hashes[number] = hashlib.sha256(block).digest()

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hashlib.sha256(b"".join(hashes)).digest()


if __name__ == "__main__":
    main()
