"""Exports: loaded by a stranger's Python, they are the searched model; failures leave nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from actors import export as exporting
from actors.export import export, low_rank_model
from actors.factors import FactorStore
from actors.low_rank import TrialModel
from actors.modeling_rankfront import FactoredLinear, PivotedLinear, RankfrontForCausalLM
from actors.models import count_parameters, load_model
from actors.pivoting import pivot
from actors.preparation import prepare
from actors.scoring import Scorer
from actors.storage import ITEMSIZE
from actors.types import Allocation, Prepared, RankfrontError, ReplicaSpec, Score
from search.config import Config, parse_config
from search.cost import CostModel

# Run by another Python, outside the checkout, where `actors` and `search` cannot be imported.
STRANGER = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("actors", "search"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import numpy, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
job = json.load(sys.stdin)
answers = {}
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


@dataclass(frozen=True)
class Case:
    """A prepared model, an allocation of it, its score, and the folder it was exported to."""

    config: Config
    prepared: Prepared
    storage: str
    allocation: Allocation
    score: Score
    folder: Path
    lines: list[str]

    def searched(self) -> Any:
        model = load_model(self.prepared.model_folder, self.config.preparation().model)
        trial = TrialModel(model, self.prepared.targets, FactorStore(self.prepared.factor_store))
        trial.install(self.allocation, 10**9)
        return model

    @property
    def cost(self) -> CostModel:
        parameters, bias = self.prepared.model_parameters, self.config.factors.bias
        itemsize = ITEMSIZE[self.config.model.dtype]
        return CostModel(self.prepared.targets, parameters, self.storage, bias, itemsize)

    def export(self, destination: Path, **changes: Any) -> list[str]:
        case = replace(self, **changes)
        preparation = case.config.preparation()
        facts = {"study": "tiny", "trial": 3}
        return export(
            preparation, case.prepared, case.allocation, case.storage, destination, case.score, facts
        )


def make_case(
    root: Path, model_type: str, storage: str, bias: str, dtype: str = "float32", **model_settings: Any
) -> Case:
    """Every rank from one to full occurs, and some targets stay dense."""
    tiny.tiny_model(root / "model", model_type, **model_settings)
    GenerationConfig(max_new_tokens=9).save_pretrained(root / "model")
    config = parse_config(
        tiny.tiny_config(root, model={"dtype": dtype}, factors={"bias": bias}, storage=storage)
    )
    *_, prepared = prepare(config.preparation())
    assert isinstance(prepared, Prepared)
    ranks = {
        target.name: None if number % 5 == 4 else max(1, target.full_rank * (number % 5 + 1) // 4)
        for number, target in enumerate(prepared.targets)
    }
    allocation = Allocation.of(ranks, prepared.targets)
    replica = ReplicaSpec("r", config.preparation(), prepared, threads=1, device="cpu")
    score = Scorer(replica).score(allocation)
    case = Case(config, prepared, storage, allocation, score, root / "exports" / storage, [])
    return replace(case, lines=case.export(case.folder))


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
    environment = {**os.environ, "HF_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), place


NAMES = pytest.mark.parametrize("name", ["tied", "biased", "gpt2"])


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


@pytest.mark.parametrize("storage", ["auto", "pivoted", "factored"])
@pytest.mark.parametrize("bias", ["mean", "none"])
@pytest.mark.parametrize("which", ["llama", "biased_llama"])
def test_every_form_with_every_bias_is_the_searched_model(
    storage: str, bias: str, which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(which)
    config = parse_config(
        tiny.tiny_config(tmp_path, model={"source": str(source)}, factors={"bias": bias}, storage=storage)
    )
    *_, prepared = prepare(config.preparation())
    assert isinstance(prepared, Prepared)
    store = FactorStore(prepared.factor_store)
    cost = CostModel(prepared.targets, prepared.model_parameters, storage, bias)
    allocation = cost.uniform(0.7)
    searched, dense = (load_model(source, config.preparation().model) for _ in range(2))
    TrialModel(searched, prepared.targets, store).install(allocation, 10**9)
    stored = low_rank_model(dense, store, allocation, storage)
    probe = torch.arange(40)[None]
    with torch.inference_mode():
        expected, found = searched(probe).logits, stored(probe).logits
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4
    counted = prepared.model_parameters - cost.linear_parameters + cost.linear(allocation)
    assert count_parameters(stored) == counted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_counted_and_stored_in_two_bytes(dtype: str, tmp_path: Path) -> None:
    # The usual tiny weights amplify bfloat16's rounding: the dense model alone moves 3 to 5% of its largest
    # logit, as much as the export's check allows. Bytes do not depend on it; smaller weights do not amplify.
    case = make_case(tmp_path, "llama", "auto", "mean", dtype, initializer_range=0.05)
    kinds: dict[str, int] = {}
    with safe_open(case.folder / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            tensor = file.get_tensor(key)
            kinds[str(tensor.dtype)] = kinds.get(str(tensor.dtype), 0) + tensor.nbytes
    assert set(kinds) == {f"torch.{dtype}", "torch.int32"}
    assert sum(kinds.values()) == case.cost.model_bytes(case.allocation)
    forms = {case.cost.form(t, r) for t, (_, r) in zip(case.prepared.targets, case.allocation, strict=True)}
    assert forms == {"dense", "factored", "pivoted"}


def test_a_chosen_method_is_the_one_that_is_exported(tmp_path: Path, llama: Path) -> None:
    """Rank and method of the allocation, as the searched model has them and no other."""
    config = parse_config(tiny.tiny_config(tmp_path, model={"source": str(llama)}))
    spec = config.preparation()
    spec = replace(spec, factors=replace(spec.factors, choices=("weight", "feature")))
    *_, prepared = prepare(spec)
    assert isinstance(prepared, Prepared)
    store = FactorStore(prepared.factor_store)
    ranks = {target.name: target.full_rank // 2 for target in prepared.targets}
    usual = Allocation.of(ranks, prepared.targets)
    chosen = Allocation.of(ranks, prepared.targets, methods=dict.fromkeys([*ranks][::2], "weight"))
    probe = torch.arange(40)[None]

    def stored(allocation: Allocation) -> torch.Tensor:
        model = low_rank_model(load_model(llama, spec.model), store, allocation, "auto")
        return model(probe).logits

    searched = load_model(llama, spec.model)
    TrialModel(searched, prepared.targets, store).install(chosen, 10**9)
    with torch.inference_mode():
        expected = searched(probe).logits
        assert ((stored(chosen) - expected).abs().max() / expected.abs().max()).item() < 1e-4
        assert ((stored(usual) - expected).abs().max() / expected.abs().max()).item() > 0.01


def test_an_existing_destination_is_left_alone(cases: dict[str, Case], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(RankfrontError, match=r"mine exists already; name another folder with --to"):
        cases["tied"].export(tmp_path / "mine")
    assert [file.name for file in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_lost_factor_store_is_said(cases: dict[str, Case], tmp_path: Path) -> None:
    lost = replace(cases["tied"].prepared, factor_store=str(tmp_path / "gone"))
    with pytest.raises(RankfrontError, match=r"factor store .*/gone is gone; run the search command again"):
        cases["tied"].export(tmp_path / "new", prepared=lost)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_midway_leaves_nothing(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RankfrontForCausalLM, "save_pretrained", fail)
    with pytest.raises(RankfrontError, match=r"export to .*/new: .*No space left on device"):
        cases["tied"].export(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(cases: dict[str, Case], tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the same failing write, from the same libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(RankfrontError, match=r"export to .*/new: .*File too large"):
            cases["tied"].export(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_the_scored_model_is_not_written(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_a_row(left: torch.Tensor, right: torch.Tensor) -> Any:
        pivots, coefficients, order = pivot(left, right)
        return pivots, coefficients, order.roll(1)

    monkeypatch.setattr(exporting, "pivot", off_by_a_row)
    with pytest.raises(RankfrontError, match="the reloaded logits differ by"):
        cases["tied"].export(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_than_were_counted_are_refused(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order kept in eight bytes an index is the searched model, but not what its budget says."""
    save = RankfrontForCausalLM.save_pretrained

    def widened(self: Any, folder: Path) -> None:
        for module in self.modules():
            if isinstance(module, PivotedLinear):
                module.order = module.order.long()
        save(self, folder)

    monkeypatch.setattr(RankfrontForCausalLM, "save_pretrained", widened)
    with pytest.raises(RankfrontError, match=r"files hold [\d,]+ bytes of tensors; [\d,]+ were counted"):
        cases["tied"].export(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_recorded_score_of_another_model_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    """`check` promises an error where logits *or loss* differ by more than rounding."""
    case = cases["tied"]
    text = replace(case.score.text, nats=case.score.text.nats * 1.5)
    with pytest.raises(RankfrontError, match=r"nll"):
        case.export(tmp_path / "new", score=replace(case.score, text=text))
    assert list(tmp_path.iterdir()) == []
