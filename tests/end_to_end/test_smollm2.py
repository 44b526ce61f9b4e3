"""The quick start's own model and data, reduced in tokens: slow, run by `make test-slow` and CI."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from actors.splits import load_split
from actors.types import PreparationSpec
from search.folder import StudyFolder

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def rankfront(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "search.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smollm2")
    raw = yaml.safe_load((ROOT / "configs" / "smollm2.yaml").read_text())
    raw |= {
        "runs": str(root / "runs"),
        "stop": {"trials": 3},
        "references": {"uniform": [0.9]},
        "seeds": {"spectra": []},
    }
    raw["calibration"] |= {"tokens": 2048}
    raw["scoring"] |= {"tokens": {"search": 512, "test": 512}, "examples": {"search": 4, "test": 4}}
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    rankfront("search", str(config))
    return root / "runs" / "smollm2"


def rows(study: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = parquet.read_table(study / "trials.parquet").to_pylist()
    return found


def search_windows(spec: PreparationSpec, folder: StudyFolder) -> torch.Tensor:
    from actors.models import load_tokenizer

    tokenizer = load_tokenizer(folder.prepared.model_folder, spec.model)
    return load_split(spec, "search", tokenizer, 8192).windows


def plain_nll(model_folder: str, windows: torch.Tensor) -> float:
    """nats/token by transformers' own loss, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [model(w[None], labels=w[None]).loss.item() for w in windows]
    return math.fsum(losses) / len(losses)


def test_the_model_has_its_targets_and_parameters(study: Path):
    folder = StudyFolder.open(study)
    assert len(folder.prepared.targets) == 210
    assert folder.prepared.model_parameters == 134_515_008
    assert {target.block for target in folder.prepared.targets} == set(range(30))


def test_the_dense_trial_is_a_plain_transformers_loop(study: Path):
    folder = StudyFolder.open(study)
    windows = search_windows(folder.config.preparation(), folder)
    dense = rows(study)[0]
    assert dense["origin"] == "dense"
    assert dense["value.nll"] == pytest.approx(plain_nll(folder.prepared.model_folder, windows), rel=1e-5)


def test_compression_costs_and_calibrated_factors_hold(study: Path):
    dense, uniform, *_ = rows(study)
    assert uniform["origin"] == "uniform"
    assert 0.9 < uniform["value.budget.model"] < 0.95
    # Weight-space SVD ends above e^11 here; curvature factors at 90% of the targets stay within 1.5 nats.
    assert 0.05 < uniform["value.nll"] - dense["value.nll"] < 1.5


def test_export_loads_and_scores_as_recorded(study: Path, tmp_path: Path):
    folder = StudyFolder.open(study)
    output = rankfront("export", str(study), "--trial", "1", "--to", str(tmp_path / "model"))
    assert "max abs difference" in output
    script = (
        "import sys, torch, actors.modeling_rankfront\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "windows = torch.load(sys.argv[2], weights_only=True)\n"
        "with torch.inference_mode():\n"
        "    print(sum(model(w[None], labels=w[None]).loss.item() for w in windows) / len(windows))\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "prompt = tokenizer('The capital of France is', return_tensors='pt')\n"
        "print(repr(tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])))\n"
    )
    torch.save(search_windows(folder.config.preparation(), folder), tmp_path / "windows.pt")
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "windows.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    nll, sentence = run.stdout.splitlines()
    assert float(nll) == pytest.approx(rows(study)[1]["value.nll"], rel=1e-5)
    assert len(sentence) > len("'The capital of France is'") + 10


def test_factors_are_built_once(study: Path):
    stores = [p for p in (study.parent / "factors").iterdir() if (p / "manifest.json").exists()]
    assert len(stores) == 1
    built = (stores[0] / "manifest.json").stat().st_mtime_ns
    config = study.parent.parent / "config.yaml"
    rankfront("search", str(config), "--trials", "4")
    assert (stores[0] / "manifest.json").stat().st_mtime_ns == built
    assert json.loads((study / "prepared.json").read_text())["reused"]
    assert len(rows(study)) == 4


def test_the_six_tasks_are_lm_evaluation_harness_own():
    """The benchmark ends with an error where a number differs beyond what it states."""
    script = ROOT / "benchmarks" / "parity.py"
    run = subprocess.run(
        [sys.executable, str(script), "--examples", "4"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for task in ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande"):
        assert f"| {task} |" in run.stdout
