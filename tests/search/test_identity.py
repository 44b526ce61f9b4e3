"""What may change on resume: every key decided, every fixed change refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from actors.types import RankfrontError
from search.config import Config, parse_config
from search.identity import (
    FIXED_FINGERPRINTS,
    RESUME_RULES,
    config_differences,
    fingerprint_differences,
    flatten,
    refuse,
    rule_for,
)

# Every key of a config that has all sections, with another value it may take.
FIXED = {
    "study": "other",
    "database": "postgresql://db.example/studies",
    "model.dtype": "bfloat16",
    "factors.method": "weight",
    "factors.methods": {"*.q_proj": "weight"},
    "factors.bias": "none",
    "factors.dtype": "bfloat16",
    "targets.include": ["*.mlp.*"],
    "targets.exclude": ["*.0.*"],
    "storage": "factored",
    "scoring.window": 16,
    "scoring.tokens.search": 4_096,
    "scoring.examples.search": 7,
    "scoring.search_fraction": 0.3,
    "scoring.seed": 1,
    "scoring.stride": 16,
    "scoring.kl_top_k": 16,
    "objectives": ["budget.linear", "nll"],
    "constraints": {"perplexity": 30.0},
    "run.deterministic": True,
    "run.lag": 5,
    "space.group": "target",
    "space.segments": 2,
    "space.knots": 3,
    "space.levels": 21,
    "space.floor": 0.25,
    "space.methods": ["curvature", "weight"],
}
# What a key's other value needs besides.
NEEDS = {
    "space.knots": {"space.group": "curve", "sampler.name": "tpe"},
    "sampler.population": {"sampler.name": "nsga2"},
}
CONTENT = {
    "model.source": "other/model",
    "text.source": "other/text",
    "text.subset": "other",
    "text.split": "test",
    "text.column": "passage",
    "text.join": " ",
    "text.deduplicate": True,
    "calibration.text.source": "other/text",
    "calibration.text.subset": "other",
    "calibration.text.split": "test",
    "calibration.text.column": "passage",
    "calibration.text.join": " ",
    "calibration.text.deduplicate": True,
    "calibration.fraction": 0.5,
    "calibration.tokens": 1_024,
    "calibration.window": 64,
    "calibration.labels": "data",
    "scoring.tasks": ["piqa"],
    "scoring.bias": ["crows_pairs"],
    "scoring.corpora": [{"name": "other", "source": "org/other"}],
}
FREE = {
    "runs": "elsewhere",
    "calibration.memory_gb": 1.0,
    "calibration.builders": 2,
    "model.trust_remote_code": True,
    "scoring.tokens.choice": 512,
    "scoring.tokens.test": 512,
    "scoring.examples.test": 9,
    "scoring.batch_tokens": 64,
    "scoring.kl_memory_mb": 64.0,
    "scoring.prefix_memory_mb": 64.0,
    "scoring.prefix_stride": 3,
    "scoring.stages": [2_048],
    "cost.length": 4_096,
    "sampler.name": "random",
    "sampler.seed": 5,
    "sampler.population": 12,
    "sampler.lowest": 0.6,
    "references.dense": False,
    "references.uniform": [0.5],
    "seeds.spectra": [0.5],
    "seeds.sensitivity": [0.5],
    "warm_start.sources": ["other"],
    "warm_start.limit": 3,
    "sensitivity.shares": [0.5],
    "replicas.gpus": 0.5,
    "surgical.mode": "task",
    "surgical.growth": 0.01,
    "surgical.task": "boolq",
    "surgical.delta": 0.0,
    "surgical.skip_blocks": 0,
    "surgical.ladder": "shares",
    "surgical.ranks": "bisect",
    "refine.method": "refit",
    "refine.steps": 7,
    "refine.tokens": 512,
    "refine.learning_rate": 0.01,
    "refine.warmup": 0,
    "refine.clip": 2.0,
    "refine.held_out": 512,
    "refine.evaluate_every": 3,
    "refine.patience": 2,
    "refine.top_k": 8,
    "refine.seed": 1,
    "refine.checkpointed": True,
    "refine.workers": 3,
    "finalists.budgets": [0.5],
    "finalists.count": 2,
    "finalists.refine": False,
    "stop.trials": 7,
    "stop.tokens": 10,
    "stop.hours": 1.5,
    "stop.plateau.trials": 3,
    "stop.plateau.tolerance": 0.5,
    "replicas.count": 3,
    "replicas.min": 2,
    "replicas.max": 7,
    "replicas.alone_seconds": 60.0,
    "replicas.threads": 2,
    "replicas.attempts": 5,
    "replicas.trial_seconds": 9.0,
    "replicas.load_seconds": 9.0,
    "cache.factors": "/mnt/factors",
    "cache.node": "/scratch",
}


def raw(tmp_path: Path) -> dict[str, Any]:
    return {
        "study": "made-up",
        "runs": str(tmp_path),
        "model": {"source": "org/model"},
        "text": {"source": "org/text"},
        "calibration": {"text": {"source": "org/calibration"}},
        "scoring": {
            "tasks": ["boolq"],
            "tokens": {"search": 8_192, "test": 32_768},
            "examples": {"search": 100, "test": 400},
        },
        "space": {"group": "module"},
        "stop": {"plateau": {"trials": 50}},
    }


def changed(tmp_path: Path, changes: dict[str, Any]) -> Config:
    data = raw(tmp_path)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return parse_config(data)


def schema_leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted keys of the schema itself, optional sections included; lists are leaves."""
    leaves: set[str] = set()
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if sections and not str(field.annotation).startswith("tuple"):
            leaves |= schema_leaves(sections[0], f"{prefix}{name}.")
        else:
            leaves.add(prefix + name)
    return leaves


