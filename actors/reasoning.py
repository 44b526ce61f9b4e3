"""Multiple-choice scoring: packed so that no token is encoded twice and next to none is padding.

The choices of an example share their longest common prefix; each is a branch behind it. Such trees
lie in the lanes of a batch, several in one where they are short, kept apart by the attention mask
(`actors.attention`) and by position ids that restart. One forward pass over the batch then scores all of its
choices. What is no attention, and may run on from tree to tree, is refused beforehand (`actors.packing`).
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from actors.attention import attention_mask
from actors.nonfinite import culprit, finite
from actors.relay import passes, upload
from actors.samples import pack_bits, pack_floats
from actors.tasks import Example
from actors.types import RankfrontError, ScoringError, TaskScore

Tensor = torch.Tensor

# Tokens of one forward pass; a tree of more has one of its own.
BATCH_TOKENS = 512
# Trees shorter than this share a lane. Attention is quadratic in the lane, and mostly between strangers.
LANE_TOKENS = 128
# A lane may begin with a tree this much shorter than the first one's: the rest of it may stay padding.
FILLED = 7 / 8


@dataclass(frozen=True)
class PackedBatch:
    """Lanes of trees: input ids (B, L), position ids (B, L), mask (B, L, L) True where attention is allowed.

    `keep` (p,) are the positions whose logits are needed, counted through all lanes; `index` (w,) into them,
    `token` (w,), and `slot` (w,) say which wanted token adds to which choice (see `Packed.slots`).
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    keep: Tensor
    index: Tensor
    token: Tensor
    slot: Tensor


@dataclass(frozen=True)
class Packed:
    """Choices ready to be scored any number of times: nothing is tokenised again. `slots` counts them."""

    name: str
    slots: int
    batches: tuple[PackedBatch, ...]

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass over all of them, padding included."""
        return sum(batch.ids.numel() for batch in self.batches)


@dataclass(frozen=True)
class PackedTask(Packed):
    """A task of questions."""

    normalised: bool
    examples: tuple[Example, ...]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both, and how many of them are context, split as lm-evaluation-harness does.

    Spaces that end the context belong to the continuation; the whole is tokenised at once.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer(stripped + continuation, verbose=False)["input_ids"]
    return whole, len(tokenizer(stripped, verbose=False)["input_ids"])


def pack(
    name: str, normalised: bool, examples: Sequence[Example], tokenizer: Any, limit: int | None = None
) -> PackedTask:
    """Tokenise and pack `examples`; `limit` is the model's context length, if it has one.

    Raises:
        RankfrontError: an example longer than the model's context.
    """
    trees = []
    for number, example in enumerate(examples):
        pairs = zip(example.contexts, example.continuations, strict=True)
        encoded = [encode_pair(tokenizer, context, continuation) for context, continuation in pairs]
        longest = max(len(ids) for ids, _ in encoded)
        if limit is not None and longest > limit:
            where = example.origin or f"{name}: example {number}"
            raise RankfrontError(f"{where} has {longest} tokens, the model reads {limit}")
        trees.append(encoded)
    return PackedTask(name, sum(map(len, trees)), pack_trees(trees), normalised, tuple(examples))


def pack_trees(encoded: Sequence[Sequence[tuple[list[int], int]]]) -> tuple[PackedBatch, ...]:
    """Trees in lanes, the widest first: of each the choices' token ids, and how many are not scored.

    Choices have their slots in the order they are given.
    """
    trees = []
    slot = 0
    for choices in encoded:
        trees.append(_Tree(choices, slot))
        slot += len(choices)
    return tuple(map(_pack_batch, _lanes(trees)))


def _lanes(trees: Sequence[_Tree]) -> Iterator[list[list[_Tree]]]:
    """The lanes of each batch. A lane is filled with the widest trees that it has room for."""
    waiting = sorted(trees, key=lambda tree: tree.size)
    while waiting:
        widest = waiting[-1].size
        width = widest * max(1, LANE_TOKENS // widest)
        lanes: list[list[_Tree]] = []
        while waiting and len(lanes) < max(1, BATCH_TOKENS // width):
            if lanes and waiting[-1].size < FILLED * widest:
                break
            lane, room = [], width
            while at := bisect_right(waiting, room, key=lambda tree: tree.size):
                lane.append(waiting.pop(at - 1))
                room -= lane[-1].size
            lanes.append(lane)
        yield lanes


class _Tree:
    """The token tree of one example: a shared prefix and one branch per choice, one after another.

    Of each of its `size` tokens: `ids`, `positions` in its choice, `branches` (-1 in the prefix). `wanted`
    are (place of the token that predicts, token, slot of the choice).
    """

    def __init__(self, encoded: Sequence[tuple[list[int], int]], slot: int) -> None:
        inputs = [ids[:-1] for ids, _ in encoded]  # the last token is only ever predicted
        shared = 0
        for column in zip(*inputs, strict=False):
            if any(token != column[0] for token in column):
                break
            shared += 1
        self.ids = inputs[0][:shared]
        self.positions = list(range(shared))
        self.branches = [-1] * shared
        self.wanted: list[tuple[int, int, int]] = []
        for choice, (whole, context) in enumerate(encoded):
            offset = len(self.ids) - shared
            for place in range(context - 1, len(whole) - 1):
                at = place if place < shared else offset + place
                self.wanted.append((at, whole[place + 1], slot + choice))
            self.ids += inputs[choice][shared:]
            self.positions += range(shared, len(inputs[choice]))
            self.branches += [choice] * (len(inputs[choice]) - shared)
        self.size = len(self.ids)


def _pack_batch(lanes: Sequence[Sequence[_Tree]]) -> PackedBatch:
    width = max(sum(tree.size for tree in lane) for lane in lanes)
    shape = len(lanes), width
    # Padding is a tree of its own in each lane, that nothing is read from.
    ids, positions, branch_of = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    tree_of = torch.full(shape, -1)
    wanted: list[tuple[int, int, int]] = []  # (position through all lanes, token, slot)
    for row, lane in enumerate(lanes):
        start = 0
        for number, tree in enumerate(lane):
            there = row, slice(start, start + tree.size)
            ids[there], positions[there] = torch.tensor(tree.ids), torch.tensor(tree.positions)
            tree_of[there], branch_of[there] = number, torch.tensor(tree.branches)
            wanted += [(row * width + start + at, token, slot) for at, token, slot in tree.wanted]
            start += tree.size
    keep = sorted({position for position, _, _ in wanted})
    at = {position: index for index, position in enumerate(keep)}
    same_tree = tree_of[:, :, None] == tree_of[:, None, :]
    reachable = (branch_of[:, None, :] == -1) | (branch_of[:, :, None] == branch_of[:, None, :])
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return PackedBatch(
        ids=ids,
        positions=positions,
        mask=same_tree & reachable & causal,
        keep=torch.tensor(keep),
        index=torch.tensor([at[position] for position, _, _ in wanted]),
        token=torch.tensor([token for _, token, _ in wanted]),
        slot=torch.tensor([slot for _, _, slot in wanted]),
    )


@contextlib.contextmanager
def _head_reads(model: nn.Module, keep: Tensor) -> Iterator[None]:
    """While open, the head is given the hidden states at `keep` (p,) alone, as one row: (1, p, hidden).

    In passes of this thread, as others may be under way (`actors.relay`); and before they change device.
    """
    own = threading.get_ident()

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != own:
            return None
        kept = keep.to(args[0].device, non_blocking=True)
        return (args[0].flatten(0, 1)[kept][None], *args[1:])

    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(gather, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def log_likelihoods(model: nn.Module, task: Packed) -> Tensor:
    """Summed log-probability of every choice of every tree, in order: (slots,) float64, nats.

    Raises:
        ScoringError: a non-finite value, naming the task, the batch (from 0) and the layer it began in.
    """
    sums = torch.zeros(task.slots, dtype=torch.float64)
    works = (partial(token_scores, model, batch) for batch in task.batches)
    with contextlib.closing(passes(model, works)) as found:
        for number, (batch, (scores, sound)) in enumerate(zip(task.batches, found, strict=True)):
            scores = scores.cpu()
            if not (torch.isfinite(scores).all() and sound):
                raise ScoringError(
                    f"{task.name}: non-finite log-likelihood in batch {number} of {len(task.batches)}, "
                    f"{culprit(model, partial(_forward, model, batch))}"
                )
            sums.index_add_(0, batch.slot, scores)
    return sums


def _forward(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Logits of a batch, at every position unless the head reads fewer."""
    parameter = next(model.parameters())
    there, dtype = partial(upload, device=parameter.device), parameter.dtype
    output = model(
        there(batch.ids),
        attention_mask=attention_mask(model, batch.mask, batch.positions, parameter.device, dtype),
        position_ids=there(batch.positions),
        use_cache=False,
    )
    return output.logits  # type: ignore[no-any-return]


