"""Refinement against plain autograd of the whole-vocabulary divergence, and what it promises of its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from infinite import Infinite
from safetensors.torch import load_file
from torch import nn

import actors.refinable
import actors.refine
from actors.calibration import collect_moments
from actors.divergence import DenseTop, dense_top
from actors.factors import FactorStore
from actors.low_rank import TrialModel
from actors.models import list_targets, load_model
from actors.perplexity import WindowLosses, window_losses
from actors.refinable import HeldOut, Texts, first_windows, refinable
from actors.refine import (
    Refinement,
    Shares,
    Teacher,
    chosen_windows,
    rate,
    refine,
    refuse_what_does_not_fit,
)
from actors.refined import RefinedFactors, read, write
from actors.refinement import (
    REFIT,
    SPEED,
    RefinementSpec,
    RefinementStep,
    refinement_fingerprint,
    variant_of,
)
from actors.text import ScoredText
from actors.types import (
    Allocation,
    FactorSpec,
    ModelSource,
    RankfrontError,
    ScoringError,
    TargetSpec,
    digest,
)

VOCABULARY = 384
SPEC = RefinementSpec(steps=12, tokens=128, learning_rate=3e-4, warmup=2, evaluate_every=4, top_k=VOCABULARY)


@dataclass(frozen=True)
class Setting:
    folder: Path
    targets: tuple[TargetSpec, ...]
    store: FactorStore
    allocation: Allocation
    texts: Texts

    def dense(self) -> Any:
        return load_model(self.folder, ModelSource(str(self.folder)))

    def steps(self, path: Path, spec: RefinementSpec = SPEC, **other: Any) -> Iterator[RefinementStep]:
        store = other.get("store", self.store)
        return refine(self.dense(), store, self.allocation, self.texts, spec, path, {"trial": 3})


@pytest.fixture(scope="module", params=[("llama", "mean"), ("biased_llama", "none")])
def setting(
    request: pytest.FixtureRequest, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    """Some targets dense, some at ranks that run as a product and some that run as factors."""
    which, bias = request.param
    folder: Path = request.getfixturevalue(which)
    model = load_model(folder, ModelSource(str(folder)))
    targets = list_targets(model)
    place = tmp_path_factory.mktemp("stores") / "store"
    store = tiny.tiny_store(
        place, model, targets, collect_moments(model, targets, ids), FactorSpec("feature", bias=bias)
    )
    shares = (None, 0.25, 0.5, 0.75)
    ranks = {
        target.name: None if shares[n % 4] is None else int(target.full_rank * shares[n % 4])
        for n, target in enumerate(targets)
    }
    return Setting(folder, targets, store, Allocation.of(ranks, targets), tiny.refinement_texts(ids))


@pytest.fixture(scope="module")
def refined(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refined") / "done.safetensors"
    assert [step.step for step in setting.steps(path)] == [*range(13), 12]
    return path


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


@pytest.mark.parametrize("steps", [2, 7])
def test_a_killed_run_goes_on_bit_for_bit(
    setting: Setting, refined: Path, steps: int, tmp_path: Path
) -> None:
    """After a kill between two scores the steps since the last one are taken again."""
    path = tmp_path / "again.safetensors"
    for told in setting.steps(path):
        if told.step == steps:
            break
    assert not path.exists()
    again = [told.step for told in setting.steps(path)]
    assert again[0] == (4 if steps > 4 else 0)
    once, twice = load_file(refined), load_file(path)
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert read(path)[1] == read(refined)[1]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_run_that_was_killed_after_it_went_back_goes_on_bit_for_bit(
    setting: Setting, tmp_path: Path
) -> None:
    spec = replace(SPEC, learning_rate=0.02, evaluate_every=1, patience=12)
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    list(setting.steps(whole, spec))
    scores = RefinedFactors(whole).manifest["scores"]
    assert scores[1][1] > scores[0][1], "the first step was no better"
    assert min(scores, key=lambda score: score[1])[0] > 3, "a later one, at a lower rate, was"
    for told in setting.steps(killed, spec):
        if told.step == 3:
            break
    list(setting.steps(killed, spec))
    assert killed.read_bytes() == whole.read_bytes()


def test_steps_that_are_no_better_leave_the_start(setting: Setting, tmp_path: Path) -> None:
    spec = replace(SPEC, learning_rate=0.5, evaluate_every=1, patience=2)
    *_, last = setting.steps(tmp_path / "worse.safetensors", spec)
    assert (last.step, last.best_step) == (2, 0)
    assert last.ended == "no better held-out point in 2 scores"
    factors = RefinedFactors(tmp_path / "worse.safetensors")
    assert factors.manifest["held_out"]["after"] == factors.manifest["held_out"]["before"]
    for name, rank in setting.allocation:
        if rank is not None:
            assert torch.equal(factors.rank(name, rank)[1], setting.store.rank(name, rank)[1])


def test_a_score_that_is_no_better_takes_steps_back_and_halves_the_rate(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a constant gradient Adam moves everything by the rate, and by less where it forgot the way."""
    kl = iter([1.0, 0.9, 1.1, 0.8])
    count = float(setting.texts.held.scored.sum())

    def losses(*_: Any) -> WindowLosses:
        return WindowLosses(torch.zeros(1), torch.tensor([next(kl) * count]))

    monkeypatch.setattr(actors.refinable, "window_losses", losses)
    model, spec = setting.dense(), replace(SPEC, warmup=0, steps=10)
    with refinable(model, setting.allocation, setting.store, 64) as moving:
        value = next(iter(moving.values()))

        def gradient(step: int) -> float:
            for each in moving.values():
                each.grad = torch.ones_like(each)
            return 1.0

        top = DenseTop(torch.empty(0), torch.empty(0))
        run = Refinement(model, moving, setting.texts.held, top, spec, gradient)
        run.evaluate()
        start = value.detach().clone()
        run.advance()
        run.evaluate()
        best = value.detach().clone()
        assert torch.allclose(start - best, torch.full_like(value, rate(spec, 1)), rtol=1e-2)
        run.advance()
        assert torch.allclose(best - value, torch.full_like(value, rate(spec, 2)), rtol=1e-2)
        run.evaluate()
        assert torch.equal(value, best)
        run.advance()
        forgot = (1 - 0.9) / (1 - 0.9**3)
        assert torch.allclose(best - value, torch.full_like(value, 0.5 * rate(spec, 3) * forgot), rtol=1e-2)
        run.evaluate()
        assert run.points.best_score == (3, pytest.approx(0.8))


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


