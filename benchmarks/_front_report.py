"""The table and the picture of a comparison, from its book alone: what is there, and what is not yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from _common import table
from _front_book import Asked, Book
from _front_runs import (
    DENSE,
    IMPROVED,
    LADDER,
    OURS,
    PAPER,
    SEEDS,
    Run,
    asked_runs,
    every_run,
    refined_name,
)
from _front_setup import SEARCH_SHARE, Setup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from actors.refinement import RefinementSpec
from search.choosing import APART
from search.pareto import front, hypervolume_history

# A run that has not come so far, and one that has ended without a point so small.
NOT_YET, NONE = "not yet", "none"


class Reading:
    """A book as one setup reads it."""

    def __init__(self, setup: Setup, book: Book) -> None:
        self.setup, self._book = setup, book
        self.runs = every_run(setup)
        self.labels = list(dict.fromkeys(run.label for run in self.runs))

    def of(self, label: str) -> list[Run]:
        return [run for run in self.runs if run.label == label]

    def count(self, run: Run) -> int:
        """Recorded trials."""
        return len(self._book.runs.get(run.name, []))

    def dense(self, run: Run) -> float:
        """Of the dense model on the search split, as the run's first trial found it; nats/token."""
        return self._book.scores[self._book.runs[run.name][0].score].nll

    def points(self, run: Run, trials: int | None = None) -> np.ndarray:
        """(n, 2): budget and loss above dense, nats/token, of a run's first trials; inf where a trial is
        not kept."""
        recorded = self._book.runs[run.name][:trials]
        losses = [self._book.scores[trial.score].nll - self.dense(run) for trial in recorded]
        budgets = [np.inf if trial.budget is None else trial.budget for trial in recorded]
        return np.column_stack([budgets, losses]).reshape(-1, 2)

    def tokens(self, run: Run) -> np.ndarray:
        """(n,) spent by the end of each trial."""
        return np.cumsum([trial.tokens for trial in self._book.runs[run.name]])

    def history(self, run: Run) -> np.ndarray:
        """(n,) hypervolume after each trial, as a share of the room; budgets below the lowest count as it."""
        setup, points = self.setup, self.points(run)
        points[:, 0] = np.maximum(points[:, 0], setup.lowest)
        # A trial that is not kept is outside of the bound, and adds nothing.
        points[~np.isfinite(points[:, 0])] = 2.0, 2 * setup.room
        room = (1 - setup.lowest) * setup.room
        return np.asarray(hypervolume_history(points, (1.0 + 1e-12, setup.room)) / room)

    def test(self, name: str, under: float) -> tuple[float, float] | None:
        """Budget and loss above dense on the test split of what the run of that name picked at or under a
        budget."""
        pick = self._book.picks.get(name, {}).get(under)
        dense = self._book.picks.get("dense", {}).get(1.0)
        if pick is None or dense is None:
            return None
        return pick.budget, self._book.scores[pick.score].nll - self._book.scores[dense.score].nll

    def refined(self, run: Run, spec: RefinementSpec, under: float) -> tuple[float, float] | None:
        """The same of the pick's refined factors; None where they are those of an earlier pick."""
        found, bare = self.test(refined_name(run, spec), under), self.test(run.name, under)
        return found if found is not None and bare is not None and found[0] == bare[0] else None

    def asked(self) -> dict[str, Asked]:
        """By the name of whose pick it is, in the order of a table; not those of an earlier pick."""
        spec, known, found = self.setup.refinement, self._book.asked, {}
        for run in asked_runs(self.setup):
            under = 1.0 if run == DENSE else self.setup.task_budget
            current = run != DENSE and self.refined(run, spec, under) is not None
            for name in (run.name, *((refined_name(run, spec),) if current else ())):
                pick = self._book.picks.get(name, {}).get(under)
                if name in known and pick is not None and known[name].score == pick.score:
                    found[name] = known[name]
        return found

    def processor(self, run: Run) -> str:
        return self._book.machine(run.name).partition(",")[0]

    def complete(self, run: Run) -> bool:
        return self._book.reached(run.name, self.setup.trials if run.counted else 1)


