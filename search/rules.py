"""What sections of a config must agree on: each rule returns its mistakes, one line each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from actors.refinement import GRADIENT, REFIT, windows_of
from actors.stages import METRICS as STAGED
from actors.tasks import task_of
from actors.types import METHOD_NAMES, SPLITS, ScoringSpec, TextSource
from search.constraints import constraint_mistakes
from search.places import builder_mistakes, name_mistakes
from search.sections import FLOOR, KNOTS, POPULATION
from search.surgical import CHUNKS
from search.text_rules import cap_mistakes, corpus_mistakes, stride_mistakes, text_mistakes

if TYPE_CHECKING:
    from search.inputs import ModelSection, ScoringSection, TextSection
    from search.sections import (
        CalibrationSection,
        FactorSection,
        FinalistSection,
        RefineSection,
        ReplicaSection,
        SamplerSection,
        SpaceSection,
        StopSection,
        SurgicalSection,
    )

# Metrics that can be objectives, and whether less is better. Tasks add `reasoning.<task>.<kind>`, corpora
# `nll.<name>`.
METRICS: dict[str, bool] = {
    "budget.model": True,
    "budget.linear": True,
    "budget.bytes": True,
    "nll": True,
    "kl": True,
    "reasoning.acc": False,
    "reasoning.acc_norm": False,
    "reasoning.margin": False,
}
_CORPUS = "nll."
# Most parameters that `gp` proposes for: at 21 one proposal takes four seconds, at 42 eight to ten
# (benchmarks/results/sampler_cost.md).
GP_PARAMETERS = 20
GENETIC = ("nsga2", "nsga3")  # the samplers that have a population
_TASK_METRIC = re.compile(r"^reasoning\.(?P<task>\w+)\.(acc|acc_norm|margin)$")


def smaller_is_better(metric: str) -> bool:
    """The direction of a metric that can be an objective."""
    return METRICS.get(metric, metric.startswith(_CORPUS))


def _objective_mistakes(objectives: tuple[str, ...], scoring: ScoringSection) -> list[str]:
    tasks = [task.name for task in scoring.tasks]
    further = [f"{_CORPUS}{corpus.name}" for corpus in scoring.corpora]
    found = []
    for index, name in enumerate(objectives):
        match = _TASK_METRIC.match(name)
        if name not in (*METRICS, *further) and not (match and match["task"] in tasks):
            offered = [*METRICS, *further, *(f"reasoning.{task}.acc" for task in tasks)]
            found.append(f"objectives[{index}]: {name!r} is unknown; one of {', '.join(offered)}")
        elif name == "kl" and scoring.kl_top_k is None:
            found.append(f"objectives[{index}]: 'kl' needs scoring.kl_top_k, which is not set")
        elif name.startswith("reasoning.") and not tasks:
            found.append(f"objectives[{index}]: {name!r} needs scoring.tasks, which is empty")
        elif name.endswith(".acc_norm") and not any(
            task_of(task.name, task.format).normalised
            for task in scoring.tasks
            if task.name in ([match["task"]] if match else tasks)
        ):
            found.append(f"objectives[{index}]: {name!r} is not defined for {', '.join(tasks)}")
        if name in objectives[:index]:
            found.append(f"objectives[{index}]: {name!r} is there twice")
    if not any(name.startswith("budget.") for name in objectives):
        found.append("objectives: one of them must be a budget (budget.model, budget.linear or budget.bytes)")
    if all(name.startswith("budget.") for name in objectives):
        found.append("objectives: one of them must be measured (nll, kl, reasoning.acc, ...), not a budget")
    return found


def _task_mistakes(scoring: ScoringSection) -> list[str]:
    named: dict[str, list[str]] = {
        "tasks": [task.name for task in scoring.tasks],
        "bias": [chosen.name for chosen in scoring.bias],
    }
    found = [
        f"scoring.{key}[{i}]: {name!r} is there twice"
        for key, names in named.items()
        for i, name in enumerate(names)
        if name in names[:i]
    ]
    return found + [
        f"scoring.tasks[{i}].source: missing; {task.name!r} is a task of your own (format: {task.format})"
        for i, task in enumerate(scoring.tasks)
        if task.format is not None and task.source is None
    ]


def _kl_mistakes(scoring: ScoringSection, text: TextSection) -> list[str]:
    spec = ScoringSpec(
        TextSource(**text.model_dump()),
        scoring.window,
        scoring.tokens.model_dump(),
        kl_top_k=scoring.kl_top_k,
        kl_memory_mb=scoring.kl_memory_mb,
        stride=scoring.stride,
    )
    return [f"scoring.{problem}" for problem in map(spec.kl_problem, SPLITS) if problem is not None]


def _stage_mistakes(objectives: tuple[str, ...], scoring: ScoringSection) -> list[str]:
    """Stages that no trial would stop after, or that cannot tell whether it is dominated."""
    stages, whole, least = scoring.stages, scoring.tokens.search, 2 * scoring.window
    found = []
    for index, tokens in enumerate(stages):
        if index and tokens <= stages[index - 1]:
            found.append(
                f"scoring.stages[{index}]: {tokens} is not above {stages[index - 1]}, the stage before"
            )
        if tokens >= whole:
            found.append(f"scoring.stages[{index}]: {tokens} is not below scoring.tokens.search, {whole}")
        if tokens < least:
            found.append(f"scoring.stages[{index}]: {tokens} is below two windows, {least}: one has no error")
    if stages and scoring.stride not in (None, scoring.window):
        found.append(
            f"scoring.stages: they compare windows that do not overlap; scoring.stride is {scoring.stride}, "
            f"scoring.window {scoring.window}"
        )
    return found + [
        f"scoring.stages: they compare {' and '.join(STAGED)} alone, objectives[{index}] is {name!r}"
        for index, name in enumerate(objectives)
        if stages and not name.startswith("budget.") and name not in STAGED
    ]


def _stop_mistakes(stop: StopSection) -> list[str]:
    if all(rule is None for rule in (stop.trials, stop.tokens, stop.hours, stop.plateau)):
        return ["stop: set at least one of trials, tokens, hours, plateau"]
    return []


def _space_mistakes(space: SpaceSection) -> list[str]:
    found = []
    if space.segments > 1 and space.group != "module":
        found.append(f"space.segments: {space.segments} needs group: module, not {space.group}")
    if space.knots != KNOTS and space.group != "curve":
        found.append(f"space.knots: {space.knots} needs group: curve, not {space.group}")
    if space.floor == 1:  # a rule and no type, as there may be saved studies that did so
        found.append(f"space.floor: {space.floor:g} makes every level dense; below 1, such as {FLOOR:g}")
    methods = space.methods
    for index, name in enumerate(methods):
        if name not in METHOD_NAMES:
            found.append(f"space.methods[{index}]: {no_method(name)}")
        elif name in methods[:index]:
            found.append(f"space.methods[{index}]: {name!r} is there twice")
    if len(methods) == 1:
        found.append(f"space.methods: {methods[0]!r} alone is no choice; name two or more, or factors.method")
    return found


def sampler_problem(name: str, parameters: int) -> str | None:
    """Why a sampler does not propose in a space of so many parameters, None where it does."""
    if name != "gp" or parameters <= GP_PARAMETERS:
        return None
    return (
        f"sampler.name: 'gp' takes a space of at most {GP_PARAMETERS} parameters, this one has {parameters}; "
        "use exchange or tpe, or fewer space.segments (group module), fewer space.knots (group curve)"
    )


def _proposer_mistakes(sampler: SamplerSection) -> list[str]:
    """Settings of one sampler under the name of another."""
    name, population, lowest = sampler.name, sampler.population, sampler.lowest
    found = []
    if population != POPULATION and name not in GENETIC:
        found.append(f"sampler.population: {population} needs name: {' or '.join(GENETIC)}, not {name}")
    if lowest is not None and name != "exchange":
        found.append(f"sampler.lowest: {lowest:g} needs name: exchange, not {name}; null, or leave it out")
    return found


def _sampler_mistakes(sampler: SamplerSection, space: SpaceSection) -> list[str]:
    """What is certain without the model, whose modules and blocks the other groups are of."""
    if sampler.name == "exchange" and space.group == "curve":
        return [
            "sampler.name: 'exchange' moves parameters between levels of targets, under space.group: curve a "
            "target has none of its own; use gp or tpe, or another group"
        ]
    if sampler.name != "gp" or space.group != "target":
        return []
    return [
        f"sampler.name: 'gp' takes a space of at most {GP_PARAMETERS} parameters, space.group: target has "
        "one for each target; use exchange or tpe, or space.group: module"
    ]


def _factor_mistakes(factors: FactorSection) -> list[str]:
    return [f"{key}: {no_method(name)}" for key, name in _configured(factors) if name not in METHOD_NAMES]


def _choice_mistakes(factors: FactorSection, space: SpaceSection) -> list[str]:
    """A configured method that the search may not choose: no parameter could stand for it."""
    if not space.methods or not set(space.methods) <= set(METHOD_NAMES):
        return []  # the misspelt name may be the one that is missing
    return [
        f"space.methods: {name!r} is not in it, but {key} names it; change that, or add it"
        for key, name in _configured(factors)
        if name in METHOD_NAMES and name not in space.methods
    ]


def _configured(factors: FactorSection) -> list[tuple[str, str]]:
    """Each key that names the method of some targets, and that name."""
    named = [(f"factors.methods.{pattern}", name) for pattern, name in factors.methods.items()]
    return [("factors.method", factors.method), *named]


def no_method(name: object) -> str:
    """What is wrong with a name that is none of METHOD_NAMES."""
    return f"{name!r} is no method of a target; there are {', '.join(METHOD_NAMES)}"


def _surgical_mistakes(surgical: SurgicalSection, scoring: ScoringSection) -> list[str]:
    tasks = [task.name for task in scoring.tasks]
    found = []
    if surgical.task is not None and surgical.task not in tasks:
        offered = f"one of {', '.join(tasks)}" if tasks else "scoring.tasks is empty"
        found.append(f"surgical.task: {surgical.task!r} is not scored; {offered}")
    if surgical.mode == "task" and not tasks:
        found.append("surgical.mode: 'task' needs scoring.tasks, which is empty")
    if surgical.mode == "task" and scoring.examples.search < CHUNKS:
        few = f"{scoring.examples.search} are too few for the {CHUNKS} parts of surgical.mode: task"
        found.append(f"scoring.examples.search: {few}")
    return found


def _refine_mistakes(refine: RefineSection, calibration: CalibrationSection) -> list[str]:
    windows = windows_of(refine.tokens, calibration.window)
    if refine.method == REFIT or refine.workers == "auto" or refine.workers <= windows:
        return []
    return [
        f"refine.workers: {refine.workers} cannot share the {windows} windows of a step: refine.tokens is "
        f"{refine.tokens}, calibration.window {calibration.window}"
    ]


def _finalist_mistakes(model: ModelSection, refine: RefineSection, finalists: FinalistSection) -> list[str]:
    if model.dtype != "float16" or refine.method != GRADIENT or not (finalists.wanted and finalists.refine):
        return []
    return [
        "finalists.refine: gradients vanish in model.dtype float16; use bfloat16 or float32, "
        "refine.method: refit, or finalists.refine: false"
    ]


def _replica_mistakes(replicas: ReplicaSection) -> list[str]:
    least, most, count = replicas.min, replicas.max, replicas.count
    found = []
    if most is not None and least > most:
        found.append(f"replicas.min: {least} is above replicas.max, {most}")
    if count != "auto" and count < least:
        found.append(f"replicas.min: {least} is above replicas.count, {count}")
    if count != "auto" and most is not None and count > most:
        found.append(f"replicas.max: {most} is below replicas.count, {count}")
    return found


Rules = tuple[tuple[tuple[str, ...], Callable[..., list[str]]], ...]

# The sections each rule needs; it is asked where all of them could be read.
RULES: Rules = (
    (("study", "runs", "cache"), name_mistakes),
    (("objectives", "scoring"), _objective_mistakes),
    (("constraints", "scoring"), constraint_mistakes),
    (("scoring",), _task_mistakes),
    (("scoring",), stride_mistakes),
    (("scoring", "text"), _kl_mistakes),
    (("objectives", "scoring"), _stage_mistakes),
    (("stop",), _stop_mistakes),
    (("replicas",), _replica_mistakes),
    (("space",), _space_mistakes),
    (("sampler",), _proposer_mistakes),
    (("sampler", "space"), _sampler_mistakes),
    (("factors",), _factor_mistakes),
    (("factors", "space"), _choice_mistakes),
    (("surgical", "scoring"), _surgical_mistakes),
    (("refine", "calibration"), _refine_mistakes),
    (("model", "refine", "finalists"), _finalist_mistakes),
    (("calibration", "cache"), builder_mistakes),
    (("calibration", "scoring"), cap_mistakes),
    (("text", "calibration", "scoring"), text_mistakes),
    (("text", "calibration", "scoring"), corpus_mistakes),
)
