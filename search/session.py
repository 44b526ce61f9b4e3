"""One run of a study, from its config to its report: the order in which everything happens."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
import yaml
from rich.console import Console

from actors.storage import ITEMSIZE
from actors.types import FactorSpec, Prepared, RankfrontError, ReplicaSpec
from search.config import Config, parse_config
from search.cost import CostModel
from search.evaluations import Evaluations
from search.files import write_atomic
from search.identity import config_differences, fingerprint_differences, refuse
from search.journal import JOURNAL, LOCK, driver_lock, open_journal, repair
from search.pareto import front
from search.pool import Job, Machine, Pool, connect
from search.preparing import prepare
from search.records import Evaluation, StudySummary
from search.references import reference_allocations
from search.report import write_report
from search.rules import refuse_idle_patterns
from search.runner import TICK_SECONDS, Runner, Stop, hypervolumes, minimised, reference_point
from search.samplers import make_sampler
from search.screen import ProgressBar, Screen
from search.sections import SamplerSection
from search.space import Space
from search.study import SearchStudy, open_storage_study

CONFIG, PREPARED = "config.yaml", "prepared.json"

# Bytes of a replica beyond its weights: torch, a batch of logits, activations.
REPLICA_BYTES = 700 * 2**20
# Weights are there twice (dense and product) and the node's factors are shared: see actors.low_rank.
WEIGHT_COPIES = 2.5


@dataclass(frozen=True)
class StudyFolder:
    """A study on disk: its config and what was prepared for it."""

    path: Path
    config: Config
    prepared: Prepared

    @classmethod
    def open(cls, path: Path) -> StudyFolder:
        """Raises RankfrontError where there is no study, or it never got as far as its first trial."""
        if not (path / CONFIG).exists() or not (path / PREPARED).exists():
            raise RankfrontError(f"{path} holds no study: no {CONFIG} and {PREPARED} in it")
        config = parse_config(yaml.safe_load((path / CONFIG).read_text()), str(path / CONFIG))
        return cls(path, config, Prepared.from_dict(json.loads((path / PREPARED).read_text())))

    def open_study(self, sampler: SamplerSection | None = None) -> SearchStudy:
        """The study behind the folder, ready to be read and written."""
        config, cost = self.config, self.cost
        section = sampler or config.sampler
        objectives = config.named_objectives
        study = open_storage_study(open_journal(self.path), config.study, objectives)
        space = Space(cost, config.factor_spec, **config.space.model_dump(exclude={"methods"}))
        return SearchStudy(study, make_sampler(section), section.seed, space, cost, objectives)

    @property
    def cost(self) -> CostModel:
        return CostModel(
            self.prepared.targets,
            self.prepared.model_parameters,
            self.config.storage,
            self.config.factors.bias,
            ITEMSIZE[self.config.model.dtype],
        )

    @property
    def facts(self) -> dict[str, str]:
        """What was prepared, for people."""
        prepared, config = self.prepared, self.config
        return {
            "model": config.model.source,
            "parameters": f"{prepared.model_parameters:,} ({len(prepared.targets)} targets hold "
            f"{self.cost.linear_parameters:,})",
            "factors": _factor_fact(config.factor_spec),
            "storage of a compressed target": config.storage,
            "calibration": f"{prepared.tokens['calibration']:,} tokens",
            "search split": _split_fact(prepared, "search"),
            "test split": _split_fact(prepared, "test"),
            "factor store": prepared.factor_store,
        }


def repair_if_idle(folder: Path) -> None:
    """Before something is written beside a possible driver: a torn tail may stay only where one runs."""
    with contextlib.suppress(RankfrontError), driver_lock(folder):
        repair(folder / JOURNAL)


def find_study(name: str, runs: Path) -> StudyFolder:
    """A study by the path of its folder, or by its name in `runs`."""
    path = Path(name)
    return StudyFolder.open(path if (path / CONFIG).exists() else runs / name)


def summarise(folder: StudyFolder, study: SearchStudy) -> StudySummary:
    """Everything the reports show."""
    values, numbers = minimised(study)
    rows = study.rows()
    chosen = sorted(numbers[front(values)].tolist(), key=lambda number: -rows[number].budget_model)
    volumes = hypervolumes(study)
    config = folder.config
    scored = sum(row.score.forward_tokens for row in rows if row.score and row.copied_from is None)
    facts = {
        **folder.facts,
        "space": f"{config.space.group}, {config.space.levels} levels above {config.space.floor:.0%}",
        "sampler": f"{config.sampler.name}, seed {config.sampler.seed}",
        "trials": f"{len(rows)}, {scored:,} tokens scored",
        "optuna": optuna.__version__,
    }
    return StudySummary(
        study=config.study,
        model=short_name(config.model.source),
        objectives=study.objectives,
        rows=rows,
        front=tuple(chosen),
        hypervolume=float(volumes[-1]) if len(volumes) else 0.0,
        reference=reference_point(study) or (),
        evaluations=Evaluations(folder.path).rows,
        facts=facts,
    )


def short_name(source: str) -> str:
    """A hub id as it is; of a path or a packaged file its last part."""
    return source.rsplit("/", 1)[-1] if source.startswith(("/", "package:")) else source


def _factor_fact(factors: FactorSpec) -> str:
    own = "".join(f", {pattern} by {method}" for pattern, method in factors.methods)
    chosen = f", the search chooses among {'/'.join(factors.choices)}" if factors.choices else ""
    return f"{factors.method}{own}{chosen}, bias {factors.bias}, {factors.dtype}"


def _split_fact(prepared: Prepared, split: str) -> str:
    tasks = ", ".join(f"{count} of {name}" for name, count in prepared.examples[split].items())
    return f"{prepared.tokens[split]:,} tokens of text" + (f"; {tasks}" if tasks else "")


def report(folder: StudyFolder, study: SearchStudy) -> StudySummary:
    """Write the tables, the plots and the page; returns what they show."""
    summary = summarise(folder, study)
    write_report(summary, folder.path, folder.prepared.targets)
    return summary


@contextlib.contextmanager
def stop_on_signals(stop: Stop, console: Console) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the loop at its next look; the second ends the process."""

    def handler(number: int, frame: object) -> None:
        if stop.reason:
            raise KeyboardInterrupt
        stop.reason = signal.Signals(number).name
        console.print(f"{stop.reason}: stopping; what is finished is saved")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _study_folder(path: Path) -> Iterator[None]:
    """The folder, locked; a folder that nothing came of is taken away again."""
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with driver_lock(path):
            yield
    finally:
        if new and {file.name for file in path.iterdir()} <= {LOCK}:
            shutil.rmtree(path)


