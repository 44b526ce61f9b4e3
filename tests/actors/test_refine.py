"""Refinement against plain autograd of the whole-vocabulary divergence, and what it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refinements import SPEC, VOCABULARY, Setting
from torch import nn

import actors.refinable
import actors.refine
from actors.divergence import DenseTop, dense_top
from actors.low_rank import TrialModel
from actors.models import load_model
from actors.perplexity import window_losses
from actors.refinable import first_windows, refinable
from actors.refine import (
    Shares,
    Teacher,
    chosen_windows,
    rate,
    refine,
)
from actors.refined import RefinedFactors, write
from actors.refinement import (
    REFIT,
    SPEED,
    RefinementSpec,
    refinement_fingerprint,
    variant_of,
)
from actors.text import ScoredText
from actors.types import (
    Allocation,
    ModelSource,
    RankfrontError,
    digest,
)


def full_divergence(model: nn.Module, dense: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """KL(dense || model) over the whole vocabulary, per predicted token; log-softmax in float64."""
    with torch.no_grad():
        wanted = dense(windows).logits[:, :-1].double().log_softmax(-1)
    found = model(windows).logits[:, :-1].double().log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_is_that_of_the_divergence_over_the_vocabulary(
    setting: Setting, checkpointed: bool
) -> None:
    model, dense = setting.dense(), setting.dense()
    spec = replace(SPEC, batch_tokens=64, checkpointed=checkpointed)
    training = setting.texts.training
    with refinable(model, setting.allocation, setting.store, 64) as moving:
        chosen = chosen_windows(len(training), 4, 1, spec.seed)
        expected = full_divergence(model, dense, training[chosen])
        gradients = torch.autograd.grad(expected, list(moving.values()))
        loss = Shares(model, moving, training, spec).share(1, 0, 1)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        for name, gradient in zip(moving, gradients, strict=True):
            found = moving[name].grad
            assert found is not None
            assert torch.allclose(found, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_begins_at_the_trial_and_leaves_the_model_as_it_was(setting: Setting) -> None:
    model, trial = setting.dense(), setting.dense()
    before = model(setting.texts.training[:2]).logits
    TrialModel(trial, setting.targets, setting.store).install(setting.allocation, 64)
    with refinable(model, setting.allocation, setting.store, 64), torch.no_grad():
        found = model(setting.texts.training[:2]).logits
    assert torch.allclose(found, trial(setting.texts.training[:2]).logits, atol=1e-4)
    assert torch.equal(model(setting.texts.training[:2]).logits, before)


def test_the_held_out_divergence_falls_and_is_that_of_the_reloaded_factors(
    setting: Setting, refined: Path
) -> None:
    factors = RefinedFactors(refined)
    held_out = factors.manifest["held_out"]
    assert held_out["after"] < held_out["before"]
    assert factors.manifest["trial"] == 3
    held = setting.texts.held.windows
    for store, kept in ((setting.store, held_out["before"]), (factors, held_out["after"])):
        model = setting.dense()
        top = dense_top(model, held, 1024, VOCABULARY, "text")
        trial = TrialModel(model, setting.targets, setting.store)
        trial.use(store)
        trial.install(setting.allocation, 10**9)  # the other of two equal products, where there is one
        found = window_losses(model, held, 1024, "text", top).kl
        assert found is not None
        assert found.sum().item() / (len(held) * 31) == pytest.approx(kept, rel=1e-4)


def test_a_held_out_text_of_overlapping_windows_counts_every_token_once(
    setting: Setting, tmp_path: Path
) -> None:
    ids = setting.texts.held.windows.flatten()
    text = first_windows(ScoredText("tiny@32/16", ids.unfold(0, 32, 16), 16), tokens=100)
    assert text.windows.shape == (3, 32)
    path = tmp_path / "f.safetensors"
    model, dense = setting.dense(), setting.dense()
    texts = replace(setting.texts, held=text)
    list(refine(model, setting.store, setting.allocation, texts, replace(SPEC, steps=1), path, {}))
    TrialModel(model, setting.targets, setting.store).install(setting.allocation, 64)
    with torch.no_grad():
        wanted, found = (each(text.windows).logits.double().log_softmax(-1) for each in (dense, model))
    kl = (wanted.exp() * (wanted - found)).sum(-1)
    scored = torch.cat([kl[0, :-1], kl[1, 15:-1], kl[2, 15:-1]])
    assert RefinedFactors(path).manifest["held_out"]["before"] == pytest.approx(
        scored.mean().item(), rel=1e-4
    )


def test_the_dense_model_is_asked_once_about_each_window_that_a_step_reads(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever others were read with it, it says the same, bit for bit."""
    windows, asked = setting.texts.training, []
    usual = actors.refine.dense_top

    def counted(model: nn.Module, windows: torch.Tensor, *others: Any) -> DenseTop:
        asked.extend(windows[:, 0].tolist())
        return usual(model, windows, *others)

    monkeypatch.setattr(actors.refine, "dense_top", counted)
    model = setting.dense()
    expected = dense_top(setting.dense(), windows, 32, SPEC.top_k, "text")
    with refinable(model, setting.allocation, setting.store, 64):
        teacher = Teacher(model, windows, SPEC)
        for chosen in ([3], [5, 3, 1], [1, 3]):
            found = teacher.of(torch.tensor(chosen))
            assert torch.equal(found.ids, expected.ids[chosen])
            assert torch.equal(found.logs, expected.logs[chosen])
    assert asked == windows[[3, 5, 1], 0].tolist()


