"""Sections of a config that say what a search begins with and how its proposals follow from results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from search.section import NUMBER, Positive, Section, is_saved


class RunSection(Section):
    """How proposals follow from results.

    `deterministic`: the same trials again from the same seed, with any number of replicas. Trial n is then
    proposed knowing the ends of the trials below n - `lag`, so at most `lag` + 1 are under way at a time.
    """

    deterministic: bool = False
    lag: Annotated[int, Field(ge=0), NUMBER] = 16


class WarmStartSection(Section):
    """Scored after the seeds: what other searches found (`search.warm`).

    Each of `sources` is the folder of a study, its name beside this one or in the same database, or a file of
    allocations. Of a study at most `limit` members of its front are taken, of a file all.
    """

    sources: tuple[str, ...] = ()
    limit: Positive = 16

    @field_validator("sources")
    @classmethod
    def _absolute(cls, sources: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Paths that are there, so that the study can be resumed from another folder."""
        if is_saved(info):
            return sources
        return tuple(str(Path(name).resolve()) if _is_source(Path(name)) else name for name in sources)


def _is_source(path: Path) -> bool:
    """Whether a file, or a study's folder: any other folder may have the name of a study elsewhere."""
    return path.is_file() or (path / "config.yaml").exists()
