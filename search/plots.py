"""The picture of a study as PNG: compression against loss and accuracy."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from search.panels import Panel, Point, panels, perplexity_ticks
from search.records import StudySummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (1600, 700)
"""Pixels of the picture: two panels side by side in a README or on a slide."""

FRONT = "#2457c5"
TRIAL = "#9aa5b1"
UNIFORM = "#c96a12"
SEED = "#0f8a5f"
DENSE = "#111827"
INFEASIBLE = "violates a constraint"
LABEL_GAP = (44.0, 18.0)
"""Pixels, across and up, that keep two labels apart; a label that would come closer is left out."""


def front_png(summary: StudySummary) -> bytes:
    """PNG of SIZE pixels: every trial, the front, dense, uniform and seed allocations, test-split values."""
    # Figure and canvas without pyplot: no global state, no display, safe in any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02)  # inches around each panel
    figure = Figure(figsize=(SIZE[0] / 100, SIZE[1] / 100), dpi=100, layout=layout, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)
    shown = panels(summary)
    title = f"{_short(summary.model)}: what compression costs  ({_short(summary.study)})"
    # No mathtext: a `$` in a name must not be read as a formula.
    figure.suptitle(title, fontsize=16, fontweight="bold", parse_math=False)
    axes = np.atleast_1d(np.asarray(figure.subplots(1, max(1, len(shown)))))
    for axis, panel in zip(axes, shown, strict=False):
        _draw(axis, panel)
    if shown:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=13)
        canvas.draw()  # the layout is needed before labels can be kept apart
        for axis, panel in zip(axes, shown, strict=True):
            _label(axis, panel)
    else:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "no finished trial yet", ha="center", fontsize=16)
    file = io.BytesIO()
    canvas.print_png(file)
    return file.getvalue()


def _draw(axis: Axes, panel: Panel) -> None:
    _axes(axis, panel)
    kept = [point for point in panel.trials if point.feasible]
    _scatter(axis, kept, label="trial", s=22, color=TRIAL, alpha=0.45, linewidths=0, zorder=1)
    _scatter(
        axis, panel.infeasible, label=INFEASIBLE, marker="x", s=22, color=TRIAL, linewidths=1.0, zorder=1
    )
    best = panel.best
    axis.plot([p.kept for p in best], [p.value for p in best], color=FRONT, linewidth=1.8, zorder=2)
    bars: dict[str, Any] = {"fmt": "o", "color": FRONT, "markersize": 7, "elinewidth": 1.3, "zorder": 4}
    axis.errorbar(
        [p.kept for p in panel.front],
        [p.value for p in panel.front],
        yerr=[p.stderr if np.isfinite(p.stderr) else 0.0 for p in panel.front],
        label="front (search split, ±1 standard error)",
        **bars,
    )
    hollow = {"facecolors": "none", "edgecolors": FRONT, "linewidths": 1.5}
    _scatter(axis, panel.test, label="front (test split)", marker="D", s=52, zorder=5, **hollow)
    # A frame, larger than a front marker: uniform allocations that are on the front show as both.
    uniform = {"facecolors": "none", "edgecolors": UNIFORM, "linewidths": 1.8}
    _scatter(axis, panel.uniform, label="uniform allocation", marker="s", s=170, zorder=3, **uniform)
    seeds = {"facecolors": "none", "edgecolors": SEED, "linewidths": 1.8}
    _scatter(axis, panel.seeds, label="seed (equal marginal loss)", marker="^", s=170, zorder=3, **seeds)
    if panel.dense is not None:
        star = {"color": DENSE, "edgecolors": "white", "linewidths": 1.0}
        _scatter(axis, [panel.dense], label="dense model", marker="*", s=330, zorder=6, **star)
        axis.axhline(
            panel.dense.value, color=DENSE, linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.5, zorder=0
        )
    if panel.beyond:
        edge = panel.limits[1] - 0.015 * (panel.limits[1] - panel.limits[0])
        x = [p.kept for p in panel.beyond]
        axis.scatter(x, [edge] * len(x), marker="^", s=34, color=TRIAL, zorder=3)


def _axes(axis: Axes, panel: Panel) -> None:
    axis.set_xlim(panel.span[1], panel.span[0])
    axis.set_ylim(*panel.limits)
    axis.set_xlabel("parameters kept, % of the model  (more compression →)", fontsize=13)
    axis.set_ylabel(panel.label, fontsize=13)
    axis.tick_params(labelsize=12)
    axis.grid(color="#e5e9f0", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.note:
        axis.set_title(f"▲ {panel.note}", fontsize=12, color="#5b6675", loc="right")
    if panel.metric == "nll":
        ticks = perplexity_ticks(*panel.limits)
        second = axis.secondary_yaxis("right")
        second.set_yticks(np.log(ticks), [f"{tick:,.4g}" for tick in ticks])
        second.tick_params(labelsize=11, colors="#5b6675")
        second.set_ylabel("perplexity", fontsize=12, color="#5b6675")
        second.spines["right"].set_visible(False)


def _scatter(axis: Axes, points: Iterable[Point], **style: Any) -> None:
    points = tuple(points)
    if points:
        axis.scatter([p.kept for p in points], [p.value for p in points], **style)


def _label(axis: Axes, panel: Panel) -> None:
    """Trial numbers on the empty side of the front, skipping those that would touch one already written."""
    side = -1 if panel.metric == "nll" else 1
    style: dict[str, Any] = {"fontsize": 11, "color": FRONT, "ha": "left", "zorder": 7}
    style["va"] = "top" if side < 0 else "bottom"
    written: list[tuple[float, float]] = []
    for point in panel.shown(panel.front):
        at = (point.kept, point.value + side * (point.stderr if np.isfinite(point.stderr) else 0.0))
        x, y = axis.transData.transform(at)
        if all(abs(x - a) > LABEL_GAP[0] or abs(y - b) > LABEL_GAP[1] for a, b in written):
            written.append((x, y))
            axis.annotate(f"#{point.trial}", at, xytext=(3, 5 * side), textcoords="offset points", **style)


def _short(name: str, length: int = 48) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
