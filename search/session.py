"""One run of a study, from its config to its report: the order in which everything happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from actors.types import Allocation, RankfrontError
from search.alone import FILE, Log
from search.config import Config
from search.finals import front_and_dense, score_test
from search.folder import StudyFolder, report
from search.opening import opened
from search.pool import Pool
from search.records import StudySummary
from search.references import reference_allocations
from search.replicas import replicas
from search.rules import sampler_problem
from search.runner import Runner, Stop
from search.screen import Screen
from search.seeds import seed_allocations
from search.signals import stop_on_signals
from search.study import SearchStudy


def search(config: Config, console: Console) -> tuple[StudyFolder, StudySummary, str]:
    """Run or resume a study: returns its folder, what was found, and why it stopped.

    Raises:
        RankfrontError: another driver holds the study, it is another study, or it cannot start.
    """
    with opened(config, console) as session:
        folder = session.folder
        problem = sampler_problem(config.sampler.name, len(folder.space.distributions))
        if problem is not None:
            raise RankfrontError(problem)
        study = folder.open_study()
        references = config.references
        if config.stop.plateau is not None:  # the hypervolume is measured from the dense model
            references = references.model_copy(update={"dense": True})
        study.enqueue([*reference_allocations(references, folder.cost), *_seeds(folder, session.say)])
        stop = Stop()
        with replicas(session) as pool, stop_on_signals(stop, console):
            reason = _run(config, study, pool, stop, console)
            if not stop.reason:
                score_test(folder, study, front_and_dense(study), pool, stop, session.say)
        return folder, report(folder, study), stop.reason or reason


def _seeds(folder: StudyFolder, say: Callable[[str], None]) -> Iterator[tuple[Allocation, str]]:
    """The seeds of a study; those from measured losses where `rankfront sensitivity` left any."""
    config, prepared = folder.config, folder.prepared
    log = None
    if (folder.path / FILE).exists():
        log = Log(folder.path, prepared.fingerprints)
        if log.repaired:
            say(f"sensitivity: {log.repaired}")
    return seed_allocations(
        config.seeds,
        folder.cost,
        config.space.floor,
        config.factor_spec,
        Path(prepared.factor_store),
        log,
        config.sensitivity.shares,
        say,
    )


def _run(config: Config, study: SearchStudy, pool: Pool, stop: Stop, console: Console) -> str:
    before = len([row for row in study.rows() if row.state not in ("WAITING", "RUNNING")])
    with Screen(console, study, config.stop.trials, before) as screen:
        runner = Runner(
            study,
            pool,
            config.stop,
            config.sampler.name,
            stop,
            screen.redraw,
            staged=bool(config.scoring.stages),
        )
        return runner.run()
