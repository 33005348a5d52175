"""What users write on a command line for durations, sizes and pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from fray.errors import InvalidValueError
from fray.types import Resource

__all__ = ["parse_duration", "parse_memory", "parse_pairs", "parse_resource", "whole"]

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([smhdw]?)\s*", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(?:([kmgtp])(i?b)?|b)?", re.IGNORECASE | re.ASCII)
_POWERS = {letter: power for power, letter in enumerate("kmgtp", start=1)}


def parse_duration(option: str, text: str) -> float:
    """Return the seconds that `90`, `90s`, `15m`, `2h`, `1d`, `1w` or `1h30m` stand for."""
    position, seconds = 0, 0.0
    while position < len(text) and (part := _DURATION_PART.match(text, position)):
        if not part[2] and (position > 0 or part.end() < len(text)):
            break  # a number without a unit stands alone
        seconds += float(part[1]) * _SECONDS[part[2]]
        position = part.end()
    if not text or position < len(text):
        raise InvalidValueError(f"{option}: {text!r} is no duration; write 90 (seconds), 90s, 15m, 2h, 1d or 1h30m")
    return seconds


def parse_memory(option: str, text: str) -> int:
    """Return the bytes that `8GiB`, `8G` (the same), `512MB` (of 1000) or a bare number stand for."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidValueError(f"{option}: {text!r} is no size; write 8GiB, 512MB or a number of bytes")
    number, letter, ending = match[1], match[2], match[3]
    base = 1000 if ending and ending.lower() == "b" else 1024
    return int(Fraction(number) * base ** (_POWERS[letter.lower()] if letter else 0))


def parse_resource(option: str, text: str) -> Resource:
    """Return the resource that `NAME=QUANTITY` stands for; a memory may have a unit."""
    name, equals, quantity = text.partition("=")
    if not equals or not name:
        raise InvalidValueError(f"{option}: write NAME=QUANTITY, not {text!r}")
    if name == "memory":
        return Resource(name, parse_memory(option, quantity))
    try:
        number = float(quantity)
    except ValueError:
        raise InvalidValueError(f"{option}: {quantity!r} is no quantity of {name}; write a number") from None
    return Resource(name, whole(number))


def whole(number: float) -> float:
    """Return a number without a fraction as an integer: 2 cores, not 2.0."""
    return int(number) if number.is_integer() else number


def parse_pairs(option: str, texts: Iterable[str]) -> dict[str, str]:
    """Return what `KEY=VALUE` options say; the last one of a key counts."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidValueError(f"{option}: write KEY=VALUE, not {text!r}")
        pairs[key] = value
    return pairs
