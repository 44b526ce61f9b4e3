"""What a worker that refines holds in memory, and that its trials are none the worse for it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import actors.refiner
from actors.preparation import prepare
from actors.refinement import REFIT, RefinementSpec
from actors.refiner import Refiner
from actors.types import Allocation, Prepared, ReplicaSpec
from search.config import parse_config

SPEC = RefinementSpec(steps=2, tokens=64, held_out=64, evaluate_every=1, top_k=16)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Refiner:
    root: Path = tmp_path_factory.mktemp("refiner")
    config = parse_config(tiny.tiny_config(root))
    *_, prepared = prepare(config.preparation())
    assert isinstance(prepared, Prepared)
    return Refiner(ReplicaSpec("r", config.preparation(), prepared, 1, "cpu"), root / "refined")


@pytest.fixture
def allocation(refiner: Refiner) -> Allocation:
    """Ranks that run as a product."""
    targets = refiner._spec.prepared.targets
    return Allocation.of({target.name: target.full_rank - 1 for target in targets}, targets)


def test_what_trials_hold_is_dropped_while_factors_move(refiner: Refiner, allocation: Allocation) -> None:
    """The factors of every rank, and the products; another trial then scores as before, bit for bit."""
    scorer = refiner._scorer
    before = refiner.score(allocation, "test", None).metrics
    name = allocation.ranks[0][0]
    for spec in (SPEC, RefinementSpec(method=REFIT, held_out=64, top_k=16)):
        product, factors = scorer.trial_model.layer(name)._product, scorer.store.rank(name, 3)[0]
        assert product is not None
        held = [weakref.ref(product), weakref.ref(factors.untyped_storage())]
        del product, factors
        assert all(each() is not None for each in held)
        for _ in refiner.refine(allocation, spec, {}):
            assert all(each() is None for each in held)
            assert not scorer.store._tensors
        assert refiner.score(allocation, "test", None).metrics == before
        assert not scorer.store._tensors, "a device that refines has no room for the factors of every rank"


def test_a_helper_lets_go_of_one_run_before_the_next(
    refiner: Refiner, allocation: Allocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []

    class Shared:
        pass

    @contextlib.contextmanager
    def helping(*asked: Any) -> Iterator[Shared]:
        assert [each for each in alive if each() is not None] == []
        shared = Shared()
        alive.append(weakref.ref(shared))
        yield shared

    monkeypatch.setattr(actors.refiner, "helping", helping)
    for _ in range(2):
        refiner.help(allocation, SPEC)
        assert alive[-1]() is refiner.helping
    assert len(alive) == 2
