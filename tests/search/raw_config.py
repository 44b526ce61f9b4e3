"""A raw config in pieces: one key set, and the mistakes that are found in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from search.config import ConfigError, parse_config


def put(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `raw` with the dotted `key` set."""
    changed = copy.deepcopy(raw)
    *parents, last = key.split(".")
    section = changed
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return changed


def mistakes(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert all(line in str(caught.value) for line in caught.value.mistakes)
    return caught.value.mistakes
