"""Every key of a config, from the sections themselves: `python -m search.config_page > docs/config.md`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from actors.plain import Dumper
from search.config import Config
from search.mistakes import section_of

HEAD = """# Config keys

Every key of a study's config, made from the sections in `search/` by `python -m search.config_page >
docs/config.md` (a test keeps the two equal). A study must name `study`, `model.source` and `text.source`;
all else has a default. `null` is no value. `--set KEY=VALUE` sets a key by its dotted name for one command,
and [resume.md](resume.md) says which keys may change once a study has trials.
"""
TABLE = "| key | takes | default |\n|---|---|---|"
SCALARS = {str: "text", bool: "true or false", int: "whole number", float: "number"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def page() -> str:
    """The whole page, in Markdown."""
    keys = Config.model_fields
    alone = {name: field for name, field in keys.items() if section_of(field.annotation) is None}
    parts = [HEAD, "## Outside the sections\n", f"{_prose(Config)}\n", _table(alone, "")]
    for name, field in keys.items():
        section = section_of(field.annotation)
        if section is not None:
            parts += _section(section, name, 2)
    return "\n".join(parts)


def _section(section: type[BaseModel], path: str, depth: int) -> Iterator[str]:
    """A heading, what the section says of itself, its table, and the same for every section inside."""
    yield f"{'#' * depth} `{path}`\n"
    yield f"{_prose(section)}\n"
    yield _table(section.model_fields, f"{path}.")
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None and _shown_as(inner) is None:
            each = "[]" if get_origin(field.annotation) is tuple else ""
            yield from _section(inner, f"{path}.{name}{each}", depth + 1)


def _shown_as(section: type[BaseModel]) -> str | None:
    """The key of the config that has this section, None for one that is inside others alone."""
    return next((name for name, field in Config.model_fields.items() if field.annotation is section), None)


def _prose(section: type[BaseModel]) -> str:
    return inspect.getdoc(section) or ""


def _table(fields: dict[str, FieldInfo], prefix: str) -> str:
    rows = [f"| `{prefix}{name}` | {takes(field)} | {default(field)} |" for name, field in fields.items()]
    return "\n".join([TABLE, *rows, ""])


def takes(field: FieldInfo) -> str:
    """What a field takes, in words: those of its own, or those of its type."""
    return (field.description or _words(field.annotation, field.metadata)).replace("|", "\\|")


def _words(annotation: Any, metadata: Any = ()) -> str:
    """A type and its constraints."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _words(inner[0], annotation.__metadata__)
    if origin in (Union, UnionType):
        return _listed([_words(each, metadata) for each in inner if each is not NoneType], NoneType in inner)
    if origin is Literal:
        return _listed([f"`{each}`" for each in inner])
    if origin is tuple:
        count = _count(metadata)
        section = section_of(inner[0]) is not None
        return f"list{count} of sections, below" if section else f"list{count}, each: {_words(inner[0])}"
    if origin is dict:
        return f"mapping of {_words(inner[0])} to {_words(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        shown = _shown_as(annotation)
        return f"section with the keys of `{shown}`" if shown else "section, below"
    bounds = ", ".join(_bounds(metadata))
    return SCALARS[annotation] + (f" ({bounds})" if bounds else "")


def _listed(words: list[str], or_null: bool = False) -> str:
    """`a`, `b` or `c`."""
    words = words + ["null"] * or_null
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _count(metadata: Any) -> str:
    least = next((each.min_length for each in _flat(metadata) if hasattr(each, "min_length")), None)
    most = next((each.max_length for each in _flat(metadata) if hasattr(each, "max_length")), None)
    if least is None:
        return ""
    return f" of at least {least}" if most is None else f" of {least} to {most}"


def _bounds(metadata: Any) -> Iterator[str]:
    for each in _flat(metadata):
        for name, sign in BOUNDS.items():
            bound = getattr(each, name, None)
            if bound is not None:
                yield f"{sign} {bound}"
        pattern = getattr(each, "pattern", None)
        if pattern is not None:
            yield f"as `{pattern}`"


def _flat(metadata: Any) -> Iterator[Any]:
    """Constraints one by one; a `Field` inside an annotation holds several."""
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else (each,)


def default(field: FieldInfo) -> str:
    """The value of a key that is not there, as it is written in YAML."""
    if field.is_required():
        return "required"
    value = TypeAdapter(Any).dump_python(field.get_default(call_default_factory=True), mode="json")
    line = yaml.dump([value], Dumper=Dumper, default_flow_style=True, sort_keys=False, width=sys.maxsize)
    inside = line.strip()[1:-1]
    if "\n" in inside:
        inside = json.dumps(value)
    return f"`{inside}`"


if __name__ == "__main__":
    print(page(), end="")