def report(setup: Setup, book: Book, picture: Path, where: str) -> Iterator[str]:
    """The result file, paragraph by paragraph; draws the picture."""
    reading = Reading(setup, book)
    yield f"# Fronts at equal cost: {setup.name}"
    yield (
        f"`python benchmarks/front_quality.py --table`; made of `{where}`. Calibration on at most "
        f"{setup.calibration_tokens:,} tokens of the validation file, {setup.search_tokens:,} other tokens "
        f"of it a trial, results on {setup.test_tokens:,} tokens of the raw test file; `<unk>` is deleted "
        f"from the validation file with the space before it; windows of {setup.window}. Budgets are of all "
        f"parameters, delta is nats/token above dense. `exchange` aims at none below {setup.lowest:.0%}, as "
        "the ladder does; what others propose there counts as if it were at it. Curvature factors with a "
        "mean bias, each target in its cheapest form, but for `surgical/paper` (feature, factored). What a "
        "strategy gives at a budget is its point at or under it of the least search loss; where that is "
        f"within {APART:g} paired standard "
        f"errors of others, {setup.choice_tokens:,} further tokens of the validation file choose among "
        f"{setup.candidates} at most. `refined`: the factors of such picks "
        f"after at most {setup.refinement.steps} steps of KL to the dense model on the first "
        f"{setup.refine_windows} windows of the calibration text, ranks as they were, at a rate of at most "
        f"{setup.refinement.learning_rate:g}; {min(setup.refinement.held_out, setup.choice_tokens):,} tokens "
        "of the text that chooses tell which step is kept. `refit`: such picks in closed form instead. "
        "On another kind of processor (last table) factors of the same fingerprint differ by rounding, and "
        "by the labels that were drawn for them."
    )
    yield "## At budgets, on the test split"
    yield table(["strategy", *(f"{budget:.0%}" for budget in setup.budgets)], list(_budgets(reading)))
    yield f"## Tasks at {setup.task_budget:.0%}: accuracy (%) and its standard error"
    yield (
        f"Of each task {setup.examples} questions that are not of the search split ({SEARCH_SHARE:.0%}), or "
        "as many as there are; zero-shot `acc`. The mean weighs tasks equally. Allocations are those of the "
        "table above: found by the loss on text, not by any question."
    )
    yield table(
        ["strategy", "budget", "mean", *(task["name"] for task in setup.tasks)], list(_tasks(reading))
    )
    yield f"## Hypervolume on the search split, of the room between budgets {setup.lowest:.0%} and 100%"
    yield (
        f"Reference point: the dense size, and {setup.room:.3f} nats/token above dense. Mean over what seeds "
        "have got so far (their number)."
    )
    heads = [f"{count} trials" for count in setup.checkpoints]
    yield table(["strategy", *heads, "all", "tokens spent"], list(_volumes(reading)))
    lines = list(_against(reading))
    if lines:
        yield "## Ours above the warm-started baselines: mean paired difference, its standard error"
        yield table(["baseline", *heads], lines)
    for run in (Run(IMPROVED), Run(PAPER)):
        said = _covered(reading, run)
        if said is not None:
            yield said
    yield "## What is complete"
    yield table(["run", "trials", "complete", "on"], list(_progress(reading)))
    draw(reading, picture)
    yield f"![hypervolume and fronts]({picture.name})"


def _budgets(reading: Reading) -> Iterator[list[str]]:
    setup, budgets, ours, seeds = reading.setup, reading.setup.budgets, reading.of(OURS)[0], Run(SEEDS)
    for run, spec in ((ours, setup.refinement), (seeds, setup.refinement), (seeds, setup.refit)):
        found = [reading.refined(run, spec, budget) for budget in budgets]
        if any(found):
            yield [refined_name(run, spec), *(_spread([pair[1]] if pair else [], 1) for pair in found)]
    for label in reading.labels:
        cells, runs = [], reading.of(label)
        missing = NONE if all(reading.complete(run) for run in runs) else NOT_YET
        for budget in budgets:
            losses = [pair[1] for run in runs if (pair := reading.test(run.name, budget)) is not None]
            cells.append(_spread(losses, len(runs)) if losses else missing)
        if any(cell != NOT_YET for cell in cells):
            yield [label, *cells]


def _tasks(reading: Reading) -> Iterator[list[str]]:
    names = [task["name"] for task in reading.setup.tasks]
    for name, asked in reading.asked().items():
        error = math.sqrt(sum(asked.stderr[task] ** 2 for task in names)) / len(names)
        mean = sum(asked.acc[task] for task in names) / len(names)
        cells = [(mean, error), *((asked.acc[task], asked.stderr[task]) for task in names)]
        yield [name, f"{asked.budget:.1%}", *(f"{100 * acc:.1f} ± {100 * one:.1f}" for acc, one in cells)]


def _spread(values: Sequence[float], of: int) -> str:
    """Mean and least..most, and of how many seeds where there are several."""
    if not values:
        return NOT_YET
    if of == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ({min(values):.3f}..{max(values):.3f}, {len(values)} of {of})"


