"""One run of a study, from its config to its report: the order in which everything happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from rich.console import Console

from actors.types import Allocation, RankfrontError
from search.alone import FILE, Log
from search.beacon import Beacon
from search.config import Config
from search.constraints import dense_notes
from search.database import secrets_of
from search.driving import ends_told
from search.event_log import event_log
from search.events import Note, told
from search.finalists import follow, reported
from search.finals import front_and_dense, score_finished
from search.folder import StudyFolder, report
from search.metrics import RayMetrics
from search.opening import Session, opened
from search.pool import Machine, Pool
from search.records import StudySummary
from search.references import reference_allocations
from search.replicas import replicas
from search.rules import sampler_problem
from search.runner import Progress, Runner, Stop
from search.screen import Screen
from search.seeds import seed_allocations
from search.signals import stop_on_signals
from search.study import SearchStudy
from search.warm import check_sources, warm_allocations
from search.worker import worker_count


def search(config: Config, console: Console) -> tuple[StudyFolder, StudySummary, str]:
    """Run or resume a study: returns its folder, what was found, and why it stopped.

    Raises:
        RankfrontError: another driver holds the study, it is another study, or it cannot start.
    """
    begun = time.monotonic()
    check_sources(config)
    warm: list[tuple[Allocation, str]] = []

    def check(session: Session) -> None:
        folder = session.folder
        problem = sampler_problem(config.sampler.name, len(folder.space.distributions))
        if problem is not None:
            raise RankfrontError(problem)
        warm.extend(warm_allocations(config, folder.prepared.targets, folder.leased, session.say))

    def suits(machine: Machine) -> None:
        if config.finalists.wanted and config.finalists.refine:
            worker_count(config, machine)  # refused now, not when the search is done

    with opened(config, console, check=check, suits=suits) as session:
        folder = session.folder
        study = folder.open_study()
        references = config.references
        if config.stop.plateau is not None:  # the hypervolume is measured from the dense model
            references = references.model_copy(update={"dense": True})
        study.enqueue([*reference_allocations(references, folder.cost), *_seeds(folder, session.say), *warm])
        stop, metrics = Stop(), RayMetrics(config.study)
        with event_log(folder.path, secrets_of(config.database), session.say) as log:
            note = told(log, metrics.note)
            folder.patience.note = note
            note("resumed" if study.started else "started", study=config.study, trials=study.started)
            with stop_on_signals(stop, console), replicas(session, note) as pool:
                beacon = Beacon(folder.path, study, pool, metrics, pool.alone_seconds)

                def tell(reason: str) -> None:
                    note("stopped", reason=reason)
                    beacon.stop(reason)

                with ends_told(tell, stop):
                    reason = _run(session, study, pool, stop, console, beacon, note, begun)
                    if not stop.reason:
                        last = front_and_dense(study)
                        score_finished(folder, study, last, pool, stop, session.say, look=beacon.tick)
        if config.finalists.wanted and not stop.reason:
            report(folder, study)  # what was found is there to see while the finalists are followed
            with stop_on_signals(stop, console), reported(folder, study):
                follow(session, study, config.finalists, stop, console)
        return folder, report(folder, study), stop.reason or reason


def _seeds(folder: StudyFolder, say: Callable[[str], None]) -> Iterator[tuple[Allocation, str]]:
    """The seeds of a study; those from measured losses where `rankfront sensitivity` left any."""
    config = folder.config
    log = None
    if (folder.path / FILE).exists():
        log = Log(folder.path, folder.prepared.fingerprints)
        if log.repaired:
            say(f"sensitivity: {log.repaired}")
    return seed_allocations(
        config.seeds,
        folder.cost,
        config.space.floor,
        config.factor_spec,
        folder.factor_store,
        log,
        config.sensitivity.shares,
        say,
    )


class DenseNotes:
    """Says, once the dense model is scored, which constraints it violates itself."""

    def __init__(self, study: SearchStudy, say: Callable[[str], None]) -> None:
        self._study, self._say = study, say
        self._said = not study.constraints

    def look(self) -> None:
        number = None if self._said else self._study.scored_as(self._study.dense)
        if number is not None:
            self._said = True
            for note in dense_notes(self._study.constraints, self._study.row(number)):
                self._say(note)


def _run(
    session: Session,
    study: SearchStudy,
    pool: Pool,
    stop: Stop,
    console: Console,
    beacon: Beacon,
    note: Note,
    begun: float,
) -> str:
    config = session.folder.config
    before = len([row for row in study.rows() if row.state not in ("WAITING", "RUNNING")])
    with Screen(console, study, config.stop.trials, before) as screen:
        noted = DenseNotes(study, session.say)

        def redraw(progress: Progress) -> None:
            noted.look()
            screen.redraw(progress)
            beacon.tick()

        runner = Runner(
            study,
            pool,
            config.stop,
            config.sampler.name,
            stop,
            redraw,
            staged=bool(config.scoring.stages),
            note=note,
            begun=begun,
        )
        return runner.run()
