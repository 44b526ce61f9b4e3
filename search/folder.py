"""A study's folder: its config, what was prepared for it, and what its reports show."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, InMemoryStorage

from actors.node_cache import MANIFEST, local_store
from actors.storage import ITEMSIZE
from actors.types import CHOICE, Allocation, FactorSpec, Prepared, RankfrontError
from search.config import Config, parse_saved
from search.cost import CostModel
from search.database import open_database, open_tables
from search.evaluations import Evaluations
from search.findings import percent
from search.journal import (
    JOURNAL,
    driver_lock,
    journal_has_trial,
    lock_holder,
    open_journal,
    repair_journal,
)
from search.landscape import Landscape, landscape_of
from search.pareto import front
from search.patience import Patience, impatient
from search.places import FACTOR_STORES
from search.plain import read_own
from search.records import StudySummary
from search.report import write_report
from search.runner import hypervolumes, minimised, reference_point, room_of
from search.samplers import make_sampler
from search.sections import SamplerSection, SpaceSection
from search.seeds import tail_losses
from search.space import Space
from search.spectra import losses
from search.stored import has_trial, open_storage_study
from search.study import SearchStudy
from search.tables import TRIALS, kept_trials

CONFIG, PREPARED = "config.yaml", "prepared.json"


@dataclass(frozen=True)
class StudyFolder:
    """A study on disk: its config and what was prepared for it.

    `leased` is the database's storage where this process drives the study there; `patience` is a driver's
    with a storage that refuses.
    """

    path: Path
    config: Config
    prepared: Prepared
    leased: BaseStorage | None = None
    patience: Patience = field(default_factory=impatient, compare=False)

    @classmethod
    def open(cls, path: Path) -> StudyFolder:
        """Raises RankfrontError where there is no study, it never got as far as its first trial, or a file of
        it is damaged."""
        if not (path / CONFIG).exists() or not (path / PREPARED).exists():
            raise RankfrontError(f"{path} holds no study: no {CONFIG} and {PREPARED} in it")
        config = parse_saved(read_own(path / CONFIG, dict), str(path / CONFIG))
        return cls(path, config, _with_factors_beside(path, read_own(path / PREPARED, Prepared.from_dict)))

    def open_study(self, sampler: SamplerSection | None = None) -> SearchStudy:
        """The study behind the folder, ready to be read and written; it is begun if it is not."""
        return self._study_in(self._storage(), sampler or self.config.sampler)

    def read_study(self) -> SearchStudy:
        """The study for one who only reads it; before its first trial one in memory: no look begins it."""
        return self._study_in(self._begun_storage() or InMemoryStorage(), self.config.sampler)

    def _study_in(self, storage: BaseStorage, section: SamplerSection) -> SearchStudy:
        config, cost = self.config, self.cost
        objectives = config.named_objectives
        if not has_trial(storage, config.study):
            refuse_lost(self.path)
        study = open_storage_study(storage, config.study, objectives)
        return SearchStudy(
            study,
            make_sampler(section, self.landscape, config.named_constraints),
            section.seed,
            self.space,
            cost,
            objectives,
            config.named_constraints,
            config.run.lag if config.run.deterministic else None,
        )

    @property
    def space(self) -> Space:
        """What the sampler proposes in."""
        config = self.config
        return Space(self.cost, config.factor_spec, **config.space.model_dump(exclude={"methods"}))

    def landscape(self) -> Landscape:
        """Sizes of every level, and losses predicted by the factors where they were built with gradients.

        Raises:
            RankfrontError: the factor store cannot be read from this machine.
        """
        objectives, factors = self.config.named_objectives, self.config.factor_spec
        known = losses(self.factor_store)
        own = {target.name: factors.method_of(target.name) for target in self.prepared.targets}
        predicted = None
        if all(method in known.get(name, {}) for name, method in own.items()):
            predicted = {name: tail_losses(known[name][method]) for name, method in own.items()}
        rooms = [room_of(objective) for objective in objectives]
        wanted, bounds = self.config.finalists.budgets, self.config.named_constraints
        lowest = self.config.sampler.lowest
        return landscape_of(self.space, self.cost, objectives, rooms, predicted, wanted, bounds, lowest)

    @property
    def factor_store(self) -> Path:
        """The folder of the factors; where they are at a URL, this node's copy, made if there is none.

        Raises:
            RankfrontError: the copy cannot be made.
        """
        return local_store(self.prepared.factor_store, Path(self.config.cache.node))

    def _storage(self) -> BaseStorage:
        if self.leased is not None:
            return self.leased
        database = self.config.database
        return open_journal(self.path, self.patience) if database is None else open_database(database)

    def _begun_storage(self) -> BaseStorage | None:
        """Where the study has a trial, None where it has none; neither file nor table is made."""
        database, name = self.config.database, self.config.study
        if database is None:
            return open_journal(self.path) if journal_has_trial(self.path, name) else None
        storage = open_tables(database)
        return storage if storage is not None and has_trial(storage, name) else None

    @cached_property
    def cost(self) -> CostModel:
        """Kept: counting an allocation looks up tables that take time to make."""
        return CostModel(
            self.prepared.targets,
            self.prepared.model_parameters,
            self.config.storage,
            self.config.factors.bias,
            ITEMSIZE[self.config.model.dtype],
            self.prepared.operations,
            self.config.cost.length or self.config.scoring.window,
        )

    @property
    def facts(self) -> dict[str, str]:
        """What was prepared, for people."""
        prepared, config = self.prepared, self.config
        return {
            "model": config.model.source,
            "parameters": f"{prepared.model_parameters:,} ({len(prepared.targets)} targets hold "
            f"{self.cost.linear_parameters:,})",
            "MACs per token": _mac_fact(self.cost),
            "factors": factor_fact(config.factor_spec),
            "storage of a compressed target": config.storage,
            "calibration": f"{prepared.tokens['calibration']:,} tokens",
            "search split": _split_fact(prepared, "search"),
            **({"choice split": _split_fact(prepared, CHOICE)} if CHOICE in prepared.tokens else {}),
            "test split": _split_fact(prepared, "test"),
            "factor store": prepared.factor_store,
        }


def _with_factors_beside(path: Path, prepared: Prepared) -> Prepared:
    """With the factors beside the study's folder, where they are: `runs` may have moved, or be a copy."""
    made = prepared.factor_store
    beside = path.resolve().parent / FACTOR_STORES / Path(made).name
    return replace(prepared, factor_store=str(beside)) if (beside / MANIFEST).exists() else prepared


