"""`rankfront refine`: refine one trial's factors in a worker, and score them beside the trial's own."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from actors.refinement import (
    FOLDER,
    RefinementStep,
    file_of,
    pattern_of,
    refinement_fingerprint,
    variant_of,
)
from actors.types import SPLITS, RankfrontError, Score
from search.cells import Cells
from search.driving import logged
from search.evaluations import Evaluations
from search.findings import error_bar, paired
from search.folder import StudyFolder
from search.journal import driver_lock
from search.pool import connect
from search.records import FACTORS, Evaluation, TrialRow
from search.runner import Stop
from search.screen import Line, clock
from search.signals import stop_on_signals
from search.worker import Worker, mistakes_named, refiner, worker_count

Pair = tuple[Score, Score]
"""A score before and a score after, of one split."""


@dataclass(frozen=True)
class Refined:
    """What came of a refinement: its variant and file, why it ended, scores by split (none if stopped)."""

    variant: str
    path: Path
    ended: str
    scores: dict[str, Pair]


def refine(folder: StudyFolder, row: TrialRow, console: Console) -> Refined:
    """Refine a finished trial as the study's config says, or go on doing so, and score what is not scored.

    Raises:
        RankfrontError: another driver holds the study, its factors are gone, or there is nothing to refine.
    """
    store = folder.factor_store
    if not (store / "manifest.json").exists():
        raise RankfrontError(f"the factor store {store} is gone; run the search command again to rebuild it")
    if row.allocation.is_dense:
        raise RankfrontError(f"--trial {row.number}: every target is dense; there are no factors to refine")
    stop, machine, say = Stop(), connect(), partial(console.print, markup=False)
    with (
        driver_lock(folder.path),
        logged(folder, say, "refine", stop),
        refiner(folder, machine, worker_count(folder.config, machine), say) as worker,
        stop_on_signals(stop, console),
        mistakes_named(),
    ):
        return refine_by(worker, folder, row, stop, console)


def refine_by(worker: Worker, folder: StudyFolder, row: TrialRow, stop: Stop, console: Console) -> Refined:
    """The same by a worker that is there. The caller holds the study's lock.

    Raises:
        RankfrontError: also where the worker's files are not the driver's.
    """
    spec, say = folder.config.refinement, partial(console.print, markup=False)
    variant, path = refined_path(folder, row)
    _tidy(path)
    ended = "it was refined before"
    if not path.exists():
        # Rounding, and a GPU's lower precision, may end elsewhere: scores of a file that is gone are not its.
        Evaluations(folder.path, [row]).forget(row.number, variant, say)
        facts = {"study": folder.config.study, "trial": row.number, "variant": variant}
        with _seen(path) as file:
            worker.find(file)
            steps = worker.refine(row.allocation, spec, facts)
            ended = _watch(steps, stop, console) or ended
        if not stop.reason and not path.exists():
            raise RankfrontError(
                f"{path}: refined, and not there for the driver: what the worker wrote is elsewhere or was "
                "removed; set runs to a folder that both share, or start the driver on the worker's node"
            )
    scores = {} if stop.reason else scored(folder, row, variant, path.name, worker, say)
    return Refined(variant, path, stop.reason or ended, scores)


def _tidy(path: Path) -> None:
    """Remove what drivers and workers that were killed left beside a refined file: what was not written to
    its end and, where the file is there, the checkpoint it came of. The caller holds the study's lock."""
    left = "*" if path.exists() else "*.tmp"
    for stale in path.parent.glob(f"{path.name}.{left}"):
        stale.unlink(missing_ok=True)


@contextlib.contextmanager
def _seen(path: Path) -> Iterator[str]:
    """An empty file beside a refined one, by name, for the worker to find; gone at the end.

    A new name each time, and gone only when the work is done: over NFS a name that was not there may be
    taken to be absent for a minute, unless one's own change of the folder makes one look again.
    """
    file = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise RankfrontError(f"{file}: {error}") from error
    try:
        yield file.name
    finally:
        file.unlink(missing_ok=True)


def refined_path(folder: StudyFolder, row: TrialRow) -> tuple[str, Path]:
    """The variant and the file that refining a trial as the config says leaves, or has left."""
    prints, spec = folder.prepared.fingerprints, folder.config.refinement
    fingerprint = refinement_fingerprint(prints, row.allocation, spec)
    return variant_of(fingerprint, spec), (folder.path / FOLDER / file_of(fingerprint)).resolve()


def is_refined(folder: StudyFolder, row: TrialRow) -> bool:
    """Whether a trial is refined as the config says, and both splits are scored."""
    variant, path = refined_path(folder, row)
    evaluations, prints = Evaluations(folder.path, [row]), folder.prepared.fingerprints
    keys = ((row.number, variant, split, prints[split]) for split in SPLITS)
    return path.exists() and all(key in evaluations for key in keys)


