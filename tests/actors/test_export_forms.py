"""Every form, bias, method and precision of an export is the searched model, within its own rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from exported_models import make_case, off_by_a_row
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from actors import export as exporting
from actors.agreement import compare_logits
from actors.export import low_rank_model
from actors.factors import FactorStore
from actors.low_rank import TrialModel
from actors.models import count_parameters, load_model
from actors.preparation import prepare
from actors.types import Allocation, PreparationSpec, Prepared, RankfrontError
from search.config import parse_config
from search.cost import CostModel


@dataclass(frozen=True)
class Ready:
    """A model that is prepared with a bias."""

    source: Path
    bias: str
    spec: PreparationSpec
    prepared: Prepared


@pytest.fixture(
    scope="module",
    params=[(which, bias) for which in ("llama", "biased_llama") for bias in ("mean", "none")],
    ids="-".join,
)
def ready(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    which, bias = request.param
    source = request.getfixturevalue(which)
    root = tmp_path_factory.mktemp("ready")
    raw = tiny.tiny_config(root, model={"source": str(source)}, factors={"bias": bias})
    spec = parse_config(raw).preparation()
    *_, prepared = prepare(spec)
    assert isinstance(prepared, Prepared)
    return Ready(source, bias, spec, prepared)


@pytest.mark.parametrize("storage", ["auto", "pivoted", "factored"])
def test_every_form_with_every_bias_is_the_searched_model(storage: str, ready: Ready) -> None:
    prepared = ready.prepared
    store = FactorStore(prepared.factor_store)
    cost = CostModel(prepared.targets, prepared.model_parameters, storage, ready.bias)
    allocation = cost.uniform(0.7)
    searched, dense = (load_model(ready.source, ready.spec.model) for _ in range(2))
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
    case = make_case(tmp_path, "llama", "auto", "mean", dtype)
    kinds: dict[str, int] = {}
    with safe_open(case.folder / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            tensor = file.get_tensor(key)
            kinds[str(tensor.dtype)] = kinds.get(str(tensor.dtype), 0) + tensor.nbytes
    assert set(kinds) == {f"torch.{dtype}", "torch.int32"}
    assert sum(kinds.values()) == case.cost.model_bytes(case.allocation)
    forms = {case.cost.form(t, r) for t, (_, r) in zip(case.prepared.targets, case.allocation, strict=True)}
    assert forms == {"dense", "factored", "pivoted"}


def test_a_model_that_amplifies_rounding_is_exported_and_a_wrong_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are far from the searched model's logits; only one is further off a float32 run than those are."""
    case = make_case(tmp_path, "gpt2", "pivoted", "mean", "bfloat16", seed=1, initializer_range=1.0)
    probe = torch.arange(40)[None]
    loaded = AutoModelForCausalLM.from_pretrained(case.folder, dtype="auto").eval()
    with torch.inference_mode():
        expected, found = case.searched()(probe).logits.float(), loaded(probe).logits.float()
    assert (found - expected).abs().max() > 0.05 * expected.abs().max(), "it amplifies nothing"
    assert " off a float32 run of the same factors, the searched model's are " in case.lines[3]
    monkeypatch.setattr(exporting, "pivot", off_by_a_row)
    with pytest.raises(RankfrontError, match=r"logits are \S+ off a float32 run .* model's are \S+ "):
        case.export(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_logits_may_be_off_by_a_few_times_the_rounding_of_the_searched_model() -> None:
    generator = torch.Generator().manual_seed(0)
    exact, one, other = torch.randn(3, 8, 50, generator=generator).unbind()
    one, other = one / one.square().mean().sqrt(), other / other.square().mean().sqrt()
    searched = exact + 0.1 * one
    said = compare_logits(exact + 0.35 * other, searched, exact)
    assert "3.50e-01 off a float32 run" in said
    assert "the searched model's are 1.00e-01" in said
    for wrong in (exact + 0.45 * other, torch.full_like(exact, torch.nan)):
        with pytest.raises(RankfrontError, match=r"off a float32 run .* are 0\.1 "):
            compare_logits(wrong, searched, exact)
    # in float32 the searched model is that run
    largest = exact.abs().max()
    assert "max abs difference" in compare_logits(exact + 9e-4 * largest, exact, exact)
    for wrong in (exact + 2e-3 * largest, torch.full_like(exact, torch.nan)):
        with pytest.raises(RankfrontError, match="the reloaded logits differ by"):
            compare_logits(wrong, exact, exact)


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
