"""Scores on splits other than the search's: of finished trials, once each, into the evaluations table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from actors.node_cache import MANIFEST
from actors.types import RankfrontError
from search.cells import Cells
from search.driving import logged
from search.evaluations import Evaluations
from search.findings import error_bar, loss_cell, perplexity
from search.folder import StudyFolder, report
from search.opening import Session, opened
from search.pool import Job, Pool
from search.records import FACTORS, Evaluation, StudySummary
from search.replicas import replicas
from search.runner import TICK_SECONDS, Stop
from search.signals import stop_on_signals
from search.study import SearchStudy


def front_and_dense(study: SearchStudy) -> list[int]:
    """Numbers of the front's trials and of the dense reference, in order."""
    dense = study.scored_as(study.dense)
    return sorted({*(row.number for row in study.front), *(() if dense is None else (dense,))})


def unscored(
    folder: StudyFolder, study: SearchStudy, numbers: Sequence[int], split: str = "test"
) -> list[int]:
    """Those trials that have no score on a split as it is now."""
    evaluations = Evaluations(folder.path, map(study.row, numbers))
    fingerprint = folder.prepared.fingerprints[split]
    return [n for n in numbers if evaluations.get(n, FACTORS, split, fingerprint) is None]


def score_finished(
    folder: StudyFolder,
    study: SearchStudy,
    numbers: Sequence[int],
    pool: Pool,
    stop: Stop,
    say: Callable[[str], None],
    split: str = "test",
    look: Callable[[], None] = lambda: None,
) -> None:
    """Score finished trials once on a split; known scores are not repeated. `look` is called meanwhile."""
    queue = [study.row(number) for number in unscored(folder, study, numbers, split)]
    if not queue:
        return
    evaluations = Evaluations(folder.path, queue)
    fingerprint = folder.prepared.fingerprints[split]
    tokens = folder.prepared.tokens[f"{split}.forward"]
    say(f"{split} split: scoring {len(queue)} trials, {tokens:,} tokens each")
    while (queue or pool.outstanding) and not stop.reason:
        while queue and pool.free:
            row = queue.pop(0)
            pool.submit(Job(row.number, row.allocation, split))
        for outcome in pool.wait(TICK_SECONDS):
            if outcome.score is None:
                say(f"trial {outcome.job.key} has no {split} score: {outcome.reason}")
            else:
                evaluations.add(Evaluation(outcome.job.key, FACTORS, split, fingerprint, outcome.score), say)
        look()


def reopened(folder: StudyFolder, console: Console) -> contextlib.AbstractContextManager[Session]:
    """A study held to measure its trials, in the folder it is in now: that may have moved since the search,
    or be a copy, under any name. Factors that are there, beside it or where they were made, are taken."""
    config, store = folder.config, Path(folder.prepared.factor_store)
    changes: dict[str, object] = {"runs": str(folder.path.resolve().parent)}
    if (store / MANIFEST).exists():
        changes["cache"] = config.cache.model_copy(update={"factors": str(store.parent)})
    return opened(config.model_copy(update=changes), console, folder.path)


def finished_numbers(study: SearchStudy, numbers: Sequence[int]) -> list[int]:
    """Trials to measure, each once; none named: the front and the dense model.

    Raises:
        RankfrontError: a trial that is not there or has no score.
    """
    rows = study.rows()
    unknown = [str(n) for n in numbers if not (0 <= n < len(rows) and rows[n].finished)]
    if unknown:
        raise RankfrontError(f"--trial {', '.join(unknown)}: no finished trial of this study")
    return list(dict.fromkeys(numbers)) or front_and_dense(study)


def evaluate_study(
    folder: StudyFolder, numbers: Sequence[int], console: Console
) -> tuple[StudySummary, str | None]:
    """Score trials of a study (none named: the front and the dense model) on its test split.

    Returns what the study's report then shows, and the signal that stopped it, if one did.

    Raises:
        RankfrontError: another driver holds the study, it is no longer the study that was searched, or a
            trial has no score yet.
    """
    with reopened(folder, console) as session:
        study = session.folder.open_study()
        stop = Stop()
        wanted = unscored(session.folder, study, finished_numbers(study, numbers))
        if wanted:
            with (
                logged(session.folder, session.say, "evaluate", stop) as note,
                stop_on_signals(stop, console),
                replicas(session, note) as pool,
            ):
                score_finished(session.folder, study, wanted, pool, stop, session.say)
        return report(session.folder, study), stop.reason


def split_cells(summary: StudySummary, numbers: Sequence[int]) -> Cells:
    """Test scores of trials (none named: of all that have one) by falling budget, with standard errors."""
    rows = [row for row in summary.rows if not numbers or row.number in numbers]
    cells = []
    for row in sorted(rows, key=lambda row: -row.budget_model):
        score = summary.test_score(row.number)
        if score is None:
            continue
        metrics, errors = score.metrics, score.stderrs
        tasks = [
            f"{100 * metrics[name]:.1f}{error_bar(100 * errors[name], 1)}" if name in metrics else ""
            for name in ("reasoning.acc", "reasoning.acc_norm")
        ]
        kept = f"{100 * row.budget_model:.1f}%"
        cells.append((str(row.number), kept, loss_cell(score), perplexity(score.text.nll), *tasks))
    return Cells(("trial", "kept", "nll", "ppl", "acc", "acc_norm"), tuple(cells), "± is one standard error")
