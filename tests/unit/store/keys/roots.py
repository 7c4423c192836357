"""Keys to wrap and to unwrap."""

import base64
import os
from typing import Any

import pytest

SECRET = bytes(range(32))


posix = pytest.mark.skipif(os.name != "posix", reason="rights are those of POSIX")


def kek(fill: int, size: int = 32) -> str:
    return base64.b64encode(bytes([fill]) * size).decode()


def stanza_of_a_stranger() -> dict[str, Any]:
    return {"kek_id": "key-00", "source": "file", "kdf": {"name": "HKDF-SHA256"}, "wrapped": "00" * 40}
