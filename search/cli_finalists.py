"""The command `finalists`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.cells import cells_table
from search.choosing import check_budget
from search.config import parse_config
from search.finalist_table import finalist_cells
from search.finalists import run_finalists
from search.folder import find_study
from search.terminal import Runs, StudyName, console, exit_if_stopped, program, quoted, tell


def finalists_command(
    study: StudyName,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="The best front point at or under this model budget; may be repeated."),
    ] = None,
    count: Annotated[int | None, typer.Option(help="So many front points, spread evenly.")] = None,
    refine: Annotated[
        bool | None, typer.Option(help="Refine them; finalists.refine where not given.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Score chosen front members on the test split and refine them; or continue doing so."""
    for each in budget or []:
        check_budget(each)
    folder = find_study(study, runs)
    raw = folder.config.model_dump(mode="json")
    if budget or count is not None:
        raw["finalists"] |= {"budgets": budget or [], "count": count}
    if refine is not None:
        raw["finalists"]["refine"] = refine
    section = parse_config(raw, "finalists").finalists
    summary, rows, reason = run_finalists(folder, section, console)
    cells = finalist_cells(summary, tuple(row.number for row in rows))
    if cells is not None:
        console.print(cells_table(cells, f"{summary.study}: finalists", left=("variant",)))
    tell("Saved in ", (f"{folder.path}/", "bold"), ": evaluations.parquet, report.html")
    if cells is not None and any(row[-1] for row in cells.rows):
        tell(f"\nNext:\n  {program()} export {quoted(folder.path)} --trial N --variant VARIANT")
    exit_if_stopped(reason or "")
