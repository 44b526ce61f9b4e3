"""Mistakes in a config: all listed at once, each with its path, its value and what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from raw_config import mistakes, put

from actors.types import METHOD_NAMES, FactorSpec
from search.config import ConfigError, load_config, parse_config, parse_saved
from search.constraints import Constraint
from search.sections import HELD_OUT, SamplerSection

C4 = {"name": "c4", "source": "allenai/c4"}
CAPS = {"search": 64, "test": 8}
OWN = {"name": "mine", "format": "choices", "source": "/tmp"}


def test_a_section_without_keys_has_its_defaults(raw: dict[str, Any], tmp_path: Path) -> None:
    """All of them may be comments; `--set` fills it."""
    plain = parse_config(raw)
    for key in ("sampler", "constraints", "factors.methods", "stop", "calibration.text", "stop.plateau"):
        assert parse_config(put(raw, key, None)) == plain
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw) + "sampler:\n  # seed: 1\n")
    assert load_config(tmp_path / "config.yaml", {"sampler.seed": 2}).sampler.seed == 2


def test_what_a_section_without_keys_lacks_is_named(raw: dict[str, Any]) -> None:
    assert "text.source: missing" in mistakes(put(raw, "text", None))
    assert mistakes(put(raw, "scoring.tokens", None)) == [
        "scoring.tokens.search: missing",
        "scoring.tokens.test: missing",
    ]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        (
            "sampler",
            "tpe",
            "sampler: 'tpe': input should be a section; its keys are name, seed, population, lowest",
        ),
        (
            "scoring.corpora",
            [C4, "wikitext"],
            "scoring.corpora[1]: 'wikitext': input should be a section; its keys are source, subset, split, "
            "column, join, deduplicate, name, tokens",
        ),
        ("stop.plateau", 3, "stop.plateau: 3: input should be a section; its keys are trials, tolerance"),
        ("finalists.budgets", 0.9, "finalists.budgets: 0.9: input should be a list, such as [0.9]"),
        ("scoring.stages", None, "scoring.stages: None: input should be a list, such as []"),
        ("objectives", ["nll"], "objectives: ['nll']: input should be 2 to 3 of them"),
        ("sensitivity.shares", [], "sensitivity.shares: []: input should be at least 1 of them"),
        ("sensitivity.shares", [1], "sensitivity.shares[0]: 1: input should be less than 1"),
        ("constraints", "nll", "constraints: 'nll': input should be a mapping, such as {KEY: VALUE}"),
    ],
)
def test_a_value_of_another_form_is_said_in_the_words_of_yaml(
    raw: dict[str, Any], key: str, value: Any, line: str
) -> None:
    assert mistakes(put(raw, key, value)) == [line]


def test_the_right_config_is_right(raw: dict[str, Any]) -> None:
    assert parse_config(raw).study == "made-up"


def test_a_study_saved_when_held_out_was_a_share_still_opens(raw: dict[str, Any]) -> None:
    assert parse_config({**raw, "refine": {"held_out": 0.1}}).refine.held_out == HELD_OUT
    assert parse_config({**raw, "refine": {"held_out": 96}}).refine.held_out == 96
    with pytest.raises(ConfigError, match=r"refine.held_out: 0.25"):
        parse_config({**raw, "refine": {"held_out": 0.25}})


@pytest.mark.parametrize(
    ("key", "value", "path", "says"),
    [
        ("bogus", 1, "bogus", ["unknown key", "objectives"]),
        ("scoring.windw", 1, "scoring.windw", ["unknown key", "window"]),
        ("scoring.tokens", {"search": 1, "test": 1, "x": 1}, "scoring.tokens.x", ["unknown key", "test"]),
        ("objectives", ["budget.model", "perplexity"], "objectives[1]", ["'perplexity'", "nll"]),
        ("objectives", ["budget.model", "nll", "nll"], "objectives[2]", ["'nll'", "twice"]),
        ("objectives", ["nll", "reasoning.acc"], "objectives", ["budget.linear", "budget.bytes"]),
        ("objectives", ["budget.model"], "objectives", ["2 to 3 of them"]),
        ("objectives", ["budget.model", "budget.bytes"], "objectives", ["must be measured", "nll"]),
        ("objectives", ["budget.model", "reasoning.piqa.acc"], "objectives[1]", ["piqa", "boolq"]),
        ("objectives", ["budget.model", "reasoning.boolq.acc_norm"], "objectives[1]", ["not defined"]),
        ("objectives", ["budget.model", "kl"], "objectives[1]", ["'kl'", "scoring.kl_top_k"]),
        ("scoring.bias", ["crows"], "scoring.bias[0].name", ["'crows'", "crows_pairs", "stereoset"]),
        ("scoring.bias", ["stereoset", "stereoset"], "scoring.bias[1]", ["'stereoset'", "twice"]),
        ("scoring.stride", 33, "scoring.stride", ["33", "scoring.window, 32"]),
        ("scoring.corpora", [{"source": "a/b"}], "scoring.corpora[0].name", ["missing"]),
        ("scoring.corpora", [{**C4, "name": "c 4"}], "scoring.corpora[0].name", ["'c 4'", "pattern"]),
        ("scoring.corpora", [{**C4, "windw": 2}], "scoring.corpora[0].windw", ["unknown key", "tokens"]),
        ("scoring.corpora", [C4, {**C4, "split": "x"}], "scoring.corpora[1].name", ["'c4'", "twice"]),
        ("scoring.corpora", [C4, {**C4, "name": "d"}], "scoring.corpora[1]", ["text of scoring.corpora[0]"]),
        ("objectives", ["budget.model", "nll.d4"], "objectives[1]", ["'nll.d4'", "one of", "reasoning"]),
        ("constraints", {"perplexity": 0.9}, "constraints.perplexity", ["0.9", "must be 1 or more"]),
        ("constraints", {"perplexity": float("nan")}, "constraints.perplexity", ["nan", "finite"]),
        ("constraints", {"perplexity": "low"}, "constraints.perplexity", ["'low'", "valid number"]),
        ("constraints", {"budget.model": 1.5}, "constraints.budget.model", ["1.5", "at most 1"]),
        ("constraints", {"reasoning.boolq.acc": 0}, "constraints.reasoning.boolq.acc", ["0", "above 0"]),
        ("constraints", {"perplexty": 30}, "constraints.perplexty", ["unknown", "one of bytes", "nll"]),
        ("constraints", {"reasoning.piqa.acc": 0.5}, "constraints.reasoning.piqa.acc", ["scoring.tasks"]),
        ("constraints", {"kl": 0.5}, "constraints.kl", ["not scored", "scoring.kl_top_k"]),
        ("constraints", {"bias.stereoset.lms": 0.5}, "constraints.bias.stereoset.lms", ["scoring.bias"]),
        ("constraints", ["perplexity"], "constraints", ["['perplexity']", "a mapping"]),
        ("scoring.kl_top_k", 0, "scoring.kl_top_k", ["0", "greater than or equal to 1"]),
        ("scoring.kl_top_k", 10**7, "scoring.kl_top_k", ["search split", "kl_memory_mb is 512", "at most"]),
        ("scoring.stages", [64, 0], "scoring.stages[1]", ["0", "greater than or equal to 1"]),
        ("scoring.stages", [96, 96], "scoring.stages[1]", ["96 is not above 96"]),
        ("scoring.stages", [8192], "scoring.stages[0]", ["8192 is not below scoring.tokens.search, 8192"]),
        ("scoring.stages", [63], "scoring.stages[0]", ["63", "two windows, 64"]),
        ("scoring.prefix_memory_mb", -1, "scoring.prefix_memory_mb", ["-1", "greater than or equal to 0"]),
        ("scoring.prefix_stride", 0, "scoring.prefix_stride", ["0", "greater than or equal to 1"]),
        ("model.source", "/no/such/model", "model.source", ["/no/such/model", "no file or folder"]),
        ("text.source", "./no/such/text", "text.source", ["./no/such/text", "no file or folder"]),
        ("model.source", "package:no_such_package/x", "model.source", ["no_such_package"]),
        ("model.dtype", "int8", "model.dtype", ["'int8'", "bfloat16"]),
        ("references.uniform", [0.9, 0.0], "references.uniform[1]", ["0.0", "greater than 0"]),
        ("references.uniform", [1.5], "references.uniform[0]", ["1.5", "less than or equal to 1"]),
        ("references.uniform", [float("nan")], "references.uniform[0]", ["nan"]),
        ("space.floor", 0, "space.floor", ["0", "greater than 0"]),
        ("space.floor", 1.01, "space.floor", ["1.01", "less than or equal to 1"]),
        ("space.floor", 1, "space.floor", ["1", "every level dense", "below 1, such as 0.2"]),
        ("space.segments", 3, "space.segments", ["3", "group: module"]),
        ("space.knots", 3, "space.knots", ["3", "group: curve"]),
        ("space.knots", 0, "space.knots", ["0", "greater than or equal to 1"]),
        ("scoring.tasks", ["arc_easy", "arc_esay"], "scoring.tasks[1].name", ["'arc_esay'", "arc_easy"]),
        ("scoring.tasks", ["arc_easy", "arc_easy"], "scoring.tasks[1]", ["'arc_easy'", "twice"]),
        ("scoring.tasks", [{"name": "piqa", "source": "/no/piqa"}], "scoring.tasks[0].source", ["/no/piqa"]),
        ("scoring.tasks", [{"name": "mine", "source": "/tmp"}], "scoring.tasks[0].name", ["format: choices"]),
        ("scoring.tasks", [OWN | {"name": "piqa"}], "scoring.tasks[0].name", ["'piqa'", "another name"]),
        ("scoring.tasks", [OWN | {"name": "my-own"}], "scoring.tasks[0].name", ["'my-own'", "letters"]),
        ("scoring.tasks", [OWN | {"source": None}], "scoring.tasks[0].source", ["missing", "'mine'"]),
        ("scoring.tasks", [OWN | {"format": "csv"}], "scoring.tasks[0].format", ["'csv'", "'choices'"]),
        ("stop.trials", None, "stop", ["trials", "tokens", "hours", "plateau"]),
        ("refine.method", "least", "refine.method", ["'least'", "'refit'"]),
        ("refine.workers", 1_537, "refine.workers", ["1537", "windows of a step", "refine.tokens is 1536"]),
        ("finalists.budgets", [90], "finalists.budgets[0]", ["90", "less than or equal to 1"]),
        ("calibration.tokens", 31, "calibration.tokens", ["31 is less than one window", "window is 32"]),
        ("scoring.tokens", {"search": 31, "test": 64}, "scoring.tokens.search", ["31", "window is 32"]),
        ("scoring.corpora", [{**C4, "tokens": CAPS}], "scoring.corpora[0].tokens.test", ["8 is less than"]),
        ("calibration.window", 5_000, "calibration.window", ["too short", "5000"]),
        ("scoring.window", 5_000, "scoring.window", ["too short", "search"]),
        ("study", "a/b", "study", ["'a/b'"]),
        ("replicas.count", 0, "replicas.count", ["0", "greater than or equal to 1"]),
        ("replicas.gpus", 2.5, "replicas.gpus", ["2.5", "whole number of GPUs, or a share of one"]),
        ("replicas.gpus", 0.3, "replicas.gpus", ["0.3", "0.1 of it is nobody's", "0.3333", "0.25"]),
        ("replicas", {"min": 3, "max": 2}, "replicas.min", ["3", "above replicas.max, 2"]),
        ("replicas", {"count": 2, "min": 3}, "replicas.min", ["3", "above replicas.count, 2"]),
        ("replicas", {"count": 4, "max": 3}, "replicas.max", ["3", "below replicas.count, 4"]),
        ("run.lag", -1, "run.lag", ["-1", "greater than or equal to 0"]),
        ("sampler.name", "cmaes", "sampler.name", ["'cmaes'", "nsga2", "tpe"]),
        ("sampler.seed", -1, "sampler.seed", ["-1", "greater than or equal to 0"]),
        ("sampler.seed", 2**32, "sampler.seed", ["4294967296", "less than 4294967296"]),
        ("sampler.name", "gp", "sampler.name", ["'gp'", "at most 20", "space.group: target", "exchange"]),
        ("sampler", {"name": "tpe", "lowest": 0.6}, "sampler.lowest", ["0.6", "name: exchange, not tpe"]),
        ("sampler.population", 9, "sampler.population", ["9", "nsga2 or nsga3, not exchange"]),
        ("factors.method", "svd", "factors.method", ["'svd'", "weight, feature, curvature"]),
        ("factors.methods", {"*.q_proj": "svd"}, "factors.methods.*.q_proj", ["'svd'", "curvature"]),
        ("factors.methods", ["feature"], "factors.methods", ["['feature']", "a mapping"]),
        ("space.methods", ["feature", "svd"], "space.methods[1]", ["'svd'", "weight, feature, curvature"]),
        ("space.methods", ["curvature", "curvature"], "space.methods[1]", ["'curvature'", "twice"]),
        ("space.methods", ["curvature"], "space.methods", ["'curvature' alone", "two or more"]),
        ("space.methods", ["feature", "weight"], "space.methods", ["'curvature'", "factors.method names it"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named(raw: dict[str, Any], key: str, value: Any, path: str, says: list[str]) -> None:
    found = mistakes(put(raw, key, value))
    about = [line for line in found if line.startswith(f"{path}: ")]
    assert about, f"no line about {path}: {found}"
    assert all(word in " ".join(about) for word in says), about


def test_exchange_needs_a_level_of_each_target(raw: dict[str, Any]) -> None:
    curves = put(raw, "space", {"group": "curve"})
    assert parse_config(put(curves, "sampler.name", "tpe"))
    for config in (curves, put(curves, "sampler.name", "exchange")):  # which is who proposes if none is named
        [line] = mistakes(config)
        assert line.startswith("sampler.name: 'exchange' moves parameters between levels of targets")


def test_what_one_sampler_alone_reads_is_refused_only_where_it_was_set(raw: dict[str, Any]) -> None:
    """A saved config has every default."""
    for name in get_args(SamplerSection.model_fields["name"].annotation):
        own = {"exchange": {"lowest": 0.6}, "nsga2": {"population": 9}, "nsga3": {"population": 9}}
        section = {"name": name, **own.get(name, {})}
        config = parse_config(raw | {"sampler": section, "space": {"group": "module"}, "stop": {"trials": 1}})
        assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_a_study_saved_when_every_level_could_be_dense_still_opens(raw: dict[str, Any]) -> None:
    saved = yaml.safe_load(parse_config(raw).to_yaml())
    assert parse_saved(put(saved, "space.floor", 1.0), "here").space.floor == 1


def test_a_reasoning_objective_needs_tasks(raw: dict[str, Any]) -> None:
    raw = put(put(raw, "scoring.tasks", []), "objectives", ["budget.model", "reasoning.acc"])
    [line] = mistakes(raw)
    assert line.startswith("objectives[1]: 'reasoning.acc' needs scoring.tasks")


def test_finalists_of_a_float16_model_are_not_refined_by_steps(raw: dict[str, Any]) -> None:
    raw = put(put(raw, "model.dtype", "float16"), "finalists.budgets", [0.8])
    [line] = mistakes(raw)
    assert line.startswith("finalists.refine: gradients vanish in model.dtype float16; use bfloat16")
    assert parse_config(put(raw, "finalists.refine", False))
    assert parse_config(put(raw, "refine.method", "refit"))


def test_stages_need_windows_that_do_not_overlap(raw: dict[str, Any]) -> None:
    raw = put(put(raw, "scoring.stages", [64]), "scoring.stride", 16)
    with pytest.raises(ConfigError) as error:
        parse_config(raw)
    assert [line for line in error.value.mistakes if line.startswith("scoring.stages")] == [
        "scoring.stages: they compare windows that do not overlap; scoring.stride is 16, scoring.window 32"
    ]


def test_stages_compare_text_alone(raw: dict[str, Any]) -> None:
    """Named where it is asked for: each objective that is neither a cost nor a loss over windows."""
    raw = put(raw, "scoring.stages", [64])
    assert parse_config(raw).preparation().scoring.stages == (64,)
    assert parse_config(put(put(raw, "scoring.kl_top_k", 8), "objectives", ["budget.bytes", "nll", "kl"]))
    [line] = mistakes(put(raw, "objectives", ["budget.model", "nll", "reasoning.boolq.acc"]))
    assert line == "scoring.stages: they compare nll and kl alone, objectives[2] is 'reasoning.boolq.acc'"


def test_constraints_are_bounds_by_metric(raw: dict[str, Any]) -> None:
    """Sorted, so that order is no difference; nested as `--set constraints.reasoning.acc=...` leaves them."""
    nested = {"perplexity": 35, "bytes": 200_000_000, "reasoning": {"acc": 0.5, "boolq": {"acc_norm": 1}}}
    [line] = mistakes(put(raw, "constraints", nested))
    assert line.startswith("constraints.reasoning.boolq.acc_norm: ")
    del nested["reasoning"]["boolq"]  # type: ignore[attr-defined]
    config = parse_config(put(raw, "constraints", nested))
    assert config.named_constraints == (
        Constraint("bytes", 200_000_000),
        Constraint("perplexity", 35),
        Constraint("reasoning.acc", 0.5),
    )
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_a_missing_key_is_named(raw: dict[str, Any]) -> None:
    del raw["model"], raw["text"]["source"]
    assert {"model: missing", "text.source: missing"} <= set(mistakes(raw))


def test_every_mistake_is_listed_at_once(raw: dict[str, Any]) -> None:
    """None hides another: not in one section, not across sections, not a rule of two sections."""
    raw["scoring"] |= {"windw": 16, "tasks": ["arc_easy", "nope"], "search_fraction": 1.0}
    raw |= {
        "bogus": 1,
        "constraints": {"perplexity": 0.5, "kl": 1, "bytes": True},
        "model": {"source": "/no/such/model", "dtype": "int8"},
        "objectives": ["perplexity", "nll", "nll"],
        "factors": {"method": "svd", "methods": {"*.q_proj": "feature", "*.k_proj": "none"}, "bias": "some"},
        "space": {"floor": 0, "group": "block", "segments": 3, "levels": 0, "methods": ["weight", "weight"]},
        "references": {"uniform": [0.9, 1.5, 0]},
        "sampler": {"name": "cmaes", "seed": 2**32},
        "stop": {"trials": None},
        "calibration": {"window": 5_000},
    }
    found = mistakes(raw)
    expected = [
        "bogus:", "constraints.perplexity:", "constraints.kl:", "constraints.bytes:", "model.source:",
        "model.dtype:", "scoring.windw:", "scoring.tasks[1].name:",
        "scoring.search_fraction:", "objectives[0]:", "objectives[2]:", "objectives:", "space.floor:",
        "space.segments:", "space.levels:", "references.uniform[1]:", "references.uniform[2]:",
        "sampler.name:", "sampler.seed:", "stop:", "calibration.window:", "factors.method:",
        "factors.methods.*.k_proj:", "factors.bias:", "space.methods[1]:", "space.methods:",
    ]  # fmt: skip
    assert [path for path in expected if not any(line.startswith(path) for line in found)] == []


def test_no_mistake_is_listed_twice(raw: dict[str, Any]) -> None:
    [line] = mistakes(put(raw, "replicas.threads", 0))
    assert line.startswith("replicas.threads: 0")


@pytest.mark.parametrize(
    ("key", "value"), [("factors.method", "curvatur"), ("space.methods", ["feature", "curvatur"])]
)
def test_a_misspelt_method_is_one_mistake(raw: dict[str, Any], key: str, value: Any) -> None:
    """Not also a missing one."""
    raw = put(raw, "space.methods", ["feature", "curvature"])
    [line] = mistakes(put(raw, key, value))
    assert "'curvatur' is no method" in line


def test_every_configured_method_must_be_a_choice(raw: dict[str, Any]) -> None:
    raw = put(raw, "factors", {"method": "feature", "methods": {"*.q_proj": "weight", "*.k_proj": "feature"}})
    [line] = mistakes(put(raw, "space.methods", ["feature", "curvature"]))
    assert line.startswith("space.methods: 'weight' is not in it, but factors.methods.*.q_proj names it")
    assert parse_config(put(raw, "space.methods", ["weight", "feature"])).space.methods == (
        "weight",
        "feature",
    )


def test_workers_learn_the_methods_and_the_choices(raw: dict[str, Any]) -> None:
    assert parse_config(raw).preparation().factors == FactorSpec("curvature")
    patterns = {"*.1.q_proj": "weight", "*.q_proj": "feature"}
    raw = put(put(raw, "factors.methods", patterns), "space.methods", list(METHOD_NAMES))
    spec = parse_config(raw).preparation().factors
    assert spec == FactorSpec("curvature", tuple(patterns.items()), METHOD_NAMES)
    names = ("layers.1.q_proj", "layers.0.q_proj", "layers.1.k_proj")
    assert [spec.method_of(name) for name in names] == ["weight", "feature", "curvature"]


def test_patterns_keep_their_order_in_the_saved_config(raw: dict[str, Any]) -> None:
    """The first that fits decides; sorted by name these would change places."""
    patterns = {"z*": "weight", "a*": "feature", "*": "curvature"}
    saved = parse_config(yaml.safe_load(parse_config(put(raw, "factors.methods", patterns)).to_yaml()))
    assert saved.factor_spec.methods == tuple(patterns.items())
