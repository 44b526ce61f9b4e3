"""The report of targets alone: `sensitivity.parquet`, `sensitivity.html` and `sensitivity.png`."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from search.cells import Cells
from search.files import write_atomic
from search.findings import error_bar, percent
from search.page import chart, facts_section, page, table
from search.sensitivity_table import (
    Sensitivity,
    found,
    module_cells,
    sensitivity_parquet,
    target_cells,
)


def write_sensitivity(sensitivity: Sensitivity, folder: Path) -> list[Path]:
    """Write the table, the page and the picture into `folder`, each replaced atomically."""
    from search.heat import heat_maps, heat_png

    files: dict[str, bytes | str] = {
        "sensitivity.parquet": sensitivity_parquet(sensitivity),
        "sensitivity.html": sensitivity_html(sensitivity),
        "sensitivity.png": heat_png(sensitivity, heat_maps(sensitivity)),
    }
    for name, data in files.items():
        write_atomic(folder / name, data)
    return [folder / name for name in files]


def sensitivity_html(sensitivity: Sensitivity) -> str:
    """The page. It loads nothing from anywhere."""
    title = f"{sensitivity.study}: targets alone"
    under = f"study {sensitivity.study} · every target compressed alone, all others dense"
    return page(title, sensitivity.model, under, _sections(sensitivity))


def _sections(sensitivity: Sensitivity) -> Iterator[str]:
    from search.heat import figure, heat_maps

    yield (
        '<section class="found">' + "".join(f"<p>{escape(t)}</p>" for t in found(sensitivity)) + "</section>"
    )
    for index, heat in enumerate(heat_maps(sensitivity)):
        yield f"<section><h2>{escape(heat.title)}</h2>{chart(figure(heat), f'heat-{index}')}</section>"
    yield _section("By module type", module_cells(sensitivity))
    share = f"alone at {percent(sensitivity.middle)} of its parameters"
    yield _section(f"Lose least per parameter saved, {share}", target_cells(sensitivity.least))
    yield _section(f"Lose most per parameter saved, {share}", target_cells(sensitivity.most))
    yield _missing(sensitivity)
    text = sensitivity.dense.text
    loss = f"{text.nll:.4f}{error_bar(text.stderr, 4, ' ± ')}"
    dense = f"{loss} nats/token ({text.name}, {text.tokens:,} tokens)"
    yield facts_section({"dense model": dense, **sensitivity.facts}.items())


def _section(title: str, cells: Cells) -> str:
    if not cells.rows:
        return ""
    note = f'<p class="note">{escape(cells.note)}.</p>' if cells.note else ""
    return f"<section><h2>{escape(title)}</h2>{table(cells.columns, cells.rows, 'named')}{note}</section>"


def _missing(sensitivity: Sensitivity) -> str:
    without = [row for row in sensitivity.rows if row.score is None]
    lines = [(row.target.name, str(row.rank or "dense"), row.reason or "") for row in without]
    if not lines:
        return ""
    columns = ("target", "rank", "reason")
    return f"<section><h2>Without a score</h2>{table(columns, lines, 'reasons')}</section>"
