"""Allocations every front is read against: dense, and uniform ones."""

from __future__ import annotations

from collections.abc import Iterator

from actors.types import Allocation
from search.cost import CostModel
from search.sections import ReferenceSection


def reference_allocations(section: ReferenceSection, cost: CostModel) -> Iterator[tuple[Allocation, str]]:
    """(allocation, origin) pairs: dense first, then each uniform linear budget as configured."""
    if section.dense:
        yield Allocation.dense(cost.targets), "dense"
    for share in section.uniform:
        if share < 1:
            yield cost.uniform(share), "uniform"
