"""Warm starts: what other studies found, or files name, scored before the sampler proposes anything.

Of a study these are the members of its front; another model's do as well, as long as its targets are the
same. Ranks are taken as they are: the trial scores them here, and the sampler is told the nearest parameters.
A target keeps the method it was cut by where this study has its factors by that method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from actors.types import Allocation, FactorSpec, Prepared, RankfrontError, TargetSpec
from search.allocations import check_method, read_items, told_methods
from search.begun import stored_preparation
from search.config import Config
from search.constraints import feasible
from search.database import open_database
from search.folder import CONFIG, PREPARED
from search.journal import JOURNAL, open_journal
from search.packing import PLAN, scored
from search.pareto import contributions, front
from search.plain import read_own
from search.policy import WarmStartSection

ORIGIN = "warm"

MOST_NAMED = 5
"""Differing targets that an error names; of two models there may be hundreds."""


@dataclass(frozen=True)
class _Study:
    """Another study: its Optuna study, what it was prepared as, and how it decomposes."""

    study: optuna.Study
    targets: tuple[TargetSpec, ...]
    factors: FactorSpec


@dataclass(frozen=True)
class _Found:
    """Ranks of a source, and the method each target with a rank was cut by, None where it does not say."""

    ranks: Mapping[str, int | None]
    methods: Mapping[str, str | None]


def check_sources(config: Config) -> None:
    """Look for every source before anything starts; those that only the database may have are left out.

    Raises:
        RankfrontError: each that is nowhere, or is the study itself.
    """
    mistakes = []
    for index, name in enumerate(config.warm_start.sources):
        folder = _folder_of(name, config)
        if folder is None and not Path(name).is_file() and config.database is None:
            mistakes.append(f"warm_start.sources[{index}]: {_nowhere(name, config)}")
        if name == config.study or (folder and folder.resolve() == config.folder.resolve()):
            mistakes.append(f"warm_start.sources[{index}]: {name!r} is this study itself")
    _refuse(mistakes)


def warm_allocations(
    config: Config,
    targets: Sequence[TargetSpec],
    storage: BaseStorage | None,
    say: Callable[[str], None],
) -> list[tuple[Allocation, str]]:
    """(allocation, origin) pairs of every source, the dense model left out; `storage` is that of the config's
    database, where it names one.

    Raises:
        RankfrontError: every source that is nowhere or cannot be read, and every target that differs.
    """
    found: list[Allocation] = []
    mistakes = []
    for index, name in enumerate(config.warm_start.sources):
        where = f"warm_start.sources[{index}]"
        try:
            members = _read(name, config, targets, storage)
            allocations, other = _as_here(members, targets, config.factor_spec, name)
        except RankfrontError as error:
            mistakes.append(f"{where}: {error}")
            continue
        found += [each for each in allocations if not each.is_dense]
        note = f"; {other} targets are cut by other methods than there, which this study has no factors of"
        say(f"warm start: {len(allocations)} allocations of {name}" + (note if other else ""))
    _refuse(mistakes)
    return [(allocation, ORIGIN) for allocation in found]


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        hint = "What a source gave before is in the study: without it, the search goes on."
        raise RankfrontError("\n".join([*mistakes, hint]))


# -- where sources are ------------------------------------------------------------------------


def _folder_of(name: str, config: Config) -> Path | None:
    """The folder of a study, by its path or by its name beside this one."""
    places = (Path(name), Path(config.runs) / name)
    return next((place for place in places if (place / CONFIG).exists()), None)


def _nowhere(name: str, config: Config) -> str:
    database = ", nor a study of the database" if config.database is not None else ""
    return f"{name!r} is no folder of a study, no file, no study in {config.runs}{database}"


def _read(
    name: str, config: Config, targets: Sequence[TargetSpec], storage: BaseStorage | None
) -> list[_Found]:
    """What a source has."""
    folder = _folder_of(name, config)
    if folder is not None:
        return _members(_in_folder(folder), config.warm_start, targets)
    if Path(name).is_file():
        return [_named(item, f"[{index}]") for index, item in enumerate(read_items(Path(name)))]
    kept = None if storage is None else stored_preparation(storage, name)
    if storage is None or kept is None:
        raise RankfrontError(_nowhere(name, config))
    raw, prepared = kept
    study = optuna.load_study(study_name=name, storage=storage)
    return _members(_Study(study, prepared.targets, told_methods(raw)), config.warm_start, targets)


def _in_folder(folder: Path) -> _Study:
    """Its config is not held against this version's schema: texts it names may be gone."""
    name, database, factors = read_own(
        folder / CONFIG, lambda kept: (str(kept["study"]), kept.get("database"), told_methods(kept))
    )
    needed = (PREPARED, JOURNAL) if database is None else (PREPARED,)
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise RankfrontError(f"{folder} has no {' and no '.join(missing)}: its search never began")
    prepared = read_own(folder / PREPARED, Prepared.from_dict)
    storage = open_journal(folder) if database is None else open_database(database)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        where = "journal" if database is None else "database"
        raise RankfrontError(f"{folder}: its {where} has no study {name!r}") from None
    return _Study(study, prepared.targets, factors)