@dataclass(frozen=True)
class Session:
    """A study that this process drives: prepared and in its folder, with the machine it runs on."""

    folder: StudyFolder
    machine: Machine
    say: Callable[[str], None]


@contextlib.contextmanager
def opened(config: Config, console: Console) -> Iterator[Session]:
    """Lock the study of a config, hold the config against what the study was, prepare it, save both.

    A folder without a journal has no trial yet (its targets may have been scored alone, see
    `search.sensitivity`): nothing binds the config then.

    Raises:
        RankfrontError: another driver holds the study, it is another study, or it cannot start.
    """
    path = config.folder
    say = _sayer(console)
    with _study_folder(path):
        begun = (path / JOURNAL).exists()
        if begun and (path / CONFIG).exists():
            saved = parse_config(yaml.safe_load((path / CONFIG).read_text()), str(path / CONFIG))
            refuse(config.study, config_differences(saved, config))
        repaired = repair(path / JOURNAL)
        if repaired:
            say(f"journal: {repaired}")
        machine = connect()
        check = _fingerprint_check(config.study, path if begun else None)
        builders = config.calibration.builders
        count = max(1, machine.gpus) if builders == "auto" else builders
        with ProgressBar(console) as bar:
            prepared = prepare(config.preparation(), machine, count, say, bar.progress, check)
        refuse_idle_patterns(config.factors.methods, prepared.targets)
        write_atomic(path / CONFIG, config.to_yaml())
        write_atomic(path / PREPARED, json.dumps(prepared.to_dict(), indent=1))
        yield Session(StudyFolder(path, config, prepared), machine, say)


