"""The study's config: strict, with every mistake listed at once, saved resolved beside the study.

Sections are checked one by one and then against each other, so one mistake never hides another.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from actors.node_cache import is_url
from actors.plain import to_yaml
from actors.refinement import RefinementSpec
from actors.types import (
    SPLITS,
    CalibrationSpec,
    CorpusSource,
    FactorSpec,
    ModelSource,
    PreparationSpec,
    RankfrontError,
    ScoringSpec,
    TextSource,
)
from search.constraints import Constraint, flat
from search.database import check_url
from search.inputs import ModelSection, ScoringSection, TextSection
from search.mistakes import sentences
from search.places import FACTOR_STORES, CacheSection, factor_folder
from search.plain import read_yaml
from search.policy import RunSection, WarmStartSection
from search.records import Objective
from search.rules import RULES, Rules, smaller_is_better
from search.section import MAPPING, SAVED, Bound, Section, known_home
from search.sections import (
    CalibrationSection,
    CostSection,
    FactorSection,
    FinalistSection,
    ReferenceSection,
    RefineSection,
    ReplicaSection,
    SamplerSection,
    SeedSection,
    SensitivitySection,
    SpaceSection,
    StopSection,
    SurgicalSection,
    TargetSection,
)


class ConfigError(RankfrontError):
    """A config with mistakes: one line each, with the path, the value and what would be right."""

    def __init__(self, where: str, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        count = f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)}"
        super().__init__("\n".join([f"{where}: {count}, nothing was started", *(f"  {m}" for m in mistakes)]))


class Config(Section):
    """One study: `study` is its name, and that of its folder in the folder `runs`.

    `database` is the URL of a PostgreSQL database to keep it in, `postgresql://user:${PGPASSWORD}@host/name`,
    whose password is a variable; null is a journal, a file in the study's folder.

    `storage` is the form in which a compressed target is stored, and so what a rank costs: `factored` as its
    two factors, `pivoted` as so many of its rows and the coefficients of the others, `auto` in whichever
    form, that of one product included, takes the fewest bytes.

    `objectives` are what a front is of: budgets (`budget.model`, `budget.linear`, `budget.bytes`) and what is
    measured (`nll`, `nll.<corpus>`, `kl`, `reasoning.acc`, `reasoning.acc_norm`, `reasoning.margin`,
    `reasoning.<task>.acc`, ...), at least one of each.

    `constraints` are bounds by metric, `{perplexity: 35, bytes: 2e8}`, to which a member of the front must
    keep: at most for costs, losses and bias, at least for accuracies.
    """

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    runs: Annotated[str, AfterValidator(known_home)] = "runs"
    database: Annotated[str | None, PlainValidator(check_url)] = None
    model: ModelSection
    text: TextSection
    calibration: CalibrationSection = CalibrationSection()
    factors: FactorSection = FactorSection()
    targets: TargetSection = TargetSection()
    storage: Literal["auto", "pivoted", "factored"] = "auto"
    scoring: ScoringSection = ScoringSection()
    cost: CostSection = CostSection()
    objectives: Annotated[tuple[str, ...], Field(min_length=2, max_length=3)] = ("budget.model", "nll")
    constraints: Annotated[dict[str, Bound], BeforeValidator(flat), MAPPING] = Field(default_factory=dict)
    space: SpaceSection = SpaceSection()
    sampler: SamplerSection = SamplerSection()
    references: ReferenceSection = ReferenceSection()
    seeds: SeedSection = SeedSection()
    warm_start: WarmStartSection = WarmStartSection()
    sensitivity: SensitivitySection = SensitivitySection()
    surgical: SurgicalSection = SurgicalSection()
    refine: RefineSection = RefineSection()
    finalists: FinalistSection = FinalistSection()
    stop: StopSection = StopSection()
    run: RunSection = RunSection()
    replicas: ReplicaSection = ReplicaSection()
    cache: CacheSection = CacheSection()

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.runs) / self.study

    @property
    def factor_spec(self) -> FactorSpec:
        """How targets are decomposed: by their configured method and by all that the search may choose."""
        factors = self.factors
        return FactorSpec(
            method=factors.method,
            methods=tuple(factors.methods.items()),
            choices=self.space.methods,
            bias=factors.bias,
            dtype=factors.dtype,
        )

    @property
    def named_objectives(self) -> tuple[Objective, ...]:
        return tuple(Objective(name, minimize=smaller_is_better(name)) for name in self.objectives)

    @property
    def named_constraints(self) -> tuple[Constraint, ...]:
        return tuple(Constraint(metric, bound) for metric, bound in self.constraints.items())

    @property
    def builders(self) -> int | Literal["auto"]:
        """How many builders prepare: one where factor stores are at a URL, see `search.places`."""
        return 1 if is_url(self.cache.factors) else self.calibration.builders

    @property
    def refinement(self) -> RefinementSpec:
        """How a trial is refined."""
        return RefinementSpec(
            **self.refine.model_dump(exclude={"workers"}), batch_tokens=self.scoring.batch_tokens
        )

    def preparation(self) -> PreparationSpec:
        """What the workers need of this config."""
        calibration, scoring = self.calibration, self.scoring
        shared = self.cache.factors if is_url(self.cache.factors) else None
        stores = factor_folder(self.runs, self.cache) or Path(self.runs) / FACTOR_STORES
        text = TextSource(**self.text.model_dump())
        own = calibration.text
        return PreparationSpec(
            model=ModelSource(**self.model.model_dump()),
            calibration=CalibrationSpec(
                text=TextSource(**own.model_dump()) if own else text,
                tokens=calibration.tokens,
                window=calibration.window,
                labels=calibration.labels,
                memory_gb=calibration.memory_gb,
            ),
            factors=self.factor_spec,
            scoring=ScoringSpec(
                text=text,
                window=scoring.window,
                tokens=scoring.tokens.model_dump(),
                tasks=tuple(task.resolved() for task in scoring.tasks),
                examples=scoring.examples.model_dump(),
                search_fraction=scoring.search_fraction,
                seed=scoring.seed,
                batch_tokens=scoring.batch_tokens,
                kl_top_k=scoring.kl_top_k,
                kl_memory_mb=scoring.kl_memory_mb,
                prefix_memory_mb=scoring.prefix_memory_mb,
                prefix_stride=scoring.prefix_stride,
                stages=scoring.stages,
                stride=scoring.stride,
                bias=tuple(chosen.resolved() for chosen in scoring.bias),
                corpora=tuple(
                    CorpusSource(
                        corpus.name,
                        TextSource(**corpus.model_dump(exclude={"name", "tokens"})),
                        (corpus.tokens or scoring.tokens).model_dump(include=set(SPLITS)),
                    )
                    for corpus in scoring.corpora
                ),
            ),
            calibration_fraction=calibration.fraction,
            include=self.targets.include,
            exclude=self.targets.exclude,
            cache=str(stores.resolve()),
            shared=shared,
            node_cache=self.cache.node,
        )

    def to_yaml(self) -> str:
        return to_yaml(self.model_dump(mode="json"))


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, resolve and check a config; `overrides` maps dotted keys to values.

    Raises:
        RankfrontError: the file is no YAML, and where.
        ConfigError: every mistake, one line each.
    """
    try:
        raw = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from error
    if not isinstance(raw, dict):
        raise ConfigError(str(path), ["the top level must be a mapping of keys"])
    for key, value in (overrides or {}).items():
        set_key(raw, key, value)
    return parse_config(raw, str(path))


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of plain data, making the sections on the way.

    Raises:
        RankfrontError: a part of the key is no section.
    """
    *parents, last = key.split(".")
    for parent in parents:
        if raw.get(parent) is None:
            raw[parent] = {}
        raw = raw[parent]
        if not isinstance(raw, dict):
            raise RankfrontError(f"{key}: {parent!r} is not a section")
    raw[last] = value


def parse_config(raw: Mapping[str, Any], where: str = "config") -> Config:
    """Check a config given as plain data.

    Raises:
        ConfigError: every mistake, one line each.
    """
    return _parsed(raw, where, RULES)


def parse_saved(raw: Mapping[str, Any], where: str) -> Config:
    """The config of a study as it was saved, without a look at what it names, nor at what its sections must
    agree on.

    Both held when it was given; its model and texts may have moved since, this be another machine, and a rule
    be stricter in this version.

    Raises:
        ConfigError: every mistake, one line each: another version saved it, or somebody changed it.
    """
    return _parsed(raw, where, (), SAVED)


def check_names(config: Config) -> None:
    """Look for what a config names before it is worked with: a saved one may name what has moved.

    Raises:
        ConfigError: all that is not here.
    """
    _parsed(config.model_dump(mode="json"), f"study {config.study!r}", ())


def _parsed(raw: Mapping[str, Any], where: str, rules: Rules, context: str | None = None) -> Config:
    mistakes: list[str] = []
    sections: dict[str, Any] = {}
    for key in raw:
        if key not in Config.model_fields:
            mistakes.append(f"{key}: unknown key; one of {', '.join(Config.model_fields)}")
    for key, field in Config.model_fields.items():
        if key not in raw:
            if field.is_required():
                mistakes.append(f"{key}: missing")
            else:
                sections[key] = field.get_default(call_default_factory=True)
            continue
        adapter = adapter_of(field)
        try:
            sections[key] = adapter.validate_python(raw[key], context=context)
        except ValidationError as error:
            mistakes += sentences(Config, key, error)
            with contextlib.suppress(ValidationError):
                sections[key] = adapter.validate_python(_without(raw[key], error), context=context)
    for needs, rule in rules:
        if all(need in sections for need in needs):
            mistakes += rule(*(sections[need] for need in needs))
    if mistakes:
        raise ConfigError(where, mistakes)
    return Config(**sections)


def adapter_of(field: FieldInfo) -> TypeAdapter[Any]:
    """Checks a value as a model's field would, by itself."""
    annotation: Any = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]
    return TypeAdapter(annotation)


def _without(value: Any, error: ValidationError) -> Any:
    """A section less its mistakes, so that what is left of it is still held against the others."""
    value = copy.deepcopy(value)
    for detail in sorted(error.errors(), key=lambda detail: str(detail["loc"]), reverse=True):
        location = detail["loc"]
        item = next((index for index, step in enumerate(location) if isinstance(step, int)), None)
        *path, last = location[: None if item is None else item + 1] or ("",)  # an item goes as a whole
        parent: Any = value
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for step in path:
                parent = parent[step]
            del parent[last]
    return value
