"""Made-up targets, costs, scores and studies: the search without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.types import Allocation, Score, TargetSpec, TaskScore, TextScore
from search.config import SamplerSection
from search.cost import CostModel
from search.journal import open_journal
from search.records import Objective
from search.samplers import make_sampler
from search.space import Space
from search.study import SearchStudy, open_storage_study

SHAPES = {"q_proj": (24, 24), "up_proj": (48, 24), "down_proj": (24, 48)}
TARGETS = tuple(
    TargetSpec(f"layers.{block}.{module}", rows, cols, False, block, module)
    for block in range(4)
    for module, (rows, cols) in SHAPES.items()
)
LINEAR_PARAMETERS = 4 * (24 * 24 + 2 * 48 * 24)
MODEL_PARAMETERS = LINEAR_PARAMETERS + 3_000
OBJECTIVES = (Objective("budget.model", True), Objective("nll", True))
DENSE_NLL = 2.0


def cost_model(storage: str = "pivoted", bias: str = "none") -> CostModel:
    return CostModel(TARGETS, MODEL_PARAMETERS, storage, bias)


def space_of(cost: CostModel, **changes: Any) -> Space:
    return Space(cost, **{"group": "module", "segments": 1, "levels": 10, "floor": 0.2, **changes})


def open_study(
    folder: Path,
    sampler: str = "random",
    seed: int = 0,
    population: int = 6,
    objectives: tuple[Objective, ...] = OBJECTIVES,
    **space: Any,
) -> SearchStudy:
    """The study of a folder, created if it is new: what a driver does when it starts."""
    cost = cost_model()
    section = SamplerSection(name=sampler, seed=seed, population=population)
    study = open_storage_study(open_journal(folder), "made-up", objectives)
    return SearchStudy(study, make_sampler(section), seed, space_of(cost, **space), cost, objectives)


def loss(allocation: Allocation) -> float:
    """Dense loss plus what each target's missing ranks cost; later targets cost more."""
    full = {target.name: target.full_rank for target in TARGETS}
    missing = [(1 - (full[name] if rank is None else rank) / full[name]) ** 2 for name, rank in allocation]
    return DENSE_NLL + sum(index * share for index, share in enumerate(missing, 1)) / 10


def score_of(allocation: Allocation, nll: float | None = None, tokens: int = 100) -> Score:
    nll = loss(allocation) if nll is None else nll
    text = TextScore("made-up@32", nats=nll * tokens, tokens=tokens, stderr=0.01)
    tasks = {"boolq": TaskScore(examples=10, acc=0.6, acc_norm=None, margin=0.25)}
    return Score("search", text, tasks, forward_tokens=tokens, seconds=0.5, replica="made-up")
