"""A configuration alone: ranks, and all that is needed to make that model of them again, anywhere.

It is the ranks.yaml of an export, what `rankfront export --config-only` writes as YAML and as JSON, and what
`rankfront apply` reads. docs/allocation.schema.json is its schema, held equal to `schema()` by a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from search.config import Config, ConfigError, adapter_of, parse_config, set_key
from search.folder import StudyFolder
from search.inputs import ModelSection, ScoringSection, TextSection
from search.plain import read_yaml
from search.records import FACTORS, StudySummary, TrialRow
from search.section import Positive, Section
from search.sections import CalibrationSection, FactorSection, TargetSection
from search.tables import finite

FORMAT = "rankfront-allocation-1"
SECTIONS = ("model", "text", "calibration", "factors", "targets", "storage", "scoring")
"""Sections of a study's config that decide which model an allocation is, and what its scores mean."""

Metrics = dict[str, float | None]
Method = Literal["weight", "feature", "curvature"]
"""`METHOD_NAMES`, as pydantic and the schema need them."""


class AllocationFile(Section):
    """A configuration alone.

    `ranks` names targets: a rank, or null for dense, as targets are that are not named. `methods` names those
    with a rank whose method is not that of `factors`. `scores` maps search and test to metrics, and each
    `<metric>_stderr` to its standard error. `variant` names refined factors, whose scores they then are, and
    which ranks alone do not make again. `fingerprints` are sha256 of what the study was prepared from.
    """

    format: Literal["rankfront-allocation-1"]
    study: str | None = None
    trial: int | None = None
    variant: str | None = None
    budgets: dict[str, float] = Field(default_factory=dict)
    scores: dict[Literal["search", "test"], Metrics] = Field(default_factory=dict)
    fingerprints: dict[str, str] = Field(default_factory=dict)
    model: ModelSection
    text: TextSection
    calibration: CalibrationSection = CalibrationSection()
    factors: FactorSection = FactorSection()
    targets: TargetSection = TargetSection()
    storage: Literal["auto", "pivoted", "factored"] = "auto"
    scoring: ScoringSection = ScoringSection()
    ranks: Annotated[dict[str, Positive | None], Field(min_length=1)]
    methods: dict[str, Method] = Field(default_factory=dict)


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration alone."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **AllocationFile.model_json_schema()}


def facts(
    folder: StudyFolder, row: TrialRow, summary: StudySummary, variant: str = FACTORS
) -> dict[str, Any]:
    """All of a trial's configuration but its storage, ranks and methods; `row` has its variant's score."""
    assert row.score is not None
    test = summary.test_score(row.number, variant)
    scores = {"search": row.score} | ({"test": test} if test is not None else {})
    budgets = {
        "budget.linear": row.budget_linear,
        "budget.model": row.budget_model,
        "budget.bytes": row.budget_bytes,
    }
    return {
        "format": FORMAT,
        "study": folder.config.study,
        "trial": row.number,
        **({} if variant == FACTORS else {"variant": variant}),
        "budgets": budgets,
        "scores": {split: metrics_of(score) for split, score in scores.items()},
        "fingerprints": dict(folder.prepared.fingerprints),
        **sections(folder.config),
    }


def metrics_of(score: Any) -> Metrics:
    """Every metric of a score, and its standard error beside it; null where that is not known."""
    found: Metrics = {}
    for name, value in score.metrics.items():
        found[name] = finite(value)
        found[f"{name}_stderr"] = finite(score.stderrs.get(name))
    return found


def sections(config: Config) -> dict[str, Any]:
    """The sections of a config that a configuration alone has, less its storage."""
    dumped = config.model_dump(mode="json", include=set(SECTIONS))
    return {name: dumped[name] for name in SECTIONS if name != "storage"}


def whole(facts: Mapping[str, Any], storage: str, row: TrialRow) -> dict[str, Any]:
    """A configuration alone, as it is written."""
    found = {**facts, "storage": storage, "ranks": row.allocation.to_dict()}
    return found | ({"methods": dict(row.allocation.methods)} if row.allocation.methods else {})


@dataclass(frozen=True)
class Configuration:
    """What a file says, for one model: a study's sections as a config, ranks, and what it tells of itself."""

    config: Config
    ranks: Mapping[str, int | None]
    methods: Mapping[str, str]
    told: Mapping[str, Any]

    @property
    def recorded(self) -> dict[str, float]:
        """The metrics of the search split that were recorded, without standard errors."""
        found = self.told.get("scores", {}).get("search", {})
        return {
            name: value for name, value in found.items() if not name.endswith("_stderr") and value is not None
        }


def read_configuration(
    file: Path, model: str, overrides: Mapping[str, Any] | None = None, runs: Path = Path("runs")
) -> Configuration:
    """A configuration alone, applied to a `model` by its source; `overrides` maps dotted keys to values.

    Of these alone `model.trust_remote_code` is taken: a file that came from elsewhere gives no permission.

    Raises:
        RankfrontError: the file is no YAML, and where.
        ConfigError: the file cannot be read, or every mistake in it, one line each.
    """
    try:
        raw = read_yaml(file)
    except (OSError, ValueError) as error:
        raise ConfigError(str(file), [f"cannot be read: {error}"]) from error
    if not isinstance(raw, dict):
        raise ConfigError(str(file), ["the top level must be a mapping of keys"])
    named = raw.get("model") or {}
    if not isinstance(named, dict):
        raise ConfigError(str(file), [f"model: {named!r} is no section"])
    raw = {**raw, "model": {**named, "source": model, "trust_remote_code": False}}
    for key, value in (overrides or {}).items():
        set_key(raw, key, value)
    mistakes = _own_mistakes(raw)
    study = {name: raw[name] for name in SECTIONS if name in raw}
    try:
        config = parse_config({"study": "applied", "runs": str(runs), **study}, str(file))
    except ConfigError as error:
        raise ConfigError(str(file), [*mistakes, *error.mistakes]) from error
    if mistakes:
        raise ConfigError(str(file), mistakes)
    told = {name: raw[name] for name in raw if name not in (*SECTIONS, "ranks", "methods")}
    return Configuration(config, raw["ranks"], raw.get("methods") or {}, told)


def _own_mistakes(raw: Mapping[str, Any]) -> list[str]:
    """Mistakes outside the sections that a study's config has as well."""
    known = AllocationFile.model_fields
    mistakes = [f"{key}: unknown key; one of {', '.join(known)}" for key in raw if key not in known]
    for key, field in known.items():
        if key in SECTIONS:
            continue
        if key not in raw:
            if field.is_required():
                mistakes.append(f"{key}: missing" + (f"; {FORMAT!r} is read" if key == "format" else ""))
            continue
        try:
            adapter_of(field).validate_python(raw[key])
        except ValidationError as error:
            mistakes += [f"{key}{_path(e['loc'])}: {_said(e)}" for e in error.errors()]
    return mistakes


def _path(location: tuple[int | str, ...]) -> str:
    """Where in a value a mistake is, less the name of the member of a union that was tried."""
    return "".join(f".{step}" for step in location if step not in ("constrained-int", "int", "none", "[key]"))


def _said(error: Any) -> str:
    """What is wrong, behind the value unless a check of our own has named it."""
    message: str = error["msg"].removeprefix("Value error, ")
    own = error["type"] == "value_error"
    return message if own else f"{error['input']!r}: {message[0].lower()}{message[1:]}"
