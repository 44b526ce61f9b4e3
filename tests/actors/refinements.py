"""What a refinement of a tiny model takes, for the tests of its numbers and of its ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decomposed import Decomposed

from actors.refinable import Texts
from actors.refine import refine
from actors.refinement import RefinementSpec, RefinementStep
from actors.types import Allocation

VOCABULARY = 384
SPEC = RefinementSpec(steps=12, tokens=128, learning_rate=3e-4, warmup=2, evaluate_every=4, top_k=VOCABULARY)


@dataclass(frozen=True)
class Setting(Decomposed):
    allocation: Allocation
    texts: Texts

    def steps(self, path: Path, spec: RefinementSpec = SPEC, **other: Any) -> Iterator[RefinementStep]:
        store = other.get("store", self.store)
        return refine(self.dense(), store, self.allocation, self.texts, spec, path, {"trial": 3})