def search(config: Config, console: Console) -> tuple[StudyFolder, StudySummary, str]:
    """Run or resume a study: returns its folder, what was found, and why it stopped.

    Raises:
        RankfrontError: another driver holds the study, it is another study, or it cannot start.
    """
    with opened(config, console) as session:
        folder = session.folder
        study = folder.open_study()
        references = config.references
        if config.stop.plateau is not None:  # the hypervolume is measured from the dense model
            references = references.model_copy(update={"dense": True})
        study.enqueue(reference_allocations(references, folder.cost))
        stop = Stop()
        with replicas(session) as pool, stop_on_signals(stop, console):
            reason = _run(config, study, pool, stop, console)
            if not stop.reason:
                _score_test(folder, study, pool, stop, session.say)
        return folder, report(folder, study), stop.reason or reason


def _fingerprint_check(study: str, path: Path | None) -> Callable[[Mapping[str, str]], None]:
    """Refuses fingerprints other than those the study at `path` was prepared with, if it was."""
    known = None
    if path is not None and (path / PREPARED).exists():
        known = json.loads((path / PREPARED).read_text())["fingerprints"]

    def check(found: Mapping[str, str]) -> None:
        if known is not None:
            refuse(study, fingerprint_differences(known, found))

    return check


def _sayer(console: Console) -> Callable[[str], None]:
    start = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - start:6.1f} s[/]  {line}", highlight=False, soft_wrap=True)

    return say


@contextlib.contextmanager
def replicas(session: Session) -> Iterator[Pool]:
    """The replicas of a study, gone at the end."""
    pool = _start_pool(session.folder.config, session.folder.prepared, session.machine, session.say)
    try:
        yield pool
    finally:
        pool.close()


def _start_pool(config: Config, prepared: Prepared, machine: Machine, say: Callable[[str], None]) -> Pool:
    count, threads = replica_plan(config, prepared, machine)
    say(f"replicas: {count}, {threads} threads each" + (", one GPU each" if machine.gpus else ""))
    specs = [
        ReplicaSpec(f"replica-{index}", config.preparation(), prepared, threads) for index in range(count)
    ]
    section = config.replicas
    return Pool(specs, 1 if machine.gpus else 0, section.attempts, section.trial_seconds)


def replica_plan(config: Config, prepared: Prepared, machine: Machine) -> tuple[int, int]:
    """How many replicas, with how many threads each: a GPU each, or what cores and memory allow."""
    section = config.replicas
    wanted_threads = 1 if section.threads == "auto" else section.threads
    if section.count != "auto":
        count = section.count
    elif machine.gpus:
        count = machine.gpus
    else:
        weights = prepared.model_parameters * ITEMSIZE[config.model.dtype]
        each = REPLICA_BYTES + WEIGHT_COPIES * weights
        count = max(1, min(machine.cores // wanted_threads, int(0.8 * machine.memory / each)))
    if section.threads == "auto":
        return count, max(1, machine.cores // count)
    return count, section.threads


def _run(config: Config, study: SearchStudy, pool: Pool, stop: Stop, console: Console) -> str:
    before = len([row for row in study.rows() if row.state not in ("WAITING", "RUNNING")])
    with Screen(console, study, config.stop.trials, before) as screen:
        runner = Runner(study, pool, config.stop, config.sampler.name, stop, screen.redraw)
        return runner.run()


def _score_test(
    folder: StudyFolder, study: SearchStudy, pool: Pool, stop: Stop, say: Callable[[str], None]
) -> None:
    """Score the front and the references once on the test split; known scores are not repeated."""
    evaluations = Evaluations(folder.path)
    fingerprint = folder.prepared.fingerprints["test"]
    values, numbers = minimised(study)
    rows = study.rows()
    wanted = [
        rows[number]
        for number in sorted(
            {
                *numbers[front(values)].tolist(),
                *(row.number for row in rows if row.finished and row.origin == "dense"),
            }
        )
        if evaluations.get(number, "factors", "test", fingerprint) is None
    ]
    if not wanted:
        return
    tokens = folder.prepared.tokens["test.forward"]
    say(f"test split: scoring {len(wanted)} trials of the front, {tokens:,} tokens each")
    queue = list(wanted)
    while (queue or pool.outstanding) and not stop.reason:
        while queue and pool.free:
            row = queue.pop(0)
            pool.submit(Job(row.number, row.allocation, "test"))
        for outcome in pool.wait(TICK_SECONDS):
            if outcome.score is None:
                say(f"trial {outcome.job.key} has no test score: {outcome.reason}")
            else:
                evaluations.add(Evaluation(outcome.job.key, "factors", "test", fingerprint, outcome.score))
