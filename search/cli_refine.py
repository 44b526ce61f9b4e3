"""The command `refine`: wiring only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from actors.refinement import READ_BY_REFIT, REFIT
from actors.types import RankfrontError
from search.cells import cells_table
from search.choosing import OPTIONS, chosen
from search.config import parse_config
from search.folder import find_study, report, summarise
from search.refine import comparison_cells, refine
from search.terminal import (
    Runs,
    StudyName,
    console,
    exit_if_stopped,
    note_untold,
    program,
    quoted,
    tell,
    warn_infeasible,
)


def refine_command(
    study: StudyName,
    trial: Annotated[int | None, typer.Option(help="Which trial.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="The best front point at or under this model budget.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="gradient, or refit in closed form; refine.method where not given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; refine.steps where not given.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step; refine.tokens where not given.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Refine one trial's factors towards the dense model, ranks fixed, and score what came of it."""
    folder = find_study(study, runs)
    raw = folder.config.model_dump(mode="json")
    given = {k: v for k, v in (("method", method), ("steps", steps), ("tokens", tokens)) if v is not None}
    raw["refine"] |= given
    folder = replace(folder, config=parse_config(raw, "refine"))
    idle = [f"--{name}" for name in given if name not in READ_BY_REFIT]
    if folder.config.refine.method == REFIT and idle:
        raise RankfrontError(f"refine: {' and '.join(idle)} for the method gradient; a refit takes no steps")
    summary = summarise(folder, folder.read_study())
    [row] = chosen(summary, trial, budget, options=OPTIONS[:2])
    note_untold(folder, summary, budget)
    warn_infeasible(summary, [row])
    found = refine(folder, row, console)
    tell(f"Stopped: {found.ended}")
    if found.scores:
        title = f"Trial {row.number}, {row.budget_model:.1%} of all parameters: {found.variant}"
        console.print(cells_table(comparison_cells(found.scores), title, left=("split", "metric")))
        report(folder, folder.read_study())
        again = quoted("export", folder.path, "--trial", row.number, "--variant", found.variant)
        tell(f"\nNext:\n  {program()} {again}")
    exit_if_stopped(found.ended)