def _watch(steps: Iterable[RefinementStep], stop: Stop, console: Console) -> str | None:
    """Draw the steps until they end or `stop` says so; returns why they ended, None if they did not."""
    with _Screen(console) as screen:
        for step in steps:
            screen.redraw(step)
            if step.ended is not None or stop.reason:
                return step.ended
    raise RankfrontError("the refining process ended without saying why")


class _Screen(Line):
    """The line of progress: how far, the KL trained on and held out, how long the rest will take at most."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._first: tuple[int, float] | None = None  # a step and its time

    def redraw(self, step: RefinementStep) -> None:
        if self._first is None:
            self._first = (step.step, time.monotonic())
        self.show(lambda now: self._line(step, now))

    def _line(self, step: RefinementStep, now: float) -> str:
        assert self._first is not None
        parts = [f"refining {step.step}/{step.steps}"]
        if step.workers > 1:
            parts[0] += f" by {step.workers} workers"
        if step.training is not None:
            parts.append(f"KL {step.training:.4f}")
        parts.append(f"held out {step.held_out:.4f}, best {step.best:.4f} at {step.best_step}")
        done = step.step - self._first[0]
        if done:
            parts.append(f"ETA {clock((now - self._first[1]) / done * (step.steps - step.step))}")
        return " | ".join(parts)


def scored(
    folder: StudyFolder, row: TrialRow, variant: str, file: str, worker: Worker, say: Callable[[str], None]
) -> dict[str, Pair]:
    """Both splits before and after, by the evaluations table or, where it has none, by asking: what is asked
    is added. The trial's own score on the search split is the trial's. The caller holds the study's lock.
    """
    evaluations = Evaluations(folder.path, [row])
    assert row.score is not None

    def known(name: str, split: str) -> Score:
        fingerprint = folder.prepared.fingerprints[split]
        found = evaluations.get(row.number, name, split, fingerprint)
        if found is None:
            score = worker.score(row.allocation, split, None if name == FACTORS else file)
            found = Evaluation(row.number, name, split, fingerprint, score)
            evaluations.add(found, say)
        return found.score

    return {
        split: (row.score if split == "search" else known(FACTORS, split), known(variant, split))
        for split in SPLITS
    }


def variants_of(folder: StudyFolder, row: TrialRow, evaluations: Evaluations) -> dict[str, Score]:
    """The refined variants of a trial, each with its score on the search split as it is now."""
    scored_on = (row.number, "search", folder.prepared.fingerprints["search"])
    mine = (e for e in evaluations.rows if (e.trial, e.split, e.fingerprint) == scored_on)
    return {e.variant: e.score for e in mine if e.variant != FACTORS}


def kept_file(folder: StudyFolder, variant: str) -> Path | None:
    """The file of refined factors by their variant's name; None where it is gone."""
    files = list((folder.path / FOLDER).glob(pattern_of(variant)))
    return files[0] if len(files) == 1 else None


def refined_file(folder: StudyFolder, row: TrialRow, variant: str) -> tuple[Path, Score]:
    """The file of a trial's refined factors by their variant's name, and their score on the search split.

    Raises:
        RankfrontError: the trial has no such variant, or its file is gone.
    """
    scores = variants_of(folder, row, Evaluations(folder.path, [row]))
    if variant not in scores:
        there = ", ".join(scores) or "none"
        raise RankfrontError(f"--variant {variant}: trial {row.number} has no such variant; it has {there}")
    file = kept_file(folder, variant)
    if file is None:
        raise RankfrontError(f"--variant {variant}: its file in {folder.path / FOLDER} is gone; refine again")
    return file, scores[variant]


def comparison_cells(scores: dict[str, Pair]) -> Cells:
    """A row for each split and metric: before, after, and the paired difference, with standard errors."""
    rows: list[tuple[str, ...]] = []
    for split, (before, after) in scores.items():
        perplexities = f"{before.text.perplexity:.2f}", f"{after.text.perplexity:.2f}"
        rows.append((split, "perplexity", *perplexities, ""))
        wanted = ("nll", "kl", "reasoning.acc", "reasoning.margin")
        for metric in (name for name in wanted if name in before.metrics and name in after.metrics):
            values = (
                f"{score.metrics[metric]:.4f}{error_bar(score.stderrs[metric], 4, ' ± ')}"
                for score in (before, after)
            )
            rows.append((split, metric, *values, paired(before, after, metric)))
    return Cells(("split", "metric", "before", "after", "difference, paired"), tuple(rows), "")
