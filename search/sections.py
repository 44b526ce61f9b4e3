"""The sections of a config that say how to search: what each key means, its type and its default.

What one key alone must be is checked here and in `search.inputs`; what keys must agree on is in
`search.rules`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from search.inputs import TextSection
from search.section import MAPPING, NUMBER, CountOrAuto, Positive, SecondsOrAuto, Section, Share
from search.shares import GpusOrAuto


class CalibrationSection(Section):
    """Calibration text, on which factors are fitted: `text` of its own, or the first `fraction` of the
    scoring text. At most `tokens` of it are read, in windows of `window` tokens.

    `labels` says whose next tokens the gradients of `curvature` are of: `sampled` from the model (the true
    Fisher) or those of the `data` (the empirical one). `memory_gb` (10^9 bytes) bounds the moments that each
    builder holds at once beside its model; a smaller one takes more passes over the text. `builders` share
    the text of a pass and the targets to decompose. All of them run at once, on a CPU each and a GPU each
    where there are any: `auto` is one for each GPU, or one.
    """

    text: TextSection | None = None
    fraction: Annotated[float, Field(gt=0, lt=1), NUMBER] = 0.4
    tokens: Positive = 65_536
    window: Annotated[int, Field(ge=2), NUMBER] = 512
    labels: Literal["sampled", "data"] = "sampled"
    memory_gb: Annotated[float, Field(gt=0), NUMBER] = 4.0
    builders: CountOrAuto = "auto"


class FactorSection(Section):
    """How targets are decomposed.

    A target's method is that of the first shell pattern in `methods` its name matches, else `method`. There
    are `weight` (least error of the weights), `feature` (least error of the outputs on the calibration text)
    and `curvature` (least predicted increase of the loss). With `bias: mean` a compressed target gets a bias
    that keeps its mean output. `dtype` is that of the stored factors.
    """

    method: str = "curvature"
    methods: Annotated[dict[str, str], MAPPING] = Field(default_factory=dict)
    bias: Literal["mean", "none"] = "mean"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TargetSection(Section):
    """Which linear layers inside the blocks may be compressed, by shell patterns over their names: those that
    one of `include` fits and none of `exclude`."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


class CostSection(Section):
    """What a token costs: MACs are of one that attends to `length` positions, by default a window."""

    length: Positive | None = None


KNOTS = 4
"""A curve's default: a level at both ends of the depth and two between, where what layers are worth turns."""

FLOOR = 0.2


class SpaceSection(Section):
    """The search space: targets that share a `group` share one level. A group is one target, all of a module
    type, or all of a block.

    A level is one of `levels` equal steps of parameters between `floor`, a share of a target's own, and
    dense. `segments` cuts the depth of a `module` group into that many parts. A `curve` has a level at each
    of `knots` blocks for each module type, and straight lines between them. Where `methods` are named, the
    search chooses one of them for each module type.
    """

    group: Literal["target", "module", "block", "curve"] = "target"
    segments: Positive = 1
    knots: Positive = KNOTS
    levels: Annotated[int, Field(ge=1, le=1000), NUMBER] = 20
    floor: Annotated[Share, Field(description="number (> 0, < 1)")] = FLOOR
    methods: tuple[str, ...] = ()


POPULATION = 32


class SamplerSection(Section):
    """Who proposes, by `name`: `exchange` is ours (`search.exchange`), the others are Optuna's; `gp` is for
    spaces of few parameters. `seed` is that of every random draw of it. `population` is the trials of a
    generation of `nsga2` and `nsga3`. `lowest` is the smallest budget of all parameters that `exchange` aims
    at; without it, as small a one as may be of use (`search.exchange`)."""

    name: Literal["exchange", "nsga2", "nsga3", "tpe", "gp", "random"] = "exchange"
    seed: Annotated[int, Field(ge=0, lt=2**32), NUMBER] = 0  # what numpy's RandomState takes
    population: Annotated[int, Field(ge=2), NUMBER] = POPULATION
    lowest: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), NUMBER] | None = None


class ReferenceSection(Section):
    """Scored before the sampler's first proposal: the `dense` model, without which there is no hypervolume,
    and `uniform` allocations at these linear budgets."""

    dense: bool = True
    uniform: tuple[Share, ...] = (0.95, 0.9, 0.8, 0.7, 0.6)


class SeedSection(Section):
    """Scored after the references: allocations of equal marginal loss per parameter (`search.seeds`) at these
    linear budgets. `spectra` are of the losses the factors predict, `sensitivity` of those that
    `rankfront sensitivity` measured, where the study's folder has them."""

    spectra: tuple[Share, ...] = (0.95, 0.9, 0.8, 0.7, 0.6)
    sensitivity: tuple[Share, ...] = (0.95, 0.9, 0.8, 0.7, 0.6)


