"""Values of one score, one by one (a window, an example), packed small; and what they say about two scores.

Packed values travel in a `Score` as text, so that they are on the wire and in the record what they are here:
base64 of little-endian float32, or of bits. Standard library only: both sides import it.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass


def pack_floats(values: Sequence[float]) -> str:
    """As float32: relative error at most 2^-24, far below the noise between windows or examples."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def unpack_floats(packed: str) -> tuple[float, ...]:
    """What `pack_floats` was given, in float32."""
    content = base64.b64decode(packed)
    return struct.unpack(f"<{len(content) // 4}f", content)


def pack_bits(values: Sequence[bool]) -> str:
    """Eight to the byte, the first in the lowest bit; how many there are is not kept."""
    number = sum(1 << index for index, value in enumerate(values) if value)
    return base64.b64encode(number.to_bytes((len(values) + 7) // 8, "little")).decode()


def unpack_bits(packed: str, count: int) -> tuple[float, ...]:
    """The `count` values that `pack_bits` was given, as 0.0 and 1.0."""
    number = int.from_bytes(base64.b64decode(packed), "little")
    return tuple(float(number >> index & 1) for index in range(count))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent `values`: s / sqrt(n), s with n - 1; nan for fewer than two."""
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, its standard error, and the number of pairs; in the unit of the values."""

    mean: float
    stderr: float
    pairs: int

    def beyond(self, errors: float) -> bool:
        """Whether the mean is further from zero than that many standard errors; never where they are nan."""
        return abs(self.mean) > errors * self.stderr


def paired_difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """one - other over the same windows or examples, in the same order.

    What all models find hard or easy cancels pair by pair, so two scores can be told apart that their own
    standard errors could not.

    Raises:
        ValueError: different numbers of values, or none.
    """
    if len(one) != len(other) or not one:
        raise ValueError(f"{len(one)} values cannot be paired with {len(other)}")
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    return Difference(math.fsum(gaps) / len(gaps), standard_error(gaps), len(gaps))


def mean_difference(parts: Sequence[Difference]) -> Difference:
    """Of a mean that weighs its parts equally (tasks), the parts being independent samples.

    Raises:
        ValueError: no part.
    """
    if not parts:
        raise ValueError("there is nothing to average")
    count = len(parts)
    return Difference(
        math.fsum(part.mean for part in parts) / count,
        math.sqrt(math.fsum(part.stderr**2 for part in parts)) / count,
        sum(part.pairs for part in parts),
    )
