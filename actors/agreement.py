"""How far two runs of one model may be apart: its logits, and the metrics that were recorded of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from actors.samples import unpack_floats
from actors.types import RankfrontError, Score

Tensor = torch.Tensor

# float32 rounding in the order of a long sum, relative to the largest logit; beyond it the folder is
# not the model that was scored.
LOGIT_TOLERANCE = 1e-3
# In half precision, how much further off a float32 run the export may be than the searched model is: 0.8 to
# 1.2 times as far on random models of three families, and pivoted forms round up to 4 times as much.
ROUNDING_RATIO = 4
# Means over thousands of tokens, of which rounding moves some up and some down.
NLL_TOLERANCE_HALF = 0.05


def compare_logits(found: Tensor, expected: Tensor, exact: Tensor) -> str:
    """Hold reloaded logits against the searched model's, in words.

    `exact` are those of a float32 run of the same factors: `expected` itself where that is one. Else both
    are off it by rounding, which a model may amplify as it likes: the reloaded ones may not be much
    further off than the searched ones are.

    Raises:
        RankfrontError: the difference is more than rounding, or not a number.
    """
    largest = exact.abs().max().item()
    difference = (found - expected).abs().max().item()
    rounding, apart = _rms(expected - exact), _rms(found - exact)
    if rounding == 0:
        if not difference <= LOGIT_TOLERANCE * largest:
            raise RankfrontError(
                f"the reloaded logits differ by {difference:.3g} (largest logit {largest:.3g})"
            )
        return f"max abs difference {difference:.2e} (largest logit {largest:.1f})"
    if not apart <= ROUNDING_RATIO * rounding:
        raise RankfrontError(
            f"the reloaded logits are {apart:.3g} off a float32 run of the same factors, the searched "
            f"model's are {rounding:.3g} (root mean squares; largest logit {largest:.3g}): beyond "
            f"{ROUNDING_RATIO} times as much it is not rounding"
        )
    return (
        f"{apart:.2e} off a float32 run of the same factors, the searched model's are {rounding:.2e} "
        f"(root mean squares; largest logit {largest:.1f})"
    )


def _rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


def hold(score: Score, recorded: Mapping[str, float], dtype: str) -> list[str]:
    """Hold recorded metrics against the score of a model whose weights are kept in `dtype`, in words.

    Losses may differ by rounding; shares by one answer of each task or set, and where the weights are of 16
    bits by a standard error; sums of log-probabilities, such as margins, by rounding, or likewise by a
    standard error. `kl` is not held: it takes the dense model to measure.

    Raises:
        RankfrontError: every metric that differs by more or was not measured.
    """
    lines, mistakes = [], []
    for name, value in recorded.items():
        found = score.metrics.get(name)
        if name == "kl":
            lines.append(f"kl: {value:.6f} recorded; not held, as it takes the dense model")
        elif found is None:
            mistakes.append(
                f"{name} is {value:.6f} recorded, and not measured: the scoring section that is read asks "
                "for less than was scored"
            )
        elif not abs(found - value) <= _allowed(score, name, value, dtype):
            unit = " nats/token" if _is_loss(name) else ""
            mistakes.append(f"{name} is {found:.6f}{unit} reloaded, {value:.6f} recorded")
        else:
            lines.append(f"{name} on the search split: {found:.6f} reloaded, {value:.6f} recorded")
    if mistakes:
        raise RankfrontError("\n".join(mistakes))
    return lines


def _allowed(score: Score, name: str, recorded: float, dtype: str) -> float:
    """How much a metric of a score may be off the recorded value."""
    exact = dtype == "float32"
    tolerance = LOGIT_TOLERANCE if exact else NLL_TOLERANCE_HALF
    if _is_loss(name):
        return tolerance * recorded
    answer = _one_answer(score, name)
    rounding = tolerance * max(1.0, abs(recorded)) if answer is None else answer * (1 + 1e-9)
    error = score.stderrs.get(name, math.nan)
    return rounding if exact or math.isnan(error) else max(rounding, error)


def _is_loss(name: str) -> bool:
    return name.partition(".")[0] == "nll"


def _one_answer(score: Score, name: str) -> float | None:
    """How much one other answer to each task or set it is of moves a share at most; None for what is none."""
    kind = name.rpartition(".")[2]
    if name.startswith("reasoning.") and kind in ("acc", "acc_norm"):
        only = name.removeprefix("reasoning.").rpartition(".")[0]
        counts = [
            task.examples
            for each, task in score.tasks.items()
            if only in ("", each) and getattr(task, kind) is not None
        ]
        return math.fsum(1 / count for count in counts) / len(counts)
    if name.startswith("bias.") and kind != "likelihood_diff":
        samples = unpack_floats(score.bias[name.split(".")[1]].samples[kind])
        # icat is lms min(ss, 1 - ss) / 0.5: an answer of ss moves it twice as much, one of lms as much
        return (3 if kind == "icat" else 1) / len(samples)
    return None
