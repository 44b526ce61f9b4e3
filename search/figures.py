"""The interactive figures of the page. Text from the study is escaped, for plotly reads a little HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from actors.types import Allocation, TargetSpec
from search.findings import perplexity
from search.panels import Panel, Point, front_rows, perplexity_ticks
from search.pareto import hypervolume_history
from search.plots import DENSE, FRONT, INFEASIBLE, SEED, TRIAL, UNIFORM
from search.records import StudySummary

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
GRID = "#e8ecf2"
SHARES = [[0.0, "#f4f7fd"], [0.5, "#7fa3ea"], [1.0, "#163a8a"]]
REFERENCES = ("dense", "uniform", "seed")
"""Origins with marks of their own."""
KEPT = "parameters kept, %  (more compression →)"


def panel_figure(panel: Panel) -> go.Figure:
    """One panel of the picture: hover tells trial, origin, value and standard error."""
    figure = _figure(KEPT, panel.label, height=460)
    hover = _hover(panel)
    members = {point.trial for point in panel.front}
    others = [p for p in panel.trials if p.trial not in members and p.origin not in REFERENCES]
    _dots(figure, "trial", [p for p in others if p.feasible], hover, size=6, color=TRIAL, opacity=0.6)
    _dots(figure, INFEASIBLE, panel.infeasible, hover, size=7, color=TRIAL, symbol="x-thin-open")
    best = panel.best
    line = {"x": [p.kept for p in best], "y": [p.value for p in best], "line": {"color": FRONT, "width": 2}}
    figure.add_trace(go.Scatter(mode="lines", showlegend=False, hoverinfo="skip", **line))
    _dots(figure, "uniform", panel.uniform, hover, size=9, color=UNIFORM, symbol="square")
    _dots(figure, "seed", panel.seeds, hover, size=9, color=SEED, symbol="triangle-up")
    errors = [p.stderr if math.isfinite(p.stderr) else None for p in panel.front]
    _dots(figure, "front, search split", panel.front, hover, errors, size=9, color=FRONT)
    _dots(figure, "front, test split", panel.test, hover, size=9, color=FRONT, symbol="diamond-open")
    _dots(figure, "dense", [panel.dense] if panel.dense else [], hover, size=16, color=DENSE, symbol="star")
    figure.update_layout(margin={"b": 115})  # two lines of legend under the title of the axis
    figure.update_xaxes(range=[panel.span[1], panel.span[0]])
    figure.update_yaxes(range=list(panel.limits))
    if panel.metric == "nll":
        _perplexity_axis(figure, panel)
    return figure


def hypervolume_figure(summary: StudySummary) -> go.Figure | None:
    """Hypervolume after each finished trial, by trial number; None where there is nothing to draw."""
    rows = [row for row in summary.rows if row.finished]
    if not rows or len(summary.reference) != len(summary.objectives):
        return None
    signs = np.array([1.0 if objective.minimize else -1.0 for objective in summary.objectives])
    points = [row.point(summary.objectives) for row in rows]
    history = hypervolume_history(points, np.array(summary.reference) * signs)
    figure = _figure("trial", "hypervolume", height=340)
    line = {"color": FRONT, "width": 2, "shape": "hv"}
    x = [row.number for row in rows]
    figure.add_trace(go.Scatter(x=x, y=history.tolist(), mode="lines", line=line, showlegend=False))
    return figure


def rank_figure(summary: StudySummary, targets: Sequence[TargetSpec]) -> go.Figure | None:
    """Share of full rank kept, block by module: one trace per front member, that at `first_shown` visible."""
    rows = front_rows(summary)
    if not rows or not targets:
        return None
    figure = _figure("block", "", height=120 + 34 * len({target.module for target in targets}))
    for index, row in enumerate(rows):
        figure.add_trace(_rank_trace(row.allocation, targets, visible=index == first_shown(len(rows))))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False)
    return figure


def first_shown(members: int) -> int:
    """The member of the front the page opens with: the middle one, since the first is mostly dense."""
    return members // 2


def _rank_trace(allocation: Allocation, targets: Sequence[TargetSpec], visible: bool) -> go.Heatmap:
    """Cells (modules, blocks); where no target is, the cell stays empty."""
    blocks = sorted({target.block for target in targets})
    modules = list(dict.fromkeys(target.module for target in targets))
    ranks = allocation.to_dict()
    share: list[list[float | None]] = [[None] * len(blocks) for _ in modules]
    told = [[""] * len(blocks) for _ in modules]
    mark = [[""] * len(blocks) for _ in modules]
    for target in targets:
        row, column = modules.index(target.module), blocks.index(target.block)
        rank = ranks.get(target.name)
        share[row][column] = 1.0 if rank is None else rank / target.full_rank
        told[row][column] = f"{escape(target.name)}<br>" + (
            "dense" if rank is None else f"rank {rank} of {target.full_rank}"
        )
        mark[row][column] = "·" if rank is None else ""
    return go.Heatmap(
        x=blocks,
        y=[escape(module) for module in modules],
        z=share,
        customdata=told,
        text=mark,
        texttemplate="%{text}",
        textfont={"color": "white", "size": 16},
        hovertemplate="%{customdata}<br>%{z:.1%} of full rank<extra></extra>",
        colorscale=SHARES,
        zmin=0,
        zmax=1,
        xgap=2,
        ygap=2,
        visible=visible,
        colorbar={"tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
    )


def _figure(x: str, y: str, height: int) -> go.Figure:
    axis: dict[str, Any] = {"gridcolor": GRID, "zeroline": False, "linecolor": "#c8d0db", "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 60, "r": 20, "t": 36, "b": 50},
            "font": {"family": FONT, "size": 13, "color": "#1f2937"},
            "xaxis": {**axis, "title": {"text": x}},
            "yaxis": {**axis, "title": {"text": y}},
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
            "hoverlabel": {"bgcolor": "white", "font": {"color": "#1f2937"}},
        }
    )


def _hover(panel: Panel) -> Callable[[Point], str]:
    def told(point: Point) -> str:
        error = f" ± {point.stderr:.3g}" if math.isfinite(point.stderr) else ""
        more = f"<br>perplexity {perplexity(point.value)}" if panel.metric == "nll" else ""
        head = f"<b>trial {point.trial}</b> · {escape(point.origin)}<br>{point.kept:.1f}% kept<br>"
        return f"{head}{panel.metric} {point.value:.4g}{error}{more}"

    return told


def _dots(
    figure: go.Figure,
    name: str,
    points: Iterable[Point],
    hover: Callable[[Point], str],
    errors: list[float | None] | None = None,
    **marker: Any,
) -> None:
    points = tuple(points)
    if not points:
        return
    trace = go.Scatter(
        x=[p.kept for p in points],
        y=[p.value for p in points],
        mode="markers",
        name=name,
        marker=marker,
        text=[hover(p) for p in points],
        hovertemplate="%{text}<extra>" + name + "</extra>",
    )
    if errors:
        trace.error_y = {"type": "data", "array": errors, "thickness": 1.2, "width": 3, "color": FRONT}
    figure.add_trace(trace)


def _perplexity_axis(figure: go.Figure, panel: Panel) -> None:
    """A second reading of the same axis; `matches` makes it follow when the reader zooms."""
    ticks = perplexity_ticks(*panel.limits)
    # plotly draws an axis only when a trace hangs on it.
    figure.add_trace(go.Scatter(x=[None], y=[None], yaxis="y2", showlegend=False, hoverinfo="skip"))
    figure.update_layout(
        margin={"r": 60},
        yaxis2={
            "overlaying": "y",
            "matches": "y",
            "side": "right",
            "showgrid": False,
            "zeroline": False,
            "tickvals": np.log(ticks).tolist(),
            "ticktext": [f"{tick:,.4g}" for tick in ticks],
            "title": {"text": "perplexity"},
        },
    )
