"""GPUs of a replica: a whole number of them, or a share of one that replicas divide it by without a rest."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

# Ray counts resources in ten-thousandths.
UNIT = 10_000
# So much of a GPU, in units, may its replicas leave to nobody: a third written as 0.33, not 0.3.
IDLE = UNIT // 20


def per_gpu(share: float) -> int:
    """How many replicas of a share, below 1, a GPU takes."""
    return UNIT // round(share * UNIT)


def gpu_places(gpus: float, each: float) -> int:
    """How many replicas of `each` a node of so many GPUs takes: a share is never of two of them."""
    return int(gpus) * per_gpu(each) if each < 1 else int(gpus // each)


def even_share(replicas: int) -> float:
    """The largest share that as many replicas of have room on a GPU."""
    return UNIT // replicas / UNIT


def gpus_problem(value: Any) -> str | None:
    """What is wrong with a number of GPUs for each replica, None where nothing is."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (value > 1 and value != int(value)):
        return "input should be 'auto', a whole number of GPUs, or a share of one, such as 0.5"
    if value >= 1:
        return None
    counted = value * UNIT
    if round(counted) < 1 or abs(counted - round(counted)) > 1e-6:
        fitting = max(1, math.floor(counted)) / UNIT
        return f"shares are counted in ten-thousandths of a GPU; {fitting:g} is one"
    count = per_gpu(value)
    idle = UNIT - count * round(counted)
    if idle <= IDLE:
        return None
    return (
        f"with {count} on a GPU, {idle / UNIT:g} of it is nobody's; {even_share(count):g} is the share for "
        f"{count}, {even_share(count + 1):g} for {count + 1}"
    )


def _gpus_or_auto(value: Any) -> Any:
    problem = None if value == "auto" else gpus_problem(value)
    if problem is not None:
        raise ValueError(f"{value!r}: {problem}")
    return int(value) if value != "auto" and value >= 1 else value


GpusOrAuto = Annotated[
    int | float | Literal["auto"],
    PlainValidator(_gpus_or_auto),
    Field(description="`auto`, whole number or share of one, such as 0.5"),
]


def in_words(gpus: float) -> str:
    """What a replica takes: `a GPU`, `2 GPUs`, `0.5 of a GPU`."""
    if gpus == 1:
        return "a GPU"
    return f"{gpus:g} GPUs" if gpus > 1 else f"{gpus:g} of a GPU"
