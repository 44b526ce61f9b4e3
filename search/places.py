"""Where prepared files lie: the section of a config, and what it must agree on with others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationInfo, field_validator

from actors.node_cache import is_url
from actors.sources import from_home
from actors.types import NODE_CACHE
from search.section import Section, is_saved, known_home, readable_url

if TYPE_CHECKING:
    from search.sections import CalibrationSection

FACTOR_STORES = "factors"
"""The folder of factor stores beside the studies in `runs`, unless `cache.factors` names another."""


class CacheSection(Section):
    """`factors` is where factor stores are kept: a folder that all nodes share (`factors` in `runs`, unless
    another is named), or a URL. `node` is a folder of each node's own, for copies of what is named by URL."""

    factors: str | None = None
    node: str = NODE_CACHE

    @field_validator("factors")
    @classmethod
    def _there(cls, factors: str | None, info: ValidationInfo) -> str | None:
        if factors is not None and not is_url(factors) and not is_saved(info):
            known_home(factors)
        return readable_url(factors, info)

    @field_validator("node")
    @classmethod
    def _same_everywhere(cls, node: str, info: ValidationInfo) -> str:
        if not node.startswith(("/", "~")):
            raise ValueError(
                f"{node!r} is no absolute path, and processes start in many folders; /... or ~/..."
            )
        if not is_saved(info):
            known_home(node)
        return node


def factor_folder(runs: str, cache: CacheSection) -> Path | None:
    """The folder that all nodes share factor stores in, None where they are at a URL.

    Raises:
        RankfrontError: its `~` is the home of nobody.
    """
    if is_url(cache.factors):
        return None
    return from_home(cache.factors or Path(runs) / FACTOR_STORES, "cache.factors")


def name_mistakes(study: str, runs: str, cache: CacheSection) -> list[str]:
    """A study whose folder would be that of factor stores, which `rm -r` of a study would take along."""
    stores, folder = factor_folder(runs, cache), Path(runs) / study
    if stores is None or stores.resolve() != folder.resolve():
        return []
    return [
        f"study: {study!r} would lie in {folder}, where factor stores are; give it another name, or name "
        "another folder in cache.factors"
    ]


def builder_mistakes(calibration: CalibrationSection, cache: CacheSection) -> list[str]:
    """Several builders write into one folder; a URL is none."""
    if not is_url(cache.factors) or calibration.builders in ("auto", 1):
        return []
    return [
        f"calibration.builders: {calibration.builders} write into one folder, and cache.factors is a URL; "
        "1 or auto, or a folder that all nodes share"
    ]