def _volumes(reading: Reading) -> Iterator[list[str]]:
    for label in reading.labels:
        runs = [run for run in reading.of(label) if reading.count(run)]
        if not runs:
            continue
        histories = [reading.history(run) for run in runs]
        cells = []
        for count in reading.setup.checkpoints:
            reached = [history[count - 1] for history in histories if len(history) >= count]
            cells.append(f"{np.mean(reached):.4f} ({len(reached)})" if reached and runs[0].counted else "")
        ends = [history[-1] for history in histories]
        spent = [reading.tokens(run)[-1] for run in runs]
        yield [label, *cells, f"{np.mean(ends):.4f} ({len(ends)})", f"{np.mean(spent):,.0f}"]


def _against(reading: Reading) -> Iterator[list[str]]:
    """One line for each warm-started baseline that a checkpoint of ours can be compared with: of equal seeds,
    with the ladder, which has none, of every seed."""
    ours = {run.seed: reading.history(run) for run in reading.of(OURS) if reading.count(run)}
    for label in reading.labels:
        if label != LADDER and not label.endswith(" warm"):
            continue
        cells = []
        for count in reading.setup.checkpoints:
            pairs = [
                mine[count - 1] - reading.history(run)[count - 1]
                for seed, mine in ours.items()
                for run in reading.of(label)
                if (run.seed == seed or label == LADDER) and len(mine) >= count <= reading.count(run)
            ]
            cells.append(_paired(pairs))
        if any(cells):
            yield [label, *cells]


def _paired(pairs: Sequence[float]) -> str:
    if len(pairs) < 2:
        return f"{pairs[0]:+.4f} (1 seed)" if pairs else ""
    error = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs))
    return f"{np.mean(pairs):+.4f} ± {error:.4f} ({len(pairs)})"


def _covered(reading: Reading, run: Run) -> str | None:
    """How much of a surgical search's front, down to the lowest budget that counts, the seeds of ours weakly
    dominate, on the search split."""
    if not reading.count(run):
        return None
    theirs = reading.points(run)
    theirs = theirs[np.isfinite(theirs[:, 0]) & (theirs[:, 0] >= reading.setup.lowest)]
    theirs = theirs[front(theirs)]
    lines = []
    for ours in reading.of(OURS):
        if reading.count(ours):
            mine = reading.points(ours)
            held = sum(bool((mine <= point + 1e-9).all(axis=1).any()) for point in theirs)
            lines.append(f"seed {ours.seed}: {held} of {len(theirs)}")
    if not lines:
        return None
    theirs_above = f"the front of `{run.name}` from {reading.setup.lowest:.0%} on"
    return f"Points of {theirs_above} that ours weakly dominates: {', '.join(lines)}."


def _progress(reading: Reading) -> Iterator[list[str]]:
    for run in reading.runs:
        wanted = f" of {reading.setup.trials}" if run.counted else ""
        complete = "yes" if reading.complete(run) else "no"
        yield [run.name, f"{reading.count(run)}{wanted}", complete, reading.processor(run)]


def draw(reading: Reading, path: Path) -> None:
    """Hypervolume against tokens spent, whole and from the seeds on, and the fronts on the search split."""
    # Figure and canvas without pyplot: no global state, no display.
    figure = Figure(figsize=(17, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for number, label in enumerate(reading.labels):
        colour = f"C{number % 10}"
        dashes = "-" if number < 10 else "--"
        named = {"label": label, "color": colour, "linestyle": dashes}
        for run in reading.of(label):
            if not reading.count(run):
                continue
            for axes in (left, middle):
                axes.step(reading.tokens(run), reading.history(run), where="post", lw=1.2, **named)
            points = reading.points(run)
            points = points[np.isfinite(points[:, 0])]
            points = points[front(points)]
            points = points[np.argsort(points[:, 0])]
            right.step(points[:, 0], points[:, 1], where="post", lw=1.2, **named)
            named.pop("label", None)
    left.set(xlabel="tokens spent", ylabel="hypervolume, share of the room", xscale="log")
    middle.set(xlabel="tokens spent", ylabel="the same, from the seeds on")
    middle.xaxis.set_major_formatter(EngFormatter(sep=""))
    seeds = Run(SEEDS)
    if reading.count(seeds):
        least = reading.history(seeds)[-1]
        above = [run for run in reading.runs if reading.count(run) and reading.history(run)[-1] >= least]
        most = max(reading.history(run)[-1] for run in above)
        room = max(0.05 * (most - least), 1e-6)
        last = max(reading.tokens(run)[-1] for run in above)
        middle.set(xlim=(reading.tokens(seeds)[-1], 1.02 * last), ylim=(least - room, most + room))
    right.set(
        xlabel="share of all parameters",
        ylabel="nats/token above dense, search split",
        xlim=(reading.setup.lowest, 1.0),
        ylim=(0, 1.5),
    )
    if any(reading.count(run) for run in reading.runs):
        left.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
