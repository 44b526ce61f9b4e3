"""What every section of a config is, and what its values are made of."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    model_validator,
)

from actors.node_cache import is_url, url_problem
from actors.sources import from_home
from actors.types import RankfrontError


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value!r}: input should be a number, not true or false")
    return value


NUMBER = BeforeValidator(_no_flag)
"""Of every number, as true is 1 to Python. Written behind its bounds, or its JSON schema loses them."""

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), NUMBER]
Positive = Annotated[int, Field(ge=1), NUMBER]
Bound = Annotated[float, Field(strict=True, allow_inf_nan=False)]

SAVED = "saved"
"""The validation context of a config that was saved with a study: what it names was found when it was given,
and may be gone by now, or be on another machine. Names stay as they are."""


def is_saved(info: ValidationInfo) -> bool:
    return info.context == SAVED


def readable_url(place: str | None, info: ValidationInfo) -> str | None:
    """A place as it is; raises ValueError where it is a URL that this machine has no driver for."""
    if place is not None and is_url(place) and not is_saved(info):
        problem = url_problem(place)
        if problem is not None:
            raise ValueError(problem)
    return place


def known_home(folder: str) -> str:
    """A folder, its `~` a user's home; raises ValueError where there is no such user."""
    try:
        return str(from_home(folder))
    except RankfrontError as error:
        raise ValueError(str(error)) from error


def _or_empty(value: Any) -> Any:
    return {} if value is None else value


MAPPING = BeforeValidator(_or_empty)
"""Of every mapping: one without keys, as where all of them are comments, is null in YAML."""


class Section(BaseModel):
    """Unknown keys are mistakes; values never change. One without keys has its defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    _without_keys = model_validator(mode="before")(_or_empty)


def _count_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{value!r}: input should be 'auto' or an integer greater than or equal to 1")


def _seconds_or_auto(value: Any) -> Any:
    if value is None or value == "auto":
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"{value!r}: input should be 'auto', null or a number of seconds greater than 0")


# One validator for both: a union would list a mistake once for each of its members.
CountOrAuto = Annotated[
    int | Literal["auto"],
    PlainValidator(_count_or_auto),
    Field(description="`auto` or whole number (>= 1)"),
]
SecondsOrAuto = Annotated[
    float | Literal["auto"] | None,
    PlainValidator(_seconds_or_auto),
    Field(description="`auto`, number (> 0) or null"),
]
