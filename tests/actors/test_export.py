"""Exported folders: loaded by a stranger's Python they are the searched model, and hold what was counted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from exported_models import Case, make_case
from safetensors import safe_open
from strangers import ask_stranger
from transformers import AutoModelForCausalLM

import actors.export
from actors.modeling_rankfront import FactoredLinear, PivotedLinear, RankfrontForCausalLM
from actors.models import load_model, load_tokenizer, same_tokenizers
from actors.types import Allocation, RankfrontError

# What another Python does, see `ask_stranger`.
STRANGER = """
import numpy
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
for name, folder in job["folders"].items():
    refused = []
    for loader in (AutoConfig, AutoModel, AutoModelForCausalLM):
        try:
            loader.from_pretrained(folder, trust_remote_code=False)
            refused.append("loaded")
        except ValueError as error:
            refused.append(str(error))
    answers[name] = {"refused": refused}
for name, folder in job["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(job["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        numpy.save(f"{job['out']}/{name}.npy", model(ids).logits.numpy())
        written = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        unasked = model.generate(ids)
    answers[name] |= {
        "ids": ids[0].tolist(),
        "generated": written[0].tolist(),
        "unasked": unasked[0].tolist(),
        "module": type(model).__module__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype),
        "known": sorted(n for n in sys.modules if n.split(".")[0] in ("actors", "search")),
    }
print(json.dumps(answers))
"""
PROMPT = tiny.documents()[7][:120]
MODULES = {"dense": torch.nn.Linear, "factored": FactoredLinear, "pivoted": PivotedLinear}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    biases = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    return {
        "tied": make_case(tmp_path_factory.mktemp("tied"), "llama", "pivoted", "mean"),
        "biased": make_case(tmp_path_factory.mktemp("biased"), "llama", "factored", "none", **biases),
        "gpt2": make_case(
            tmp_path_factory.mktemp("gpt2"), "gpt2", "auto", "mean", seed=1, initializer_range=1.0
        ),
    }


@pytest.fixture(scope="module")
def stranger(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What another Python says of all exported folders, and where it left their logits."""
    place = tmp_path_factory.mktemp("stranger")
    job = {
        "folders": {name: str(case.folder) for name, case in cases.items()},
        "out": str(place),
        "prompt": PROMPT,
    }
    return ask_stranger(STRANGER, job, place), place


NAMES = pytest.mark.parametrize("name", ["tied", "biased", "gpt2"])


@NAMES
def test_whoever_may_read_the_folder_may_read_its_files(name: str, cases: dict[str, Case]) -> None:
    folder = cases[name].folder
    readable = folder.stat().st_mode & 0o444
    assert readable & 0o044  # else safetensors' own 0600 would do
    assert {file.name: file.stat().st_mode & 0o666 for file in folder.iterdir()} == {
        file.name: readable | 0o200 for file in folder.iterdir()
    }


@NAMES
def test_a_stranger_gets_the_searched_models_logits(
    name: str, cases: dict[str, Case], stranger: tuple[dict[str, Any], Path]
) -> None:
    answers, place = stranger
    assert answers[name]["known"] == []
    assert answers[name]["module"].startswith("transformers_modules.")
    assert answers[name]["dtype"] == "torch.float32"
    with torch.inference_mode():
        expected = cases[name].searched()(torch.tensor([answers[name]["ids"]])).logits.numpy()
        dense = load_model(cases[name].prepared.model_folder, cases[name].config.preparation().model)
        apart = dense(torch.tensor([answers[name]["ids"]])).logits.numpy()
    found = np.load(place / f"{name}.npy")
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(apart - expected).max() > 0.1 * np.abs(expected).max()


@NAMES
def test_a_stranger_generates_what_the_searched_model_does(
    name: str, cases: dict[str, Case], stranger: tuple[dict[str, Any], Path]
) -> None:
    answer = stranger[0][name]
    ids = torch.tensor([answer["ids"]])
    expected = cases[name].searched().generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert answer["generated"] == expected[0].tolist()
    assert len({*answer["generated"][len(answer["ids"]) :]}) > 3  # no stuck repetition of one token


@NAMES
def test_the_models_own_generation_settings_travel(name: str, stranger: tuple[dict[str, Any], Path]) -> None:
    answer = stranger[0][name]
    assert answer["unasked"] == answer["generated"][: len(answer["ids"]) + 9]


@NAMES
def test_a_loader_that_knows_nothing_of_it_fails(name: str, stranger: tuple[dict[str, Any], Path]) -> None:
    """Opened as the base model it would be half random; it must not open."""
    refused = stranger[0][name]["refused"]
    assert len(refused) == 3
    assert all("trust_remote_code" in answer for answer in refused)


@NAMES
def test_parameters_are_those_the_search_counted(
    name: str, cases: dict[str, Case], stranger: tuple[dict[str, Any], Path]
) -> None:
    case = cases[name]
    linear = case.cost.linear(case.allocation)
    counted = case.prepared.model_parameters - case.cost.linear_parameters + linear
    assert stranger[0][name]["parameters"] == counted
    share = case.cost.budgets(case.allocation)["budget.model"]
    assert case.lines[0] == f"parameters: {counted:,} stored, {share:.4f} of the dense model's"


