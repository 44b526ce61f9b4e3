"""Heat maps, block by module: what they hold, and their drawing for the page and as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from search.figures import FONT, SHARES
from search.findings import percent
from search.sensitivity_table import ENERGY, Row, Sensitivity

LINEAR = 1e-3
"""nats/token up to which the colour of an increase is linear; it is logarithmic beyond (asinh). No choice
of ranks hangs on less, and targets alone differ by orders of magnitude more."""

LOSSES = [[0.0, "#1f5fa8"], [0.25, "#a9c9ea"], [0.5, "#f7f7f5"], [0.75, "#f0a35e"], [1.0, "#9c2f0b"]]
"""Less loss than dense is blue, more is red, white is none."""

TICKS = (0.001, 0.01, 0.1, 1.0, 10.0)
GAP = "#dfe3ea"
CELL = 30
"""Pixels of a module's row."""


@dataclass(frozen=True)
class HeatMap:
    """`values` (modules, blocks), NaN where there is no target or no score; `told` says what each cell is.

    Colours run over `shade(values)`, between the ends of `span`; `ticks` are values of the colour bar.
    """

    title: str
    unit: str
    modules: tuple[str, ...]
    blocks: tuple[int, ...]
    values: np.ndarray
    told: tuple[tuple[str, ...], ...]
    shade: Callable[[Any], Any]
    span: tuple[float, float]
    ticks: tuple[float, ...]
    tick_format: Callable[[float], str]
    colours: list[list[Any]]


def heat_maps(table: Sensitivity) -> tuple[HeatMap, ...]:
    """The loss increase at each share, on one scale of colours; then the rank of 99% of the energy."""
    increases = [abs(row.increase) for row in table.rows if row.increase is not None]
    largest = max([*increases, LINEAR])
    top = _log(largest)
    # Ticks within a thousandth of the largest would be written over each other.
    ticks = [sign * tick for tick in TICKS if largest / 1000 < tick <= largest for sign in (-1, 1)]
    losses = [
        _heat_map(
            table,
            table.at(share),
            title=f"Loss increase at {percent(share)} of the target's own parameters, nats/token",
            unit="nats/token",
            value=lambda row: row.increase,
            shade=_log,
            span=(-top, top),
            ticks=(0.0, *ticks),
            tick_format=lambda value: f"{value:+g}" if value else "0",
            colours=LOSSES,
        )
        for share in table.shares
    ]
    energy = _heat_map(
        table,
        table.at(table.shares[0]),
        title=f"Rank that keeps {percent(ENERGY)} of the energy, share of full rank",
        unit="of full rank",
        value=lambda row: row.rank_99_share,
        shade=np.asarray,
        span=(0.0, 1.0),
        ticks=(0.0, 0.25, 0.5, 0.75, 1.0),
        tick_format=percent,
        colours=SHARES,
    )
    return (*losses, energy)


def _log(values: Any) -> Any:
    return np.arcsinh(np.asarray(values) / LINEAR)


def _heat_map(
    table: Sensitivity, rows: Sequence[Row], value: Callable[[Row], float | None], **look: Any
) -> HeatMap:
    blocks = sorted({target.block for target in table.targets})
    modules = list(dict.fromkeys(target.module for target in table.targets))
    values = np.full((len(modules), len(blocks)), np.nan)
    told = [[""] * len(blocks) for _ in modules]
    for row in rows:
        cell = modules.index(row.target.module), blocks.index(row.target.block)
        measured = value(row)
        values[cell] = np.nan if measured is None else measured
        told[cell[0]][cell[1]] = _told(row)
    return HeatMap(
        modules=tuple(modules), blocks=tuple(blocks), values=values, told=tuple(map(tuple, told)), **look
    )


