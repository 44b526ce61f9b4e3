"""What pydantic found wrong with a value of a config, in the words of one who writes YAML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Location = tuple[str | int, ...]


def sentences(model: type[BaseModel], key: str, error: ValidationError) -> list[str]:
    """The mistakes in the value of a model's field, one line each: where, the value, what would be right."""
    details = error.errors()
    return [
        _sentence(model, (key, *each["loc"]), each)
        for each in details
        # A list is too short as well where items of it are wrong: that goes with them.
        if each["type"] != "too_short" or not any(_within(other["loc"], each["loc"]) for other in details)
    ]


def _within(location: Location, outer: Location) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _sentence(model: type[BaseModel], location: Location, detail: Any) -> str:
    key, *steps = location
    path = str(key) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key; one of {', '.join(_keys(model, location[:-1]))}"
    if kind == "missing":
        return f"{path}: missing"
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}"
    said = _right(model, location, kind, value) or f"{message[0].lower()}{message[1:]}"
    return f"{path}: {value!r}: {said}"


def _right(model: type[BaseModel], location: Location, kind: str, value: Any) -> str | None:
    """What would be right, where pydantic says so in Python's words; else None."""
    if kind in ("model_type", "model_attributes_type"):
        return f"input should be a section; its keys are {', '.join(_keys(model, location))}"
    if kind == "dict_type":
        return "input should be a mapping, such as {KEY: VALUE}"
    if kind == "tuple_type":
        one = isinstance(value, int | float | str) and not isinstance(value, bool)
        return f"input should be a list, such as {[value] if one else []!r}"
    if kind in ("too_short", "too_long"):
        bounds = _fields(model, location)[-1].metadata
        least = next((each.min_length for each in bounds if hasattr(each, "min_length")), 0)
        most = next((each.max_length for each in bounds if hasattr(each, "max_length")), None)
        return f"input should be {f'at least {least}' if most is None else f'{least} to {most}'} of them"
    return None


def _fields(model: type[BaseModel], location: Location) -> list[FieldInfo]:
    """The fields that a location leads through; items of a list and keys of a mapping are of the last one."""
    found: list[FieldInfo] = []
    for step in location:
        section = section_of(found[-1].annotation) if found else model
        if isinstance(step, str) and section is not None and step in section.model_fields:
            found.append(section.model_fields[step])
    return found


def _keys(model: type[BaseModel], location: Location) -> list[str]:
    """The keys of the section at a location."""
    section = section_of(_fields(model, location)[-1].annotation)
    return [] if section is None else list(section.model_fields)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a type is, or is a list or an option of."""
    return next((part for part in parts(annotation) if _is_section(part)), None)


def _is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def parts(annotation: Any) -> Iterator[Any]:
    """A type and everything it is made of: the members of a union, the items of a tuple."""
    yield annotation
    for part in get_args(annotation):
        yield from parts(part)
