"""The sections of a config: what each key means, its type and its default.

What one key alone must be is checked here; what keys must agree on is in `search.rules`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator

from actors.bias import BIAS_SETS
from actors.node_cache import is_url, url_problem
from actors.sources import Source
from actors.tasks import TASKS
from actors.types import RankfrontError, TaskSource
from search.shares import GpusOrAuto

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Bound = Annotated[float, Field(strict=True, allow_inf_nan=False)]


SAVED = "saved"
"""The validation context of a config that was saved with a study: what it names was found when it was given,
and may be gone by now, or be on another machine. Names stay as they are."""


def is_saved(info: ValidationInfo) -> bool:
    return info.context == SAVED


def _known_source(name: str, info: ValidationInfo) -> str:
    if is_saved(info):
        return name
    try:
        return Source.parse(name).name
    except RankfrontError as error:
        raise ValueError(str(error)) from error


def readable_url(place: str | None, info: ValidationInfo) -> str | None:
    """A place as it is; raises ValueError where it is a URL that this machine has no driver for."""
    if place is not None and is_url(place) and not is_saved(info):
        problem = url_problem(place)
        if problem is not None:
            raise ValueError(problem)
    return place


def _known_model(name: str, info: ValidationInfo) -> str:
    return name if is_url(readable_url(name, info)) else _known_source(name, info)


class Section(BaseModel):
    """Unknown keys are mistakes; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ModelSection(Section):
    """The pretrained model; its source may be a URL too (`actors.node_cache`).

    `trust_remote_code` runs code that comes with it: only for models you trust.
    """

    source: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False

    _source = field_validator("source")(_known_model)


class TextSection(Section):
    """Documents: a column of a data set, joined into one text."""

    source: str
    subset: str | None = None
    split: str | None = None
    column: str = "text"
    join: str = "\n\n"
    deduplicate: bool = False

    _source = field_validator("source")(_known_source)


class TaskSection(Section):
    """A reasoning task by its lm-evaluation-harness name; without a source, from the hub.

    With a `format` it is one's own, of any other name, and needs a source (see `actors.tasks`).
    """

    format: Literal["choices"] | None = None  # first, as what a name may be depends on it
    name: str
    source: str | None = None
    subset: str | None = None
    split: str | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        if info.data.get("format") is None:
            if name not in TASKS:
                own = "; your own needs format: choices"
                raise ValueError(f"{name!r} is no task; one of {', '.join(TASKS)}{own}")
        elif name in TASKS:
            raise ValueError(f"{name!r} is lm-evaluation-harness's; give your own another name")
        elif not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"{name!r}: a name is letters, digits and _, and begins with a letter")
        return name

    @field_validator("source")
    @classmethod
    def _source(cls, name: str | None, info: ValidationInfo) -> str | None:
        return None if name is None else _known_source(name, info)

    def resolved(self) -> TaskSource:
        if self.format is not None:
            assert self.source is not None, "see search.rules"
            return TaskSource(self.name, self.source, self.subset, self.split, self.format)
        task = TASKS[self.name]
        if self.source is None:
            return TaskSource(self.name, task.hub, task.subset, self.split or "validation")
        return TaskSource(self.name, self.source, self.subset, self.split)


class BiasSection(Section):
    """A set of sentences by its name (see `actors.bias`); without a source, from the hub."""

    name: Literal["crows_pairs", "stereoset"]
    source: str | None = None
    subset: str | None = None
    split: str | None = None

    @field_validator("source")
    @classmethod
    def _source(cls, name: str | None, info: ValidationInfo) -> str | None:
        return None if name is None else _known_source(name, info)

    def resolved(self) -> TaskSource:
        if self.source is not None:
            return TaskSource(self.name, self.source, self.subset, self.split)
        chosen = BIAS_SETS[self.name]
        return TaskSource(self.name, chosen.hub, chosen.subset, self.split or chosen.split)


def _count_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{value!r}: input should be 'auto' or an integer greater than or equal to 1")


# One validator for both: a union would list a mistake once for each of its members.
CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto)]


