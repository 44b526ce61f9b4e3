"""Finalists: front members that are scored on the test split and refined, after a search or by command.

At a budget they are told first from trials that are as good by the search text, by a larger one. What they
come to is in the evaluations table; what is there is not done again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache

from ray.exceptions import RayError
from rich.console import Console

from actors.types import CHOICE, RankfrontError
from search.choosing import chosen, untold
from search.driving import logged
from search.events import Note
from search.failures import last_line
from search.finals import reopened, score_finished, unscored
from search.folder import StudyFolder, report, summarise
from search.opening import Session
from search.panels import dense_row, front_rows
from search.records import StudySummary, TrialRow
from search.refine import is_refined, refine_by
from search.replicas import replicas
from search.runner import Stop
from search.sections import FinalistSection
from search.signals import stop_on_signals
from search.study import SearchStudy
from search.worker import mistakes_named, refiner, worker_count


def run_finalists(
    folder: StudyFolder, section: FinalistSection, console: Console
) -> tuple[StudySummary, list[TrialRow], str | None]:
    """Follow a study's finalists further, or go on doing so.

    Returns what the study's report then shows, who they were, and the signal that stopped it, if one did.

    Raises:
        RankfrontError: none was asked for or the front has none, another driver holds the study, it is no
            longer the study that was searched, or some could not be refined.
    """
    if not section.wanted:
        raise RankfrontError(
            "finalists: none is asked for; give --budget B or --count N, or set finalists.budgets or "
            "finalists.count in the config"
        )
    with reopened(folder, console) as session:
        study, stop = session.folder.open_study(), Stop()
        with stop_on_signals(stop, console), reported(session.folder, study):
            rows = follow(session, study, section, stop, console)
        summary = report(session.folder, study)
    if not rows:
        raise RankfrontError("finalists: the front has no compressed model that was asked for")
    return summary, rows, stop.reason


@contextlib.contextmanager
def reported(folder: StudyFolder, study: SearchStudy) -> Iterator[None]:
    """An error in here leaves a report of what there is all the same."""
    try:
        yield
    except Exception:
        report(folder, study)
        raise


def follow(
    session: Session, study: SearchStudy, section: FinalistSection, stop: Stop, console: Console
) -> list[TrialRow]:
    """Choose the finalists, score them and the dense model on the test split, then refine one after the
    other; the study's log has when it began, what its replicas went through, and how it ended.

    Raises:
        RankfrontError: some could not be refined, the others were; or so many workers never run at once.
    """
    with logged(session.folder, session.say, "finalists", stop) as note:
        return _follow(session, study, section, stop, console, note)


def _follow(
    session: Session, study: SearchStudy, section: FinalistSection, stop: Stop, console: Console, note: Note
) -> list[TrialRow]:
    folder, say = session.folder, session.say
    with contextlib.ExitStack() as held:
        # Where there is anything to score.
        started = cache(lambda: held.enter_context(replicas(session, note)))
        near = undecided(summarise(folder, study), section) if CHOICE in folder.prepared.fingerprints else []
        if near:
            score_finished(folder, study, near, started(), stop, say, CHOICE)
        summary = summarise(folder, study)
        rows = finalists(summary, section, say)
        left = [row for row in rows if section.refine and not is_refined(folder, row)]
        # It may refuse: before what is scored for them.
        workers = worker_count(folder.config, session.machine) if left and not stop.reason else 0
        reference = dense_row(summary)
        numbers = [row.number for row in ([reference] if reference else []) + rows]
        if rows and not stop.reason and unscored(folder, study, numbers):
            score_finished(folder, study, numbers, started(), stop, say)
    failed = []
    if left and not stop.reason:
        with refiner(folder, session.machine, workers, say) as worker:
            for place, row in enumerate(left, start=1):
                kept = f"{row.budget_model:.1%} of all parameters"
                say(f"finalist {place} of {len(left)}: refining trial {row.number}, {kept}")
                try:
                    with mistakes_named():
                        found = refine_by(worker, folder, row, stop, console)
                except (RankfrontError, RayError) as error:
                    failed.append(str(row.number))
                    reason = str(error)
                    if isinstance(error, RayError):  # nobody foresaw it, and it may be the process that broke
                        reason = last_line(error)
                        worker.close()
                    say(f"trial {row.number} is not refined: {reason}")
                    continue
                if stop.reason:
                    break
                say(f"trial {row.number}: {found.variant}, {found.ended}")
    if failed:
        named = f"trials {', '.join(failed)} are" if len(failed) > 1 else f"trial {failed[0]} is"
        raise RankfrontError(f"finalists: {named} not refined, as is said above; all else is done and kept")
    return rows


def undecided(summary: StudySummary, section: FinalistSection) -> list[int]:
    """Numbers of the trials, in order, that the larger text is to tell apart for the section's budgets."""
    found: set[int] = set()
    for budget in section.budgets:
        with contextlib.suppress(RankfrontError):  # it is not reached: `finalists` says so
            found |= set(untold(summary, budget))
    return sorted(found)


def finalists(summary: StudySummary, section: FinalistSection, say: Callable[[str], None]) -> list[TrialRow]:
    """The compressed trials that a section asks for, the largest first, each once.

    Front members, and at a budget the one that the larger text prefers, which may be right behind the front.
    A budget that the front does not reach is said and passed over.
    """
    members = [row for row in front_rows(summary) if not row.allocation.is_dense]
    count, last = min(section.count or 0, len(members)), len(members) - 1
    wanted = [members[round(place * last / max(1, count - 1))] for place in range(count)]
    for budget in section.budgets:
        try:
            wanted += chosen(summary, budget=budget)
        except RankfrontError as error:
            say(f"finalists: {error}")
    different = {row.number: row for row in wanted if not row.allocation.is_dense}
    return sorted(different.values(), key=lambda row: -row.budget_model)
