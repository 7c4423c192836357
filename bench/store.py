"""What sealing costs: checkpoints against `torch.save`, key rotation, the audit log."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensafe_nb as tn
from bench.harness import LARGER, Row, Taken, Target, paired

MIB = 1 << 20
SIZE = 512
HEADER = {
    "training_client": "tc-bench",
    "step": 1,
    "base_model": "none",
    "revision": None,
    "ledger_head": None,
}


def write() -> Row:
    """Issue 26: at most 1.4 times."""
    with _folder() as folder:
        state, store = _state(), _store(folder)

        def ours() -> None:
            store.delete(_save(store, state))

        taken = paired(ours, lambda: _torch_save(state, folder / "peer.pt"), seconds=10, warmup=1)
    return Row(
        what="seal a state and write it, durable when it returns",
        peer="`torch.save`, then `fsync`: in the clear",
        sizes=f"{SIZE} MiB in 32 tensors",
        compares=LARGER,
        taken=taken,
        target=Target("≤", 1.4),
    )


def read() -> Row:
    """Issue 26: at most 1.2 times."""
    import torch

    from tensafe_nb.engine.state import read_part

    with _folder() as folder:
        state, store = _state(), _store(folder)
        artifact_id = _save(store, state)
        _torch_save(state, folder / "peer.pt")

        def ours() -> dict[str, Any]:
            with store.open(artifact_id) as artifact:
                (tensors,) = [read_part(stream, size) for _, size, stream in artifact.parts()]
                return tensors

        assert all(torch.equal(tensor, state[name]) for name, tensor in ours().items())
        taken = paired(ours, lambda: torch.load(folder / "peer.pt"), seconds=10, warmup=1)
    return Row(
        what="read a sealed state, and check all of it",
        peer="`torch.load`: unchecked",
        sizes=f"{SIZE} MiB in 32 tensors",
        compares=LARGER,
        taken=taken,
        target=Target("≤", 1.2),
    )


def sealing() -> Row:
    """Issue 5: at least 700 MiB/s on one core."""
    from tensafe_nb.store.sealed.envelope import seal

    with _folder() as folder:
        keys, payload = _keys(folder), memoryview(os.urandom(64 * MIB))

        def ours() -> None:
            seal(Sink(), HEADER, [payload] * (SIZE // 64), keys)  # type: ignore[arg-type]

        taken = Taken([_seconds(ours) for _ in range(6)][1:])
    return Row(
        what="seal and hash, nothing written",
        peer="",
        sizes=f"{SIZE} MiB: 700 MiB/s are {SIZE / 700:.2f} s",
        taken=taken,
        target=Target("≤", SIZE / 700, "ours"),
    )


def checkpoint() -> Row:
    """Issue 5: at most 0.1 s."""

    with _folder() as folder, tn.ServiceClient() as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=16))
        tc.forward_backward(tn.BatchData([[5, 6, 7]]))
        tc.optim_step().result()
        engine: Any = tc._channel._executor.engine  # type: ignore[attr-defined]
        weights = {name: parameter.detach() for name, parameter in engine.model.trainable}

        def peer() -> None:
            _torch_save(
                {"weights": weights, "optimizer": engine.optimizer.torch.state_dict()}, folder / "peer.pt"
            )

        taken = paired(lambda: tc.save_state().result(), peer, seconds=3)
    return Row(
        what="`save_state` with the optimiser, LoRA r16",
        peer="`torch.save` of adapter and optimiser, then `fsync`: in the clear, no log",
        precision="fp32",
        sizes="`builtin:tiny`",
        compares=LARGER,
        taken=taken,
        target=Target("≤", 0.1, "ours"),
    )


def rotation() -> Row:
    """Issue 5: at most 1 s."""
    with _folder() as folder:
        keys = _keys(folder)
        store = _store(folder, keys)
        for _ in range(100):
            store.save({"part": os.urandom(1 << 16)}, header=HEADER | {"schema": 1})

        def rotate() -> None:
            keys.new()
            assert store.rotate() == 100

        taken = Taken([_seconds(rotate) for _ in range(5)])
    return Row(
        what="rotate the key: every artifact rewrapped, journalled, verified",
        peer="",
        sizes="100 artifacts of 64 KiB",
        taken=taken,
        target=Target("≤", 1.0, "ours"),
    )


def audit() -> Row:
    """Issue 5: at most 0.2 ms without fsync."""
    from tensafe_nb.store.audit.log import AuditLog

    with _folder() as folder:
        log, batch = AuditLog(folder / "audit", _keys(folder)), memoryview(os.urandom(96 << 10))

        def append() -> None:
            log.append(operation="forward_backward", request=(batch,), started_at=0.0, completed_at=1.0)

        taken = Taken([_seconds(append) for _ in range(2_000)][100:])
    return Row(
        what="append a record to the audit log, without fsync",
        peer="",
        sizes="a request of 96 KiB (4 × 1024 tokens, three arrays of int64)",
        taken=taken,
        target=Target("≤", 0.2e-3, "ours"),
    )


class Sink:
    """A file that takes everything and keeps nothing."""

    def write(self, data: bytes) -> int:
        return len(data)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tensafe-bench-store-") as folder:
        yield Path(folder)


def _keys(folder: Path) -> Any:
    from tensafe_nb.store.keys.keyring import Keys

    return Keys(folder / "keys", "file", announce=lambda _: None)


def _store(folder: Path, keys: Any = None) -> Any:
    from tensafe_nb.store.artifacts.artifacts import ArtifactStore

    return ArtifactStore(folder / "artifacts", keys or _keys(folder))


def _state() -> dict[str, Any]:
    import torch

    return {f"layer.{number}": torch.randn(SIZE * MIB // 4 // 32) for number in range(32)}


def _save(store: Any, state: dict[str, Any]) -> str:
    from tensafe_nb.engine.state import tensor_part

    artifact_id: str = store.save(
        {"model.safetensors": tensor_part(state)}, header=HEADER | {"schema": 1}
    ).artifact_id
    return artifact_id


def _torch_save(state: Any, path: Path) -> None:
    import torch

    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
