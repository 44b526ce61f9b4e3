"""Mistakes in a config: all listed at once, each with its path, its value and what would be right."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.types import METHOD_NAMES, FactorSpec, RankfrontError
from search.config import Config, ConfigError, load_config, parse_config
from search.constraints import Constraint
from search.records import Objective


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A right config whose sources are local."""
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text(
        "\n".join(f"{n} lines of some forty characters of text" for n in range(200))
    )
    return {
        "study": "made-up",
        "runs": str(tmp_path / "runs"),
        "model": {"source": str(tmp_path / "model")},
        "text": {"source": str(tmp_path / "text.txt")},
        "calibration": {"window": 32},
        "scoring": {"window": 32, "tasks": ["arc_easy", "boolq"]},
    }


C4 = {"name": "c4", "source": "allenai/c4"}
OWN = {"name": "mine", "format": "choices", "source": "/tmp"}


def put(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `raw` with the dotted `key` set."""
    changed = copy.deepcopy(raw)
    *parents, last = key.split(".")
    section = changed
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return changed


def mistakes(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert all(line in str(caught.value) for line in caught.value.mistakes)
    return caught.value.mistakes


def test_the_right_config_is_right(raw: dict[str, Any]) -> None:
    assert parse_config(raw).study == "made-up"


@pytest.mark.parametrize(
    ("key", "value", "path", "says"),
    [
        ("bogus", 1, "bogus", ["unknown key", "objectives"]),
        ("scoring.windw", 1, "scoring.windw", ["unknown key", "window"]),
        ("scoring.tokens", {"search": 1, "test": 1, "x": 1}, "scoring.tokens.x", ["unknown key", "test"]),
        ("objectives", ["budget.model", "perplexity"], "objectives[1]", ["'perplexity'", "nll"]),
        ("objectives", ["budget.model", "nll", "nll"], "objectives[2]", ["'nll'", "twice"]),
        ("objectives", ["nll", "reasoning.acc"], "objectives", ["budget.linear", "budget.bytes"]),
        ("objectives", ["budget.model"], "objectives", ["at least 2"]),
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
        ("constraints", ["perplexity"], "constraints", ["['perplexity']", "dictionary"]),
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
        ("sampler.name", "gp", "sampler.name", ["'gp'", "at most 20", "space.group: target", "exchange"]),
        ("factors.method", "svd", "factors.method", ["'svd'", "weight, feature, curvature"]),
        ("factors.methods", {"*.q_proj": "svd"}, "factors.methods.*.q_proj", ["'svd'", "curvature"]),
        ("factors.methods", ["feature"], "factors.methods", ["['feature']", "dictionary"]),
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
    [line] = mistakes(put(curves, "sampler.name", "exchange"))
    assert line.startswith("sampler.name: 'exchange' moves parameters between levels of targets")


def test_a_reasoning_objective_needs_tasks(raw: dict[str, Any]) -> None:
    raw = put(put(raw, "scoring.tasks", []), "objectives", ["budget.model", "reasoning.acc"])
    [line] = mistakes(raw)
    assert line.startswith("objectives[1]: 'reasoning.acc' needs scoring.tasks")


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
        "sampler": {"name": "cmaes"},
        "stop": {"trials": None},
        "calibration": {"window": 5_000},
    }
    found = mistakes(raw)
    expected = [
        "bogus:", "constraints.perplexity:", "constraints.kl:", "constraints.bytes:", "model.source:",
        "model.dtype:", "scoring.windw:", "scoring.tasks[1].name:",
        "scoring.search_fraction:", "objectives[0]:", "objectives[2]:", "objectives:", "space.floor:",
        "space.segments:", "space.levels:", "references.uniform[1]:", "references.uniform[2]:",
        "sampler.name:", "stop:", "calibration.window:", "factors.method:", "factors.methods.*.k_proj:",
        "factors.bias:", "space.methods[1]:", "space.methods:",
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


REFUSE_RAY = """
import ray
def refuse(*arguments, **more):
    print("RAY WAS STARTED")
    raise SystemExit(99)
ray.init = refuse
from search.cli import main
main()
"""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REFUSE_RAY, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_command_starts_nothing_with_a_wrong_config(raw: dict[str, Any], tmp_path: Path) -> None:
    wrong = put(put(raw, "bogus", 1), "space.floor", 7)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(wrong))
    before = sorted(tmp_path.rglob("*"))
    done = command(tmp_path, "search", "bad.yaml")
    assert done.returncode == 2
    assert "2 mistakes, nothing was started" in done.stderr
    assert "bogus: unknown key" in done.stderr
    assert "space.floor: 7" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "RAY WAS STARTED" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["study: [", "- a list", "", "\x00"])
def test_a_file_that_is_no_config_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml: 1 mistake, nothing was started"):
        load_config(path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_the_saved_config_is_the_config(raw: dict[str, Any]) -> None:
    raw |= {"objectives": ["budget.linear", "reasoning.acc", "nll"], "stop": {"plateau": {"trials": 9}}}
    config = parse_config(raw)
    saved = yaml.safe_load(config.to_yaml())
    assert parse_config(saved) == config
    assert saved["stop"] == {
        "trials": 200,
        "tokens": None,
        "hours": None,
        "plateau": {"trials": 9, "tolerance": 0.001},
    }
    assert set(saved) == set(Config.model_fields), "defaults are saved too: they may change"


def test_local_sources_are_saved_as_absolute_paths(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """So that the study can be resumed from another folder."""
    monkeypatch.chdir(tmp_path)
    config = parse_config(put(raw, "model.source", "./model"))
    assert config.model.source == str(tmp_path / "model")


def test_overrides_change_nested_keys_and_create_sections(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    overrides = {"scoring.tokens": {"search": 64, "test": 96}, "stop.plateau.trials": 7, "study": "other"}
    config = load_config(path, overrides)
    assert (config.scoring.tokens.search, config.scoring.tokens.test) == (64, 96)
    assert config.stop.plateau is not None
    assert config.stop.plateau.trials == 7
    assert config.study == "other"
    assert config.scoring.window == 32, "the rest of the section stays"


def test_an_override_below_a_value_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(RankfrontError, match="study"):
        load_config(path, {"study.name": "x"})


def test_objectives_know_their_direction(raw: dict[str, Any]) -> None:
    names = ["budget.linear", "nll", "reasoning.arc_easy.acc_norm"]
    assert parse_config(put(raw, "objectives", names)).named_objectives == (
        Objective("budget.linear", minimize=True),
        Objective("nll", minimize=True),
        Objective("reasoning.arc_easy.acc_norm", minimize=False),
    )


def test_a_corpus_can_be_an_objective_and_has_the_caps_of_the_text_unless_its_own(
    raw: dict[str, Any],
) -> None:
    own = {"name": "mine", "source": "org/mine", "join": " ", "tokens": {"search": 64, "test": 96}}
    raw = put(put(raw, "scoring.corpora", [C4, own]), "objectives", ["budget.model", "nll.mine"])
    config = parse_config(raw)
    assert config.named_objectives[1] == Objective("nll.mine", minimize=True)
    c4, mine = config.preparation().scoring.corpora
    assert (c4.name, c4.text.source, c4.tokens) == ("c4", "allenai/c4", {"search": 8_192, "test": 32_768})
    assert (mine.text.join, mine.tokens) == (" ", {"search": 64, "test": 96})


@pytest.mark.parametrize("key", ["text", "calibration.text"])
def test_a_corpus_that_is_read_already_is_refused(raw: dict[str, Any], tmp_path: Path, key: str) -> None:
    """The factors are fitted on the calibration text; joined otherwise it is the same text."""
    (tmp_path / "own.txt").write_text("a text of its own, long enough for one window of tokens\n" * 9)
    raw = put(raw, "calibration.text", {"source": str(tmp_path / "own.txt")})
    source = raw["text"]["source"] if key == "text" else str(tmp_path / "own.txt")
    [line] = mistakes(put(raw, "scoring.corpora", [{"name": "it", "source": source, "join": " "}]))
    assert line.startswith(f"scoring.corpora[0]: is the text of {key};")


def test_a_corpus_too_short_or_without_its_column_is_named(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("few words\n" * 5)
    short = {"name": "short", "source": str(tmp_path / "short.txt")}
    [line] = mistakes(put(raw, "scoring.corpora", [short]))
    assert line.startswith("scoring.corpora[0]: text too short: its search part has 9 characters")
    [line] = mistakes(put(raw, "scoring.corpora", [C4, {**short, "column": "passage"}]))
    assert line.startswith("scoring.corpora[1]: ")
    assert "no column 'passage'; there are text" in line


def test_a_task_of_ones_own_can_be_an_objective(raw: dict[str, Any]) -> None:
    names = ["budget.model", "reasoning.mine.acc_norm", "reasoning.mine.margin"]
    config = parse_config(put(put(raw, "scoring.tasks", [OWN, "boolq"]), "objectives", names))
    [own, boolq] = config.preparation().scoring.tasks
    assert (own.name, own.source, own.split, own.format) == ("mine", "/tmp", None, "choices")
    assert boolq.format is None


def test_bias_sets_are_read_from_the_hub_or_from_elsewhere(raw: dict[str, Any], tmp_path: Path) -> None:
    own = {"name": "crows_pairs", "source": str(tmp_path / "text.txt")}
    crows, stereoset = parse_config(put(raw, "scoring.bias", [own, "stereoset"])).preparation().scoring.bias
    assert (crows.source, crows.subset, crows.split) == (own["source"], None, None)
    assert stereoset.source == "McGill-NLP/stereoset"
    assert (stereoset.subset, stereoset.split) == ("intrasentence", "validation")


def test_a_task_of_its_own_source_keeps_the_split_it_names(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    tasks = [{"name": "piqa", "source": str(tmp_path / "piqa")}, {"name": "arc_easy", "split": "test"}]
    own, hub = parse_config(put(raw, "scoring.tasks", tasks)).preparation().scoring.tasks
    assert (own.source, own.subset, own.split) == (str(tmp_path / "piqa"), None, None)
    assert (hub.source, hub.subset, hub.split) == ("allenai/ai2_arc", "ARC-Easy", "test")


def test_a_model_and_factors_may_be_named_by_url(raw: dict[str, Any]) -> None:
    cache = {"factors": "file:///mnt/factors", "node": "/scratch/rankfront"}
    config = parse_config(put(raw, "model.source", "file:///mnt/model") | {"cache": cache})
    spec = config.preparation()
    assert (spec.model.source, spec.shared) == ("file:///mnt/model", "file:///mnt/factors")
    assert spec.node_cache == "/scratch/rankfront"
    assert config.builders == 1, "several would write into one folder"
    assert parse_config(raw).builders == "auto"


def test_a_shared_folder_of_factors_is_used_in_place(raw: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_config(put(raw, "cache.factors", str(tmp_path / "shared"))).preparation()
    assert (spec.cache, spec.shared) == (str(tmp_path / "shared"), None)
    spec = parse_config(raw).preparation()
    assert (spec.cache, spec.shared) == (str(tmp_path / "runs" / "factors"), None)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "model.source",
            "nosuch://a/b",
            "model.source: 'nosuch://a/b' cannot be read here: Protocol not known",
        ),
        ("cache.factors", "nosuch://a/b", "cache.factors: 'nosuch://a/b' cannot be read here"),
        ("cache.factors", "ftp://me:secret@host/x", "cache.factors: 'ftp://host/x' came with a password"),
        ("text.source", "file:///x/text.txt", "text.source: 'file:///x/text.txt' is no source"),
        ("cache.node", "", "cache.node: '' is no absolute path"),
        ("cache.node", "./cache", "cache.node: './cache' is no absolute path"),
    ],
)
def test_urls_that_cannot_be_used_are_mistakes(raw: dict[str, Any], key: str, value: str, said: str) -> None:
    [found] = mistakes(put(raw, key, value))
    assert found.startswith(said)
    assert "secret" not in found


def test_several_builders_need_a_folder(raw: dict[str, Any]) -> None:
    raw = put(put(raw, "cache.factors", "file:///mnt/factors"), "calibration.builders", 4)
    assert mistakes(raw) == [
        "calibration.builders: 4 write into one folder, and cache.factors is a URL; 1 or auto, or a folder "
        "that all nodes share"
    ]
