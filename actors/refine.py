"""Refine the factors of one allocation: Adam on the KL to the dense model, ranks fixed, nothing else moves.

The teacher is what `actors.divergence` keeps of the dense model on the calibration windows; there are no
labels. The last windows are held out. What is kept is the point with the lowest divergence on them, and the
start is one of the points: refining never makes it larger.

A run is a function of the model, the factors, the windows and the spec. Its state is on disk after every
held-out score, so a run that was killed takes the same steps again and ends at the same numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.divergence import DenseTop, dense_top
from actors.linears import bias_of, weight_of
from actors.low_rank import Ranks, TrialLinear, factored_is_cheaper
from actors.models import decoder_blocks
from actors.passes import checkpointed
from actors.perplexity import window_divergence, window_losses
from actors.refined import BIAS, LEFT, RIGHT, read, write
from actors.refinement import RefinementSpec, RefinementStep
from actors.types import Allocation, RankfrontError, ScoringError

Tensor = torch.Tensor

# The share of the learning rate that is left at the last step.
FLOOR = 0.1
_NAME = "held-out calibration text"


class RefinableLinear(nn.Module):
    """A target at a rank whose factors and bias move; all else is the dense layer's.

    Parameters are float32; products are made in the precision of what comes in, as a trial makes them.
    """

    def __init__(
        self, dense: nn.Module, left: Tensor, right: Tensor, bias: Tensor | None, tokens: int
    ) -> None:
        """`left` (r, m), `right` (r, n) and `bias` (m,) as a factor store has them; `tokens` of a batch.

        Where the layer has a bias of its own and the factors bring none, it moves from zero.
        """
        super().__init__()
        weight, own = weight_of(dense), bias_of(dense)
        if bias is None and own is not None:
            bias = torch.zeros_like(own)
        self._dense = [dense]  # in a list: its parameters are not ours
        self.left = nn.Parameter(left.T.float().contiguous().clone())
        self.right = nn.Parameter(right.float().contiguous().clone())
        self.bias = None if bias is None else nn.Parameter(bias.float().clone())
        self._factored = factored_is_cheaper(len(left), weight.shape[0], weight.shape[1], tokens)

    @property
    def weight(self) -> Tensor:
        """The dense parameter: some model code reads dtype or device from it."""
        return self._dense[0].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        left, right, bias = self.left.to(x.dtype), self.right.to(x.dtype), bias_of(self._dense[0])
        if self.bias is not None:
            moved = self.bias.to(x.dtype)
            bias = moved if bias is None else bias + moved
        if self._factored:
            return nn.functional.linear(nn.functional.linear(x, right), left, bias)
        return nn.functional.linear(x, left @ right, bias)


@contextlib.contextmanager
def refinable(
    model: nn.Module, allocation: Allocation, store: Ranks, tokens: int
) -> Iterator[dict[str, nn.Parameter]]:
    """While open, every target with a rank is a `RefinableLinear`; yields what moves, by target and part.

    Raises:
        RankfrontError: the allocation is dense.
    """
    before = {name: model.get_submodule(name) for name, rank in allocation if rank is not None}
    if not before:
        raise RankfrontError("refine: every target is dense; there are no factors to refine")
    moving: dict[str, nn.Parameter] = {}
    try:
        for name, rank in allocation:
            if rank is None:
                continue
            dense = before[name].dense if isinstance(before[name], TrialLinear) else before[name]
            factors = store.rank(name, rank, allocation.method_of(name))
            layer = RefinableLinear(dense, *factors, tokens)  # type: ignore[arg-type]
            model.set_submodule(name, layer)
            parts = {LEFT: layer.left, RIGHT: layer.right, BIAS: layer.bias}
            moving |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
        yield moving
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def divided(windows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Windows (windows, window) to train on, and the last `share` of them, which are held out; one at least.

    Raises:
        RankfrontError: fewer than two windows.
    """
    if len(windows) < 2:
        raise RankfrontError(
            f"refine: {len(windows)} calibration window; two are needed, one to train on and one held out"
        )
    held = min(len(windows) - 1, max(1, round(share * len(windows))))
    return windows[:-held], windows[-held:]


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