def token_scores(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The log-probability of every wanted token (w,) float64, and whether all logits are numbers."""
    with _head_reads(model, batch.keep):
        logits = _forward(model, batch)[0]
    there = partial(upload, device=logits.device)
    scores = logits.float().log_softmax(-1)[there(batch.index), there(batch.token)]
    return scores.double(), finite(logits)


def score_task(model: nn.Module, task: PackedTask) -> TaskScore:
    """Accuracy, normalised accuracy and margin over the task's examples; raises as `log_likelihoods` does."""
    return task_score(task, log_likelihoods(model, task))


def task_score(task: PackedTask, sums: Tensor) -> TaskScore:
    """The score of a task whose choices have the log-likelihoods `sums` (slots,).

    `acc`: the choice of highest log-likelihood is the gold one; `acc_norm`: of highest
    log-likelihood per character. Ties go to the first choice, as numpy's argmax does there.
    """
    found = sums.tolist()
    hits, normalised, margins = [], [], []
    slot = 0
    for example in task.examples:
        values = found[slot : slot + len(example.continuations)]
        slot += len(values)
        per_character = [
            value / max(length, 1) for value, length in zip(values, example.lengths, strict=True)
        ]
        hits.append(values.index(max(values)) == example.gold)
        normalised.append(per_character.index(max(per_character)) == example.gold)
        margins.append(values[example.gold] - max(v for i, v in enumerate(values) if i != example.gold))
    count = len(task.examples)
    return TaskScore(
        examples=count,
        acc=sum(hits) / count,
        acc_norm=sum(normalised) / count if task.normalised else None,
        margin=sum(margins) / count,
        hits=pack_bits(hits),
        hits_norm=pack_bits(normalised) if task.normalised else "",
        margins=pack_floats(margins),
    )
