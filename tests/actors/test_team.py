"""Several workers against one: the same factors up to rounding, whoever comes late or goes."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import GetTimeoutError, RayTaskError

from actors.calibration import collect_moments
from actors.factors import FactorStore
from actors.helper import Gone, _Reference
from actors.models import list_targets, load_model
from actors.refinable import Texts, refinable
from actors.refine import Helping, Shares, helping, refine
from actors.refined import read
from actors.refinement import RefinementSpec, RefinementStep
from actors.team import Pieces, pieces
from actors.types import (
    Allocation,
    FactorSpec,
    ModelSource,
    RankfrontError,
    ScoringError,
    ShortOfMemoryError,
)

SPEC = RefinementSpec(steps=6, tokens=160, learning_rate=1e-3, warmup=2, evaluate_every=2, top_k=16)


@dataclass(frozen=True)
class Setting:
    folder: Path
    store: FactorStore
    allocation: Allocation
    texts: Texts

    def dense(self) -> Any:
        return load_model(self.folder, ModelSource(str(self.folder)))

    def steps(self, path: Path, helpers: list[Near], spec: RefinementSpec = SPEC) -> Iterator[RefinementStep]:
        return refine(self.dense(), self.store, self.allocation, self.texts, spec, path, {}, helpers)


@dataclass
class Near:
    """A helper in this process, with a model of its own. It is gone from its `dies`-th call of a method on,
    and is not ready before it was looked at `late` times. From its `fails`-th call of a method on it raises
    `error`, and as one that hangs it uses up the time it is given."""

    setting: Setting
    dies: tuple[str, int] | None = None
    late: int = 0
    fails: tuple[str, int, Exception | None] | None = None
    limits: list[float] = field(default_factory=list)
    ended: bool = False
    asked: Counter[str] = field(default_factory=Counter)
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    worker: Helping | None = None
    gone: bool = False

    def ask(self, method: str, *arguments: Any) -> Told:
        self.asked[method] += 1
        self.gone = self.gone or (self.dies is not None and self.asked[self.dies[0]] >= self.dies[1])
        if self.gone:
            return Told(self, None)
        if self.fails is not None and self.asked[self.fails[0]] >= self.fails[1]:
            return Told(self, None, failed=True)
        return Told(
            self, self.begin(*arguments) if method == "help" else getattr(self.worker, method)(*arguments)
        )

    def begin(self, allocation: Allocation, spec: RefinementSpec) -> None:
        s = self.setting
        self.worker = self.held.enter_context(helping(s.dense(), s.store, allocation, s.texts.training, spec))

    def shared(self, value: Any) -> Any:
        return value

    def end(self) -> None:
        self.ended = True


@dataclass
class Told:
    helper: Near
    value: Any
    failed: bool = False

    def ready(self) -> bool:
        self.helper.late -= 1
        return self.helper.late < 0

    def get(self, limit: float) -> Any:
        """As `ActorHelper` answers, whose `ray.get` raises what `fails` says or waits as long as it may."""
        if self.helper.gone:
            raise Gone("it died")
        if not self.failed:
            return self.value
        assert self.helper.fails is not None

        def wait(reference: Any, timeout: float) -> None:
            self.helper.limits.append(timeout)
            cause = self.helper.fails[2]  # type: ignore[index]
            if cause is None:
                raise GetTimeoutError
            raise RayTaskError("", "Traceback", cause).as_instanceof_cause()

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ray, "get", wait)
            return _Reference(self).get(limit)


@pytest.fixture(scope="module")
def setting(llama: Path, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    model = load_model(llama, ModelSource(str(llama)))
    targets = list_targets(model)
    place = tmp_path_factory.mktemp("stores") / "store"
    moments = collect_moments(model, targets, ids)
    store = tiny.tiny_store(place, model, targets, moments, FactorSpec("feature"))
    ranks = {target.name: target.full_rank // 2 for target in targets[::2]}
    return Setting(llama, store, Allocation.of(ranks, targets), tiny.refinement_texts(ids))


@pytest.fixture(scope="module")
def alone(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker leaves."""
    path = tmp_path_factory.mktemp("alone") / "f.safetensors"
    assert {step.workers for step in setting.steps(path, [])} == {1}
    return path