class Refinement:
    """One run: where its factors stand, what Adam remembers, and the best point so far."""

    def __init__(
        self,
        model: nn.Module,
        moving: dict[str, nn.Parameter],
        windows: Tensor,
        top: DenseTop,
        spec: RefinementSpec,
    ) -> None:
        """`top` is what is kept of the dense model on all of `windows`."""
        self._model, self._moving, self._spec = model, moving, spec
        self._device = next(model.parameters()).device
        self._training, self._held = divided(windows, spec.held_out)
        border = len(self._training)
        # Copies: tensors made in inference mode cannot be kept for a gradient.
        self._teacher = DenseTop(top.ids[:border].clone(), top.logs[:border].clone())
        self._held_top = DenseTop(top.ids[border:], top.logs[border:])
        self._adam = torch.optim.Adam(list(moving.values()), lr=spec.learning_rate)
        self._blocks = decoder_blocks(model)[1]
        self.step = 0
        self.scores: list[tuple[int, float]] = []  # step, nats/token on the held-out windows
        self.best: dict[str, Tensor] = {}

    @property
    def best_score(self) -> tuple[int, float]:
        """Step and nats/token of the best point; of equal ones the first."""
        return min(self.scores, key=lambda score: score[1])

    @property
    def out_of_patience(self) -> bool:
        since = len(self.scores) - 1 - self.scores.index(self.best_score)
        return since >= self._spec.patience

    def evaluate(self) -> None:
        """Score the held-out windows as a trial would be, and keep the point where it is the best.

        Raises:
            ScoringError: no finite divergence.
        """
        found = window_losses(self._model, self._held, self._spec.batch_tokens, _NAME, self._held_top)
        assert found.kl is not None
        kl = found.kl.sum().item() / (len(self._held) * (self._held.shape[1] - 1))
        if not self.scores or kl < self.best_score[1]:
            self.best = {name: value.detach().clone() for name, value in self._moving.items()}
        self.scores.append((self.step, kl))

    def advance(self) -> float:
        """One step of Adam; returns the KL of its windows before it, nats/token.

        Raises:
            ScoringError: a loss or a gradient that is not finite; the factors have not moved.
        """
        spec, window = self._spec, self._training.shape[1]
        each = max(1, spec.tokens // window)
        chosen = chosen_windows(len(self._training), each, self.step + 1, spec.seed)
        self._adam.zero_grad(set_to_none=True)
        total = 0.0
        for part in chosen.split(max(1, spec.batch_tokens // window)):
            loss = self._loss(part) / (each * (window - 1))
            total += loss.item()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self._moving.values(), spec.clip).item()
        for name, value in (("loss", total), ("norm of the gradients", norm)):
            if not math.isfinite(value):
                raise ScoringError(f"the {name} of step {self.step + 1} is {value}")
        self.step += 1
        self._adam.param_groups[0]["lr"] = rate(spec, self.step)
        self._adam.step()
        return total

    def _loss(self, chosen: Tensor) -> Tensor:
        """KL summed over the predicted tokens of some training windows, nats."""
        device = self._device
        keep = checkpointed(self._blocks) if self._spec.checkpointed else contextlib.nullcontext()
        half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        teacher = DenseTop(self._teacher.ids[chosen.to(device)], self._teacher.logs[chosen.to(device)])
        batch = self._training[chosen].to(device)
        predicted = torch.full((len(batch),), batch.shape[1] - 1, device=device)
        with torch.enable_grad(), keep:
            with half:
                logits = self._model(batch, use_cache=False).logits
            return window_divergence(logits, teacher, predicted).sum()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a killed run needs to go on."""
        tensors: dict[str, Tensor] = {}
        for name, value in self._moving.items():
            tensors |= {f"now.{name}": value, f"best.{name}": self.best[name]}
            remembered = self._adam.state.get(value, {})
            tensors |= {f"{key}.{name}": part for key, part in remembered.items() if key != "step"}
        return tensors, {"step": self.step, "scores": self.scores}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step, self.scores = facts["step"], [(step, kl) for step, kl in facts["scores"]]
        with torch.no_grad():
            for name, value in self._moving.items():
                value.copy_(tensors[f"now.{name}"])
                self.best[name] = tensors[f"best.{name}"].to(self._device)
                if self.step:
                    self._adam.state[value] = {
                        "step": torch.tensor(float(self.step)),
                        **{k: tensors[f"{k}.{name}"].to(self._device) for k in ("exp_avg", "exp_avg_sq")},
                    }


def refine(
    model: nn.Module,
    store: Ranks,
    allocation: Allocation,
    windows: Tensor,
    spec: RefinementSpec,
    path: Path,
    facts: Mapping[str, Any],
) -> Iterator[RefinementStep]:
    """Refine `allocation` on `windows` (windows, window) and leave the best point at `path`, with `facts` in
    its manifest. `model` is dense when this starts, and as it was when it ends.

    The run's state is in `<path>.partial` until then.

    Raises:
        RankfrontError: nothing to refine, too little text, float16, or a loss that is not finite before any
            step was better than the start.
    """
    if next(model.parameters()).dtype == torch.float16:
        raise RankfrontError("refine: gradients vanish in model.dtype float16; need bfloat16 or float32")
    divided(windows, spec.held_out)
    partial = path.with_name(f"{path.name}.partial")
    top = dense_top(model, windows, spec.batch_tokens, spec.top_k, "calibration text")
    with refinable(model, allocation, store, min(spec.tokens, spec.batch_tokens)) as moving:
        run = Refinement(model, moving, windows, top, spec)
        training, ended = yield from _steps(run, spec, partial)
        step, kl = run.best_score
        manifest = {
            **facts,
            "ranks": allocation.to_dict(),
            "methods": dict(allocation.methods),
            "spec": spec.to_dict(),
            "ended": ended,
            "step": step,
            "held_out": {"before": run.scores[0][1], "after": kl},
            "scores": run.scores,
        }
        write(path, run.best, manifest)
    partial.unlink(missing_ok=True)
    yield _told(run, spec, training, ended)  # only now: who hears of an end finds its file


def _steps(
    run: Refinement, spec: RefinementSpec, partial: Path
) -> Generator[RefinementStep, None, tuple[float | None, str]]:
    """Steps until one of the ends; returns the last training KL, and which end it was, in words."""
    if partial.exists():
        run.restore(*read(partial))
    else:
        run.evaluate()  # a start that has no divergence cannot be refined: raised as it is
    training: float | None = None
    ended = None
    while ended is None:
        yield _told(run, spec, training)
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
                if run.best_score[0] == 0:
                    raise RankfrontError(
                        f"refine: {error}, and no step before it was better than the start; "
                        f"try a smaller refine.learning_rate than {spec.learning_rate:g}"
                    ) from error
                ended = str(error)
    return training, ended


def _told(
    run: Refinement, spec: RefinementSpec, training: float | None, ended: str | None = None
) -> RefinementStep:
    step, best = run.best_score
    return RefinementStep(run.step, spec.steps, training, run.scores[-1][1], best, step, ended)
