"""The refit of a tiny model against brute force on what its targets read, and what it promises of its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refinements
import tiny
import torch
from captured import weight
from decomposed import decomposed
from infinite import Infinite
from regressions import Floats, error, reduced_rank
from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM

import actors.refit
from actors.decompose import damping
from actors.divergence import dense_top
from actors.errors import OpaqueModelError
from actors.low_rank import TrialModel
from actors.models import list_targets, load_model
from actors.perplexity import window_losses
from actors.refinable import refinable
from actors.refined import RefinedFactors
from actors.refinement import REFIT, RefinementSpec, RefinementStep
from actors.refit import Refit, refit
from actors.types import Allocation, FactorSpec, ModelSource, RankfrontError, ScoringError

SPEC = RefinementSpec(method=REFIT, evaluate_every=1, top_k=384, batch_tokens=256)


@dataclass(frozen=True)
class Setting(refinements.Setting):
    def steps(self, path: Path, spec: RefinementSpec = SPEC, **other: Any) -> Iterator[RefinementStep]:
        store = other.get("store", self.store)
        return refit(self.dense(), store, self.allocation, self.texts, spec, path, {"trial": 3})

    def ranked(self) -> list[tuple[str, int]]:
        return [(name, rank) for name, rank in self.allocation if rank is not None]


@pytest.fixture(scope="module", params=[("llama", "mean"), ("llama", "none"), ("biased_llama", "none")])
def setting(
    request: pytest.FixtureRequest, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    """Some targets dense, in the last block all after the third; the rest cut low."""
    which, bias = request.param
    folder: Path = request.getfixturevalue(which)
    place = tmp_path_factory.mktemp("stores") / "store"
    made = decomposed(folder, place, ids, FactorSpec("feature", bias=bias))
    shares = (0.5, 0.3, None, 0.6, 0.4)
    ranks = {
        target.name: int(target.full_rank * share)
        for n, target in enumerate(made.targets[:17])
        if (share := shares[n % 5]) is not None
    }
    allocation = Allocation.of(ranks, made.targets)
    return Setting(folder, made.targets, made.store, allocation, tiny.refinement_texts(ids))


@pytest.fixture(scope="module")
def done(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refit") / "done.safetensors"
    told = list(setting.steps(path))
    assert [(step.step, step.steps) for step in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [step.ended for step in told] == [None, None, None, "3 blocks"]
    return path


def inputs(model: nn.Module, names: list[str], windows: torch.Tensor) -> dict[str, Floats]:
    """What each target reads (tokens, n), float64."""
    found: dict[str, Floats] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[name] = args[0].flatten(0, 1).double().numpy()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return found


def test_every_target_is_the_regression_on_what_it_reads_behind_the_refitted_ones(setting: Setting) -> None:
    """Later targets change nothing of what earlier ones read, so the end shows what each was fitted to."""
    model, dense = setting.dense(), setting.dense()
    training = setting.texts.training
    names = [name for name, _ in setting.ranked()]
    read = inputs(dense, names, training)
    with refinable(model, setting.allocation, setting.store, 256), torch.no_grad():
        before = {name: product(model, name) for name in names}
        run = Refit(model, setting.allocation, training, 256)
        for _ in range(run.blocks):
            run.advance()
        behind = inputs(model, names, training)
        assert not np.allclose(behind[names[-1]], read[names[-1]], atol=0.1), "the prefix is compressed"
        for name, rank in setting.ranked():
            matrix, layer = weight(dense.get_submodule(name)), model.get_submodule(name)
            centred, x = layer.bias is not None, behind[name]
            outputs = read[name] @ matrix.T
            second = np.cov(x.T, bias=True) if centred else x.T @ x / len(x)
            ridge = damping(torch.from_numpy(np.linalg.eigvalsh(second)))
            expected = reduced_rank(outputs, x, rank, centred, ridge, matrix)
            found, moved = product(model, name), None if layer.bias is None else layer.bias.numpy()
            least = error(outputs, x, expected, centred)
            mine = error(outputs, x, found, centred, moved)
            unfitted = error(outputs, x, before[name], centred)
            assert mine == pytest.approx(min(least, unfitted), rel=1e-4, abs=1e-6), name
            assert mine <= unfitted * (1 + 1e-5), name
            if least < 0.99 * unfitted:
                np.testing.assert_allclose(x @ found.T, x @ expected.T, atol=0.01 * np.abs(outputs).max())


def test_targets_that_read_one_input_share_its_moments(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, usual = [], Refit._measured

    def counted(run: Refit, name: str, names: list[str]) -> Any:
        measured.append(name)
        return usual(run, name, names)

    monkeypatch.setattr(Refit, "_measured", counted)
    list(setting.steps(tmp_path / "f"))
    inputs_of = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "mlp", "up": "mlp", "down": "down"}
    first: dict[tuple[str, str], str] = {}
    for name, _ in setting.ranked():
        *place, module = name.split(".")
        first.setdefault((place[2], inputs_of[module.removesuffix("_proj")]), name)
    assert measured == list(first.values())
    assert len(measured) < len(setting.ranked())


def product(model: nn.Module, name: str) -> Floats:
    layer = model.get_submodule(name)
    return (layer.left.double() @ layer.right.double()).numpy()


def test_what_is_kept_is_the_best_held_out_point_and_scores_as_it_says(setting: Setting, done: Path) -> None:
    factors = RefinedFactors(done)
    manifest = factors.manifest
    assert (manifest["trial"], manifest["ended"], manifest["spec"]["method"]) == (3, "3 blocks", "refit")
    assert [step for step, _ in manifest["scores"]] == [0, 1, 2, 3]
    values = dict(manifest["scores"])
    assert manifest["held_out"] == {"before": values[0], "after": min(values.values())}
    assert values[manifest["step"]] == min(values.values())
    held = setting.texts.held.windows
    model = setting.dense()
    top = dense_top(model, held, 1024, 384, "text")
    TrialModel(model, setting.targets, factors).install(setting.allocation, 10**9)
    found = window_losses(model, held, 1024, "text", top).kl
    assert found is not None
    assert found.sum().item() / (len(held) * 31) == pytest.approx(manifest["held_out"]["after"], rel=1e-4)
    for name, rank in setting.ranked():
        own = model.get_submodule(name).dense.bias is not None
        mine, theirs = factors.rank(name, rank), setting.store.rank(name, rank)
        assert [part.shape for part in mine[:2]] == [part.shape for part in theirs[:2]]
        assert (mine[2] is not None) == (own or theirs[2] is not None)


def test_a_bfloat16_model_is_refitted_in_float32_and_kept_as_it_scores(
    setting: Setting, tmp_path: Path
) -> None:
    model = load_model(setting.folder, ModelSource(str(setting.folder), dtype="bfloat16"))
    path = tmp_path / "half.safetensors"
    list(refit(model, setting.store, setting.allocation, setting.texts, SPEC, path, {}))
    factors = RefinedFactors(path)
    name, rank = setting.ranked()[0]
    assert factors.rank(name, rank)[1].dtype == torch.float32
    held = setting.texts.held.windows
    top = dense_top(model, held, SPEC.batch_tokens, 384, "text")
    TrialModel(model, setting.targets, factors).install(setting.allocation, SPEC.batch_tokens)
    found = window_losses(model, held, SPEC.batch_tokens, "text", top).kl
    assert found is not None
    kept = factors.manifest["held_out"]["after"]
    assert found.sum().item() / (len(held) * 31) == pytest.approx(kept, rel=1e-6)


def test_a_run_that_was_killed_begins_anew_and_ends_the_same(
    setting: Setting, done: Path, tmp_path: Path
) -> None:
    path = tmp_path / "again.safetensors"
    for told in setting.steps(path):
        if told.step == 1:
            break
    assert list(tmp_path.iterdir()) == []
    assert next(iter(setting.steps(path))).step == 0
    list(setting.steps(path))
    assert path.read_bytes() == done.read_bytes()


def test_a_refit_that_held_out_text_speaks_against_is_undone(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(name: str, matrix: Any, joint: Any, corrected: Any, rank: int, bias: str) -> Any:
        return torch.zeros(matrix.shape[0], rank), torch.zeros(rank, matrix.shape[1])

    monkeypatch.setattr(actors.refit, "regressed", worse)
    monkeypatch.setattr(actors.refit, "excess", lambda matrix, product, *_: product.square().sum().item())
    path = tmp_path / "worse.safetensors"
    *_, last = setting.steps(path, replace(SPEC, evaluate_every=2))
    assert (last.step, last.best_step) == (3, 0)
    factors = RefinedFactors(path)
    assert [step for step, _ in factors.manifest["scores"]] == [0, 2, 3]
    for name, rank in setting.ranked():
        assert torch.equal(factors.rank(name, rank)[1], setting.store.rank(name, rank)[1])


def test_a_start_that_is_not_finite_is_refused(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="held-out text tiny@32: non-finite"):
        list(setting.steps(tmp_path / "f.safetensors", store=Infinite(setting.store)))
    assert list(tmp_path.iterdir()) == []


def test_a_point_without_a_divergence_ends_it(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = actors.refit.regressed

    def infinite(name: str, *others: Any) -> Any:
        left, right = usual(name, *others)
        return (left * 1e30, right * 1e30) if name.endswith("0.mlp.down_proj") else (left, right)

    monkeypatch.setattr(actors.refit, "regressed", infinite)
    monkeypatch.setattr(actors.refit, "excess", lambda matrix, product, *_: -product.square().sum().item())
    path = tmp_path / "f.safetensors"
    *_, last = setting.steps(path)
    assert (last.step, last.best_step) == (1, 0)
    assert "held-out text tiny@32: non-finite" in (last.ended or "")
    assert RefinedFactors(path).manifest["ended"] == last.ended


def test_moments_that_are_not_finite_end_it_at_the_best_point(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two scores they are what sees that a refit went wrong."""
    usual = actors.refit.regressed

    def refused(name: str, *others: Any) -> Any:
        if "layers.1" in name:
            raise RankfrontError(f"{name}: second moment is not finite")
        return usual(name, *others)

    monkeypatch.setattr(actors.refit, "regressed", refused)
    path = tmp_path / "f.safetensors"
    *_, last = setting.steps(path)
    assert "second moment is not finite" in (last.ended or "")
    assert RefinedFactors(path).manifest["ended"] == last.ended
    assert last.step == 2