def same(found: Path, expected: Path) -> None:
    """Equal factors and scores, up to the order of float32 additions; Adam divides by small gradients."""
    (mine, told), (theirs, said) = read(found), read(expected)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name], rtol=1e-3, atol=1e-4 * theirs[name].abs().max().item()), (
            name
        )
    assert [step for step, _ in told["scores"]] == [step for step, _ in said["scores"]]
    for (_, kl), (_, other) in zip(told["scores"], said["scores"], strict=True):
        assert kl == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_shares_add_up_to_the_gradient_of_the_step(setting: Setting, count: int) -> None:
    """Of five windows; a sixth worker's share is empty."""
    model = setting.dense()
    training = setting.texts.training
    with refinable(model, setting.allocation, setting.store, 64) as moving:
        shares = Shares(model, moving, training, SPEC)
        total = shares.share(1, 0, 1)
        whole = {name: value.grad.clone() for name, value in moving.items() if value.grad is not None}
        assert whole.keys() == moving.keys()
        summed, parts = {name: torch.zeros_like(value) for name, value in whole.items()}, 0.0
        for place in range(count):
            parts += shares.share(1, place, count)
            for name, value in moving.items():
                summed[name] += 0 if value.grad is None else value.grad
        assert parts == pytest.approx(total, rel=1e-6)
        for name, value in whole.items():
            assert torch.allclose(summed[name], value, rtol=1e-4, atol=1e-6 * value.abs().max().item()), name