def test_ranks_and_counted_parameters_stay(setting: Setting, refined: Path) -> None:
    factors = RefinedFactors(refined)
    assert factors.allocation == setting.allocation
    ranked = [(name, rank) for name, rank in setting.allocation if rank is not None]
    for name, rank in ranked:
        mine, theirs = factors.rank(name, rank), setting.store.rank(name, rank)
        assert [part.shape for part in mine[:2]] == [part.shape for part in theirs[:2]]
        assert not torch.equal(mine[0], theirs[0])
        own = setting.dense().get_submodule(name).bias is not None
        assert (mine[2] is not None) == (own or theirs[2] is not None)
    name, rank = ranked[0]
    for wrong in ((rank + 1, None), (rank, "weight")):
        with pytest.raises(RankfrontError, match=f"{name} is refined at rank {rank}, not at rank {wrong[0]}"):
            factors.rank(name, *wrong)


def test_a_bfloat16_model_is_refined_in_float32_and_kept_as_it_scores(
    setting: Setting, tmp_path: Path
) -> None:
    """Steps are too small for bfloat16 to hold; what is promised is what a trial of the file scores."""
    source = ModelSource(str(setting.folder), dtype="bfloat16")
    path = tmp_path / "half.safetensors"
    model = load_model(setting.folder, source)
    list(refine(model, setting.store, setting.allocation, setting.texts, SPEC, path, {}))
    factors = RefinedFactors(path)
    name, rank = next((name, rank) for name, rank in setting.allocation if rank is not None)
    right = factors.rank(name, rank)[1]
    assert right.dtype == torch.float32
    assert (factors.manifest["step"] == 0) == torch.equal(right, setting.store.rank(name, rank)[1])
    held = setting.texts.held.windows
    top = dense_top(model, held, 1024, VOCABULARY, "text")
    TrialModel(model, setting.targets, factors).install(setting.allocation, SPEC.tokens)
    found = window_losses(model, held, 1024, "text", top).kl
    assert found is not None
    kept = factors.manifest["held_out"]["after"]
    assert found.sum().item() / (len(held) * 31) == pytest.approx(kept, rel=1e-6)


# -- mixed precision --------------------------------------------------------------------------


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on this machine's CPU multiply as they do on a GPU."""
    gpu = actors.refine.step_precision(torch.device("cuda", 0))
    monkeypatch.setattr(actors.refine, "step_precision", lambda device: gpu)


def test_steps_multiply_in_bfloat16_on_gpus_alone() -> None:
    assert actors.refine.step_precision(torch.device("cuda", 1)) == torch.bfloat16
    assert actors.refine.step_precision(torch.device("cpu")) is None


def gradient_of(setting: Setting, spec: RefinementSpec) -> tuple[dict[str, torch.Tensor], set[torch.dtype]]:
    """The gradient of a step of a float32 model, and what its refined targets and its head gave."""
    model, given = setting.dense(), set()
    with refinable(model, setting.allocation, setting.store, 64) as moving:
        shares = Shares(model, moving, setting.texts.training, spec)
        shares.share(1, 0, 1)  # asks the dense model, in its own precision
        refined = [each for each in model.modules() if isinstance(each, actors.refinable.RefinableLinear)]
        for layer in (*refined, model.get_output_embeddings()):
            layer.register_forward_hook(lambda layer, taken, found: given.add(found.dtype))
        shares.share(1, 0, 1)
        assert {value.dtype for value in moving.values()} == {torch.float32}
        return {name: value.grad for name, value in moving.items() if value.grad is not None}, given