def test_the_tables_of_this_test_are_the_schema() -> None:
    """A new key fails here until someone decides what its change means."""
    assert schema_leaves(Config) == {*FIXED, *CONTENT, *FREE}
    assert len({*FIXED, *CONTENT, *FREE}) == len(FIXED) + len(CONTENT) + len(FREE)


def test_every_leaf_of_a_config_is_decided(tmp_path: Path) -> None:
    leaves = flatten(changed(tmp_path, {}).model_dump(mode="json"))
    assert set(leaves) == {*FIXED, *CONTENT, *FREE}
    assert {key: rule_for(key).verdict for key in leaves} == {
        **dict.fromkeys(FIXED, "fixed"),
        **dict.fromkeys(CONTENT, "content"),
        **dict.fromkeys(FREE, "free"),
    }


def test_every_rule_decides_something() -> None:
    keys = {*FIXED, *CONTENT, *FREE}
    assert {rule_for(key).key for key in keys} == {rule.key for rule in RESUME_RULES}


@pytest.mark.parametrize("key", FIXED)
def test_a_fixed_key_is_refused_by_name(tmp_path: Path, key: str) -> None:
    beside = NEEDS.get(key, {})
    found = config_differences(changed(tmp_path, beside), changed(tmp_path, {**beside, key: FIXED[key]}))
    [line] = found
    now = FIXED[key]
    assert line.startswith(f"{key}: was ")
    assert f"now {now!r}" in line
    with pytest.raises(RankfrontError, match="cannot be resumed") as caught:
        refuse("made-up", found)
    assert line in str(caught.value)


@pytest.mark.parametrize("key", [*CONTENT, *FREE])
def test_other_keys_pass(tmp_path: Path, key: str) -> None:
    value = {**CONTENT, **FREE}[key]
    beside = NEEDS.get(key, {})
    before, after = changed(tmp_path, beside), changed(tmp_path, {**beside, key: value})
    assert before != after
    refuse("made-up", config_differences(before, after))


def test_every_difference_is_listed(tmp_path: Path) -> None:
    others = ("space.segments", "space.knots", "sampler.population", "sampler.lowest")  # they need others
    changes, free = (
        {key: value for key, value in keys.items() if key not in others} for keys in (FIXED, FREE)
    )
    found = config_differences(changed(tmp_path, {}), changed(tmp_path, {**changes, **free}))
    assert {line.partition(":")[0] for line in found} == set(changes)
    with pytest.raises(RankfrontError) as caught:
        refuse("made-up", found)
    assert all(line in str(caught.value) for line in found)


@pytest.mark.parametrize("name", FIXED_FINGERPRINTS)
def test_another_content_is_refused_by_name(name: str) -> None:
    saved = {key: key * 20 for key in ("model", "tokenizer", "calibration", "search", "test", "factors")}
    [line] = fingerprint_differences(saved, {**saved, name: "0123456789abcdef"})
    assert line.startswith(f"{name}: ")
    assert "0123456789ab" in line


def test_another_test_split_passes() -> None:
    """Test scores are kept with their fingerprint; search scores do not depend on them."""
    saved = dict.fromkeys((*FIXED_FINGERPRINTS, "test"), "a" * 64)
    assert fingerprint_differences(saved, {**saved, "test": "b" * 64}) == []


def test_the_order_of_patterns_is_a_difference(tmp_path: Path) -> None:
    """The first that fits decides."""
    patterns = {"*.0.*": "feature", "*.q_proj": "weight"}
    before = changed(tmp_path, {"factors.methods": patterns})
    after = changed(tmp_path, {"factors.methods": dict(reversed(patterns.items()))})
    [line] = config_differences(before, after)
    assert line.startswith("factors.methods: was {'*.0.*': 'feature', '*.q_proj': 'weight'}, now {'*.q_proj'")
    assert config_differences(before, changed(tmp_path, {"factors.methods": dict(patterns)})) == []


def test_the_order_of_constraints_is_no_difference(tmp_path: Path) -> None:
    bounds = {"perplexity": 30.0, "budget.model": 0.8}
    before = changed(tmp_path, {"constraints": bounds})
    assert (
        config_differences(before, changed(tmp_path, {"constraints": dict(reversed(bounds.items()))})) == []
    )
    [line] = config_differences(before, changed(tmp_path, {"constraints": {**bounds, "perplexity": 31.0}}))
    assert line.startswith("constraints: was {'budget.model': 0.8, 'perplexity': 30.0}, now")


def test_the_order_of_choices_is_a_difference(tmp_path: Path) -> None:
    """Optuna takes two orders for two parameters."""
    before = changed(tmp_path, {"space.methods": ["curvature", "weight"]})
    [line] = config_differences(before, changed(tmp_path, {"space.methods": ["weight", "curvature"]}))
    assert line.startswith("space.methods: ")


def test_a_longer_key_decides_only_below_itself() -> None:
    assert rule_for("scoring.tokens.search").verdict == "fixed"
    assert rule_for("scoring.tokens.test").verdict == "free"
    assert rule_for("text.source").key == "text"
