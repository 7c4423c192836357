"""Saves and reads back a state past 2 GiB, made and checked piece by piece, and prints what memory that took.

Imports only the store. Run by test_store.py.
"""

import json
import resource
import sys
import time
from pathlib import Path

from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.tensors import TensorPart, read_tensors
from tests.unit.store.lives import HEADER, save

PIECE = 16 << 20
PIECES = 136  # 2.125 GiB: past 2^31 bytes


def piece(number: int) -> bytes:
    return number.to_bytes(8, "little") * (PIECE // 8)


def peak() -> int:
    """Bytes of memory this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(home: str) -> None:
    assert "torch" not in sys.modules
    store = ArtifactStore(Path(home) / "artifacts", Keys(Path(home) / "keys", announce=lambda text: None))
    save(store, 0)
    before, start = peak(), time.perf_counter()
    state = TensorPart(
        (f"{number:04}", "U8", (PIECE,), lambda number=number: piece(number)) for number in range(PIECES)
    )
    saved = store.save({"model.safetensors": state, "last.json": b"{}"}, header=HEADER)
    written = time.perf_counter()
    found = 0
    with store.open(saved.artifact_id) as artifact:
        for name, size, stream in artifact.parts():
            if name == "model.safetensors":
                for number, (tensor, _, _, data) in enumerate(read_tensors(stream, size)):
                    assert (tensor, data) == (f"{number:04}", piece(number))
                    found += len(data)
            else:
                assert stream.read() == b"{}"
    facts = {
        "bytes": found,
        "extra_memory": peak() - before,
        "save_seconds": written - start,
        "open_seconds": time.perf_counter() - written,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
