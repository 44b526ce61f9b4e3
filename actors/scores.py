"""What a replica answers: the scores of one allocation, their standard errors, and the values behind them.

Frozen, JSON, standard library only, as everything on the wire (`actors.types`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.errors import RankfrontError, ScoringError
from actors.samples import (
    Difference,
    mean_difference,
    paired_difference,
    standard_error,
    unpack_bits,
    unpack_floats,
)

KINDS = ("acc", "acc_norm", "margin")
"""The metrics of a reasoning task."""
_MEASURED, _SHARES = ("reasoning.", "bias."), (".acc", ".acc_norm", ".stereotype", ".lms", ".icat")


@dataclass(frozen=True)
class TextScore:
    """Loss over one text: `nats` summed over `tokens` predicted tokens.

    `stderr` is the standard error of nats/token, over windows; `windows` packs the nats/token of each.
    """

    name: str
    nats: float
    tokens: int
    stderr: float
    windows: str = ""

    @property
    def nll(self) -> float:
        """nats/token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


@dataclass(frozen=True)
class KlScore:
    """KL(dense || trial) over the tokens of the text: `nats` summed over `tokens` predicted tokens.

    Over the dense model's `top_k` most likely tokens and the tail (see `actors.divergence`); `stderr` and
    `windows` as in `TextScore`.
    """

    top_k: int
    nats: float
    tokens: int
    stderr: float
    windows: str = ""

    @property
    def mean(self) -> float:
        """nats/token."""
        return self.nats / self.tokens


@dataclass(frozen=True)
class TaskScore:
    """Zero-shot multiple choice. `acc` and `acc_norm` as lm-evaluation-harness defines them.

    `margin` is the mean of log p(gold) - max log p(wrong), in nats; `acc_norm` is None for the
    tasks where the harness does not define it. `hits`, `hits_norm` (bits) and `margins` (nats) pack
    the same of each example, in the order of the split.
    """

    examples: int
    acc: float
    acc_norm: float | None
    margin: float
    hits: str = ""
    hits_norm: str = ""
    margins: str = ""

    @property
    def stderr(self) -> float:
        """Standard error of `acc`."""
        return self.error("acc")

    def error(self, kind: str) -> float:
        """Standard error of `acc`, `acc_norm` (binomial, n - 1 as in lm-evaluation-harness) or `margin`.

        nan where it cannot be told: one example, no `acc_norm`, margins that were not kept.
        """
        if kind == "margin":
            return standard_error(unpack_floats(self.margins))
        share = self.acc if kind == "acc" else self.acc_norm
        if share is None or self.examples < 2:
            return math.nan
        return math.sqrt(share * (1 - share) / (self.examples - 1))

    def samples(self, kind: str) -> tuple[float, ...]:
        """`acc`, `acc_norm` or `margin` of each example; empty where they were not kept."""
        if kind == "margin":
            return unpack_floats(self.margins)
        packed = {"acc": self.hits, "acc_norm": self.hits_norm}[kind]
        return unpack_bits(packed, self.examples) if packed else ()


@dataclass(frozen=True)
class BiasScore:
    """What a bias set measures, by name (see `actors.bias`): each of `values` is the mean of its `samples`.

    Those are packed, one for each example, or for each target term where the set averages over terms.
    """

    examples: int
    values: Mapping[str, float]
    samples: Mapping[str, str]

    def error(self, kind: str) -> float:
        """Standard error of a value, over its samples; nan for a single one."""
        return standard_error(unpack_floats(self.samples[kind]))


