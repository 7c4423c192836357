"""A network of one's own, in which there is nothing but loopback: Ray listens for other machines."""

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


def bring_up() -> None:
    """Let this process reach itself."""
    with socket.socket() as some:
        fcntl.ioctl(some, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def found_by(program: str, home: Path) -> dict[str, Any]:
    """Run a module in such a network until it has printed what it has found, as JSON, and kill it.

    Where a process gets no network of its own, the test is skipped.
    """
    alone = [shutil.which("unshare") or "", "--map-root-user", "--net"]
    if not alone[0] or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip(
            "Ray listens for other machines: it is tried only where it gets a network of its own (unshare)"
        )
    with (home / "words").open("wb") as words:
        process = subprocess.Popen(
            [*alone, sys.executable, "-m", program],
            cwd=Path(__file__).parents[2],
            env={
                "PATH": os.environ["PATH"],
                "TENSAFE_HOME": str(home),
                "HOME": str(home),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
        process.communicate()
    assert line, (home / "words").read_text()[-4_000:]
    return dict(json.loads(line))
