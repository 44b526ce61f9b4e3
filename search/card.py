"""The model card of an export: where it comes from, what it scores and holds, how to make it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.node_cache import is_url
from actors.types import Score
from search.config import Config
from search.findings import error_bar
from search.folder import short_name

if TYPE_CHECKING:
    from actors.check import Checked

SPLITS = {"search": "search split", "test": "test split"}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells besides what the written folder holds.

    `scores` and `dense` (those of the uncompressed model) go by split; `commands` are those that make the
    folder again; `smaller` is false where its weights are dense.
    """

    config: Config
    calibration_tokens: int
    licence: str | None
    factors: str
    scores: Mapping[str, Score]
    commands: tuple[str, ...]
    smaller: bool
    dense: Mapping[str, Score] = field(default_factory=dict)
    study: str | None = None
    trial: int | None = None


def model_card(facts: CardFacts, checked: Checked) -> str:
    """The card, with the front matter that the Hugging Face hub reads."""
    source = facts.config.model.source
    name = short_name(source)
    share = checked.parameters / checked.dense_parameters
    parts = [
        _front_matter(facts),
        f"# {name} at {share:.1%} of its parameters" if facts.smaller else f"# {name}, cut",
    ]
    if not facts.smaller:
        parts.append(
            "**This folder is not smaller than the base model.** It holds the products of the factors as "
            "ordinary weights, so that any tool opens it; only the low-rank form stores and computes less."
        )
    parts.append(
        f"Chosen linear layers of [{name}]({_link(source)}) are kept at a low rank, found by rankfront."
        if _link(source)
        else f"Chosen linear layers of {name} are kept at a low rank, found by rankfront."
    )
    parts += ["## What it is", _listed(_what(facts, checked))]
    if facts.scores:
        parts += ["## Scores", _scores(facts), _score_note(facts)]
    parts += ["## Load it", _load(facts), "## Make it again", _code("\n".join(facts.commands), "sh")]
    return "\n\n".join(parts) + "\n"


def _link(source: str) -> str:
    """Where a hub model is; empty for one that is no hub model."""
    local = source.startswith(("/", "package:")) or is_url(source)
    return "" if local else f"https://huggingface.co/{source.removeprefix('hub:').partition('@')[0]}"


def _front_matter(facts: CardFacts) -> str:
    licence = [f"license: {facts.licence}"] if facts.licence else ["license: other", "license_name: unknown"]
    source = facts.config.model.source
    base = [f"base_model: {source.removeprefix('hub:').partition('@')[0]}"] if _link(source) else []
    tags = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [rankfront, low-rank]"]
    return "\n".join(["---", *licence, *base, *tags, "---"])


def _what(facts: CardFacts, checked: Checked) -> dict[str, str]:
    config = facts.config
    text = config.calibration.text or config.text
    parts = (short_name(text.source), text.subset, text.split)
    from_study = "" if facts.study is None else f"study {facts.study}, trial {facts.trial}"
    form = f"stored as {config.storage}" if facts.smaller else "stored as ordinary dense weights"
    told = {
        "base model": f"{config.model.source}, {config.model.dtype}",
        "licence of the base model": facts.licence or "not stated in its files; its own terms apply",
        "method": f"{facts.factors}; {form}",
        "calibration": f"{facts.calibration_tokens:,} tokens of {'/'.join(part for part in parts if part)}, "
        f"windows of {config.calibration.window}",
        "parameters": _of(checked.parameters, checked.dense_parameters),
        "bytes of tensors": _of(checked.bytes, checked.dense_bytes),
        "found by": from_study,
    }
    return {name: value for name, value in told.items() if value}


def _of(part: int, dense: int) -> str:
    return f"{part:,} of the dense model's {dense:,} ({part / dense:.1%})"


def _listed(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _scores(facts: CardFacts) -> str:
    """A row for each metric; a column for each split, and for the dense model where its scores are known."""
    columns = [(SPLITS[split], score) for split, score in facts.scores.items()]
    columns += [(f"dense, {SPLITS[split]}", score) for split, score in facts.dense.items()]
    names = dict.fromkeys(name for _, score in columns for name in score.metrics)
    lines = [["metric", *(title for title, _ in columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_value(score, name) for _, score in columns)] for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(score: Score, name: str) -> str:
    if name not in score.metrics:
        return ""
    error = score.stderrs.get(name, math.nan)
    return f"{score.metrics[name]:.4f}{error_bar(error, 4, ' ± ')}"


def _score_note(facts: CardFacts) -> str:
    note = (
        "± is one standard error; nll and kl in nats/token, acc as a share. The search split chose this model"
    )
    missing = "" if "test" in facts.scores else ", and it was not scored on the test split"
    return f"{note}; nothing was tuned on the test split{missing}."


def _load(facts: CardFacts) -> str:
    trust = ", trust_remote_code=True" if facts.smaller else ""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]
    note = (
        "\n\nWith `import actors.modeling_rankfront` before it, no remote code is needed."
        if facts.smaller
        else ""
    )
    return _code("\n".join(lines), "python") + note


def _code(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
