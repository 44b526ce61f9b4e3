"""The report of a study: one self-contained page, and the files that go with it into the study's folder."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from actors.types import TargetSpec
from search.files import write_atomic
from search.findings import front_cells, front_table, headline, percent
from search.panels import front_rows, panels
from search.plots import front_png
from search.records import StudySummary
from search.tables import evaluations_parquet, front_json, trials_parquet

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["front_table", "headline", "report_html", "write_report"]

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: #1f2937; line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 12px; }
.under { color: #5b6675; margin: 4px 0 24px; overflow-wrap: anywhere; }
section { background: white; border: 1px solid #e3e8ef; border-radius: 10px; padding: 20px 24px;
  margin-bottom: 20px; min-width: 0; }
.found { border-left: 4px solid #2457c5; }
.found p { font-size: 17px; margin: 0 0 6px; }
.found p:last-child { margin: 0; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); column-gap: 20px; }
@media (max-width: 1000px) { .pair { grid-template-columns: minmax(0, 1fr); } }
.wide { overflow: auto; max-height: 640px; }
.wide th { position: sticky; top: 0; background: white; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid #eceff4; text-align: right; white-space: nowrap; }
th { color: #5b6675; font-weight: 600; font-size: 13px; }
tbody tr:hover { background: #f5f8ff; }
th:last-child, td:last-child, .facts th, .facts td { text-align: left; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.facts th { width: 1%; padding-right: 24px; }
.reasons td:not(:last-child), .reasons th:not(:last-child) { width: 1%; }
.reasons td:last-child { white-space: normal; overflow-wrap: anywhere; }
.note { color: #5b6675; font-size: 13px; margin: 10px 0 0; }
select { font: inherit; padding: 4px 8px; margin-left: 8px; max-width: 100%; }
"""

CHOOSE = "Plotly.restyle('ranks', {visible: Array.from(this.options, option => option.selected)})"


def write_report(summary: StudySummary, folder: Path, targets: Sequence[TargetSpec] = ()) -> list[Path]:
    """Write trials.parquet, evaluations.parquet, front.json, front.png and report.html into `folder`.

    Each file is replaced atomically. `targets` (`Prepared.targets`) give the ranks their scale: without
    them the page has no rank map.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes | str] = {
        "trials.parquet": trials_parquet(summary),
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
    from plotly.offline import get_plotlyjs

    sections = [
        _found(summary),
        _charts(summary),
        _front(summary),
        _ranks(summary, targets),
        _progress(summary),
    ]
    sections += [_failures(summary), _facts(summary)]
    title = escape(f"{summary.study}: {summary.model}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head>\n<body><main>\n<h1>{escape(summary.model)}</h1>"
        f'<p class="under">study {escape(summary.study)} · {_count(summary)}</p>\n'
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )


def _found(summary: StudySummary) -> str:
    told = headline(summary) or ["No front point at or under 95% of the parameters yet."]
    return '<section class="found">' + "".join(f"<p>{escape(line)}</p>" for line in told) + "</section>"


def _charts(summary: StudySummary) -> str:
    from search.figures import panel_figure

    titles = {"nll": "Loss", "reasoning.acc": "Reasoning"}
    cards = []
    for panel in panels(summary):
        chart = _chart(panel_figure(panel), f"panel-{panel.metric.replace('.', '-')}")
        note = f'<p class="note">{escape(panel.note)}: autoscale shows them.</p>' if panel.note else ""
        cards.append(
            f"<section><h2>{titles[panel.metric]} against parameters kept</h2>{chart}{note}</section>"
        )
    return f'<div class="pair">{"".join(cards)}</div>' if len(cards) > 1 else "".join(cards)


def _front(summary: StudySummary) -> str:
    cells = front_cells(summary)
    if not cells.rows:
        return ""
    note = "± is one standard error; nll in nats/token, acc in %, kept in % of the model's parameters."
    note += f" {cells.note}." if cells.note else ""
    table = _table(cells.columns, cells.rows)
    return f'<section><h2>Front</h2>{table}<p class="note">{escape(note)}</p></section>'


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
    return f"<section><h2>Where the ranks go</h2>{choice}{_chart(figure, 'ranks')}{note}</section>"


def _progress(summary: StudySummary) -> str:
    from search.figures import hypervolume_figure

    figure = hypervolume_figure(summary)
    if figure is None:
        return ""
    named = zip(summary.objectives, summary.reference, strict=True)
    against = escape(", ".join(f"{objective.name} = {value:g}" for objective, value in named))
    note = f'<p class="note">Volume the front dominates, up to the reference point {against}.</p>'
    return f"<section><h2>Progress of the search</h2>{_chart(figure, 'progress')}{note}</section>"


def _failures(summary: StudySummary) -> str:
    groups: dict[str, list[int]] = defaultdict(list)
    for row in summary.rows:
        if row.state == "FAIL":
            groups[row.reason or "no reason recorded"].append(row.number)
    if not groups:
        return ""
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = [(str(len(numbers)), _few(numbers), reason) for reason, numbers in largest_first]
    return (
        f"<section><h2>Failed trials</h2>{_table(('count', 'trials', 'reason'), rows, 'reasons')}</section>"
    )


def _facts(summary: StudySummary) -> str:
    directions = (f"{o.name} ({'smaller' if o.minimize else 'larger'} is better)" for o in summary.objectives)
    facts = {
        "objectives": ", ".join(directions),
        "reference point": ", ".join(f"{value:g}" for value in summary.reference),
        "hypervolume": f"{summary.hypervolume:.6g}",
        **summary.facts,
    }
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<section><h2>Facts</h2><table class="facts"><tbody>{rows}</tbody></table></section>'


def _count(summary: StudySummary) -> str:
    states = Counter(row.state.lower() for row in summary.rows)
    told = ", ".join(f"{count} {state}" for state, count in states.most_common())
    plural = "" if len(summary.rows) == 1 else "s"
    return escape(f"{len(summary.rows)} trial{plural}" + (f" ({told})" if told else ""))


def _few(numbers: Sequence[int], most: int = 8) -> str:
    more = ", …" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _chart(figure: go.Figure, name: str) -> str:
    """Markup of one figure; `name` is its id. plotly escapes `<`, `>` and `/` inside its script."""
    # plotly's own menu has a button that uploads the chart; this page talks to nobody.
    unwanted = ["sendChartToCloud", "select2d", "lasso2d"]
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": unwanted}
    height = f"{figure.layout.height}px"
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config=config, default_height=height
    )
    return html
