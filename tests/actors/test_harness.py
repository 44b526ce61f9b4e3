"""Folders measured by lm-evaluation-harness and rankfront, against the harness's command and a plain loop."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import yaml
from exported_models import Case, make_case
from lm_eval.__main__ import cli_evaluate
from transformers import AutoModelForCausalLM

from actors.harness import Harness, LoadedFolder, _refuse_non_finite
from actors.harness_results import HarnessMetric, HarnessSpec, metrics_of, task_fingerprints
from actors.reasoning import pack, score_task
from actors.tasks import TASKS
from actors.types import RankfrontError, ScoringError, TextSource

COUNT = 6


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("harness"), "llama", "auto", "mean")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_harness_task(tmp_path_factory.mktemp("tasks"), COUNT)


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
    found = LoadedFolder(case.folder, "cpu").harness(Harness(HarnessSpec(("tiny_piqa",), None, 3, mine)))
    metrics = {metric.metric: metric for metric in metrics_of(found)}
    assert metrics.keys() == {"acc", "acc_norm"}
    for name, metric in metrics.items():
        assert metric.value == expected[f"{name},none"]
        assert metric.stderr == pytest.approx(expected[f"{name}_stderr,none"])
        assert metric.examples == COUNT


def test_a_limit_is_kept_to_and_accuracies_are_ours(case: Case, mine: Path) -> None:
    loaded = LoadedFolder(case.folder, "cpu")
    found = metrics_of(loaded.harness(Harness(HarnessSpec(("tiny_piqa",), 4, 1, mine))))
    examples = [TASKS["piqa"].ask(row) for row in tiny.piqa_rows(COUNT)][:4]
    score = score_task(loaded.model, pack("piqa", True, examples, loaded.tokenizer))
    assert [(m.metric, m.value, m.examples) for m in found] == [
        ("acc", score.acc, 4),
        ("acc_norm", score.acc_norm, 4),
    ]


@pytest.mark.slow  # all of the harness's task files are listed before a name is unknown
def test_an_unknown_task_is_named(mine: Path) -> None:
    with pytest.raises(RankfrontError, match="has no 'tiny_piqb'; tasks of your own are YAML files"):
        Harness(HarnessSpec(("tiny_piqa", "tiny_piqb"), None, 1, mine))


@pytest.fixture
def own(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task and groups; `mine` is in the place of the harness's own tasks, which are many."""
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(mine / "manager.py"))
    folder = tmp_path / "own"
    folder.mkdir()
    task = yaml.safe_load((mine / "tiny_piqa.yaml").read_text()) | {"task": "tiny_own", "tag": "tagged"}
    groups = {"theirs": ["tiny_piqa", "tiny_own"], "ours": ["tiny_own"]}
    files = [task, *({"group": name, "task": tasks} for name, tasks in groups.items())]
    for index, content in enumerate(files):
        (folder / f"{index}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (("theirs",), {"tiny_piqa", "tiny_own"}),
        (("tiny_*",), {"tiny_piqa", "tiny_own"}),
        (("tiny_own", "tiny_p*"), {"tiny_piqa", "tiny_own"}),
        (("ours",), {"tiny_own"}),
        (("tagged",), {"tiny_own"}),
    ],
)
def test_a_folder_adds_to_the_harness_s_own_tasks(
    asked: tuple[str, ...], answered: set[str], case: Case, own: Path
) -> None:
    """Its groups name them, and a pattern matches both."""
    found = LoadedFolder(case.folder, "cpu").harness(Harness(HarnessSpec(asked, 1, 1, own)))
    assert {metric.task for metric in metrics_of(found)} == answered


def test_a_task_of_the_folder_does_without_listing_the_harness_s_own(own: Path) -> None:
    harness = Harness(HarnessSpec(("tiny_own",), None, 1, own))
    assert harness._manager.all_subtasks == ["tiny_own"]


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
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.documents()))
    plain = loaded.perplexity(TextSource(str(tmp_path / "text.txt")), 32, 200, 64)
    assert (plain.name, plain.windows) == ("text.txt@32", score.windows)


def test_without_the_harness_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RankfrontError, match=r"in the project's folder, pip install -e '\.\[eval\]'"):
        Harness(HarnessSpec(("arc_easy",), None, 1, None))


def test_a_logit_that_is_no_number_is_no_answer(case: Case, mine: Path) -> None:
    """The harness itself would call the first choice the most likely one."""
    loaded = LoadedFolder(case.folder, "cpu")
    loaded.model.get_output_embeddings().weight.data[7, 3] = math.nan
    with pytest.raises(ScoringError, match="a logit is not finite"):
        loaded.harness(Harness(HarnessSpec(("tiny_piqa",), 2, 1, mine)))


