"""What a server knows of activations that were encrypted for it: its memory, its files and its logs are searched.

Three processes: a server, which has the adapter; a client, which has the activations; and this one, which looks into
both. What is not found would be found, were it there: the adapter in the server, the activations in the client.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import tensafe_nb as tn
from tests.parity.test_process import SERVE

SCRIPT = Path(__file__).with_name("he_client.py")
SEED, TOKENS, WIDTH = 20, 64, 160
FEW = 6  # consecutive values
pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not Path("/proc/self/mem").exists(), reason="memory is searched by /proc, which is Linux'"
    ),
]


def forms(matrix: np.ndarray) -> dict[str, bytes]:
    """Return some consecutive values of a matrix, as bytes of every form in which they might lie somewhere."""
    found = {}
    for name, lines in (("row", matrix), ("column", matrix.T)):
        for index in (0, len(lines) - 1):
            values = lines[index, :FEW]
            for kind in ("<f4", "<f8"):
                found[f"{name} {index} {kind}"] = values.astype(kind).tobytes()
        found[f"{name} as text"] = f"{values[1]!r}".removeprefix("np.float64(")[:14].encode()
    return found


def scaled(x: np.ndarray) -> dict[str, bytes]:
    """Return the same of activations as they are packed: each token times a power of two."""
    loudest = np.frexp(np.abs(x).max(axis=1))[1]
    return {f"packed {name}": value for name, value in forms(np.ldexp(x, 8 - loudest[:, None])).items()}


def memory_of(pid: int) -> Iterator[bytes]:
    """Yield all that a process can read, but for what is only a file's: mapped without a right to write it."""
    process = Path("/proc") / str(pid)
    with (process / "maps").open() as maps, (process / "mem").open("rb", buffering=0) as memory:
        for line in maps:
            span, rights, _, _, inode, *name = line.split(maxsplit=5)
            if (
                "r" not in rights
                or (inode != "0" and "w" not in rights)
                or (name and name[0].startswith("[v"))
            ):
                continue
            start, end = (int(one, 16) for one in span.split("-"))
            try:
                memory.seek(start)
                yield memory.read(end - start)
            except (OSError, OverflowError):  # given back meanwhile
                continue


def files_in(*folders: Path) -> Iterator[bytes]:
    return (path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())


def found_in(places: Iterable[bytes], patterns: dict[str, bytes]) -> set[str]:
    """Return which patterns are in there."""
    found: set[str] = set()
    for place in places:
        if place.count(0) < len(place):
            found |= {name for name, pattern in patterns.items() if name not in found and pattern in place}
    return found


def test_activations_are_nowhere_in_the_server_and_the_adapter_is_nowhere_in_the_client(
    tmp_path: Path,
) -> None:
    home, logs = tmp_path / "server", tmp_path / "logs"
    logs.mkdir()
    with ExitStack() as stack:
        log = stack.enter_context((logs / "server.txt").open("w"))
        server = stack.enter_context(
            subprocess.Popen([*SERVE, "--home", str(home)], stdout=subprocess.PIPE, stderr=log, text=True)
        )
        stack.callback(server.send_signal, signal.SIGTERM)
        assert server.stdout is not None
        where = json.loads(server.stdout.readline())
        service = stack.enter_context(tn.ServiceClient(where["url"], where["token"]))
        lora = tn.LoRAConfig(rank=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[3])
        tc = service.create_training_client(lora_config=lora, optimizer={"learning_rate": 1e-2})
        for _ in range(2):  # B begins as 0
            tc.forward_backward(tn.BatchData([[5, 6, 7, 8]]))
            tc.optim_step().result()
        saved = tc.save_state().result()
        weights = load_file(
            service.export_adapter(saved.artifact_id, tmp_path / "adapter") / "adapter_model.safetensors"
        )
        adapter = {
            f"{name} {form}": value
            for name, matrix in weights.items()
            for form, value in forms(matrix).items()
            if form.startswith("row") and "<f" in form
        }
        client = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), tc.training_client_id, str(SEED), str(TOKENS), str(WIDTH)],
                env=os.environ
                | {
                    "TENSAFE_BASE_URL": where["url"],
                    "TENSAFE_API_KEY": where["token"],
                    "TENSAFE_HOME": str(tmp_path / "client"),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert client.stdout is not None and client.stdin is not None
        stack.callback(client.stdin.write, "\n")
        assert client.stdout.readline() == "done\n"
        x = np.random.default_rng(SEED).normal(size=(TOKENS, WIDTH))
        activations = forms(x) | scaled(x)
        single = {name for name in activations if name.startswith("row") and "<f4" in name}
        double = {name for name in activations if name.startswith("row") and "<f8" in name}

        in_server = found_in(memory_of(server.pid), activations | adapter)
        assert {name for name in adapter if "<f4" in name} <= in_server, "the search finds what is there"
        assert not in_server & activations.keys(), "what the server was sent is readable by nobody there"
        in_client = found_in(memory_of(client.pid), activations | adapter)
        assert single | double <= in_client, "the search finds what is there"
        assert not in_client & adapter.keys(), "what the client was sent is no adapter"
        (logs / "control.bin").write_bytes(next(iter(activations.values())))
        in_files = found_in(files_in(home, logs), activations)
        assert len(in_files) == 1, "but for what was put there to be found"
        service.close()
