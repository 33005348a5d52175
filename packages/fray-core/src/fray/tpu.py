"""The catalogue of Cloud TPU types: the only place that knows what a type's name means.

One row a generation, from which every type is derived. `hosts` are TPU VMs: the places where `run_on_tpu` calls its
function.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from fray.errors import InvalidValueError

__all__ = ["TpuType", "tpu_type", "tpu_types"]


@dataclass(frozen=True)
class TpuType:
    """What one slice of a type is.

    Attributes:
        name: As the Cloud TPU API spells it.
        generation: Such as `v5e`, whatever the name begins with.
        chips: In the whole slice.
        hosts: TPU VMs in the slice.
        chips_per_host: On each of them.
        runtime_version: The software that a TPU VM of this generation boots by default; None where the Cloud TPU API
            does not make such VMs.
    """

    name: str
    generation: str
    chips: int
    hosts: int
    chips_per_host: int
    runtime_version: str | None


@dataclass(frozen=True)
class _Generation:
    name: str
    prefix: str
    # What the number in a type's name counts: TensorCores (two a chip) or chips (one core each).
    cores_per_chip: int
    # In the unit of the name.
    sizes: tuple[int, ...]
    runtime_version: str | None


def _cubes(largest: int) -> tuple[int, ...]:
    """Return the sizes, in cores, of a 3D torus: parts of one 4x4x4 cube of chips, then any number of whole cubes.

    Google's tables show "most, but not all" shapes of whole cubes, so none up to the largest is refused here.
    """
    return (8, 16, 32, 64, *range(128, largest + 1, 128))


_CHIPS_PER_HOST = 4
# The one kind of host with more: the single-host v5litepod-8 and v6e-8.
_CHIPS_OF_A_LARGE_HOST = 8
_FLAT_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)

# Sizes: the "supported configurations" of each generation's page below https://cloud.google.com/tpu/docs/ (v2, v3,
# v4, v5e, v5p, v6e, tpu7x). Runtime versions: https://cloud.google.com/tpu/docs/runtimes.
_GENERATIONS = (
    _Generation("v2", "v2", 2, (8, 32, 128, 256, 512), "tpu-ubuntu2204-base"),
    _Generation("v3", "v3", 2, (8, 32, 64, 128, 256, 512, 1024, 2048), "tpu-ubuntu2204-base"),
    _Generation("v4", "v4", 2, _cubes(4096), "tpu-ubuntu2204-base"),
    _Generation("v5e", "v5litepod", 1, _FLAT_SIZES, "v2-alpha-tpuv5-lite"),
    _Generation("v5p", "v5p", 2, _cubes(12288), "v2-alpha-tpuv5"),
    _Generation("v6e", "v6e", 1, _FLAT_SIZES, "v2-alpha-tpuv6e"),
    # Comes through GKE or Compute Engine; the name counts cores, as Ray's does. A pod has 9,216 chips.
    _Generation("v7x", "tpu7x", 2, _cubes(18432), None),
)


def tpu_type(name: str) -> TpuType:
    """Look a type up by its name.

    Args:
        name: Such as `v4-32`; a generation's own name does for the API's prefix (`v5e-16` is `v5litepod-16`).

    Raises:
        InvalidValueError: There is no such type; the message names the nearest.
    """
    catalogue = _catalogue()
    prefix, _, size = name.partition("-")
    for generation in _GENERATIONS:
        if prefix == generation.name:
            prefix = generation.prefix
    found = catalogue.get(f"{prefix}-{size}")
    if found is None:
        raise InvalidValueError(f"there is no TPU type {name!r}; {_hint(prefix, size, catalogue)}")
    return found


def tpu_types() -> list[TpuType]:
    """Return every type, by generation and size."""
    return list(_catalogue().values())


@cache
def _catalogue() -> dict[str, TpuType]:
    types = (_derive(generation, size) for generation in _GENERATIONS for size in generation.sizes)
    return {derived.name: derived for derived in types}


def _derive(generation: _Generation, size: int) -> TpuType:
    chips = size // generation.cores_per_chip
    one_host = chips <= _CHIPS_PER_HOST or (generation.cores_per_chip == 1 and chips == _CHIPS_OF_A_LARGE_HOST)
    chips_per_host = chips if one_host else _CHIPS_PER_HOST
    return TpuType(
        name=f"{generation.prefix}-{size}",
        generation=generation.name,
        chips=chips,
        hosts=chips // chips_per_host,
        chips_per_host=chips_per_host,
        runtime_version=generation.runtime_version,
    )


def _hint(prefix: str, size: str, names: Iterable[str]) -> str:
    for generation in _GENERATIONS:
        # Of a generation that exists the sizes around the one asked for say more than similar spellings do.
        if prefix == generation.prefix and size.isdecimal():
            below = [known for known in generation.sizes if known < int(size)][-1:]
            above = [known for known in generation.sizes if known > int(size)][:1]
            near = [f"{prefix}-{known}" for known in below + above]
            return f"the nearest sizes of {generation.name}: {', '.join(near)}"
    from difflib import get_close_matches

    if near := get_close_matches(f"{prefix}-{size}", names):
        return f"did you mean {' or '.join(near)}?"
    return f"types begin with {', '.join(f'{generation.prefix}-' for generation in _GENERATIONS)} as in v4-32"