@dataclass(frozen=True)
class Score:
    """The answer of a replica for one allocation on one split; `corpora` are further texts by name.

    `stopped_by` is the trial that dominated this one at the end of a stage: the score is then partial, of
    the first windows alone, without tasks. `busy` are the seconds that each GPU of the replica worked at
    passes, in the order of the blocks they hold; empty for one without GPUs.
    """

    split: str
    text: TextScore
    tasks: Mapping[str, TaskScore]
    forward_tokens: int
    seconds: float
    replica: str
    kl: KlScore | None = None
    stopped_by: int | None = None
    corpora: Mapping[str, TextScore] = field(default_factory=dict)
    bias: Mapping[str, BiasScore] = field(default_factory=dict)
    busy: tuple[float, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Every metric by the name an objective uses; means over tasks weigh tasks equally."""
        values = {"nll": self.text.nll}
        if self.kl is not None:
            values["kl"] = self.kl.mean
        values.update({f"nll.{name}": text.nll for name, text in self.corpora.items()})
        for kind in KINDS:
            found = {name: getattr(task, kind) for name, task in self.tasks.items()}
            found = {name: value for name, value in found.items() if value is not None}
            values.update({f"reasoning.{name}.{kind}": value for name, value in found.items()})
            if found:
                values[f"reasoning.{kind}"] = sum(found.values()) / len(found)
        for name, one in self.bias.items():
            values.update({f"bias.{name}.{kind}": value for kind, value in one.values.items()})
        return values

    @property
    def stderrs(self) -> dict[str, float]:
        """The standard error of every metric by its name; the tasks are independent samples."""
        found = {"nll": self.text.stderr}
        if self.kl is not None:
            found["kl"] = self.kl.stderr
        found.update({f"nll.{name}": text.stderr for name, text in self.corpora.items()})
        for kind in KINDS:
            defined = {name: t for name, t in self.tasks.items() if getattr(t, kind) is not None}
            errors = {name: task.error(kind) for name, task in defined.items()}
            found.update({f"reasoning.{name}.{kind}": value for name, value in errors.items()})
            if errors:
                squares = math.fsum(value**2 for value in errors.values())
                found[f"reasoning.{kind}"] = math.sqrt(squares) / len(errors)
        for name, one in self.bias.items():
            found.update({f"bias.{name}.{kind}": one.error(kind) for kind in one.values})
        return found

    @property
    def reasoning_stderr(self) -> float:
        """Standard error of `reasoning.acc`; nan without a task."""
        return self.stderrs.get("reasoning.acc", math.nan)

    def minus(self, other: Score, metric: str) -> Difference:
        """This score's metric less the other's, paired over the same windows or examples.

        Raises:
            RankfrontError: other text or tasks, or values that were not kept.
        """
        mine, theirs = self._samples(metric), other._samples(metric)
        counts, others = ({name: len(v) for name, v in found.items()} for found in (mine, theirs))
        text, its = self._text(metric).name, other._text(metric).name
        alike = (self.split, text) == (other.split, its) and counts == others
        if not (alike and counts and all(counts.values())):
            raise RankfrontError(
                f"{metric} cannot be paired: {counts or 'nothing'} of {text} ({self.split}) with "
                f"{others or 'nothing'} of {its} ({other.split})"
            )
        return mean_difference([paired_difference(mine[name], theirs[name]) for name in mine])

    def _text(self, metric: str) -> TextScore:
        """The text of `nll.<name>`, for any other metric the main one."""
        return self.corpora.get(metric.partition("nll.")[2], self.text)

    def _samples(self, metric: str) -> dict[str, tuple[float, ...]]:
        """The values a metric is the mean of, by where they are from; a mean over tasks has those of each."""
        if metric == "nll" or metric.removeprefix("nll.") in self.corpora:
            return {"windows": unpack_floats(self._text(metric).windows)}
        if metric == "kl":
            return {"windows": unpack_floats(self.kl.windows)} if self.kl is not None else {}
        if metric.startswith("bias."):
            name, _, kind = metric.removeprefix("bias.").rpartition(".")
            packed = self.bias[name].samples.get(kind, "") if name in self.bias else ""
            return {name: unpack_floats(packed)} if packed else {}
        _, _, path = metric.partition("reasoning.")
        task, _, kind = path.rpartition(".")
        if kind not in KINDS:
            return {}
        chosen = {name: one for name, one in self.tasks.items() if task in ("", name)}
        return {name: one.samples(kind) for name, one in chosen.items() if getattr(one, kind) is not None}

    def check(self) -> None:
        """Raise `ScoringError` naming the first value that cannot be a score."""
        for text in (self.text, *self.corpora.values()):
            if text.tokens < 1:
                raise ScoringError(f"{text.name}: no token was scored")
        named = {"nll": self.text.nll, **self.metrics}
        for name, value in named.items():
            if not math.isfinite(value):
                raise ScoringError(f"{name} is {value} on the {self.split} split")
            measured = name.startswith(_MEASURED)  # a corpus may have any name
            if measured and name.endswith(_SHARES) and not 0 <= value <= 1:
                raise ScoringError(f"{name} is {value} on the {self.split} split, outside 0..1")
            if name.partition(".")[0] == "nll" and value < 0:
                raise ScoringError(f"{name} is {value} nats/token, below 0")
        if self.kl is not None and self.kl.nats < 0:
            raise ScoringError(f"kl is {self.kl.mean} nats/token, below 0")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        parts = ("text", "tasks", "kl", "corpora", "bias", "busy")
        rest = {key: value for key, value in data.items() if key not in parts}
        tasks = {name: TaskScore(**task) for name, task in data["tasks"].items()}
        kl = data.get("kl")
        corpora = {name: TextScore(**text) for name, text in data.get("corpora", {}).items()}
        bias = {name: BiasScore(**one) for name, one in data.get("bias", {}).items()}
        text, busy = TextScore(**data["text"]), tuple(data.get("busy", ()))
        return cls(
            text=text, tasks=tasks, kl=kl and KlScore(**kl), corpora=corpora, bias=bias, busy=busy, **rest
        )
