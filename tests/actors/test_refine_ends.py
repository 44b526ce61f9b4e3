"""How refinements go on after a kill, turn back, end and are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from infinite import Infinite
from refinements import SPEC, Setting
from safetensors.torch import load_file
from torch import nn

import actors.refinable
import actors.refine
from actors.divergence import DenseTop
from actors.perplexity import WindowLosses
from actors.refinable import HeldOut, refinable
from actors.refine import (
    Refinement,
    Shares,
    rate,
    refine,
    refuse_what_does_not_fit,
)
from actors.refined import RefinedFactors, read
from actors.types import (
    Allocation,
    RankfrontError,
    ScoringError,
)


def share_times(factor: Callable[[int], float]) -> Callable[..., float]:
    """A `Shares.share` whose KL is multiplied by what `factor` gives for its step, or raises."""
    usual = Shares.share

    def share(shares: Shares, step: int, place: int, count: int) -> float:
        return factor(step) * usual(shares, step, place, count)

    return share


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


def test_a_start_that_is_not_finite_is_refused(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="held-out text tiny@32: non-finite"):
        list(setting.steps(tmp_path / "f.safetensors", store=Infinite(setting.store)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("good", [2, 6])
def test_a_loss_that_is_not_finite_ends_it(
    setting: Setting, good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the best point before it, and in an error where there is none."""
    path = tmp_path / "f.safetensors"
    monkeypatch.setattr(Shares, "share", share_times(lambda step: math.nan if step > good else 1.0))
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
    path = tmp_path / "f.safetensors"

    def factor(step: int) -> float:
        if step == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    with monkeypatch.context() as patched:
        patched.setattr(Shares, "share", share_times(factor))
        with pytest.raises(torch.OutOfMemoryError):
            list(setting.steps(path))
    assert [file.name for file in tmp_path.iterdir()] == [f"{path.name}.partial"]
    assert [told.step for told in setting.steps(path)] == [*range(4, 13), 12]
    assert path.read_bytes() == refined.read_bytes()


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