class CalibrationSection(Section):
    """Calibration text: `text` of its own, or the first `fraction` of the scoring text.

    `labels` and `memory_gb` are those of `CalibrationSpec`; the memory is that of each builder beside its
    model. `builders` share the text of a pass and the targets to decompose. All of them run at once, on a
    CPU each and a GPU each where there are any: `auto` is one for each GPU, or one.
    """

    text: TextSection | None = None
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.4
    tokens: Positive = 65_536
    window: Annotated[int, Field(ge=2)] = 512
    labels: Literal["sampled", "data"] = "sampled"
    memory_gb: Annotated[float, Field(gt=0)] = 4.0
    builders: CountOrAuto = "auto"


class FactorSection(Section):
    """How targets are decomposed.

    A target's method is that of the first shell pattern in `methods` its name matches, else `method`.
    """

    method: str = "curvature"
    methods: dict[str, str] = Field(default_factory=dict)
    bias: Literal["mean", "none"] = "mean"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TargetSection(Section):
    """Which linear layers may be compressed: shell patterns over their names."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


class PerSplit(Section):
    """A cap for each split."""

    search: Positive
    test: Positive


class TextTokens(PerSplit):
    """Caps for the text. `choice` is for what is behind the search split's in its part of the text, and
    chooses among trials that the search split cannot tell apart: see `search.choosing`."""

    choice: Positive = 16_384


class CorpusSection(TextSection):
    """A text scored beside the main one, as `nll.<name>`; `tokens` are its caps where they are others."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
    tokens: PerSplit | None = None


class ScoringSection(Section):
    """What a score is made of. `stride`, `kl_...`, `prefix_...` and `stages` are those of `ScoringSpec`."""

    window: Annotated[int, Field(ge=2)] = 512
    stride: Positive | None = None
    tokens: TextTokens = TextTokens(search=8_192, test=32_768)
    corpora: tuple[CorpusSection, ...] = ()
    tasks: tuple[TaskSection, ...] = ()
    bias: tuple[BiasSection, ...] = ()
    examples: PerSplit = PerSplit(search=100, test=400)
    search_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: int = 0
    batch_tokens: Positive = 1_024
    kl_top_k: Positive | None = None
    kl_memory_mb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 512.0
    prefix_memory_mb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    prefix_stride: Positive = 1
    stages: tuple[Positive, ...] = ()

    @field_validator("tasks", "bias", mode="before")
    @classmethod
    def _names(cls, tasks: Any) -> Any:
        if isinstance(tasks, list | tuple):
            return [{"name": task} if isinstance(task, str) else task for task in tasks]
        return tasks


class CostSection(Section):
    """What a token costs: MACs are of one that attends to `length` positions, by default a window."""

    length: Positive | None = None


KNOTS = 4
"""A curve's default: a level at both ends of the depth and two between, where what layers are worth turns."""


class SpaceSection(Section):
    """The search space: targets that share a group share one level.

    `levels` equal steps of parameters between `floor` and dense; `segments` cuts the depth of a
    `module` group into that many parts. A `curve` has a level at each of `knots` blocks for each module
    type, and straight lines between them. Where `methods` are named, the search chooses one of them for
    each module type.
    """

    group: Literal["target", "module", "block", "curve"] = "target"
    segments: Positive = 1
    knots: Positive = KNOTS
    levels: Annotated[int, Field(ge=1, le=1000)] = 20
    floor: Share = 0.2
    methods: tuple[str, ...] = ()


class SamplerSection(Section):
    """Who proposes: `exchange` is ours (`search.exchange`), the others are Optuna's; `gp` is for spaces of
    few parameters. `population` is that of the NSGA samplers."""

    name: Literal["exchange", "nsga2", "nsga3", "tpe", "gp", "random"] = "tpe"
    seed: Annotated[int, Field(ge=0)] = 0
    population: Annotated[int, Field(ge=2)] = 32


class ReferenceSection(Section):
    """Scored before the sampler's first proposal: dense, and uniform allocations at these linear budgets."""

    dense: bool = True
    uniform: tuple[Share, ...] = (0.95, 0.9, 0.8, 0.7, 0.6)