def repair_if_idle(folder: Path) -> str | None:
    """Before something is written beside a possible driver: a torn tail may stay only where one runs.

    Returns what was dropped; raises as `repair_journal` does.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(driver_lock(folder))
        except RankfrontError:
            return None
        return repair_journal(folder)


def refuse_lost(folder: Path) -> None:
    """What a study without a trial has to hold against: a table of trials in its folder.

    Raises:
        RankfrontError: there is one, so the journal or the database was lost; nothing may replace the table.
    """
    count = kept_trials(folder)
    if count:
        raise RankfrontError(
            f"{folder / TRIALS} lists {count} trials, the study has none of them: its {JOURNAL}, or its "
            "database, was lost; restore it from a backup, or move the folder away to begin anew"
        )


def find_study(name: str, runs: Path) -> StudyFolder:
    """A study by the path of its folder, or by its name in `runs`.

    Raises:
        RankfrontError: neither holds one, or its first trial is still prepared, or what `StudyFolder.open`
            raises.
    """
    path, named = Path(name), runs / name
    if not (path / CONFIG).exists() and not (named / CONFIG).exists():
        for folder in (path, named):
            holder = lock_holder(folder)
            if holder is not None:
                raise RankfrontError(f"{folder} is being prepared by {holder}: there is nothing to see yet")
        if path != named:
            raise RankfrontError(
                f"{name} holds no study, nor does {named}: no {CONFIG} and {PREPARED} in either; give a "
                "study's folder, or its name in --runs"
            )
    return StudyFolder.open(path if (path / CONFIG).exists() else named)


def summarise(folder: StudyFolder, study: SearchStudy) -> StudySummary:
    """Everything the reports show."""
    values, numbers = minimised(study)
    rows = study.rows()
    chosen = sorted(numbers[front(values)].tolist(), key=lambda number: -rows[number].budget_model)
    volumes = hypervolumes(study)
    evaluations = Evaluations(folder.path, rows)
    config = folder.config
    scored = sum(row.score.forward_tokens for row in rows if row.score and row.copied_from is None)
    facts = {
        **folder.facts,
        "space": _space_fact(config.space),
        "sampler": f"{config.sampler.name}, seed {config.sampler.seed}"
        + (f", deterministic, lag {config.run.lag}" if config.run.deterministic else ""),
        "trials": f"{len(rows)}, {scored:,} tokens scored",
        "optuna": optuna.__version__,
    }
    if study.constraints:
        facts["constraints"] = ", ".join(map(str, study.constraints))
    if evaluations.left_out:
        facts["evaluations left out"] = (
            f"{evaluations.left_out}, of trials that are not in this study or have another allocation in it"
        )
    return StudySummary(
        study=config.study,
        model=short_name(config.model.source),
        objectives=study.objectives,
        rows=rows,
        front=tuple(chosen),
        hypervolume=float(volumes[-1]) if len(volumes) else 0.0,
        reference=reference_point(study) or (),
        evaluations=evaluations.rows,
        facts=facts,
        macs_length=folder.cost.length,
        constraints=study.constraints,
        harness=evaluations.harness,
        fingerprints=folder.prepared.fingerprints,
    )


def short_name(source: str) -> str:
    """A hub id as it is; of a path or a packaged file its last part."""
    return source.rsplit("/", 1)[-1] if source.startswith(("/", "package:")) else source


def factor_fact(factors: FactorSpec) -> str:
    """How targets are decomposed, for people."""
    own = "".join(f", {pattern} by {method}" for pattern, method in factors.methods)
    chosen = f", the search chooses among {'/'.join(factors.choices)}" if factors.choices else ""
    return f"{factors.method}{own}{chosen}, bias {factors.bias}, {factors.dtype}"


def _space_fact(space: SpaceSection) -> str:
    more = {"curve": f" of {space.knots} knots", "module": f" in {space.segments} segments"}
    cut = "" if space.group == "module" and space.segments == 1 else more.get(space.group, "")
    return f"{space.group}{cut}, {space.levels} levels above {percent(space.floor)}"


def _mac_fact(cost: CostModel) -> str:
    count = cost.macs(Allocation.dense(cost.targets))
    if count is None:
        return "not known for this model"
    return f"{count:,} dense, at a length of {cost.length:,}; norms, softmax and activations not counted"


def _split_fact(prepared: Prepared, split: str) -> str:
    prefix = f"{split}.nll."
    further = [
        f", {count:,} of {key.removeprefix(prefix)}"
        for key, count in prepared.tokens.items()
        if key.startswith(prefix)
    ]
    tasks = ", ".join(f"{count} of {name}" for name, count in prepared.examples[split].items())
    return f"{prepared.tokens[split]:,} tokens of text{''.join(further)}" + (f"; {tasks}" if tasks else "")


def report(folder: StudyFolder, study: SearchStudy) -> StudySummary:
    """Write the tables, the plots and the page; returns what they show."""
    summary = summarise(folder, study)
    write_report(summary, folder.path, folder.prepared.targets)
    return summary