def test_a_start_that_is_not_finite_is_refused(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="held-out text tiny@32: non-finite"):
        list(setting.steps(tmp_path / "f.safetensors", store=Infinite(setting.store)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("good", [2, 6])
def test_a_loss_that_is_not_finite_ends_it(
    setting: Setting, good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the best point before it, and in an error where there is none."""
    usual = Shares.share
    path = tmp_path / "f.safetensors"

    def share(shares: Shares, step: int, place: int, count: int) -> float:
        return usual(shares, step, place, count) * (float("nan") if step > good else 1.0)

    monkeypatch.setattr(Shares, "share", share)
    if good < SPEC.evaluate_every:
        with pytest.raises(RankfrontError, match=r"the loss of step 3 is nan, and no step .*learning_rate"):
            list(setting.steps(path))
        return
    *_, last = setting.steps(path)
    assert (last.best_step, last.ended) == (4, "the loss of step 7 is nan")
    assert RefinedFactors(path).manifest["step"] == 4


def test_want_of_memory_is_an_error_and_the_run_goes_on_from_its_last_score(
    setting: Setting, refined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Shares.share
    path = tmp_path / "f.safetensors"

    def share(shares: Shares, step: int, place: int, count: int) -> float:
        if step == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(shares, step, place, count)

    with monkeypatch.context() as patched:
        patched.setattr(Shares, "share", share)
        with pytest.raises(torch.OutOfMemoryError):
            list(setting.steps(path))
    assert [file.name for file in tmp_path.iterdir()] == [f"{path.name}.partial"]
    assert [told.step for told in setting.steps(path)] == [*range(4, 13), 12]
    assert path.read_bytes() == refined.read_bytes()


def test_windows_come_in_turn_and_the_rate_rises_and_falls() -> None:
    seen = torch.cat([chosen_windows(6, 4, step, seed=1) for step in range(1, 7)])
    assert [sorted(turn.tolist()) for turn in seen.split(6)] == [list(range(6))] * 4
    assert len({tuple(turn.tolist()) for turn in seen.split(6)}) > 1
    rates = [rate(RefinementSpec(steps=10, learning_rate=1.0, warmup=2), step) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[5] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[-1] == pytest.approx(0.1)


def test_what_cannot_be_refined_is_said(setting: Setting, tmp_path: Path) -> None:
    model = setting.dense()
    path = tmp_path / "f.safetensors"
    nothing = Allocation.dense(setting.targets)
    with pytest.raises(RankfrontError, match="every target is dense"):
        list(refine(model, setting.store, nothing, setting.texts, SPEC, path, {}))
    with pytest.raises(RankfrontError, match="float16"):
        list(refine(model.half(), setting.store, setting.allocation, setting.texts, SPEC, path, {}))


def test_what_a_gpu_has_no_room_for_is_refused(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it needs, and what is free: what torch holds and does not use is free as well."""
    sizes = {target.name: target.rows + target.cols for target in setting.targets}
    numbers = sum(rank * sizes[name] for name, rank in setting.allocation if rank is not None)
    model, gpu = setting.dense(), torch.device("cuda")
    free = [16 * numbers - 6_000]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4_000)
    refuse_what_does_not_fit(model, setting.allocation, gpu)
    free[0] -= 1
    refuse_what_does_not_fit(model, setting.allocation, torch.device("cpu"))
    with pytest.raises(RankfrontError, match=f"^refine: steps on {numbers:,} numbers need 0.0 GiB"):
        refuse_what_does_not_fit(model, setting.allocation, gpu)
    free[0] = 3 * 2**30
    usual = refuse_what_does_not_fit
    monkeypatch.setattr(actors.refine, "STEP_BYTES", 16 * 2**30)
    monkeypatch.setattr(actors.refine, "refuse_what_does_not_fit", lambda *asked: usual(*asked[:2], gpu))
    wanted = rf"need {16 * numbers}\.0 GiB of the GPU, and 3\.0 GiB are free.*--method refit"
    with pytest.raises(RankfrontError, match=wanted):
        next(setting.steps(tmp_path / "f"))


class Far:
    """A tensor on a device that is not the CPU."""

    def detach(self) -> Far:
        return self

    def to(self, device: str, copy: bool) -> tuple[str, bool]:
        return device, copy


def test_the_best_point_takes_no_memory_of_the_device(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = WindowLosses(torch.zeros(1), torch.ones(1))
    monkeypatch.setattr(actors.refinable, "window_losses", lambda *_: losses)
    moving: Any = {"t.left": Far()}
    top = DenseTop(torch.empty(0), torch.empty(0))
    points = HeldOut(nn.Linear(1, 1), moving, setting.texts.held, top, 64)
    points.score(0)
    assert points.best == {"t.left": ("cpu", True)}


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
