"""Sections of a config that say what a search begins with and how its proposals follow from results."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from search.sections import Section


class RunSection(Section):
    """How proposals follow from results.

    `deterministic`: the same trials again from the same seed, with any number of replicas. Trial n is then
    proposed knowing the ends of the trials below n - `lag`, so at most `lag` + 1 are under way at a time.
    """

    deterministic: bool = False
    lag: Annotated[int, Field(ge=0)] = 16
