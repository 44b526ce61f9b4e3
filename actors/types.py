"""Values that travel between driver and replicas. Standard library only, so both sides may import it.

Everything here is frozen and serialises to JSON: what is on the wire is what is in the record. What goes out
is below, but for allocations (`actors.allocation`) and the rivals of a trial (`actors.stages`); what comes
back, a score, is defined in `actors.scores`. All are imported from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from actors.allocation import Allocation as Allocation
from actors.allocation import TargetSpec as TargetSpec
from actors.allocation import digest as digest
from actors.errors import RankfrontError as RankfrontError
from actors.errors import ScoringError as ScoringError
from actors.errors import ShortOfMemoryError as ShortOfMemoryError
from actors.scores import BiasScore as BiasScore
from actors.scores import KlScore as KlScore
from actors.scores import Score as Score
from actors.scores import TaskScore as TaskScore
from actors.scores import TextScore as TextScore
from actors.stages import Rival as Rival

SPLITS = ("search", "test")
CHOICE = "choice"
"""Text of the search part behind what trials are scored on, where there is any: it chooses among trials that
the search split cannot tell apart. A study may be without."""
NODE_CACHE = "~/.cache/rankfront"


@dataclass(frozen=True)
class TextSource:
    """Where documents come from and how they become one text.

    `source` is a hub id, a local path or `package:name/path` (see `actors.sources`). Documents are rows of
    `column`, joined by `join`; a .txt file is one text as it is, and its documents are its lines.
    """

    source: str
    subset: str | None = None
    split: str | None = None
    column: str = "text"
    join: str = "\n\n"
    deduplicate: bool = False


@dataclass(frozen=True)
class CorpusSource:
    """A text scored beside the main one, under a `name` of its own; `tokens` are its caps, by split."""

    name: str
    text: TextSource
    tokens: Mapping[str, int]


@dataclass(frozen=True)
class TaskSource:
    """A reasoning task by its lm-evaluation-harness name, or a bias set by its own, and where it comes from.

    With `format`, the task is one's own: `name` is free, and the rows are of that format (`actors.tasks`).
    """

    name: str
    source: str
    subset: str | None = None
    split: str | None = None
    format: str | None = None


@dataclass(frozen=True)
class ModelSource:
    """A pretrained causal language model, by a name (`actors.sources`) or a URL (`actors.node_cache`).

    `dtype` is the precision it computes in.
    """

    source: str
    dtype: str = "float32"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class CalibrationSpec:
    """Text and size of the calibration; `tokens` is rounded down to whole windows.

    `labels` says whose next tokens the output gradients are of: `sampled` from the model (the true
    Fisher) or those of the `data` (the empirical one). `memory_gb` (10^9 bytes) bounds the moments
    that are held at once; a smaller one takes more passes over the text.
    """

    text: TextSource
    tokens: int
    window: int
    labels: str = "sampled"
    memory_gb: float = 4.0


METHOD_NAMES = ("weight", "feature", "curvature")


@dataclass(frozen=True)
class FactorSpec:
    """How targets are decomposed: see `actors.decompose` for the methods and the bias.

    The method of a target is that of the first pattern in `methods` its name matches, else `method`.
    `choices` are methods that every target is decomposed by as well, for a search to choose from.
    """

    method: str = "curvature"
    methods: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()
    bias: str = "mean"
    dtype: str = "float32"

    def method_of(self, name: str) -> str:
        """The configured method of a target."""
        return next((method for pattern, method in self.methods if fnmatchcase(name, pattern)), self.method)

    def methods_of(self, name: str) -> tuple[str, ...]:
        """Every method the factor store holds a target's factors of, the configured one first."""
        return tuple(dict.fromkeys((self.method_of(name), *self.choices)))


