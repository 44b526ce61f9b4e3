"""What a search decides: the rank of every target. Standard library only; imported from `actors.types`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors.errors import RankfrontError


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, the one way fingerprints are made."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class TargetSpec:
    """A linear layer that may be compressed: y = W x + b with W of shape (rows, cols)."""

    name: str
    rows: int
    cols: int
    bias: bool
    block: int
    module: str

    @property
    def full_rank(self) -> int:
        return min(self.rows, self.cols)

    @property
    def parameters(self) -> int:
        """Parameters of the dense layer, its bias included."""
        return self.rows * self.cols + (self.rows if self.bias else 0)


@dataclass(frozen=True)
class Allocation:
    """One rank per target, in the model's order; None means dense (left untouched).

    `methods` names, in the same order, the targets whose rank is cut from the factors of another
    method than the one configured for them.
    """

    ranks: tuple[tuple[str, int | None], ...]
    methods: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        ranks: Mapping[str, int | None],
        targets: Iterable[TargetSpec],
        where: str = "allocation",
        methods: Mapping[str, str] | None = None,
    ) -> Allocation:
        """Order `ranks` by `targets`; a target that is not named stays dense.

        Raises:
            RankfrontError: every unknown target, every rank outside 1..min(rows, cols) and every method
                of a target that stays dense, at once.
        """
        known = {target.name: target for target in targets}
        methods = methods or {}
        named = dict.fromkeys([*ranks, *methods])
        mistakes = [f"{where}: {name!r} is no target of this model" for name in named if name not in known]
        for name, rank in ranks.items():
            if name in known and rank is not None:
                full = known[name].full_rank
                if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= full:
                    mistakes.append(
                        f"{where}.{name}: rank {rank!r} is not an integer in 1..{full} (null keeps it dense)"
                    )
        for name, method in methods.items():
            if name in known and ranks.get(name) is None:
                mistakes.append(f"{where}.{name}: method {method!r} for a target that stays dense")
        if mistakes:
            raise RankfrontError("\n".join(mistakes))
        chosen = tuple((name, methods[name]) for name in known if name in methods)
        return cls(tuple((name, ranks.get(name)) for name in known), chosen)

    @classmethod
    def dense(cls, targets: Iterable[TargetSpec]) -> Allocation:
        return cls(tuple((target.name, None) for target in targets))

    def __iter__(self) -> Iterator[tuple[str, int | None]]:
        return iter(self.ranks)

    @property
    def is_dense(self) -> bool:
        return all(rank is None for _, rank in self.ranks)

    @property
    def key(self) -> str:
        """Identity of the allocation: equal for equal ranks and methods of equal targets."""
        return digest([self.ranks, self.methods] if self.methods else self.ranks)

    def to_dict(self) -> dict[str, int | None]:
        """The rank of each target."""
        return dict(self.ranks)

    def method_of(self, name: str) -> str | None:
        """The method chosen for a target, None where it is the configured one."""
        return dict(self.methods).get(name)
