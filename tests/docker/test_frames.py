"""A job's output, through the lines of an engine's log and back."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fray.backend.docker._frames import FrameDecoder, LogStream, encode_event, encode_output

# What trips up whoever frames lines: ends of lines, marks, escapes, bytes that are no text.
TRICKY = st.sampled_from(
    [b"\n", b"\x1e", b"\\", b"\xff", b"\r", b"\xc3", b"\xc3\xbc", b"{", b"+", b"-", b"\0", b"\\x41"]
)
OUTPUT = st.lists(st.one_of(TRICKY, st.binary(max_size=8), st.text(max_size=8).map(str.encode))).map(b"".join)
SIZES = st.lists(st.integers(1, 40), min_size=1)


def decoded(payload: bytes, sizes: list[int] | None = None) -> tuple[bytes, list[dict[str, Any]]]:
    """What a log says, its payload fed in pieces of the given sizes."""
    decoder, found, at, turn = FrameDecoder(), [], 0, 0
    while at < len(payload):
        size = sizes[turn % len(sizes)] if sizes else len(payload)
        found += decoder.feed(payload[at : at + size])
        at, turn = at + size, turn + 1
    output = b"".join(item for item in found if isinstance(item, bytes))
    return output, [item for item in found if isinstance(item, dict)]


@given(st.lists(OUTPUT), SIZES)
def test_what_is_encoded_comes_back_with_the_events_in_their_places(outputs: list[bytes], sizes: list[int]) -> None:
    payload = b"".join(encode_output(each) + encode_event("pending", number=at) for at, each in enumerate(outputs))
    output, events = decoded(payload, sizes)
    assert output == b"".join(outputs)
    assert [event["number"] for event in events] == list(range(len(outputs)))


@given(OUTPUT)
def test_every_line_is_text_that_the_engine_keeps(output: bytes) -> None:
    for line in encode_output(output * 40).split(b"\n"):
        line.decode()
        assert len(line) < 16_000


def test_long_lines_come_back() -> None:
    output = b"x" * 1_000_000 + b"\n" + b"\xff\\" * 50_000 + "ü".encode() * 20_000
    assert decoded(encode_output(output))[0] == output


def test_plain_lines_stand_for_themselves() -> None:
    payload = b"a\n\n  b\\x41\r\n" + encode_event("mark", offset=12) + b"c\n"
    assert decoded(payload) == (b"a\n\n  b\\x41\r\nc\n", [{"event": "mark", "offset": 12}])


@pytest.mark.parametrize("line", [b"\x1e{no json\n", b"\x1e{}\n", b"\x1e[1]\n", b"\x1e\n"])
def test_what_is_nobodys_frame_disturbs_nothing(line: bytes) -> None:
    output, events = decoded(b"a\n" + line + b"b\n")
    assert output.startswith(b"a\n")
    assert output.endswith(b"b\n")
    assert not [event for event in events if "event" in event]


@given(st.lists(st.binary(max_size=20)), SIZES)
def test_the_engines_headers_are_taken_out(entries: list[bytes], sizes: list[int]) -> None:
    sent = b"".join(struct.pack(">BxxxI", 1, len(entry)) + entry for entry in entries)
    stream, found, at, turn = LogStream(), b"", 0, 0
    while at < len(sent):
        size = sizes[turn % len(sizes)]
        found += stream.feed(sent[at : at + size])
        at, turn = at + size, turn + 1
    assert found == b"".join(entries)
