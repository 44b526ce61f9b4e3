"""The report of a study: one self-contained page, and the files that go with it into the study's folder."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from actors.types import TargetSpec
from search.cells import Cells
from search.constraints import broken
from search.files import write_atomic
from search.finalist_table import finalist_cells
from search.findings import front_cells, front_table, headline, percent
from search.further import further_cells
from search.harness_table import harness_cells
from search.page import chart, facts_section, page, table
from search.panels import front_rows, infeasible_rows, panels
from search.plots import front_png
from search.records import StudySummary
from search.tables import TRIALS, evaluations_parquet, front_json, trials_parquet

__all__ = ["front_table", "headline", "report_html", "write_report"]

MOST_INFEASIBLE = 20
"""Rows of the table of trials that violate a constraint: trials.parquet has them all."""

CHOOSE = "Plotly.restyle('ranks', {visible: Array.from(this.options, option => option.selected)})"


def write_report(summary: StudySummary, folder: Path, targets: Sequence[TargetSpec] = ()) -> list[Path]:
    """Write trials.parquet, evaluations.parquet, front.json, front.png and report.html into `folder`.

    Each file is replaced atomically. `targets` (`Prepared.targets`) give the ranks their scale: without
    them the page has no rank map.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes | str] = {
        TRIALS: trials_parquet(summary),
        "evaluations.parquet": evaluations_parquet(summary),
        "front.json": front_json(summary),
        "front.png": front_png(summary),
        "report.html": report_html(summary, targets),
    }
    for name, data in files.items():
        write_atomic(folder / name, data)
    return [folder / name for name in files]


def report_html(summary: StudySummary, targets: Sequence[TargetSpec] = ()) -> str:
    """The page. It loads nothing from anywhere: script, style and data are inside."""
    sections = [
        _found(summary),
        _charts(summary),
        _front(summary),
        _further(summary),
        _finalists(summary),
        _harness(summary),
        _ranks(summary, targets),
        _progress(summary),
    ]
    sections += [_infeasible(summary), _stopped(summary), _failures(summary), _facts(summary)]
    title = f"{summary.study}: {summary.model}"
    return page(title, summary.model, f"study {summary.study} · {_count(summary)}", sections)


def _found(summary: StudySummary) -> str:
    told = headline(summary) or ["No front point at or under 95% of the parameters yet."]
    return '<section class="found">' + "".join(f"<p>{escape(line)}</p>" for line in told) + "</section>"


def _charts(summary: StudySummary) -> str:
    from search.figures import panel_figure

    titles = {"nll": "Loss", "reasoning.acc": "Reasoning"}
    cards = []
    for panel in panels(summary):
        shown = chart(panel_figure(panel), f"panel-{panel.metric.replace('.', '-')}")
        note = f'<p class="note">{escape(panel.note)}: autoscale shows them.</p>' if panel.note else ""
        cards.append(
            f"<section><h2>{titles[panel.metric]} against parameters kept</h2>{shown}{note}</section>"
        )
    return f'<div class="pair">{"".join(cards)}</div>' if len(cards) > 1 else "".join(cards)


def _front(summary: StudySummary) -> str:
    cells = front_cells(summary)
    if not cells.rows:
        return ""
    note = (
        "± is one standard error; nll in nats/token, margins in nats, accuracies and budgets in %, "
        "kept in % of the model's parameters."
    )
    note += f" {cells.note}." if cells.note else ""
    shown = table(cells.columns, cells.rows)
    return f'<section><h2>Front</h2>{shown}<p class="note">{escape(note)}</p></section>'


def _further(summary: StudySummary) -> str:
    note = (
        "MACs@L: of a token that attends to L positions. ± is one standard error; kl and nll in nats/token, "
        "bias in %, likelihood_diff in nats."
    )
    return _named_table("More about the front", further_cells(summary), note)


def _finalists(summary: StudySummary) -> str:
    cells = finalist_cells(summary)
    note = f"{cells.note}; nll in nats/token, kept in % of the model's parameters." if cells else ""
    return _named_table("Refined finalists", cells, note)


def _harness(summary: StudySummary) -> str:
    cells = harness_cells(summary)
    note = f"{cells.note}; kept in % of the model's parameters." if cells else ""
    return _named_table("lm-evaluation-harness", cells, note)