@dataclass(frozen=True)
class ScoringSpec:
    """What a score is made of: perplexity text, further texts and reasoning tasks, per split, with caps.

    Each window begins `stride` tokens behind the one before it; None is a whole window, so that none overlap.
    `kl_top_k` asks for the divergence from the dense model, over that many of its most likely tokens and
    the tail; what is kept of it takes at most `kl_memory_mb` (10^6 bytes) a split and replica.
    `prefix_memory_mb` (10^6 bytes a replica, 0 for none) holds hidden states of the dense model at every
    `prefix_stride`-th block, or at fewer: see `actors.prefix`. `stages` are rising numbers of tokens of the
    search split after which a dominated trial stops: see `actors.stages`. `tokens` may have a cap for
    `CHOICE` too.
    """

    text: TextSource
    window: int
    tokens: Mapping[str, int]
    tasks: tuple[TaskSource, ...] = ()
    examples: Mapping[str, int] = field(default_factory=dict)
    search_fraction: float = 0.2
    seed: int = 0
    batch_tokens: int = 1024
    kl_top_k: int | None = None
    kl_memory_mb: float = 512.0
    prefix_memory_mb: float = 0.0
    prefix_stride: int = 1
    stages: tuple[int, ...] = ()
    stride: int | None = None
    corpora: tuple[CorpusSource, ...] = ()
    bias: tuple[TaskSource, ...] = ()

    @property
    def step(self) -> int:
        """Tokens from the beginning of a window to that of the next one."""
        return self.window if self.stride is None else self.stride

    def kl_problem(self, split: str) -> str | None:
        """Why the dense log-probabilities of a split do not fit `kl_memory_mb`, None where they do.

        Each token of each window keeps k ids of 4 bytes and k + 1 log-probabilities of 4 bytes.
        """
        if self.kl_top_k is None:
            return None
        count = max(0, (self.tokens[split] - self.window) // self.step + 1)
        tokens = count * self.window
        needed, allowed = tokens * (8 * self.kl_top_k + 4), self.kl_memory_mb * 1e6
        if needed <= allowed:
            return None
        most = int(allowed // tokens - 4) // 8
        fits = f"at most {most} fits" if most > 0 else f"none fits {tokens:,} tokens"
        return (
            f"kl_top_k: {self.kl_top_k} over the {tokens:,} tokens of the {split} split takes "
            f"{needed / 1e6:,.2f} MB, kl_memory_mb is {self.kl_memory_mb:g}; {fits}"
        )


@dataclass(frozen=True)
class PreparationSpec:
    """All that decides the factor store, the splits and the scores of a study, and where files of it lie.

    Factor stores and converted models are in the folder `cache`, which all nodes share; where `shared` is a
    URL, factor stores are kept there instead. `node_cache` is a folder of each node's own (`~` is the home of
    its user) with a copy of whatever is named by URL: see `actors.node_cache`.
    """

    model: ModelSource
    calibration: CalibrationSpec
    factors: FactorSpec
    scoring: ScoringSpec
    calibration_fraction: float
    cache: str
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    shared: str | None = None
    node_cache: str = NODE_CACHE


@dataclass(frozen=True)
class Progress:
    """How far a long step of a preparation is: `done` of `total`."""

    step: str
    done: int
    total: int


@dataclass(frozen=True)
class BuildPlan:
    """What is left to do for a factor store: groups of targets, each after a pass over the text.

    `leaders` names for every target the first target that reads the same input; `windows` are those of
    the text and `rows` those of a batch; `checkpointed` says that activations are computed twice instead
    of kept. `moments` and `activations` are bytes: of the largest group, and of one batch. `repeated` says
    that some target runs more than once in a pass, so that none may end at the last target's first call.
    `overwritten` are targets whose held vector, their output or input, the model changes in place later.
    """

    groups: tuple[tuple[str, ...], ...]
    leaders: Mapping[str, str]
    windows: int
    rows: int
    checkpointed: bool
    moments: int
    activations: int
    repeated: bool = False
    overwritten: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operations:
    """Multiply-accumulates (MACs) of a token in matrix products that no rank changes.

    `linear` are those of all linear layers but the targets, the LM head included. `attention` has, for each
    block, those of its score and value products for one position attended to, and the most positions a token
    attends to (None: all before it, and itself). Norms, rotations, softmax and activations are not counted.
    """

    linear: int
    attention: tuple[tuple[int, int | None], ...]

    def at(self, length: int) -> int:
        """Of the last token of `length`, or of each where a pass computes all pairs of them."""
        return self.linear + sum(
            each * (length if most is None else min(length, most)) for each, most in self.attention
        )


@dataclass(frozen=True)
class Prepared:
    """What a preparation leaves behind, without a tensor in it.

    `model_folder` is that of the builder's node; `factor_store` is a folder, or a URL (`actors.resident`).
    `fingerprints` holds one sha256 for each of model, tokenizer, calibration, search, test, factors.
    `operations` is None where they are not known (`actors.operations`).
    """

    model_folder: str
    factor_store: str
    targets: tuple[TargetSpec, ...]
    model_parameters: int
    fingerprints: Mapping[str, str]
    tokens: Mapping[str, int]
    examples: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]
    reused: bool
    operations: Operations | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Prepared:
        targets = tuple(TargetSpec(**target) for target in data["targets"])
        known = data.get("operations")
        operations = known and Operations(known["linear"], tuple(map(tuple, known["attention"])))
        return cls(**{**data, "targets": targets, "operations": operations})


@dataclass(frozen=True)
class Foreseen:
    """What a preparation will leave behind, before the long work: who has no use for it can stop there."""

    prepared: Prepared


@dataclass(frozen=True)
class Place:
    """Where a replica runs: the name of its machine, and its process there."""

    node: str
    pid: int


@dataclass(frozen=True)
class ReplicaSpec:
    """Everything a replica needs to start: it loads these once and lives for the whole search.

    `gpus` are those it must have, or devices of the kind `device` where one is named: below 1 a share of one,
    above it so many that share the blocks. None is one GPU where there are any.
    """

    name: str
    preparation: PreparationSpec
    prepared: Prepared
    threads: int
    device: str = "auto"
    gpus: float | None = None