@NAMES
def test_rankfront_reloads_its_own(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    loaded = AutoModelForCausalLM.from_pretrained(case.folder).eval()
    assert isinstance(loaded, RankfrontForCausalLM)
    probe = torch.arange(40)[None]
    with torch.inference_mode():
        expected, found = case.searched()(probe).logits, loaded(probe).logits
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (
        name != "biased"
    )
    layers = {name: type(loaded.base.get_submodule(name)) for name, _ in case.allocation}
    searched = load_model(case.prepared.model_folder, case.config.preparation().model)
    untouched = {name: type(searched.get_submodule(name)) for name, _ in case.allocation}
    assert layers == {
        target.name: MODULES[case.cost.form(target, rank)] if rank else untouched[target.name]
        for target, (_, rank) in zip(case.prepared.targets, case.allocation, strict=True)
    }
    if name == "gpt2":  # auto, and ranks from one to full: every form occurs, and Conv1D where left alone
        assert len(set(layers.values())) == 4


@NAMES
def test_the_files_hold_the_bytes_that_the_search_counted(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    found = 0
    with safe_open(case.folder / "model.safetensors", framework="np") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            found += file.get_tensor(key).nbytes
    assert found == case.cost.model_bytes(case.allocation)
    share = case.cost.budgets(case.allocation)["budget.bytes"]
    assert case.lines[1] == f"bytes: {found:,} stored, {share:.4f} of the dense model's"


@NAMES
def test_the_largest_coefficient_is_said(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    largest, count = 0.0, {"dense": 0, "factored": 0, "pivoted": 0}
    for target, (_, rank) in zip(case.prepared.targets, case.allocation, strict=True):
        if rank is not None:
            count[case.cost.form(target, rank)] += 1
    with safe_open(case.folder / "model.safetensors", framework="np") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            if key.endswith(".coefficients"):
                largest = max(largest, np.abs(file.get_tensor(key)).max(initial=0))
    forms = ", ".join(f"{number} {form}" for form, number in count.items() if number)
    coefficient = f"; largest coefficient {largest:.2f}" if count["pivoted"] else ""
    assert case.lines[2] == f"compressed targets: {forms}{coefficient}"
    assert (largest > 0) == (name != "biased")


@NAMES
def test_the_folder_holds_what_it_should_and_no_pickle(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    assert {file.name for file in case.folder.rglob("*")} == {
        "README.md",
        "check.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_rankfront.py",
        "ranks.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [file.name for file in case.folder.parent.iterdir()] == [case.folder.name]
    ranks = yaml.safe_load((case.folder / "ranks.yaml").read_text())
    expected = {"study": "tiny", "trial": 3, "storage": case.storage, "ranks": case.allocation.to_dict()}
    assert ranks == expected
    assert Allocation.of(ranks["ranks"], case.prepared.targets) == case.allocation


@NAMES
def test_the_checks_say_the_scores_that_were_recorded(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    nll = case.score.text.nll
    assert any(f"{nll:.6f} recorded" in line for line in case.lines)
    reloaded = re.search(r"nll on the search split: ([\d.]+) reloaded", "\n".join(case.lines))
    assert reloaded is not None
    assert float(reloaded[1]) == pytest.approx(nll, abs=2e-6)


def test_an_export_asks_no_question_of_a_task(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compares the text's loss: the answers to tasks would be thrown away."""
    case = cases["tied"]
    assert case.score.tasks
    monkeypatch.setattr("actors.scoring.score_task", lambda *_: pytest.fail("a task was scored"))
    assert case.export(tmp_path / "new") == case.lines


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the export is checked there")
def test_an_export_is_checked_on_the_device_that_is_named(cases: dict[str, Case], tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    cases["tied"].export(tmp_path / "cpu", device="cpu")
    assert torch.cuda.max_memory_allocated() == before
    cases["tied"].export(tmp_path / "cuda", device="cuda")
    assert torch.cuda.max_memory_allocated() > before


def test_a_folder_makes_the_models_tokens_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it is refused; beside dense weights the type of the model says all, and files stay as they are."""
    case = make_case(tmp_path, "olmo2", "auto", "none", hub=True)
    source = case.config.preparation().model
    folders = (case.prepared.model_folder, case.folder)
    assert same_tokenizers(*(load_tokenizer(folder, source) for folder in folders))
    case.export(tmp_path / "dense", form="dense")
    own, dense = (Path(folder) / "tokenizer_config.json" for folder in (folders[0], tmp_path / "dense"))
    assert dense.read_bytes() == own.read_bytes()
    monkeypatch.setattr(actors.export, "name_tokenizer", lambda folder, tokenizer: None)
    with pytest.raises(
        RankfrontError, match=r"the folder's tokenizer, .*\(GPT2Tokenizer\), is not the model's"
    ):
        case.export(tmp_path / "unnamed")
    assert not (tmp_path / "unnamed").exists()