class SensitivitySection(Section):
    """`rankfront sensitivity`: every target alone at each of these stored `shares` of its own
    parameters."""

    shares: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), NUMBER], ...], Field(min_length=1)
    ] = (0.75, 0.5, 0.25)

    @field_validator("shares")
    @classmethod
    def _different(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(shares)) < len(shares):
            raise ValueError(f"{list(shares)}: a share is there twice")
        return shares


class SurgicalSection(Section):
    """`rankfront surgical`, the search of arXiv 2405.13039: see `search.surgical` for what the words mean.

    By `mode` a target's rank may cost perplexity, `growth` (relative) more for every target, or accuracy of
    `task`, `delta` less than the dense model's; the task is the first of `scoring.tasks` where none is named.
    The first `skip_blocks` blocks stay as they are: the paper leaves four of a 7B model. The `ladder` of
    ranks to try is the paper's, or one of stored `shares`; `ranks` are tried upwards (`scan`) or by halves
    (`bisect`).
    """

    mode: Literal["perplexity", "task"] = "perplexity"
    growth: Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER] = 0.005
    task: str | None = None
    delta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), NUMBER] = 0.03
    skip_blocks: Annotated[int, Field(ge=0), NUMBER] = 4
    ladder: Literal["paper", "shares"] = "paper"
    ranks: Literal["scan", "bisect"] = "scan"


HELD_OUT = 8_192
"""Tokens that tell which step of a refinement is kept: as many as a trial's search text has by default."""


class RefineSection(Section):
    """`rankfront refine`: how one trial's factors are moved on the calibration text, ranks fixed.

    `method: gradient` takes `steps` of Adam on the KL to the dense model, of `tokens` each (whole windows of
    `calibration.window`), drawn by `seed`. The `learning_rate` rises over `warmup` steps and falls as a
    cosine to a tenth at the last; `clip` bounds the norm of all gradients together. `checkpointed` computes
    activations twice instead of keeping them: slower, for less memory. `refit` goes through the targets in
    closed form, and reads none of these.

    The first `held_out` tokens of the search split are scored every `evaluate_every` steps, or blocks of a
    refit, and tell which step is kept. Where they are no better, steps go back to the best point at half the
    rate; after `patience` such scores they end. Every KL is over the `top_k` tokens that the dense model
    finds most likely and all others together.

    `workers` share the windows of a step, on a CPU each and a GPU each where there are any: `auto` is one for
    each GPU, or one; see `actors.team` for when it pays.
    """

    method: Literal["gradient", "refit"] = "gradient"
    steps: Positive = 200
    tokens: Positive = 1_536
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER] = 1e-4
    warmup: Annotated[int, Field(ge=0), NUMBER] = 10
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER] = 1.0
    held_out: Positive = HELD_OUT
    evaluate_every: Positive = 10
    patience: Positive = 5
    top_k: Positive = 64
    seed: Annotated[int, Field(ge=0), NUMBER] = 0
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
    tolerance: Annotated[float, Field(ge=0), NUMBER] = 0.001


class StopSection(Section):
    """The search stops at the first of these; null never stops. It stops as well where nothing is left to
    propose, or where trials fail and none has a score.

    `trials` is how many the study has, whatever their end and whoever proposed them; references, seeds,
    warm starts and what was enqueued are scored even where there are more of them. `tokens` is how many
    went through the model for scores of the study's trials; `hours` how long after its start, preparation
    included, this run proposes; `plateau` stops where the study's hypervolume no longer grows. Trials that
    are under way, scores on the test split and finalists come after that.
    """

    trials: Positive | None = 200
    tokens: Positive | None = None
    hours: Annotated[float, Field(gt=0), NUMBER] | None = None
    plateau: PlateauSection | None = None


class ReplicaSection(Section):
    """How many replicas (`count`), and what each may use. `auto` asks the machine, and follows nodes that
    join.

    `gpus` are those of each replica: a share of one GPU, with as much of its memory, or a whole number, over
    which the model's blocks are spread; `auto` is one where there are any. Fewer than `min` that are loaded
    get no trial; there are never more than `max`. A replica that takes more than `trial_seconds` for a score,
    or so many times more as its split is longer than the search split, is stopped, and the trial is tried
    again; one that takes more than `load_seconds` to load, once it is on a node, is started again. `auto` is
    20 times the longest that any took so far, at least 10 minutes for a score and 30 to load, 4 hours before
    any is known: where a node that joins late copies the model for longer, set `load_seconds`. null waits for
    ever. On a cluster that outlives the driver, replicas of one that died wait `alone_seconds` for the next;
    0 ends them with it.

    `threads` are the CPU threads of each; `auto` shares the cores, and is one in a deterministic search. A
    trial whose replica dies is scored at most `attempts` times.
    """

    count: CountOrAuto = "auto"
    min: Positive = 1
    max: Positive | None = None
    threads: CountOrAuto = "auto"
    gpus: GpusOrAuto = "auto"
    attempts: Positive = 2
    trial_seconds: SecondsOrAuto = "auto"
    load_seconds: SecondsOrAuto = "auto"
    alone_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER] = 600.0
