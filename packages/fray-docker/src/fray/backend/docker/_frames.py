r"""A job's output and events as lines of the engine's log, and back to the exact bytes.

An engine's log driver keeps lines of text: it replaces bytes that are no UTF-8, cuts lines at 16 KiB, and has no place
for events. So the runner (`runner/`) writes lines that survive it, most of them as the command wrote them:

| line | stands for |
| --- | --- |
| anything that begins with no RS (0x1E) | a line of output, as it is |
| `RS + TEXT` | a line of output, escaped |
| `RS - TEXT` | output that no newline ends, escaped: what follows continues it |
| `RS {…}` | an event, JSON; `offset` says how many bytes of output lie before it |

(There is no space behind the RS.) In TEXT `\\` is a backslash and `\xHH` a byte that is no part of valid UTF-8.
`docker logs` shows all of it readably.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from typing import Any

__all__ = ["FrameDecoder", "LogStream", "encode_event", "encode_output"]

RS = b"\x1e"
_LONGEST_TEXT = 3_900  # escaped at worst fourfold, which still is one line to the engine
_ESCAPE = re.compile(rb"\\(?:\\|x([0-9a-f]{2}))")


class FrameDecoder:
    """Turns the payload of an engine's log, in pieces of any size, into output and events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, payload: bytes) -> Iterator[bytes | dict[str, Any]]:
        """Yield what the pieces so far complete: output as bytes, events as what their JSON says."""
        payload = self._rest + payload
        end = payload.rfind(b"\n") + 1
        self._rest = payload[end:]
        at = 0
        while at < end:
            if payload.startswith(RS, at):
                stop = payload.index(b"\n", at)
                yield self._framed(payload[at + 1 : stop])
                at = stop + 1
                continue
            following = payload.find(b"\n" + RS, at, end) + 1 or end
            yield payload[at:following]
            at = following

    def _framed(self, text: bytes) -> bytes | dict[str, Any]:
        if text.startswith(b"{"):
            try:
                event = json.loads(text)
            except ValueError:
                return {}  # nothing of the runner's: somebody else wrote to the container's log
            return event if isinstance(event, dict) else {}
        output = text[1:]
        if b"\\" in output:
            output = _ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode()) if found[1] else b"\\", output)
        return output + b"\n" if text.startswith(b"+") else output


class LogStream:
    """Takes the engine's headers out of a log as it is sent: eight bytes before each entry."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return the payload that the pieces so far complete."""
        data = self._rest + data if self._rest else data
        parts, at, end = [], 0, len(data)
        while at + 8 <= end:
            (size,) = _HEADER.unpack_from(data, at)
            if at + 8 + size > end:
                break
            parts.append(data[at + 8 : at + 8 + size])
            at += 8 + size
        self._rest = data[at:]
        return b"".join(parts)


_HEADER = struct.Struct(">4xI")


def encode_event(event: str, **fields: object) -> bytes:
    """Return an event's line."""
    known = {name: value for name, value in fields.items() if value is not None}
    # Without spaces: the relay knows an event by its beginning.
    return RS + json.dumps({"event": event, **known}, separators=(",", ":")).encode() + b"\n"


def encode_output(output: bytes) -> bytes:
    """Return the lines that output is written as, what it ends with included, whether or not that is a newline."""
    lines = []
    *whole, rest = output.split(b"\n")
    for text, is_whole in [*((line, True) for line in whole), *([(rest, False)] if rest else [])]:
        while len(text) > _LONGEST_TEXT:
            lines.append(RS + b"-" + _escape(text[:_LONGEST_TEXT]) + b"\n")
            text = text[_LONGEST_TEXT:]
        lines.append(RS + (b"+" if is_whole else b"-") + _escape(text) + b"\n")
    return b"".join(lines)


def _escape(text: bytes) -> bytes:
    try:
        text.decode()
    except UnicodeDecodeError:
        decoded = text.replace(b"\\", b"\\\\").decode(errors="surrogateescape")
        return b"".join(
            b"\\x%02x" % (ord(character) - 0xDC00) if "\udc80" <= character <= "\udcff" else character.encode()
            for character in decoded
        )
    return text.replace(b"\\", b"\\\\")