def test_the_model_is_as_it_was(setting: Setting, tmp_path: Path) -> None:
    model = setting.dense()
    expected = model(setting.texts.training[:2]).logits
    list(refit(model, setting.store, setting.allocation, setting.texts, SPEC, tmp_path / "f", {}))
    assert torch.equal(model(setting.texts.training[:2]).logits, expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_dense_allocation_is_refused(setting: Setting, tmp_path: Path) -> None:
    model, path = setting.dense(), tmp_path / "f"
    nothing = Allocation.dense(setting.targets)
    with pytest.raises(RankfrontError, match="every target is dense"):
        list(refit(model, setting.store, nothing, setting.texts, SPEC, path, {}))


def test_a_model_that_no_text_can_be_taken_through_is_refused(ids: torch.Tensor, tmp_path: Path) -> None:
    """Not ended at a point that is no refit."""
    settings = {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "rotary_dim": 8,
        "n_positions": 64,
        "vocab_size": 384,
    }
    model = GPTJForCausalLM(GPTJConfig(**settings)).eval()
    targets = list_targets(model)
    store = tiny.tiny_store(tmp_path / "store", model, targets, {}, FactorSpec("weight"))
    allocation, path = Allocation.of({targets[0].name: 3}, targets), tmp_path / "f.safetensors"
    with pytest.raises(OpaqueModelError, match=r"^GPTJForCausalLM: decoder block 0 .*method: gradient"):
        list(refit(model, store, allocation, tiny.refinement_texts(ids), SPEC, path, {}))
    assert not path.exists()