def test_no_position_of_an_answer_may_be_no_number(case: Case, mine: Path) -> None:
    """Not only the last one, whose logits are those of a row's last token alone."""
    loaded = LoadedFolder(case.folder, "cpu")

    def poison(model: Any, inputs: Any, output: Any) -> None:
        output.logits[-1, -2, 5] = math.nan

    loaded.model.base.register_forward_hook(poison)
    with pytest.raises(ScoringError, match="a logit is not finite"):
        loaded.harness(Harness(HarnessSpec(("tiny_piqa",), 2, 1, mine)))


MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("mask", "at", "kept", "sound"),
    [
        (MASK, (0, 1), 5, True),
        (MASK, (0, 2), 5, False),
        (MASK, (1, 0), 5, False),
        (MASK, (0, 2), 2, True),
        (MASK, (0, 3), 2, False),
        (None, (0, 0), 5, False),
        (MASK[:, None, None].bool(), (0, 0), 5, True),
        (MASK[:, None, None].bool(), (0, 4), 5, False),
        ({"full_attention": None}, (1, 4), 5, False),
    ],
)
def test_a_position_that_the_mask_leaves_out_may_come_to_anything(
    mask: Any, at: tuple[int, int], kept: int, sound: bool
) -> None:
    """Of rows padded on the left, of whose logits the model may keep the last ones alone."""
    logits = torch.zeros(2, 5, 7)
    logits[*at, 3] = math.inf
    output = SimpleNamespace(logits=logits[:, -kept:])
    with contextlib.nullcontext() if sound else pytest.raises(ScoringError, match="not finite"):
        _refuse_non_finite(None, (), {"attention_mask": mask}, output)


def test_what_is_generated_is_watched_too(case: Case, mine: Path, tmp_path: Path) -> None:
    """From rows of unlike length; an export has the model inside it generate."""
    task = yaml.safe_load((mine / "tiny_piqa.yaml").read_text())
    del task["doc_to_choice"]
    task |= {"task": "tiny_continued", "output_type": "generate_until", "doc_to_target": "{{sol1}}"}
    task |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    task |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 4}}
    (tmp_path / "tiny_continued.yaml").write_text(yaml.safe_dump(task))
    harness = Harness(HarnessSpec(("tiny_continued",), 4, 4, tmp_path))
    loaded = LoadedFolder(case.folder, "cpu")
    assert [metric.metric for metric in metrics_of(loaded.harness(harness))] == ["exact_match"]
    loaded.model.get_output_embeddings().weight.data[7, 3] = math.nan
    with pytest.raises(ScoringError, match="a logit is not finite"):
        loaded.harness(harness)


def test_a_question_is_known_by_what_is_asked(mine: Path, tmp_path: Path) -> None:
    """Tasks, limit and the task files decide; the batch and where the folder is do not."""
    shutil.copytree(mine, tmp_path / "copy")
    spec = HarnessSpec(("a", "b"), 4, 1, mine)
    known = task_fingerprints(spec)
    assert len({*known.values()}) == 2
    assert task_fingerprints(HarnessSpec(("b", "a"), 4, 8, tmp_path / "copy")) == known
    assert task_fingerprints(HarnessSpec(("a",), 5, 1, mine))["a"] != known["a"]
    assert task_fingerprints(HarnessSpec(("a",), 4, 1, None))["a"] != known["a"]
    with (tmp_path / "copy" / "tiny_piqa.yaml").open("a") as stream:
        stream.write("num_fewshot: 1\n")
    assert task_fingerprints(HarnessSpec(("a",), 4, 1, tmp_path / "copy"))["a"] != known["a"]
    with pytest.raises(RankfrontError, match=r"--include-path .*nothing: no such folder"):
        task_fingerprints(HarnessSpec(("a",), 4, 1, tmp_path / "nothing"))


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RankfrontError, match=f"{tmp_path}: cannot be loaded as a model"):
        LoadedFolder(tmp_path, "cpu")


def test_errors_that_the_harness_cannot_tell_are_none() -> None:
    results: dict[str, Any] = {
        "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,strict": 1}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
    }
    assert metrics_of(results) == [
        HarnessMetric("t", "acc", "none", 0.5, None, 4),
        HarnessMetric("t", "f1", "strict", 1.0, None, 4),
    ]
