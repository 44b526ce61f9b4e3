"""Seeds against exhaustive search, scipy's convex hull, and the promises of a ladder."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from fakes import DENSE_NLL, TARGETS, cost_model, energy_of, score_of, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from actors.types import Allocation, FactorSpec, TargetSpec
from search.alone import Log, cells
from search.cost import CostModel
from search.sections import SeedSection
from search.seeds import (
    DENSE,
    Curve,
    curves_of,
    hull,
    measured_losses,
    seed_allocations,
    share_out,
    tail_losses,
)
from search.spectra import truncation_loss

BUDGETS = (0.95, 0.8, 0.6)
FACTORS = FactorSpec(method="feature")
COST = cost_model("auto", "mean")
FLOOR = 0.3


@st.composite
def problems(draw: st.DrawFn) -> tuple[CostModel, list[np.ndarray], float]:
    """Up to three small targets; spectra that fall, or do not."""
    shapes = draw(st.lists(st.tuples(st.integers(3, 9), st.integers(3, 9)), min_size=1, max_size=3))
    targets = tuple(TargetSpec(f"t{i}", m, n, False, i, "m") for i, (m, n) in enumerate(shapes))
    storage = draw(st.sampled_from(["auto", "pivoted", "factored"]))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    spectra = [random.exponential(size=target.full_rank) for target in targets]
    if draw(st.booleans()):
        spectra = [-np.sort(-spectrum) for spectrum in spectra]
    return CostModel(targets, 10**4, storage, "none"), spectra, draw(st.floats(0.2, 1))


@pytest.mark.parametrize("storage", ["auto", "pivoted"])
@pytest.mark.parametrize(("bias", "of_layer"), [("mean", False), ("mean", True), ("none", False)])
def test_a_target_that_keeps_all_is_dense_and_not_at_full_rank(
    storage: str, bias: str, of_layer: bool
) -> None:
    """Its full rank may store as much, and is predicted to lose as little."""
    targets = tuple(TargetSpec(f"t{block}", 8, 8, of_layer, block, "m") for block in range(3))
    cost = CostModel(targets, 10**4, storage, bias)
    curves = curves_of(cost, 0.2, lambda target: np.linspace(1, 0, 8))
    assert [curve.ranks[-1] for curve in curves] == [DENSE] * 3
    [ranks] = share_out(curves, [cost.linear_parameters])
    assert ranks == [None] * 3


@settings(max_examples=60, deadline=None)
@given(problems())
def test_an_allocation_is_the_best_but_for_one_edge(
    problem: tuple[CostModel, list[np.ndarray], float],
) -> None:
    """Never over the budget, and at least as good as the best of all with one hull edge less to spend."""
    cost, spectra, share = problem
    curves = curves_of(cost, 0.2, lambda target: tail_losses(spectra[target.block]))
    budget = int(share * cost.linear_parameters)
    widest = max(int(np.diff(each.sizes[each.corners]).max(initial=0)) for each in curves)

    def best(limit: int) -> float:
        every = itertools.product(*(zip(each.sizes, each.losses, strict=True) for each in curves))
        sums = ((sum(s for s, _ in chosen), sum(loss for _, loss in chosen)) for chosen in every)
        return min((loss for size, loss in sums if size <= limit), default=np.inf)

    [ranks] = share_out(curves, [budget])
    if ranks is None:
        assert best(budget) == np.inf
        return
    found = Allocation(tuple(zip((t.name for t in cost.targets), ranks, strict=True)))
    total = sum(truncation_loss(s, rank) for s, rank in zip(spectra, ranks, strict=True))
    assert cost.linear(found) <= budget
    assert best(budget) - 1e-9 <= total <= best(budget - widest) + 1e-9
    if cost.linear(found) in {sum(c) for c in itertools.product(*(e.sizes[e.corners] for e in curves))}:
        assert total <= best(cost.linear(found) - widest) + 1e-9


@pytest.mark.parametrize("bends", [0, 1, 3])
def test_straight_curves_keep_the_budget(bends: int) -> None:
    """Edges of a target that gain the same up to rounding are counted from the lowest one."""
    random = np.random.default_rng(bends)
    for _ in range(400):
        curves = [straight(random, bends) for _ in range(random.integers(1, 9))]
        least, most = (sum(int(curve.sizes[end]) for curve in curves) for end in (0, -1))
        budgets = random.integers(least, most + 1, 4).tolist()
        widest = max(int(np.diff(curve.sizes).max()) for curve in curves)
        for budget, ranks in zip(budgets, share_out(curves, budgets), strict=True):
            assert ranks is not None
            stored = sum(
                int(curve.sizes[curve.ranks.tolist().index(DENSE if rank is None else rank)])
                for curve, rank in zip(curves, ranks, strict=True)
            )
            assert budget - widest < stored <= budget


def straight(random: np.random.Generator, bends: int) -> Curve:
    """A straight line of losses with at most `bends` bends, convex."""
    count = int(random.integers(3, 20))
    sizes = np.cumsum(random.integers(1, 60, count))
    lacking, reach = sizes[-1] - sizes, np.cumsum(random.integers(1, 300, (1 + bends, 1)), axis=0)
    lines = random.exponential(size=(1 + bends, 1))
    losses = np.sum(lines * np.maximum(lacking - reach + reach[0], 0), axis=0)
    ranks = np.append(np.arange(1, count), DENSE)
    return Curve(ranks, sizes, losses, hull(sizes, losses))


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(0, 10**6))
def test_the_hull_is_the_lower_convex_hull(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = np.cumsum(random.integers(1, 9, count))
    values = random.exponential(size=count)
    corners = set(ConvexHull(np.column_stack([sizes, values])).vertices.tolist())
    chord = np.interp(sizes, sizes[hull(sizes, values)], values[hull(sizes, values)])
    assert (chord <= values + 1e-12).all()
    assert set(hull(sizes, values).tolist()) <= corners


def test_tails_are_the_losses_of_truncation() -> None:
    spectrum = np.random.default_rng(0).exponential(size=7)
    assert tail_losses(spectrum) == pytest.approx([truncation_loss(spectrum, r) for r in range(1, 8)])


def test_marginal_losses_per_parameter_are_equal() -> None:
    """What the last rank of each target saves is worth more than what the next one of any would."""
    spectra = {t.name: (1 + t.block) * 0.7 ** np.arange(t.full_rank) for t in TARGETS}
    curves = curves_of(COST, FLOOR, lambda target: tail_losses(spectra[target.name]))
    [ranks] = share_out(curves, [int(0.7 * COST.linear_parameters)])
    assert ranks is not None
    kept, next_ = [], []
    for each, rank in zip(curves, ranks, strict=True):
        at = each.ranks.tolist().index(rank or DENSE)
        slopes = -np.diff(each.losses[each.corners]) / np.diff(each.sizes[each.corners])
        corner = int(np.searchsorted(each.corners, at, side="right")) - 1
        kept += slopes[:corner].tolist()
        next_ += slopes[corner + 1 :].tolist()  # past the edge the budget may end in
    assert len(kept) > len(next_) > len(TARGETS)
    assert min(kept) >= max(next_) - 1e-12


def seeds(
    folder: Path, section: SeedSection, log: Log | None = None, floor: float = FLOOR, with_loss: bool = True
) -> tuple[list[Allocation], list[str]]:
    losses = {t.name: {"feature": energy_of(t)} for t in TARGETS}
    store = write_store(folder / "store", losses, losses if with_loss else None)
    said: list[str] = []
    found = list(seed_allocations(section, COST, floor, FACTORS, store, log, (0.75, 0.4), said.append))
    assert {origin for _, origin in found} <= {"seed"}
    return [allocation for allocation, _ in found], said


def test_a_ladder_meets_its_budgets_and_the_floor(tmp_path: Path) -> None:
    found, said = seeds(tmp_path, SeedSection(spectra=BUDGETS))
    assert not said
    lowest = COST.uniform(FLOOR).to_dict()
    for budget, allocation in zip(BUDGETS, found, strict=True):
        linear = COST.budgets(allocation)["budget.linear"]
        assert budget - 0.02 < linear <= budget
        assert all(rank is None or rank >= lowest[name] for name, rank in allocation)
    by_block = [
        sum(found[-1].to_dict()[f"layers.{b}.{m}"] or 24 for m in ("q_proj", "up_proj")) for b in (0, 3)
    ]
    assert by_block[0] > by_block[1], "the flatter spectrum keeps more"
    assert seeds(tmp_path / "again", SeedSection(spectra=BUDGETS)) == (found, [])


def test_what_cannot_be_worked_out_is_said(tmp_path: Path) -> None:
    found, said = seeds(tmp_path / "a", SeedSection(spectra=(0.8, 0.6)), floor=0.7)
    assert len(found) == 1
    assert said == ["seeds.spectra: none at 0.6; space.floor 0.7 keeps more than that"]
    found, [said_once] = seeds(tmp_path / "b", SeedSection(), with_loss=False)
    assert not found
    assert "12 of 12 targets have no predicted loss (layers.0.q_proj is the first)" in said_once


def measured_log(folder: Path, weights: dict[str, float]) -> Log:
    """Targets scored alone: a target loses its weight times the square of the share it gives up."""
    folder.mkdir(exist_ok=True)
    log = Log(folder, {"search": "s", "factors": "f"})
    dense = Allocation.dense(TARGETS)
    log.add(dense, None, score_of(dense, DENSE_NLL), None)
    for cell in cells(COST, (0.75, 0.4)):
        loss = weights.get(cell.target.name)
        if loss is not None:
            score = score_of(cell.allocation, DENSE_NLL + loss * (1 - cell.share) ** 2)
            log.add(cell.allocation, cell, score, None)
    return log


def test_measured_losses_decide_where_there_are_any(tmp_path: Path) -> None:
    """The spectra keep early blocks; measured, the last block loses most, so it keeps most."""
    weights = {t.name: float(t.block**2) for t in TARGETS}
    section = SeedSection(spectra=(), sensitivity=BUDGETS)
    found, said = seeds(tmp_path, section, measured_log(tmp_path, weights))
    assert not said
    for budget, allocation in zip(BUDGETS, found, strict=True):
        assert budget - 0.05 < COST.budgets(allocation)["budget.linear"] <= budget
    stored = {t.name: COST.stored(t, found[-1].to_dict()[t.name]).parameters for t in TARGETS}
    for module in ("q_proj", "up_proj", "down_proj"):
        sizes = [stored[f"layers.{block}.{module}"] for block in range(4)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1]


def test_unmeasured_targets_are_counted(tmp_path: Path) -> None:
    weights = {t.name: 1.0 for t in TARGETS[:9]}
    section = SeedSection(spectra=(), sensitivity=BUDGETS)
    found, [said] = seeds(tmp_path, section, measured_log(tmp_path, weights))
    assert not found
    assert "3 of 12 targets have no measured loss (layers.3.q_proj is the first)" in said


def test_a_target_keeps_more_than_what_broke_the_model(tmp_path: Path) -> None:
    """One that always broke stays dense; one that was lost with its replica tells nothing."""
    section = SeedSection(spectra=(), sensitivity=(0.6,))
    low, always, lost = cheap = [target.name for target in TARGETS[:3]]
    log = measured_log(tmp_path, {t.name: 0.001 if t.name in cheap else 1.0 for t in TARGETS})
    [before], _ = seeds(tmp_path, section, log)
    for cell in cells(COST, (0.75, 0.4)):
        if cell.target.name == always or (cell.target.name in (low, lost) and cell.share == 0.4):
            log.add(cell.allocation, cell, None, "nll is nan", cell.target.name == lost)
    [found], said = seeds(tmp_path, section, log)
    assert not said
    broke = next(cell.rank for cell in cells(COST, (0.4,)) if cell.target.name == low)
    assert broke is not None
    ranks, ranks_before = found.to_dict(), before.to_dict()
    assert (ranks_before[low] or 99) <= broke
    assert (ranks[low] or 99) > broke
    assert ranks_before[always] is not None
    assert ranks[always] is None
    assert (ranks[lost] or 99) <= broke
    assert COST.budgets(found)["budget.linear"] <= 0.6


def test_noise_of_measured_losses_is_taken_out() -> None:
    """Gains are none, and keeping more never costs: what is left is 0 at dense and falls."""
    target = TARGETS[1]
    losses = measured_losses(COST, target, {4: 0.5, 9: 0.7, 14: 0.1, 18: -0.3})
    assert (np.diff(losses) <= 1e-12).all()
    assert losses[-1] == 0
    assert losses[3] == pytest.approx(0.7), "rank 4 cannot lose less than rank 9"
    assert losses[13] == pytest.approx(0.1)
