"""`rankfront evaluate`: a model folder or a study, and what either refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from actors.harness_results import HarnessMetric
from actors.types import RankfrontError
from search.cli import app
from search.evaluating import FolderEvaluation, is_model_folder


def evaluate(*arguments: object) -> str:
    """What the command printed.

    Raises:
        RankfrontError: as the command does.
    """
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    if isinstance(result.exception, RankfrontError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_folder_is_measured_on_a_text(llama: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"words": document}) for document in tiny.documents()]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    output = tmp_path / "new" / "out.json"
    evaluate(llama, "--text", tmp_path / "text.jsonl", "--column", "words", "--window", 32, "--tokens", 100,
             "--device", "cpu", "--output", output)  # fmt: skip
    found = json.loads(output.read_text())
    assert found["metrics"] == []
    assert found["text"]["name"] == "text.jsonl@32"
    assert found["text"]["tokens"] == 3 * 31
    assert found["text"]["nll"] == found["text"]["nats"] / 93


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "name --tasks a,b or --text SOURCE"),
        (("--tasks", " , "), "--tasks names no task"),
        pytest.param(  # all of the harness's task files are listed first
            ("--tasks", "no-such-task", "--text", "./nothing.txt"),
            "has no 'no-such-task'",
            marks=pytest.mark.slow,
        ),
        (("--trial", "3"), "--trial, --variant and --budget choose from a study"),
        (("--text", "./nothing.txt", "--window", "32"), "no file or folder"),
        (("--text", "./nothing.txt"), "--window 512: the model reads 256 tokens"),
        (("--text", "./nothing.txt", "--limit", "3"), "--limit: only with --tasks"),
        (("--tasks", "a", "--tokens", "99", "--column", "text"), "--column and --tokens: only with --text"),
    ],
)
def test_a_folder_refuses(llama: Path, arguments: tuple[str, ...], reason: str) -> None:
    with pytest.raises(RankfrontError, match=reason):
        evaluate(llama, *arguments)


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:7", "meta"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    device: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    monkeypatch.setattr("actors.harness.whole_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(RankfrontError, match=rf"^--device {device}: .* finds no such .*; one of auto, cpu$"):
        evaluate(llama, "--text", "./nothing.txt", "--device", device)


@pytest.mark.parametrize(
    ("asked", "step"),
    [
        ("--text", "torch.nn.Module.to"),
        ("--text", "transformers.LlamaModel.forward"),
        ("--tasks", "transformers.LlamaModel.forward"),
    ],
)
def test_a_device_without_room_is_said(
    asked: str, step: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the model itself, or for what either measurement takes."""

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    (tmp_path / "text.txt").write_text("\n\n".join(tiny.documents()))
    arguments = {
        "--text": (tmp_path / "text.txt", "--window", 32, "--tokens", 100),
        "--tasks": ("tiny_piqa", "--include-path", tiny.tiny_harness_task(tmp_path, 2)),
    }
    monkeypatch.setattr(step, full)
    with pytest.raises(RankfrontError, match=r"^--device cpu: out of memory, .*; --device cpu needs none"):
        evaluate(llama, asked, *arguments[asked], "--device", "cpu")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("there", "a folder; name the JSON file to write"),
        ("there/file.txt/out.json", "cannot be written: "),
        ("/proc/out.json", "cannot be written: "),  # takes a file of nobody
        ("/proc/new/out.json", "cannot be written: "),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    name: str, reason: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.cli_evaluate.evaluate_folder", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file.txt").touch()
    with pytest.raises(RankfrontError, match=f"^--output {tmp_path / name}: {reason}"):
        evaluate(llama, "--text", "./nothing.txt", "--output", tmp_path / name)
    assert [file.name for file in tmp_path.rglob("*")] == ["there", "file.txt"]


def test_a_study_refuses_what_is_for_folders(tmp_path: Path) -> None:
    for name, value in {"text": "mine.txt", "device": "auto", "window": 512, "output": "o.json"}.items():
        with pytest.raises(RankfrontError, match=rf"--{name}: for a model folder, and {tmp_path} is none"):
            evaluate(tmp_path, f"--{name}", value, "--tasks", "a")
    with pytest.raises(RankfrontError, match="--limit and --batch-size: only with --tasks"):
        evaluate(tmp_path, "--limit", 3, "--batch-size", 1)
    with pytest.raises(RankfrontError, match="holds no study"):
        evaluate("unknown", "--runs", tmp_path)


def test_a_study_with_a_config_is_no_model_folder(llama: Path, tmp_path: Path) -> None:
    assert is_model_folder(llama)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "prepared.json").write_text("{}")
    assert not is_model_folder(tmp_path)


def test_the_table_has_values_and_errors(tmp_path: Path) -> None:
    metrics = (
        HarnessMetric("t", "acc", "none", 0.5, 0.25, 4),
        HarnessMetric("t", "f1", "none", 1.0, None, None),
    )
    (table,) = FolderEvaluation(tmp_path, metrics, {}, None).tables()
    assert table.cells.rows == (("t", "acc", "none", "0.5000±0.2500", "4"), ("t", "f1", "none", "1.0000", ""))