# -- what sources have ------------------------------------------------------------------------


def _members(source: _Study, section: WarmStartSection, targets: Sequence[TargetSpec]) -> list[_Found]:
    """The front of a study, at most `limit` of it: those that add most hypervolume, the most first.

    Measured from a tenth of the front's range beyond its worst values, so that its ends count too. Trials
    that other programs proposed by levels alone have no ranks, those that they completed no score: both are
    left out.
    """
    _refuse_other_targets(source.targets, targets)
    signs = [1.0 if each == StudyDirection.MINIMIZE else -1.0 for each in source.study.directions]
    trials = [
        trial
        for trial in source.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if "ranks" in trial.user_attrs.get(PLAN, {}) and scored(trial) and feasible(trial.constraints)
    ]
    if not trials:
        return []
    points = np.array([trial.values for trial in trials]) * signs
    members = front(points)
    best, worst = points[members].min(axis=0), points[members].max(axis=0)
    added = contributions(points[members], worst + 0.1 * np.maximum(worst - best, 1e-9))
    order = members[np.argsort(-added, kind="stable")][: section.limit]
    return [_of_plan(trials[index].user_attrs[PLAN], source) for index in order]


def _of_plan(plan: Mapping[str, Any], source: _Study) -> _Found:
    names = [target.name for target in source.targets]
    ranks = dict(zip(names, plan["ranks"], strict=True))
    chosen = dict(zip(names, plan.get("methods", [None] * len(names)), strict=True))
    return _Found(ranks, {name: chosen[name] or source.factors.method_of(name) for name in names})


def _named(item: Any, where: str) -> _Found:
    """An item of a file: `{target: rank}`, or with `ranks`, and perhaps `methods` and `factors`."""
    whole = item if isinstance(item, Mapping) and "ranks" in item else {"ranks": item}
    ranks, methods = whole["ranks"], whole.get("methods") or {}
    if not isinstance(ranks, Mapping) or not isinstance(methods, Mapping):
        raise RankfrontError(f"{where} is no mapping of targets to ranks and methods")
    unknown = [str(name) for name in methods if name not in ranks]
    if unknown:
        raise RankfrontError(f"{where}.methods: {', '.join(unknown)}: no ranks are given for them")
    try:
        for method in filter(None, methods.values()):
            check_method(method)
        factors = told_methods(whole) if "factors" in whole else None
    except TypeError as error:
        raise RankfrontError(f"{where}: {error}") from error
    cut = {name: methods.get(name) or (factors.method_of(name) if factors else None) for name in ranks}
    return _Found(ranks, cut)


def _refuse_other_targets(theirs: Sequence[TargetSpec], ours: Sequence[TargetSpec]) -> None:
    there = {target.name: (target.rows, target.cols) for target in theirs}
    here = {target.name: (target.rows, target.cols) for target in ours}
    differing = [f"{name} is no target here" for name in there if name not in here]
    differing += [f"{name} is no target there" for name in here if name not in there]
    differing += [
        f"{name} is {there[name][0]} x {there[name][1]} there, {shape[0]} x {shape[1]} here"
        for name, shape in here.items()
        if name in there and there[name] != shape
    ]
    if differing:
        more = f"; and {len(differing) - MOST_NAMED} more" if len(differing) > MOST_NAMED else ""
        raise RankfrontError(f"its targets differ: {'; '.join(differing[:MOST_NAMED])}{more}")


def _as_here(
    found: Iterable[_Found], targets: Sequence[TargetSpec], factors: FactorSpec, where: str
) -> tuple[list[Allocation], int]:
    """The allocations for this study, and how many targets keep ranks but not the method they were cut by."""
    allocations, other = [], 0
    for index, each in enumerate(found):
        methods = {}
        for name, method in each.methods.items():
            if each.ranks.get(name) is None or method in (None, factors.method_of(name)):
                continue
            if method in factors.methods_of(name):
                methods[name] = method
            else:
                other += 1
        allocations.append(Allocation.of(each.ranks, targets, f"{Path(where).name}[{index}]", methods))
    return allocations, other