@pytest.mark.parametrize("count", [1, 2])
def test_several_workers_end_where_one_does(
    setting: Setting, alone: Path, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.refine.PIECE", 1000)
    helpers = [Near(setting) for _ in range(count)]
    told = list(setting.steps(tmp_path / "f", helpers))
    assert {step.workers for step in told[1:]} == {count + 1}
    assert all(helper.asked["share"] == SPEC.steps for helper in helpers)
    same(tmp_path / "f", alone)


@pytest.mark.parametrize("method", ["help", "receive", "share", "piece"])
def test_a_helper_that_dies_costs_no_more_than_its_step(
    setting: Setting, alone: Path, method: str, tmp_path: Path
) -> None:
    dying, other = Near(setting, dies=(method, 1 if method == "help" else 3)), Near(setting)
    told = list(setting.steps(tmp_path / "f", [dying, other]))
    assert [step.step for step in told] == [*range(7), 6]
    assert told[-1].workers == 2
    assert (dying.ended, other.ended) == (True, False)
    assert other.asked["share"] >= SPEC.steps
    same(tmp_path / "f", alone)


@pytest.mark.parametrize("method", ["help", "receive", "share", "piece"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ShortOfMemoryError("out of memory while refining"), "out of memory while refining"),
        (RuntimeError("CUDA error: an illegal access"), "RuntimeError: CUDA error: an illegal access"),
        (None, "no answer in 3 s"),
    ],
    ids=["memory", "fault", "hangs"],
)
def test_a_helper_that_fails_or_hangs_is_left_out_and_that_is_told(
    setting: Setting,
    alone: Path,
    method: str,
    error: Exception | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no loss that is not finite: the run goes to its end."""
    monkeypatch.setattr("actors.team.LEAST_WAIT", 3.0)
    failing = Near(setting, fails=(method, 1 if method == "help" else 3, error))
    *_, last = setting.steps(tmp_path / "f", [failing, Near(setting)])
    assert last.ended is not None
    assert re.fullmatch(rf"6 steps; a worker was left out at step \d: {reason}", last.ended)
    assert last.workers == 2
    assert failing.ended
    same(tmp_path / "f", alone)
    assert read(tmp_path / "f")[1]["ended"] == "6 steps"


def test_a_helper_may_take_longer_where_the_share_of_the_lead_did(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(step=9.0)  # seconds between two looks at it
    monkeypatch.setattr("actors.team.time", SimpleNamespace(monotonic=lambda: next(clock)))
    early, late = (Near(setting, fails=(method, 1, None)) for method in ("receive", "share"))
    list(setting.steps(tmp_path / "f", [early]))
    list(setting.steps(tmp_path / "g", [late]))
    assert (early.limits, late.limits) == ([60.0], [90.0])


def test_a_helper_that_comes_late_joins(setting: Setting, alone: Path, tmp_path: Path) -> None:
    helper = Near(setting, late=3)
    told = list(setting.steps(tmp_path / "f", [helper]))
    assert [step.workers for step in told[1:]] == [1, 1, 1, 2, 2, 2, 2]
    assert helper.asked["share"] == 3
    same(tmp_path / "f", alone)


def test_a_killed_run_goes_on_with_another_number(setting: Setting, alone: Path, tmp_path: Path) -> None:
    path = tmp_path / "f"
    for before, helpers in ((3, [Near(setting), Near(setting)]), (5, []), (7, [Near(setting)])):
        for told in setting.steps(path, helpers):
            if told.step == before:
                break
    same(path, alone)


def test_a_mistake_of_a_helper_is_raised(setting: Setting, tmp_path: Path) -> None:
    class Wrong(Near):
        def begin(self, allocation: Allocation, spec: RefinementSpec) -> None:
            raise RankfrontError("no such text here")

        def ask(self, method: str, *arguments: Any) -> Told:
            told = Told(self, None)
            told.get = lambda limit: self.begin(*arguments)  # type: ignore[method-assign]
            return told

    with pytest.raises(RankfrontError, match="no such text here"):
        list(setting.steps(tmp_path / "f", [Wrong(setting)]))


@pytest.mark.parametrize("best", [0, 2])
def test_a_score_that_a_helper_cannot_have_ends_it_as_the_leads_own_would(
    setting: Setting, best: int, tmp_path: Path
) -> None:
    """With the best point before it, and in an error where there is none."""
    text = "calibration text: non-finite logits of the dense model"
    helper = Near(setting, fails=("share", best + 1, ScoringError(text)))
    if not best:
        with pytest.raises(RankfrontError, match=f"^refine: {text}, and no step before it was better"):
            list(setting.steps(tmp_path / "f", [helper]))
        return
    *_, last = setting.steps(tmp_path / "f", [helper])
    assert (last.best_step, last.ended) == (best, text)
    assert read(tmp_path / "f")[1]["ended"] == text


@given(st.lists(st.integers(0, 12), max_size=5), st.integers(1, 7))
def test_pieces_hold_every_number_once_in_order(sizes: list[int], most: int) -> None:
    found = pieces(sizes, most)
    assert all(1 <= sum(stop - start for _, start, stop in piece) <= most for piece in found)
    assert all(sum(stop - start for _, start, stop in piece) == most for piece in found[:-1])
    flat = [(at, place) for piece in found for at, start, stop in piece for place in range(start, stop)]
    assert flat == [(at, place) for at, size in enumerate(sizes) for place in range(size)]


def test_pieces_carry_factors_and_gradients() -> None:
    mine = [torch.nn.Parameter(torch.arange(6.0).view(2, 3)), torch.nn.Parameter(torch.ones(4))]
    theirs = [torch.nn.Parameter(torch.zeros_like(value)) for value in mine]
    mine[0].grad = torch.full((2, 3), 2.0)
    theirs[1].grad = torch.full((4,), 3.0)
    one, other = Pieces(mine, 4), Pieces(theirs, 4)
    assert len(one) == len(other) == 3
    for number in range(len(one)):
        other.set_values(number, one.values(number))
        other.add_gradients(number, one.gradients(number))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert theirs[0].grad is not None
    assert torch.equal(theirs[0].grad, mine[0].grad)
    assert torch.equal(theirs[1].grad, torch.full((4,), 3.0))
