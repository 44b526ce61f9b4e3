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
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from actors import export as exporting
from actors.decompose import decompose
from actors.export import export, low_rank_model, pivot
from actors.factors import FactorStore
from actors.low_rank import TrialModel
from actors.modeling_rankfront import FORMS, RankfrontForCausalLM
from actors.models import count_parameters, load_model
from actors.preparation import prepare
from actors.scoring import Scorer
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
        return CostModel(self.prepared.targets, parameters, self.storage, bias)

    def export(self, destination: Path, **changes: Any) -> list[str]:
        case = replace(self, **changes)
        preparation = case.config.preparation()
        facts = {"study": "tiny", "trial": 3}
        return export(
            preparation, case.prepared, case.allocation, case.storage, destination, case.score, facts
        )


def make_case(root: Path, storage: str, bias: str, **model_settings: Any) -> Case:
    """Every rank from one to full occurs, and some targets stay dense."""
    tiny.tiny_llama(root / "model", **model_settings)
    GenerationConfig(max_new_tokens=9).save_pretrained(root / "model")
    config = parse_config(tiny.tiny_config(root, factors={"bias": bias}, storage=storage))
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
        "tied": make_case(tmp_path_factory.mktemp("tied"), "pivoted", "mean"),
        "biased": make_case(tmp_path_factory.mktemp("biased"), "factored", "none", **biases),
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


NAMES = pytest.mark.parametrize("name", ["tied", "biased"])


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
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (name == "tied")
    layers = {name: type(loaded.base.get_submodule(name)) for name, _ in case.allocation}
    form = FORMS[case.storage]
    assert layers == {name: form if rank else torch.nn.Linear for name, rank in case.allocation}


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


@pytest.mark.parametrize("storage", FORMS)
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


def test_a_recorded_score_of_another_model_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    """`check` promises an error where logits *or loss* differ by more than rounding."""
    case = cases["tied"]
    text = replace(case.score.text, nats=case.score.text.nats * 1.5)
    with pytest.raises(RankfrontError, match=r"nll"):
        case.export(tmp_path / "new", score=replace(case.score, text=text))
    assert list(tmp_path.iterdir()) == []


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16), st.data())
def test_pivoting_loses_nothing(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    """W_r = P [I; C] R equals A_r B_r at every rank up to full, whatever the shape."""
    rank = data.draw(st.integers(1, min(rows, cols)))
    chance = np.random.default_rng(seed)
    left, right = (torch.from_numpy(chance.normal(size=(rank, size))) for size in (rows, cols))
    pivots, coefficients, order = pivot(left, right)
    assert pivots.shape == (rank, cols)
    assert coefficients.shape == (rows - rank, rank)
    assert sorted(order.tolist()) == [*range(rows)]
    found = torch.cat((pivots, coefficients @ pivots))[order.long()]
    product = (left.T @ right).numpy()
    np.testing.assert_allclose(found.numpy(), product, rtol=0, atol=1e-10 * np.abs(product).max())
    kept = {place for place in range(rows) if order[place] < rank}
    for place in kept:  # the pivot rows are rows of the product itself
        np.testing.assert_allclose(pivots[order[place]].numpy(), product[place], rtol=0, atol=1e-12 * rows)


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 2**16))
def test_pivoting_stands_weights_of_deficient_rank(rows: int, cols: int, seed: int) -> None:
    """Factors of a rank that carries no energy are tiny or nothing; the product still comes back."""
    chance = np.random.default_rng(seed)
    weight = np.outer(chance.normal(size=rows), chance.normal(size=cols))
    weight[0] = 0
    factors = decompose("t", torch.from_numpy(weight), None, "weight", "none")
    pivots, coefficients, order = pivot(factors.left.T, factors.right)
    found = torch.cat((pivots, coefficients @ pivots))[order.long()]
    np.testing.assert_allclose(found.numpy(), weight, rtol=0, atol=1e-10 * np.abs(weight).max())


def test_the_layers_say_what_they_store() -> None:
    """r(m + n) and r(m + n - r) parameters, m more with a bias; the order is no parameter."""
    for m, n, r in ((8, 5, 3), (5, 8, 5), (4, 4, 1)):
        for form, weights in (("factored", r * (m + n)), ("pivoted", r * (m + n - r))):
            for bias in (False, True):
                layer = FORMS[form](n, m, r, bias)
                assert sum(p.numel() for p in layer.parameters()) == weights + m * bias