def _named_table(title: str, cells: Cells | None, note: str) -> str:
    """A section of one table; nothing where there is none."""
    if cells is None:
        return ""
    shown = table(cells.columns, cells.rows, "named")
    return f'<section><h2>{title}</h2>{shown}<p class="note">{escape(note)}</p></section>'


def _ranks(summary: StudySummary, targets: Sequence[TargetSpec]) -> str:
    from search.figures import first_shown, rank_figure

    figure = rank_figure(summary, targets)
    if figure is None:
        return ""
    members = [
        f"trial {row.number} · {percent(row.budget_model)} kept · {row.score.text.nll:.3f} nats/token"
        for row in front_rows(summary)
        if row.score is not None
    ]
    options = "".join(
        f"<option{' selected' if index == first_shown(len(members)) else ''}>{member}</option>"
        for index, member in enumerate(members)
    )
    menu = f'<select autocomplete="off" onchange="{escape(CHOOSE)}">{options}</select>'
    choice = f"<label>Front member{menu}</label>"
    note = '<p class="note">Share of full rank kept. A dot marks a target left dense.</p>'
    return f"<section><h2>Where the ranks go</h2>{choice}{chart(figure, 'ranks')}{note}</section>"


def _progress(summary: StudySummary) -> str:
    from search.figures import hypervolume_figure

    figure = hypervolume_figure(summary)
    if figure is None:
        return ""
    named = zip(summary.objectives, summary.reference, strict=True)
    against = escape(", ".join(f"{objective.name} = {value:g}" for objective, value in named))
    note = f'<p class="note">Volume the front dominates, up to the reference point {against}.</p>'
    return f"<section><h2>Progress of the search</h2>{chart(figure, 'progress')}{note}</section>"


def _infeasible(summary: StudySummary) -> str:
    """Finished trials that violate a constraint, smallest violation first: never on the front."""
    found = infeasible_rows(summary)
    if not found:
        return ""
    rows = [
        (str(row.number), percent(row.budget_model), row.origin, broken(summary.constraints, row))
        for row in found[:MOST_INFEASIBLE]
    ]
    shown = table(("trial", "kept", "origin", "violates"), rows, "reasons")
    more = f", the nearest {MOST_INFEASIBLE} shown" if len(found) > MOST_INFEASIBLE else ""
    finished = sum(row.finished for row in summary.rows)
    note = f"{len(found)} of {finished} finished trials{more}; none is on the front."
    return f'<section><h2>Trials that violate a constraint</h2>{shown}<p class="note">{note}</p></section>'


def _stopped(summary: StudySummary) -> str:
    """Trials that a rival dominated before they were scored to the end; they are in no chart."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in summary.rows:
        if row.state == "PRUNED" and row.score is not None and row.stopped_by is not None:
            groups[row.score.forward_tokens, row.stopped_by].append(row.number)
    if not groups:
        return ""
    rows = [
        (f"{tokens:,}", str(rival), str(len(numbers)), _few(numbers))
        for (tokens, rival), numbers in sorted(groups.items())
    ]
    columns = ("tokens scored", "dominated by trial", "count", "trials")
    return f"<section><h2>Trials stopped early</h2>{table(columns, rows, 'stopped')}</section>"


def _failures(summary: StudySummary) -> str:
    groups: dict[str, list[int]] = defaultdict(list)
    for row in summary.rows:
        if row.state == "FAIL":
            groups[row.reason or "no reason recorded"].append(row.number)
    if not groups:
        return ""
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = [(str(len(numbers)), _few(numbers), reason) for reason, numbers in largest_first]
    return f"<section><h2>Failed trials</h2>{table(('count', 'trials', 'reason'), rows, 'reasons')}</section>"


def _facts(summary: StudySummary) -> str:
    directions = (f"{o.name} ({'smaller' if o.minimize else 'larger'} is better)" for o in summary.objectives)
    facts = {
        "objectives": ", ".join(directions),
        "reference point": ", ".join(f"{value:g}" for value in summary.reference),
        "hypervolume": f"{summary.hypervolume:.6g}",
        **summary.facts,
    }
    return facts_section(facts.items())


def _count(summary: StudySummary) -> str:
    states = Counter(row.state.lower() for row in summary.rows)
    told = ", ".join(f"{count} {state}" for state, count in states.most_common())
    plural = "" if len(summary.rows) == 1 else "s"
    return f"{len(summary.rows)} trial{plural}" + (f" ({told})" if told else "")


def _few(numbers: Sequence[int], most: int = 8) -> str:
    more = ", …" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more
