"""What makes a study the same study: the one table of what may change on resume and what may not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from actors.types import RankfrontError
from search.config import Config

Verdict = Literal["fixed", "content", "free"]

# Mappings that are values, not sections: their keys are the user's. The order of patterns counts, constraints
# are kept sorted.
MAPPINGS = ("factors.methods", "constraints")


@dataclass(frozen=True)
class Rule:
    """`key` and everything below it: `fixed` must be equal; `content` is compared by fingerprint, so
    the same bytes may come from another place; `free` may change. The longest key that fits decides."""

    key: str
    verdict: Verdict
    why: str


RESUME_RULES: tuple[Rule, ...] = (
    Rule("study", "fixed", "the name is the folder"),
    Rule("runs", "free", "the folder may have moved"),
    Rule("database", "fixed", "the trials are there; name another host by ${NAME}"),
    Rule("model", "fixed", "scores of two precisions do not compare"),
    Rule("model.source", "content", "weights and tokenizer, by fingerprint"),
    Rule("model.trust_remote_code", "free", "a permission, not a setting"),
    Rule("text", "content", "search windows, by fingerprint"),
    Rule("calibration", "content", "calibration windows, by fingerprint"),
    Rule("calibration.memory_gb", "free", "how many passes, not what they find"),
    Rule("calibration.builders", "free", "how fast, not what they find"),
    Rule("factors", "fixed", "methods, bias and precision decide every score"),
    Rule("targets", "fixed", "the parameters of the study"),
    Rule("storage", "fixed", "decides what a rank costs"),
    Rule("scoring", "fixed", "decides what a score means"),
    Rule("scoring.tasks", "content", "examples, by fingerprint"),
    Rule("scoring.bias", "content", "sentences, by fingerprint"),
    Rule("scoring.corpora", "content", "their search windows, by fingerprint"),
    Rule("scoring.tokens.choice", "free", "those scores are kept apart, each with its fingerprint"),
    Rule("scoring.tokens.test", "free", "test scores are kept apart, each with its fingerprint"),
    Rule("scoring.examples.test", "free", "test scores are kept apart, each with its fingerprint"),
    Rule("scoring.batch_tokens", "free", "speed; scores differ by rounding only"),
    Rule("scoring.kl_memory_mb", "free", "a bound, not a setting of the score"),
    Rule("scoring.prefix_memory_mb", "free", "speed; scores are equal to the bit"),
    Rule("scoring.prefix_stride", "free", "speed; scores are equal to the bit"),
    Rule("scoring.stages", "free", "how far a dominated trial is scored, not what a whole score is"),
    Rule("cost", "free", "counted again from the ranks"),
    Rule("objectives", "fixed", "the values of the study"),
    Rule("constraints", "fixed", "finished trials keep the violations they were recorded with"),
    Rule("space", "fixed", "the parameters of the study"),
    Rule("sampler", "free", "samplers learn from whatever trials there are"),
    Rule("references", "free", "missing ones are added"),
    Rule("seeds", "free", "missing ones are added"),
    Rule("warm_start", "free", "missing ones are added"),
    Rule("sensitivity", "free", "missing scores are added"),
    Rule("surgical", "free", "another walk over scores that are kept"),
    Rule("refine", "free", "other settings make another variant"),
    Rule("finalists", "free", "which to follow further; what is there is kept"),
    Rule("stop", "free", "how far to go"),
    Rule("run", "fixed", "the same trials again only by the same rule"),
    Rule("replicas", "free", "how fast to go"),
    Rule("replicas.gpus", "free", "where blocks lie, not what they compute"),
    Rule("cache", "free", "where files lie, not what they hold"),
)

# Fingerprints of a preparation that a resumed study must meet again.
FIXED_FINGERPRINTS = ("model", "tokenizer", "calibration", "search", "factors")


def rule_for(key: str) -> Rule:
    """The rule that decides a dotted config key."""
    fitting = [rule for rule in RESUME_RULES if key == rule.key or key.startswith(rule.key + ".")]
    return max(fitting, key=lambda rule: len(rule.key))


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys; lists and the `MAPPINGS` are values."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and prefix + key not in MAPPINGS:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def config_differences(saved: Config, given: Config) -> list[str]:
    """Every fixed key whose value differs, one line each."""
    was, now = flatten(saved.model_dump(mode="json")), flatten(given.model_dump(mode="json"))
    return [
        f"{key}: was {was.get(key)!r}, now {now.get(key)!r} ({rule_for(key).why})"
        for key in sorted({*was, *now})
        if rule_for(key).verdict == "fixed" and not _same(was.get(key), now.get(key))
    ]


def _same(was: Any, now: Any) -> bool:
    """Equal as written, so that the order of a mapping's keys counts."""
    return json.dumps(was) == json.dumps(now)


def fingerprint_differences(saved: Mapping[str, str], given: Mapping[str, str]) -> list[str]:
    """Every fixed fingerprint that differs, one line each."""
    return [
        f"{key}: the content differs (was {saved.get(key, 'unknown')[:12]}, now {given[key][:12]})"
        for key in FIXED_FINGERPRINTS
        if saved.get(key) != given[key]
    ]


def refuse(study: str, differences: list[str]) -> None:
    """Raise RankfrontError naming every difference, if there is one."""
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise RankfrontError(
            f"study {study!r} cannot be resumed with this config:\n{lines}\n"
            "Give the new study another name, or put these back."
        )
