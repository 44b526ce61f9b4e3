"""Plain data out of YAML and JSON, in which a key that is there twice is a mistake and not one value less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, ScalarNode

from actors.types import RankfrontError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
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


def from_yaml(text: str) -> Any:
    """Raises yaml.YAMLError where it is no YAML, or a mapping has a key twice; ValueError at a date that is
    none."""
    return yaml.load(text, _Loader)


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
