"""Whether a model scores packed choices as it does each alone, seen before a study relies on it.

An attention mask keeps trees apart only where layers mix tokens by attention that heeds it. Recurrent, linear
attention and convolution layers run from one branch into the next whatever the mask says, and some models
make positions, windows or biases of their own from a token's place in the lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from actors.reasoning import Packed, PackedBatch, pack_trees, token_scores
from actors.types import RankfrontError

Tensor = torch.Tensor

# What rounding may come to, nats a token: passes of other shapes add up in another order. In float32 it is
# below 1e-5; at 16 bits logits of some twenty are rounded to an eighth and to a hundredth.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.125, torch.float16: 0.02}
# Choices of a batch that are scored alone as well: so many of the longest, and of those at the lanes' ends.
CHOICES = 2
# The made-up trees: tokens that the two choices of each share, and tokens of a choice of its own.
SHARED, OWN = 6, (4, 5)
# What the code of a model raises that takes no such mask or position ids.
_NOT_TAKEN = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)
_CAUSES = (
    "its layers do not keep to an attention mask, as recurrent, linear attention and convolution layers do "
    "not, or make positions or windows of their own"
)


def check_packing(model: nn.Module, tasks: Sequence[Packed]) -> None:
    """Hold a small made-up batch, two trees in a lane, and those batches of `tasks` with the longest choice
    and the longest lanes, where a window shows, against plain passes; nothing where there are no tasks.

    What is not finite is left to calibration and to scoring, which name the layer.

    Raises:
        RankfrontError: the model takes no packed batch, a choice's scores depend on tokens of others, or they
            differ beyond rounding from those of the choice alone.
    """
    batches = [batch for task in tasks for batch in task.batches]
    if not batches:
        return
    small = _made_up(model)
    longest = max(batches, key=lambda batch: int(batch.positions.max()))
    widest = max(batches, key=lambda batch: batch.ids.shape[1])
    if _leaks(model, small):
        raise _refusal(model, f"tokens of one choice change the scores of another: {_CAUSES}")
    rounding = ROUNDING[next(model.parameters()).dtype]
    for batch in (small, longest, *([] if widest is longest else [widest])):
        difference = _difference(model, batch)
        if difference > rounding:
            found = f"{difference:.2g} nats a token off those of a choice alone, where rounding is below"
            raise _refusal(model, f"scores are {found} {rounding:g}: {_CAUSES}")


def _refusal(model: nn.Module, why: str) -> RankfrontError:
    return RankfrontError(
        f"scoring.tasks, scoring.bias: {type(model).__name__} cannot score choices packed into one pass; "
        f"{why}. Leave both out, and measure tasks with rankfront evaluate --tasks, each choice alone"
    )


def _made_up(model: nn.Module) -> PackedBatch:
    """Two trees of two choices each in one lane, of tokens drawn from the model's vocabulary."""
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    trees = []
    for _ in range(2):
        shared = tokens(SHARED)
        trees.append([([*shared, *tokens(own)], SHARED) for own in OWN])
    [batch] = pack_trees(trees)
    return batch


def _scores(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The log-probabilities of the wanted tokens (w,) of a batch."""
    try:
        return token_scores(model, batch)[0].cpu()
    except torch.OutOfMemoryError:
        raise
    except _NOT_TAKEN as error:
        raise _refusal(model, f"it takes no attention mask of trees: {error}") from error


@torch.inference_mode()
def _leaks(model: nn.Module, batch: PackedBatch) -> bool:
    """Whether a choice's scores change with tokens that it may not see, more than from pass to pass."""
    before = _scores(model, batch)
    noise = (_scores(model, batch) - before).abs().max()
    others = (batch.ids + 1) % len(model.get_input_embeddings().weight)  # type: ignore[operator]
    for choice in _choices(batch):
        seen = torch.zeros_like(batch.mask[:, 0])
        seen[choice.lane] = choice.sees
        after = _scores(model, replace(batch, ids=batch.ids.where(seen, others)))
        if (after - before)[choice.wanted].abs().max() > noise:
            return True
    return False


@torch.inference_mode()
def _difference(model: nn.Module, batch: PackedBatch) -> float:
    """Between the log-probabilities of choices, packed and alone: the largest mean over the tokens of one, in
    nats. 0 where a choice alone is not finite."""
    scores, device = _scores(model, batch), next(model.parameters()).device
    choices, largest = _choices(batch), 0.0
    chosen = [
        *sorted(choices, key=lambda choice: int(choice.places.max()))[-CHOICES:],
        *sorted(choices, key=lambda choice: int(choice.sees.nonzero().max()))[-CHOICES:],
    ]
    for choice in {id(choice): choice for choice in chosen}.values():
        ids = batch.ids[choice.lane][choice.sees]
        logits = model(ids[None].to(device), use_cache=False).logits[0].cpu()
        plain = logits[choice.places].float().log_softmax(-1)
        plain = plain.gather(-1, batch.token[choice.wanted, None])[:, 0].double()
        if torch.isfinite(plain).all():
            found = (scores[choice.wanted] - plain).abs().mean().nan_to_num(nan=torch.inf)
            largest = max(largest, found.item())
    return largest


@dataclass(frozen=True)
class _Choice:
    """A choice in a batch: which of the wanted tokens are its own (t,), its lane, which tokens of that its
    last token sees (L,), and at which of these each wanted token is predicted (t,)."""

    wanted: Tensor
    lane: int
    sees: Tensor
    places: Tensor


def _choices(batch: PackedBatch) -> list[_Choice]:
    """Those of a batch, by their slots."""
    width = batch.ids.shape[1]
    lane, at = batch.keep[batch.index] // width, batch.keep[batch.index] % width
    depth = batch.positions[lane, at]
    found = []
    for slot in batch.slot.unique():
        wanted = (batch.slot == slot).nonzero()[:, 0]
        last = wanted[depth[wanted].argmax()]
        row, end = int(lane[last]), int(at[last])
        found.append(_Choice(wanted, row, batch.mask[row, end], depth[wanted]))
    return found