class SeedSection(Section):
    """Scored after the references: allocations of equal marginal loss per parameter (`search.seeds`) at these
    linear budgets. `spectra` are of the losses the factors predict, `sensitivity` of those that
    `rankfront sensitivity` measured, where the study's folder has them."""

    spectra: tuple[Share, ...] = (0.95, 0.9, 0.8, 0.7, 0.6)
    sensitivity: tuple[Share, ...] = (0.95, 0.9, 0.8, 0.7, 0.6)


class SensitivitySection(Section):
    """`rankfront sensitivity`: every target alone at each of these stored shares of its own parameters."""

    shares: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)], ...], Field(min_length=1)
    ] = (0.75, 0.5, 0.25)

    @field_validator("shares")
    @classmethod
    def _different(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(shares)) < len(shares):
            raise ValueError(f"{list(shares)}: a share is there twice")
        return shares


class SurgicalSection(Section):
    """`rankfront surgical`, the search of arXiv 2405.13039: see `search.surgical` for what the words mean.

    `task` is the first of `scoring.tasks` where it is not named. The paper leaves the first four blocks of a
    7B model as they are.
    """

    mode: Literal["perplexity", "task"] = "perplexity"
    growth: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.005
    task: str | None = None
    delta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.03
    skip_blocks: Annotated[int, Field(ge=0)] = 4
    ladder: Literal["paper", "shares"] = "paper"
    ranks: Literal["scan", "bisect"] = "scan"


HELD_OUT = 8_192
"""Tokens that tell which step of a refinement is kept: as many as a trial's search text has by default."""


class RefineSection(Section):
    """`rankfront refine`: how one trial's factors are moved on the calibration text. See `RefinementSpec`.

    `held_out` tokens of the search split tell which step is kept. `workers` share the windows of a step, on a
    CPU each and a GPU each where there are any: `auto` is one for each GPU, or one; see `actors.team` for
    when it pays.
    """

    method: Literal["gradient", "refit"] = "gradient"
    steps: Positive = 200
    tokens: Positive = 1_536
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 10
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    held_out: Positive = HELD_OUT
    evaluate_every: Positive = 10
    patience: Positive = 5
    top_k: Positive = 64
    seed: Annotated[int, Field(ge=0)] = 0
    checkpointed: bool = False
    workers: CountOrAuto = 1

    @field_validator("held_out", mode="before")
    @classmethod
    def _tokens(cls, value: Any) -> Any:
        # A study saved before this was tokens has the default of then: a tenth of the calibration text.
        return HELD_OUT if value == 0.1 else value


class FinalistSection(Section):
    """Front members that `rankfront finalists` follows further, and a search at its end where any are named.

    They are scored on the test split and, with `refine`, refined as that section says. `budgets`: the best
    front point at or under each, of the model's parameters; the `exchange` sampler aims at them. `count`: so
    many front points, spread evenly from the largest compressed one to the smallest; both may be given.
    """

    budgets: tuple[Share, ...] = ()
    count: Positive | None = None
    refine: bool = True

    @property
    def wanted(self) -> bool:
        return bool(self.budgets) or self.count is not None


class PlateauSection(Section):
    """Stop when the hypervolume grew by no more than `tolerance` (relative) over `trials` trials."""

    trials: Positive
    tolerance: Annotated[float, Field(ge=0)] = 0.001


class StopSection(Section):
    """The search stops at the first of these; None never stops."""

    trials: Positive | None = 200
    tokens: Positive | None = None
    hours: Annotated[float, Field(gt=0)] | None = None
    plateau: PlateauSection | None = None


class ReplicaSection(Section):
    """How many replicas, and what each may use. `auto` asks the machine, and follows nodes that join it.

    `gpus` are those of each replica: a share of one GPU, with as much of its memory, or a whole number, over
    which the model's blocks are spread; `auto` is one where there are any. Fewer than `min` that are loaded
    get no trial; there are never more than `max`. On a cluster that outlives the driver, replicas of one that
    died wait `alone_seconds` for the next; 0 ends them with it.
    """

    count: CountOrAuto = "auto"
    min: Positive = 1
    max: Positive | None = None
    threads: CountOrAuto = "auto"
    gpus: GpusOrAuto = "auto"
    attempts: Positive = 2
    trial_seconds: Annotated[float, Field(gt=0)] | None = None
    alone_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600.0
