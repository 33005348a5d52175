"""What the caller of `run_on_tpu` and the keeper of each host say to each other, over one connection a host.

A frame is a letter, the length of what follows (32 bits, big-endian), and that: output as it is, all else JSON.
"""

from __future__ import annotations

import json
import struct
from typing import Any

__all__ = ["END", "GO", "GONE", "HELLO", "KILL", "OUTPUT", "PING", "PONG", "STEP", "FrameReader", "frame"]

# From a host.
HELLO, OUTPUT, STEP, PONG, GONE = b"H", b"O", b"S", b"A", b"G"
# To it.
GO, PING, KILL, END = b"g", b"p", b"k", b"e"

_HEADER = struct.Struct("!cI")
# More than either side sends in one.
_LARGEST = 1 << 26


def frame(kind: bytes, content: bytes | dict[str, Any] | None = None) -> bytes:
    """Return a frame's bytes."""
    if not isinstance(content, bytes):
        content = json.dumps(content or {}).encode()
    return _HEADER.pack(kind, len(content)) + content


class FrameReader:
    """Takes what was received, in any pieces, and gives whole frames."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Return the frames that are complete with `data`: kind and content.

        Raises:
            ValueError: This is no frame.
        """
        self._received += data
        frames = []
        while len(self._received) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._received)
            if length > _LARGEST:
                raise ValueError(f"a frame of {length} bytes")
            end = _HEADER.size + length
            if len(self._received) < end:
                break
            frames.append((kind, bytes(self._received[_HEADER.size : end])))
            del self._received[:end]
        return frames
