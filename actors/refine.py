"""Refine the factors of one allocation: Adam on the KL to the dense model, ranks fixed, nothing else moves.

The teacher is what `actors.divergence` keeps of the dense model on the calibration windows that steps read;
there are no labels. Which point is kept the held-out windows say (`actors.refinable`).

A rate that is good for a model at 70% of its parameters breaks one at 90%, which has little to gain and as
much to lose. So a held-out score that is not better takes the steps since the best point back and halves the
rate of those to come.

A run is a function of the model, the factors, the windows and the spec. Its state is on disk after every
held-out score, so a run that was killed takes the same steps again and ends at the same numbers. How many
workers make a step's gradient (`actors.team`) changes the order of its float32 additions and nothing else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.devices import free_bytes
from actors.divergence import DenseTop, dense_top
from actors.helper import Helper
from actors.low_rank import Ranks
from actors.models import decoder_blocks
from actors.passes import checkpointed
from actors.perplexity import window_divergence
from actors.refinable import (
    CALIBRATION_TEXT,
    HeldOut,
    RefinableLinear,
    Texts,
    bypassed,
    refinable,
)
from actors.refined import read, write
from actors.refinement import FEWER_NUMBERS, STEP_BYTES, RefinementSpec, RefinementStep, windows_of
from actors.team import PIECE, Pieces, Team
from actors.text import ScoredText
from actors.types import Allocation, RankfrontError, ScoringError

Tensor = torch.Tensor

# The share of the learning rate that is left at the last step.
FLOOR = 0.1
# What a held-out score without a gain makes of the learning rate.
BACK_OFF = 0.5


def rate(spec: RefinementSpec, step: int) -> float:
    """The learning rate of a step, counted from 1."""
    if step <= spec.warmup:
        return spec.learning_rate * step / spec.warmup
    done = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return spec.learning_rate * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)


def chosen_windows(count: int, each: int, step: int, seed: int) -> Tensor:
    """Which of `count` windows a step (from 1) reads: `each`, all in turn, shuffled for every turn."""
    places = range((step - 1) * each, step * each)
    orders = {
        turn: torch.randperm(count, generator=torch.Generator().manual_seed(seed + turn))
        for turn in {place // count for place in places}
    }
    return torch.stack([orders[place // count][place % count] for place in places])


def step_precision(device: torch.device) -> torch.dtype | None:
    """What a step's products are made in on a device; None is the model's own precision.

    GPUs multiply in bfloat16 several times as fast as in float32. What moves, its gradients and what Adam
    remembers are float32 either way, and points are scored in the model's own precision.
    """
    return torch.bfloat16 if device.type == "cuda" else None


class Teacher:
    """What is kept of the dense model on training windows, from when a step first reads them."""

    def __init__(self, model: nn.Module, windows: Tensor, spec: RefinementSpec) -> None:
        """`model` has its `RefinableLinear`s; `windows` (windows, window)."""
        self._model, self._windows, self._spec = model, windows, spec
        self._layers = [each for each in model.modules() if isinstance(each, RefinableLinear)]
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, chosen: Tensor) -> DenseTop:
        """Of the windows `chosen`, in that order.

        Raises:
            ScoringError: a non-finite logit of the dense model.
        """
        places = chosen.tolist()
        new = [place for place in dict.fromkeys(places) if place not in self._known]
        if new:
            # A window at a time: what is known of it must not depend on which others were read with it.
            window, top_k = self._windows.shape[1], self._spec.top_k
            with bypassed(self._layers):
                top = dense_top(self._model, self._windows[new], window, top_k, CALIBRATION_TEXT)
            self._known |= dict(zip(new, zip(top.ids, top.logs, strict=True), strict=True))
        ids, logs = zip(*(self._known[place] for place in places), strict=True)
        return DenseTop(torch.stack(ids), torch.stack(logs))


class Shares:
    """The gradient of the KL over training windows: of a whole step, or of one worker's share of it."""

    def __init__(
        self, model: nn.Module, moving: Mapping[str, nn.Parameter], windows: Tensor, spec: RefinementSpec
    ) -> None:
        """`model` has its `RefinableLinear`s, and `moving` is of them; `windows` (windows, window)."""
        self._model, self._moving, self._windows, self._spec = model, moving, windows, spec
        self._teacher = Teacher(model, windows, spec)
        self._device = next(model.parameters()).device
        self._blocks = decoder_blocks(model)[1]

    def share(self, step: int, place: int, count: int) -> float:
        """Leave in what moves the gradient of share `place` of `count` of a step (from 1); returns its KL.

        Shares are runs of the step's windows. Gradient and KL, nats/token, are parts of the mean over all of
        the step's tokens: those of all shares add up to it.
        """
        spec, window = self._spec, self._windows.shape[1]
        each = windows_of(spec.tokens, window)
        chosen = chosen_windows(len(self._windows), each, step, spec.seed).tensor_split(count)[place]
        for value in self._moving.values():
            value.grad = None
        total = 0.0
        for part in chosen.split(max(1, spec.batch_tokens // window)) if len(chosen) else ():
            loss = self._loss(part) / (each * (window - 1))
            total += loss.item()
            loss.backward()
        return total

    def _loss(self, chosen: Tensor) -> Tensor:
        """KL summed over the predicted tokens of some training windows, nats."""
        device = self._device
        keep = checkpointed(self._blocks) if self._spec.checkpointed else contextlib.nullcontext()
        low = step_precision(device)
        mixed = contextlib.nullcontext() if low is None else torch.autocast(device.type, low)
        teacher = self._teacher.of(chosen)
        batch = self._windows[chosen].to(device)
        predicted = torch.full((len(batch),), batch.shape[1] - 1, device=device)
        with torch.enable_grad(), keep:
            with mixed:
                logits = self._model(batch, use_cache=False).logits
            return window_divergence(logits, teacher, predicted).sum()


class Helping:
    """A helper's side of a run: its share of each step, at the factors it is sent."""

    def __init__(self, shares: Shares, pieces: Pieces) -> None:
        self.share, self.receive, self.piece = shares.share, pieces.set_values, pieces.gradients


@contextlib.contextmanager
def helping(
    model: nn.Module, store: Ranks, allocation: Allocation, windows: Tensor, spec: RefinementSpec
) -> Iterator[Helping]:
    """While open, `model`, which is dense when this starts, answers for shares of what `refine` does on the
    same training `windows`."""
    with refinable(model, allocation, store, min(spec.tokens, spec.batch_tokens)) as moving:
        yield Helping(Shares(model, moving, windows, spec), Pieces(list(moving.values()), PIECE))


class Refinement:
    """One run: where its factors stand, what Adam remembers, and the best point so far."""

    def __init__(
        self,
        model: nn.Module,
        moving: Mapping[str, nn.Parameter],
        held: ScoredText,
        top: DenseTop,
        spec: RefinementSpec,
        gradient: Callable[[int], float],
    ) -> None:
        """`top` is what is kept of the dense model on the windows of `held`; `gradient` leaves that of a
        whole step (from 1) in what moves, and returns its KL, nats/token."""
        self._moving, self._spec, self._gradient = moving, spec, gradient
        self.points = HeldOut(model, moving, held, top, spec.batch_tokens)
        self._adam = torch.optim.Adam(list(moving.values()), lr=spec.learning_rate)
        self.step, self._scale = 0, 1.0

    @property
    def out_of_patience(self) -> bool:
        scores = self.points.scores
        return len(scores) - 1 - scores.index(self.points.best_score) >= self._spec.patience

    def evaluate(self) -> None:
        """Score where it stands, and go back to the best point where that was better; raises ScoringError as
        `HeldOut.score` does."""
        self.points.score(self.step)
        if self.points.best_score[0] != self.step:
            self._go_back()

    @torch.no_grad()
    def _go_back(self) -> None:
        """To the best point, at a lower rate. Adam remembers how large gradients are, not where they led."""
        self._scale *= BACK_OFF
        for name, value in self._moving.items():
            value.copy_(self.points.best[name])
            if value in self._adam.state:
                self._adam.state[value]["exp_avg"].zero_()

    def advance(self) -> float:
        """One step of Adam; returns the KL of its windows before it, nats/token.

        Raises:
            ScoringError: a loss or a gradient that is not finite; the factors have not moved.
        """
        total = self._gradient(self.step + 1)
        norm = nn.utils.clip_grad_norm_(self._moving.values(), self._spec.clip).item()
        for name, value in (("loss", total), ("norm of the gradients", norm)):
            if not math.isfinite(value):
                raise ScoringError(f"the {name} of step {self.step + 1} is {value}")
        self.step += 1
        self._adam.param_groups[0]["lr"] = self._scale * rate(self._spec, self.step)
        self._adam.step()
        return total

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a killed run needs to go on."""
        tensors: dict[str, Tensor] = {}
        for name, value in self._moving.items():
            tensors |= {f"now.{name}": value, f"best.{name}": self.points.best[name]}
            remembered = self._adam.state.get(value, {})
            tensors |= {f"{key}.{name}": part for key, part in remembered.items() if key != "step"}
        return tensors, {"step": self.step, "scale": self._scale, "scores": self.points.scores}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step, self._scale = facts["step"], facts["scale"]
        self.points.scores = [(step, kl) for step, kl in facts["scores"]]
        with torch.no_grad():
            for name, value in self._moving.items():
                value.copy_(tensors[f"now.{name}"])
                self.points.best[name] = tensors[f"best.{name}"]
                if self.step:
                    self._adam.state[value] = {
                        "step": torch.tensor(float(self.step)),
                        **{k: tensors[f"{k}.{name}"].to(value.device) for k in ("exp_avg", "exp_avg_sq")},
                    }


def refuse_what_does_not_fit(model: nn.Module, allocation: Allocation, device: torch.device) -> None:
    """A run by steps that a GPU has no room for, whatever its batches: activations come on top.

    Raises:
        RankfrontError: says what it needs and what is free.
    """
    if device.type != "cuda":
        return
    numbers = 0
    for name, rank in allocation:
        weight = model.get_submodule(name).weight
        numbers += (rank or 0) * sum(weight.shape)  # type: ignore[arg-type, union-attr]
    needed, free = STEP_BYTES * numbers, free_bytes(device)
    if needed > free:
        raise RankfrontError(
            f"refine: steps on {numbers:,} numbers need {needed / 2**30:.1f} GiB of the GPU, and "
            f"{free / 2**30:.1f} GiB are free. {FEWER_NUMBERS}"
        )


def refine(
    model: nn.Module,
    store: Ranks,
    allocation: Allocation,
    texts: Texts,
    spec: RefinementSpec,
    path: Path,
    facts: Mapping[str, Any],
    helpers: Sequence[Helper] = (),
) -> Iterator[RefinementStep]:
    """Refine `allocation` on `texts.training` and leave the best point at `path`, with `facts` in its
    manifest. `model` is dense when this starts, and as it was when it ends.

    The run's state is in `<path>.partial` until then. `helpers` take shares of the steps, each from when it
    is ready and as long as it answers; what the last step tells names those that were left out.

    Raises:
        RankfrontError: nothing to refine, float16, a GPU without room for it, or a loss that is not finite
            before any step was better than the start; and what a helper finds wrong.
        torch.OutOfMemoryError: the state of the last held-out score is there to go on from.
    """
    like = next(model.parameters())
    if like.dtype == torch.float16:
        raise RankfrontError("refine: gradients vanish in model.dtype float16; need bfloat16 or float32")
    refuse_what_does_not_fit(model, allocation, like.device)
    held, partial = texts.held, path.with_name(f"{path.name}.partial")
    team = Team(helpers, allocation, spec)
    top = dense_top(model, held.windows, spec.batch_tokens, spec.top_k, held.name)
    with refinable(model, allocation, store, min(spec.tokens, spec.batch_tokens)) as moving:
        shares = Shares(model, moving, texts.training, spec)
        pieces = Pieces(list(moving.values()), PIECE)
        run = Refinement(
            model, moving, held, top, spec, lambda step: team.gradient(step, shares.share, pieces)
        )
        training_kl, ended = yield from _steps(run, team, spec, partial)
        run.points.keep(path, allocation, spec, ended, facts)
    partial.unlink(missing_ok=True)
    # Only now: who hears of an end finds its file.
    yield run.points.told(run.step, spec.steps, training_kl, "; ".join([ended, *team.left_out]), team.size)


def _steps(
    run: Refinement, team: Team, spec: RefinementSpec, partial: Path
) -> Generator[RefinementStep, None, tuple[float | None, str]]:
    """Steps until one of the ends; returns the last training KL, and which end it was, in words."""
    if partial.exists():
        run.restore(*read(partial))
    else:
        run.evaluate()  # a start that has no divergence cannot be refined: raised as it is
    training: float | None = None
    ended = None
    while ended is None:
        yield run.points.told(run.step, spec.steps, training, workers=team.size)
        if run.step >= spec.steps:
            ended = f"{spec.steps} steps"
        elif run.out_of_patience:
            ended = f"no better held-out point in {spec.patience} scores"
        else:
            try:
                training = run.advance()
                if run.step % spec.evaluate_every == 0 or run.step == spec.steps:
                    run.evaluate()
                    write(partial, *run.state())
            except ScoringError as error:
                if run.points.best_score[0] == 0:
                    raise RankfrontError(
                        f"refine: {error}, and no step before it was better than the start; "
                        f"try a smaller refine.learning_rate than {spec.learning_rate:g}"
                    ) from error
                ended = str(error)
    return training, ended
