"""Frames in a pipe: 8 bytes of length, then the bytes."""

from typing import IO

HEADER = 8


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Return the next frame; None where there is none any more, or not the whole of it."""
    header = stream.read(HEADER)
    if len(header) < HEADER:
        return None
    size = int.from_bytes(header, "big")
    frame = stream.read(size)
    return frame if len(frame) == size else None


def write_frame(stream: IO[bytes], frame: bytes) -> None:
    """Write a frame.

    Raises:
        OSError: Nobody reads any more.
    """
    stream.write(len(frame).to_bytes(HEADER, "big"))
    stream.write(frame)
    stream.flush()
