"""What a refinement is asked for, how far it is, and the name of what it leaves. Standard library only.

The maths is in `actors.refine` and `actors.refit`, the file in `actors.refined`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.types import Allocation, digest

# Part of every fingerprint: raised when the steps or the file mean something else.
FORMAT = 2
FOLDER = "refined"
"""Of a study: its refined factors, one file each, `<first 16 digits of the fingerprint>.safetensors`."""

GRADIENT, REFIT = "gradient", "refit"
"""How factors are refined: by steps of Adam, or in closed form."""

# Adam's, for every number of the factors: its value, gradient and two moments, in float32.
STEP_BYTES = 16
FEWER_NUMBERS = (
    f"Adam keeps {STEP_BYTES} bytes for every number of the factors, whatever the batch: a smaller budget "
    "has fewer of them, refine.method: refit (--method refit) needs no Adam, or take a GPU with more memory"
)
"""What helps where there is no memory for these."""

# What changes rounding, time and memory, not what is computed.
SPEED = ("batch_tokens", "checkpointed")
# All that a refit reads, beside those.
READ_BY_REFIT = ("method", "held_out", "evaluate_every", "top_k")


@dataclass(frozen=True)
class RefinementSpec:
    """How factors are moved towards the dense model over calibration windows, ranks fixed.

    `gradient`: Adam on the KL to the dense model. A step reads `tokens` (rounded down to whole windows, at
    least one), in batches of `batch_tokens`. The learning rate rises over `warmup` steps and falls as a
    cosine to a tenth at `steps`; `clip` bounds the norm of all gradients together. The first `held_out`
    tokens of the search split are scored every `evaluate_every` steps: where that is no better the run goes
    back to its best point and halves the rate, and after `patience` such scores it ends. `checkpointed`
    computes activations twice instead of keeping them.

    `refit`: each target in turn by least squares (`actors.refit`). A step is a decoder block; of the other
    settings `held_out`, `evaluate_every` and `top_k` mean the same, and the rest are not read.
    """

    steps: int = 200
    tokens: int = 1_536
    learning_rate: float = 1e-4
    warmup: int = 10
    clip: float = 1.0
    held_out: int = 8_192
    evaluate_every: int = 10
    patience: int = 5
    top_k: int = 64
    seed: int = 0
    batch_tokens: int = 1_024
    checkpointed: bool = False
    method: str = GRADIENT

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def windows_of(tokens: int, window: int) -> int:
    """The windows of `window` tokens that so many tokens are read as: whole ones, at least one."""
    return max(1, tokens // window)


@dataclass(frozen=True)
class RefinementStep:
    """How far a refinement is. `training` is the KL of this step's own windows before it, None at the start;
    `held_out` the last score of the held-out windows and `best` the lowest, at `best_step`: nats/token.
    `ended` says why no step follows, and who was left out; None while one does. `workers` made it."""

    step: int
    steps: int
    training: float | None
    held_out: float
    best: float
    best_step: int
    ended: str | None = None
    workers: int = 1


def refinement_fingerprint(parts: Mapping[str, str], allocation: Allocation, spec: RefinementSpec) -> str:
    """Identity of refined factors: model, both texts, factors they begin with, ranks, and the steps.

    `parts` are the fingerprints of a preparation. What a method does not read makes no other identity.
    """
    chosen = {key: parts[key] for key in ("model", "tokenizer", "calibration", "search", "factors")}
    steps = spec.to_dict()
    if spec.method == REFIT:
        steps = {key: steps[key] for key in READ_BY_REFIT}
    else:
        steps = {key: value for key, value in steps.items() if key not in (*SPEED, "method")}
    return digest(["refined", FORMAT, chosen, allocation.key, steps])


def variant_of(fingerprint: str, spec: RefinementSpec) -> str:
    """The name of refined factors in the evaluations table: `refined-` or `refit-`, and who they are."""
    return f"{'refit' if spec.method == REFIT else 'refined'}-{fingerprint[:8]}"


def pattern_of(variant: str) -> str:
    """A shell pattern for the name of a variant's file in the study's `FOLDER`."""
    return f"{variant.rpartition('-')[2]}*.safetensors"


def file_of(fingerprint: str) -> str:
    """The name of their file in the study's `FOLDER`."""
    return f"{fingerprint[:16]}.safetensors"
