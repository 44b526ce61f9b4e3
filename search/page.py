"""The frame of a page: one self-contained file that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

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
.named th:first-child, .named td:first-child { text-align: left; }
.named th:last-child, .named td:last-child { text-align: right; }
.note { color: #5b6675; font-size: 13px; margin: 10px 0 0; }
select { font: inherit; padding: 4px 8px; margin-left: 8px; max-width: 100%; }
"""


def page(title: str, heading: str, under: str, sections: Iterable[str]) -> str:
    """A whole page with script and style inside. Texts are escaped here; `sections` are markup."""
    from plotly.offline import get_plotlyjs

    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head>\n<body><main>\n<h1>{escape(heading)}</h1>"
        f'<p class="under">{escape(under)}</p>\n'
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Markup of a table; cells are text and are escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    markup = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{markup}</div>'


def chart(figure: go.Figure, name: str) -> str:
    """Markup of one figure; `name` is its id. plotly escapes `<`, `>` and `/` inside its script."""
    # plotly's own menu has a button that uploads the chart; this page talks to nobody.
    unwanted = ["sendChartToCloud", "select2d", "lasso2d"]
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": unwanted}
    height = f"{figure.layout.height}px"
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config=config, default_height=height
    )
    return html


def facts_section(facts: Iterable[tuple[str, object]]) -> str:
    """The section of names and values, one a row."""
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts)
    return f'<section><h2>Facts</h2><table class="facts"><tbody>{rows}</tbody></table></section>'
