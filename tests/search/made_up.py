"""A study that was never run, for what reports and pictures make of one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from actors.types import Allocation, Score, TargetSpec, TaskScore, TextScore
from search.pareto import front, hypervolume
from search.records import Evaluation, Objective, StudySummary, TrialRow

EVIL = "<script>alert('x')</script>"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = tuple(
    TargetSpec(f"layers.{block}.{module}", 576, 576, False, block, module)
    for block in range(30)
    for module in MODULES
)
METHODS = ("feature", "weight")
DENSE_NLL = 3.4


def score(nll: float, split: str = "search", tasks: bool = True, tokens: int = 4096) -> Score:
    acc = max(0.25, 0.55 - 0.1 * (nll - DENSE_NLL))
    named = {
        "arc_easy": TaskScore(400, acc, acc - 0.02, -0.5),
        "boolq": TaskScore(300, acc + 0.05, None, 0.1),
    }
    text = TextScore("wikitext", nll * tokens, tokens, 0.02)
    return Score(split, text, named if tasks else {}, tokens + 900, 2.5, "replica-0")


def trial(number: int, kept: float, nll: float | None, origin: str = "tpe", **more: Any) -> TrialRow:
    rng = np.random.default_rng(number)
    ranks = {t.name: None if rng.random() < 0.2 else int(rng.integers(50, int(576 * kept))) for t in TARGETS}
    methods = {name: METHODS[number % 2] for name, rank in ranks.items() if rank and rank % 3 == 0}
    methods = {} if origin == "uniform" else methods
    allocation = Allocation.of(ranks, TARGETS, methods=methods)
    if origin == "dense":
        allocation = Allocation.dense(TARGETS)
    row = TrialRow(
        number=number,
        state="COMPLETE" if nll is not None else "FAIL",
        origin=origin,
        allocation=allocation,
        budget_linear=1 - (1 - kept) * 1.2,
        budget_model=kept,
        budget_bytes=kept + 0.001,
        macs=int(kept * 10**12) + number,
        values=(kept, nll) if nll is not None else None,
        score=score(nll, tasks=more.pop("tasks", True)) if nll is not None else None,
        seconds=3.0 if nll is not None else None,
        replica="replica-0",
        reason=None,
        copied_from=None,
    )
    return dataclasses.replace(row, **more)


def study(tasks: bool = True, trials: int = 120) -> StudySummary:
    """Random search around a known curve, broken and failed trials, dense and uniform ones."""
    rng = np.random.default_rng(0)
    rows = [trial(0, 1.0, DENSE_NLL, "dense", tasks=tasks)]
    for kept in (0.9, 0.8, 0.7):
        rows.append(trial(len(rows), kept, DENSE_NLL + 9 * (1 - kept) ** 1.3, "uniform", tasks=tasks))
    for number in range(len(rows), trials):
        kept = float(rng.uniform(0.6, 0.97))
        nll = DENSE_NLL + 5 * (1 - kept) ** 1.3 * (1 + float(rng.exponential(0.5)))
        nll = 12.0 + number / 100 if number % 40 == 0 else nll
        rows.append(trial(number, kept, nll, tasks=tasks))
    n = len(rows)
    rows.append(trial(n, 0.5, None, reason=f"nll is nan on the search split {EVIL}"))
    rows.append(trial(n + 1, 0.5, None, reason=f"nll is nan on the search split {EVIL}"))
    rows.append(trial(n + 2, 0.5, None, state="RUNNING", replica=None))
    rows.append(dataclasses.replace(rows[5], number=n + 3, copied_from=5))
    done = [row for row in rows if row.values is not None]
    values = np.array([row.values for row in done])
    chosen = sorted((done[i] for i in front(values)), key=lambda row: -row.budget_model)
    reference = (1.01, 6.0)
    tested = [
        Evaluation(r.number, "factors", "test", "f" * 8, score(r.score.text.nll + 0.05, "test", tasks))
        for r in chosen
        if r.score
    ]
    return StudySummary(
        study=f"demo {EVIL}",
        model=f"HuggingFaceTB/SmolLM2-135M {EVIL}",
        objectives=(Objective("budget.model", True), Objective("nll", True)),
        rows=tuple(rows),
        front=tuple(row.number for row in chosen),
        hypervolume=hypervolume(values, reference),
        reference=reference,
        evaluations=tuple(tested),
        macs_length=512,
        fingerprints={"test": "f" * 8},
        facts={"method": "curvature", "calibration": f"WikiText-2 train, 65,536 tokens {EVIL}"},
    )


def empty_study() -> StudySummary:
    return dataclasses.replace(study(trials=4), rows=(), front=(), evaluations=(), hypervolume=0.0)


def three(**more: Any) -> StudySummary:
    """Dense at 3.0 nats, 88% at 3.25, 65% at 4.0; no tasks, no test scores."""
    rows = (
        trial(0, 1.0, 3.0, "dense", tasks=False),
        trial(1, 0.88, 3.25, tasks=False),
        trial(2, 0.65, 4.0, tasks=False),
    )
    return dataclasses.replace(study(), rows=rows, front=(0, 1, 2), evaluations=(), **more)
