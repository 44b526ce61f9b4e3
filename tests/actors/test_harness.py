"""Folders measured by lm-evaluation-harness and rankfront, against the harness's command and a plain loop."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from exported_models import Case, make_case
from lm_eval.__main__ import cli_evaluate
from transformers import AutoModelForCausalLM

from actors.harness import HarnessMetric, LoadedFolder, metrics_of
from actors.reasoning import pack, score_task
from actors.tasks import TASKS
from actors.types import RankfrontError, TextSource

COUNT = 6


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("harness"), "llama", "auto", "mean")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one task of one's own, its questions beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = folder / "questions.json"
    questions.write_text("\n".join(json.dumps(row) for row in tiny.piqa_rows(COUNT)))
    task = {
        "task": "tiny_piqa",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(questions)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    (folder / "tiny_piqa.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.mark.slow  # the command lists all of the harness's task files
def test_the_harness_finds_what_its_own_command_finds(
    case: Case, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lm_eval --model hf` on the exported folder, and the same task by `LoadedFolder`."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = f"--model hf --model_args pretrained={case.folder},trust_remote_code=True --device cpu"
    paths = f"--tasks tiny_piqa --include_path {mine} --output_path {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments.split(), *paths.split()])
    cli_evaluate()
    (written,) = (tmp_path / "out").rglob("results_*.json")
    expected = json.loads(written.read_text())["results"]["tiny_piqa"]
    found = LoadedFolder(case.folder, "cpu").harness(["tiny_piqa"], include_path=mine, batch_size=3)
    metrics = {metric.metric: metric for metric in metrics_of(found)}
    assert metrics.keys() == {"acc", "acc_norm"}
    for name, metric in metrics.items():
        assert metric.value == expected[f"{name},none"]
        assert metric.stderr == pytest.approx(expected[f"{name}_stderr,none"])
        assert metric.examples == COUNT


def test_a_limit_is_kept_to_and_accuracies_are_ours(case: Case, mine: Path) -> None:
    loaded = LoadedFolder(case.folder, "cpu")
    found = metrics_of(loaded.harness(["tiny_piqa"], include_path=mine, limit=4))
    examples = [TASKS["piqa"].ask(row) for row in tiny.piqa_rows(COUNT)][:4]
    score = score_task(loaded.model, pack("piqa", True, examples, loaded.tokenizer))
    assert [(m.metric, m.value, m.examples) for m in found] == [
        ("acc", score.acc, 4),
        ("acc_norm", score.acc_norm, 4),
    ]


@pytest.mark.slow  # all of the harness's task files are listed before a name is unknown
def test_an_unknown_task_is_named(case: Case, mine: Path) -> None:
    loaded = LoadedFolder(case.folder, "cpu")
    with pytest.raises(RankfrontError, match="has no 'tiny_piqb'; tasks of your own are YAML files"):
        loaded.harness(["tiny_piqa", "tiny_piqb"], include_path=mine)


def test_perplexity_is_a_plain_loops(case: Case, tmp_path: Path) -> None:
    rows = [json.dumps({"text": document}) for document in tiny.documents()]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    loaded = LoadedFolder(case.folder, "cpu")
    score = loaded.perplexity(TextSource(str(tmp_path / "text.jsonl")), 32, 200, 64)
    ids = loaded.tokenizer("\n\n".join(tiny.documents()), add_special_tokens=False)["input_ids"][:192]
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.item() for w in torch.tensor(ids).view(6, 32)]
    assert score.tokens == 6 * 31
    assert score.perplexity == pytest.approx(math.exp(math.fsum(losses) / 6), rel=1e-5)


def test_without_the_harness_it_is_said_how_to_get_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RankfrontError, match=r"pip install 'rankfront\[eval\]'"):
        LoadedFolder(case.folder, "cpu").harness(["arc_easy"])


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RankfrontError, match=f"{tmp_path}: cannot be loaded as a model"):
        LoadedFolder(tmp_path)


def test_errors_that_the_harness_cannot_tell_are_none() -> None:
    results: dict[str, Any] = {
        "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,strict": 1}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
    }
    assert metrics_of(results) == [
        HarnessMetric("t", "acc", "none", 0.5, None, 4),
        HarnessMetric("t", "f1", "strict", 1.0, None, 4),
    ]
