"""Plain data out of YAML and JSON, in which a key that is there twice is a mistake and not one value less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from yaml.constructor import ConstructorError
from yaml.error import MarkedYAMLError
from yaml.nodes import MappingNode, ScalarNode
from yaml.reader import ReaderError

from actors.plain import Loader
from actors.types import RankfrontError

T = TypeVar("T")


class _Loader(Loader):
    """Looks at keys as they are composed: merges (`<<`), which later ones may override, come after that."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        met = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                continue
            if (key.tag, key.value) in met:
                raise ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            met.add((key.tag, key.value))
        return node


class NoYamlError(ValueError):
    """A text that is no YAML: what is wrong, in one line, and at which line and column of it, from 1."""

    def __init__(self, error: yaml.YAMLError, text: str) -> None:
        if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
            line, column = error.problem_mark.line, error.problem_mark.column
            said = ": ".join(part for part in (error.context, error.problem) if part)
        else:
            before = text[: error.position] if isinstance(error, ReaderError) else ""
            line, column = before.count("\n"), len(before) - before.rfind("\n") - 1
            said = str(error).partition("\n")[0]
        self.place = f"{line + 1}:{column + 1}"
        super().__init__(" ".join(said.split()))


def from_yaml(text: str) -> Any:
    """Raises NoYamlError where it is no YAML, or a mapping has a key twice; another ValueError at a date that
    is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise NoYamlError(error, text) from error


def read_yaml(file: Path) -> Any:
    """What a file of YAML holds.

    Raises:
        RankfrontError: it is no YAML, or a mapping has a key twice; begins with file, line and column.
        OSError, ValueError: it cannot be read, is no UTF-8, or a date in it is none.
    """
    try:
        return from_yaml(file.read_text(encoding="utf-8"))
    except NoYamlError as error:
        raise RankfrontError(f"{file}:{error.place}: cannot be read: {error}") from error


def from_json(text: str) -> Any:
    """Raises ValueError where it is no JSON, or an object has a key twice."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def read_own(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of the keys of a YAML or JSON file that this program wrote.

    Raises:
        RankfrontError: it is damaged: no such file's content, or `parse` misses something in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if not isinstance(found, dict):
            raise TypeError(f"it holds {type(found).__name__}, no mapping of keys")
        return parse(found)
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RankfrontError(f"{path} is damaged: {' '.join(said.split())}") from error