def _told(row: Row) -> str:
    """A cell in words, plain text."""
    kept = "dense" if row.rank is None else f"rank {row.rank} of {row.target.full_rank}"
    lines = [row.target.name, f"{kept}, {percent(row.energy_kept)} of the energy"]
    if row.increase is not None:
        lines.append(f"{row.increase:+.4g} nats/token over dense")
    if row.predicted is not None:
        lines.append(f"{row.predicted:+.4g} predicted")
    if row.reason:
        lines.append(row.reason if len(row.reason) <= 120 else f"{row.reason[:119]}…")
    lines.append(f"{percent(ENERGY)} of the energy at rank {row.rank_99}")
    return "\n".join(lines)


def figure(heat: HeatMap) -> go.Figure:
    """One map of the page. Its z are `shade(values)`; the values themselves are in `customdata`."""
    shaded = heat.shade(heat.values)
    trace = go.Heatmap(
        x=list(heat.blocks),
        y=[escape(module) for module in heat.modules],
        z=_gaps(shaded),
        customdata=_gaps(heat.values),
        text=[[escape(told).replace("\n", "<br>") for told in line] for line in heat.told],
        hovertemplate="%{text}<extra></extra>",
        colorscale=heat.colours,
        zmin=heat.span[0],
        zmax=heat.span[1],
        xgap=2,
        ygap=2,
        colorbar={
            "tickvals": [float(heat.shade(tick)) for tick in heat.ticks],
            "ticktext": [heat.tick_format(tick) for tick in heat.ticks],
            "thickness": 12,
            "outlinewidth": 0,
        },
    )
    axis = {"showgrid": False, "zeroline": False, "automargin": True}
    return go.Figure(
        trace,
        layout={
            "template": "none",
            "height": 130 + CELL * len(heat.modules),
            "margin": {"l": 60, "r": 20, "t": 36, "b": 50},
            "font": {"family": FONT, "size": 13, "color": "#1f2937"},
            "plot_bgcolor": GAP,
            "xaxis": {**axis, "title": {"text": "block"}},
            "yaxis": {**axis, "autorange": "reversed"},
            "hoverlabel": {"bgcolor": "white", "font": {"color": "#1f2937"}},
        },
    )


def _gaps(values: np.ndarray) -> list[list[float | None]]:
    """NaN is no JSON: a gap is null."""
    return [[None if np.isnan(value) else float(value) for value in line] for line in values]


def heat_png(table: Sensitivity, maps: Sequence[HeatMap]) -> bytes:
    """The maps under each other, 1600 pixels wide; cells without a score are grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height = 0.9 + sum(1.1 + 0.3 * len(heat.modules) for heat in maps)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    picture = Figure(figsize=(16, height), dpi=100, layout=layout, facecolor="white")
    canvas: Any = FigureCanvasAgg(picture)
    # No mathtext: a `$` in a name must not be read as a formula.
    title = f"{table.model}: what each target loses alone  ({table.study})"
    picture.suptitle(title[:120], fontsize=16, fontweight="bold", parse_math=False)
    axes = np.atleast_1d(np.asarray(picture.subplots(len(maps), 1)))
    for axis, heat in zip(axes, maps, strict=True):
        stops = [(at, colour) for at, colour in heat.colours]
        colours = LinearSegmentedColormap.from_list("heat", stops).with_extremes(bad=GAP)
        shaded = np.ma.masked_invalid(heat.shade(heat.values))
        mesh = axis.pcolormesh(
            shaded, cmap=colours, norm=Normalize(*heat.span), edgecolors="white", linewidth=1
        )
        axis.set_title(heat.title, fontsize=13, loc="left")
        axis.set_yticks(np.arange(len(heat.modules)) + 0.5, heat.modules, fontsize=11, parse_math=False)
        step = 1 + len(heat.blocks) // 41
        axis.set_xticks(np.arange(0, len(heat.blocks), step) + 0.5, heat.blocks[::step], fontsize=10)
        axis.set_xlabel("block", fontsize=11)
        axis.invert_yaxis()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        bar = picture.colorbar(mesh, ax=axis, aspect=12, pad=0.01)
        bar.set_ticks(
            [float(heat.shade(t)) for t in heat.ticks], labels=list(map(heat.tick_format, heat.ticks))
        )
        bar.outline.set_visible(False)
    file = io.BytesIO()
    canvas.print_png(file)
    return file.getvalue()