@pytest.mark.parametrize("checkpointed", [False, True])
def test_products_are_made_in_low_precision_and_gradients_in_float32(
    setting: Setting, checkpointed: bool, request: pytest.FixtureRequest
) -> None:
    """The gradient is float32's to the digits that bfloat16 has, also where activations are made again."""
    spec = replace(SPEC, checkpointed=checkpointed)
    exact, given = gradient_of(setting, spec)
    assert given == {torch.float32}
    request.getfixturevalue("mixed")
    rounded, given = gradient_of(setting, spec)
    assert given == {torch.bfloat16}
    assert {gradient.dtype for gradient in rounded.values()} == {torch.float32}
    assert rounded.keys() == exact.keys()
    errors = [((rounded[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact]
    assert 1e-3 < min(errors) <= max(errors) < 0.3


@pytest.mark.usefixtures("mixed")
def test_a_refinement_in_low_precision_lowers_the_divergence(
    setting: Setting, refined: Path, tmp_path: Path
) -> None:
    """By about as much as in float32, though not to the same factors; what is kept is float32."""
    path = tmp_path / "mixed.safetensors"
    list(setting.steps(path))
    found, exact = RefinedFactors(path), RefinedFactors(refined)
    before, after = (found.manifest["held_out"][key] for key in ("before", "after"))
    assert before == exact.manifest["held_out"]["before"], "points are scored in the model's precision"
    assert before - after > 0.8 * (before - exact.manifest["held_out"]["after"]) > 0
    name, rank = next((name, rank) for name, rank in setting.allocation if rank is not None)
    for mine, theirs in zip(found.rank(name, rank)[:2], exact.rank(name, rank)[:2], strict=True):
        assert mine.dtype == torch.float32
        assert not torch.equal(mine, theirs)


def test_windows_come_in_turn_and_the_rate_rises_and_falls() -> None:
    seen = torch.cat([chosen_windows(6, 4, step, seed=1) for step in range(1, 7)])
    assert [sorted(turn.tolist()) for turn in seen.split(6)] == [list(range(6))] * 4
    assert len({tuple(turn.tolist()) for turn in seen.split(6)}) > 1
    rates = [rate(RefinementSpec(steps=10, learning_rate=1.0, warmup=2), step) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[5] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[-1] == pytest.approx(0.1)


def test_damaged_refined_factors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write(path, {"x": torch.ones(2, 3)}, {"ranks": {}, "methods": {}})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RankfrontError, match=r"f\.safetensors: no refined factors can be read"):
        RefinedFactors(path)


def test_what_decides_the_numbers_decides_the_fingerprint(setting: Setting) -> None:
    parts = dict.fromkeys(("model", "tokenizer", "calibration", "search", "factors", "test"), "x")
    mine = refinement_fingerprint(parts, setting.allocation, SPEC)
    assert variant_of(mine, SPEC) == f"refined-{mine[:8]}"
    for same in (replace(SPEC, batch_tokens=7), replace(SPEC, checkpointed=True)):
        assert refinement_fingerprint({**parts, "test": "y"}, setting.allocation, same) == mine
    settings = {key: value for key, value in SPEC.to_dict().items() if key not in (*SPEED, "method")}
    chosen = {key: parts[key] for key in ("model", "tokenizer", "calibration", "search", "factors")}
    assert mine == digest(["refined", 2, chosen, setting.allocation.key, settings]), "old files stay known"
    refitted = replace(SPEC, method=REFIT)
    other = refinement_fingerprint(parts, setting.allocation, refitted)
    assert variant_of(other, refitted) == f"refit-{other[:8]}"
    for same in (replace(refitted, steps=13), replace(refitted, seed=1)):
        assert refinement_fingerprint(parts, setting.allocation, same) == other
    others = [
        other,
        refinement_fingerprint(parts, setting.allocation, replace(refitted, held_out=64)),
        refinement_fingerprint({**parts, "factors": "y"}, setting.allocation, SPEC),
        refinement_fingerprint({**parts, "search": "y"}, setting.allocation, SPEC),
        refinement_fingerprint(parts, Allocation.dense(setting.targets), SPEC),
        refinement_fingerprint(parts, setting.allocation, replace(SPEC, steps=13)),
    ]
    assert len({mine, *others}) == 7
