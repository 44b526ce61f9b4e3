"""`rankfront evaluate STUDY --tasks ...`: lm-evaluation-harness on finished trials, kept apart from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from actors.harness_results import HarnessSpec, task_fingerprints
from actors.refinement import FOLDER as REFINED
from actors.types import Progress, RankfrontError, ScoringError, ShortOfMemoryError
from search.driving import logged
from search.evaluations import Evaluations
from search.finals import finished_numbers, reopened
from search.folder import StudyFolder, report
from search.records import FACTORS, HARNESS, HarnessEvaluation, StudySummary, TrialRow
from search.refine import kept_file, refined_file, variants_of
from search.runner import Stop
from search.screen import ProgressBar
from search.signals import stop_on_signals
from search.worker import Worker, mistakes_named, refiner


@dataclass(frozen=True)
class Question:
    """One task for one variant of a trial; `file` is that of refined factors, None for the trial's own."""

    row: TrialRow
    variant: str
    file: str | None
    task: str
    fingerprint: str


def evaluate_tasks(
    folder: StudyFolder, numbers: Sequence[int], variants: Sequence[str], spec: HarnessSpec, console: Console
) -> tuple[StudySummary, str | None]:
    """Ask the harness about trials (none named: the front and the dense model), each question once.

    `variants` are `factors` and names of refined factors; none named: all that a trial has. Returns what the
    study's report then shows, and the signal that stopped it, if one did.

    Raises:
        RankfrontError: the harness is not installed or does not know a task, another driver holds the study,
            it is no longer the study that was searched, a trial has no score yet, or none has a variant.
    """
    prints = task_fingerprints(spec)
    with reopened(folder, console) as session:
        study = session.folder.open_study()
        rows = [study.rows()[number] for number in finished_numbers(study, numbers)]
        queue = questions(session.folder, rows, variants, prints, session.say)
        stop = Stop()
        if queue:
            session.say(f"lm-evaluation-harness: {len(queue)} questions of a task and a model")
            with (
                logged(session.folder, session.say, "evaluate", stop),
                refiner(session.folder, session.machine, say=session.say) as worker,
                stop_on_signals(stop, console),
                mistakes_named(),
                ProgressBar(console) as bar,
            ):
                ask(session.folder, queue, spec, worker, stop, session.say, bar.progress)
        return report(session.folder, study), stop.reason


def questions(
    folder: StudyFolder,
    rows: Sequence[TrialRow],
    variants: Sequence[str],
    prints: dict[str, str],
    say: Callable[[str], None],
) -> list[Question]:
    """What the evaluations table has no answer to, trial by trial; `prints` are fingerprints by task.

    Where no variant is named, one whose file is gone is told to `say` and passed over.

    Raises:
        RankfrontError: a variant that none of the trials has, or a named one whose file is gone.
    """
    evaluations = Evaluations(folder.path, rows)
    there = {row.number: (FACTORS, *variants_of(folder, row, evaluations)) for row in rows}
    unknown = [name for name in variants if not any(name in names for names in there.values())]
    if unknown:
        known = ", ".join(dict.fromkeys(name for names in there.values() for name in names))
        raise RankfrontError(f"--variant {', '.join(unknown)}: no such trial has it; they have {known}")
    found = []
    for row in rows:
        for name in there[row.number]:
            if variants and name not in variants:
                continue
            missing = [
                task for task, key in prints.items() if (row.number, name, HARNESS, key) not in evaluations
            ]
            if missing and name != FACTORS and not variants and kept_file(folder, name) is None:
                gone = f"its file in {folder.path / REFINED} is gone; refine again"
                say(f"trial {row.number}, {name}, is passed over: {gone}")
            elif missing:
                file = None if name == FACTORS else refined_file(folder, row, name)[0].name
                found += [Question(row, name, file, task, prints[task]) for task in missing]
    return found


def ask(
    folder: StudyFolder,
    queue: Sequence[Question],
    spec: HarnessSpec,
    worker: Worker,
    stop: Stop,
    say: Callable[[str], None],
    show: Callable[[Progress], None],
) -> None:
    """Put the questions and keep each answer at once; where there is no valid one, say so and go on."""
    evaluations = Evaluations(folder.path, (question.row for question in queue))
    for done, question in enumerate(queue):
        number, variant = question.row.number, question.variant
        show(Progress(f"{question.task}: trial {number}, {variant}", done, len(queue)))
        try:
            score = worker.ask(question.row.allocation, question.file, spec, question.task)
        except (ScoringError, ShortOfMemoryError) as error:
            say(f"trial {number}, {variant}, has no score on {question.task}: {error}")
        else:
            evaluations.add(HarnessEvaluation(number, variant, question.fingerprint, score), say)
        if stop.reason:
            return
