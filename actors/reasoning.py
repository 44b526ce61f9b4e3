"""Multiple-choice scoring: packed so that no token is encoded twice and none is padding.

The choices of an example share their longest common prefix; each is a branch behind it. Several
such trees stand side by side in one row of the batch, kept apart by the attention mask and by
position ids that restart. One forward pass over the row then scores all of its choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from actors.nonfinite import all_finite, culprit
from actors.samples import pack_bits, pack_floats
from actors.tasks import Example
from actors.types import RankfrontError, ScoringError, TaskScore

Tensor = torch.Tensor

# Tokens of one packed row. Attention within a row is quadratic, and mostly between strangers.
ROW_TOKENS = 512


@dataclass(frozen=True)
class PackedRow:
    """One row of trees: input ids (L,), position ids (L,), mask (L, L) True where attention is allowed.

    `keep` (p,) are the positions whose logits are needed; `index` (w,) into them, `token` (w,), and
    `slot` (w,) say which wanted token adds to which choice (see `Packed.slots`).
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
    rows: tuple[PackedRow, ...]

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass over all of them."""
        return sum(len(row.ids) for row in self.rows)


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
    return PackedTask(name, sum(map(len, trees)), pack_rows(trees), normalised, tuple(examples))


def pack_rows(encoded: Sequence[Sequence[tuple[list[int], int]]]) -> tuple[PackedRow, ...]:
    """Trees side by side, the widest first: of each the choices' token ids, and how many are not scored.

    Choices have their slots in the order they are given.
    """
    trees = []
    slot = 0
    for choices in encoded:
        trees.append(_Tree(choices, slot))
        slot += len(choices)
    rows: list[list[_Tree]] = []
    for tree in sorted(trees, key=lambda tree: -tree.size):
        home = next((row for row in rows if sum(t.size for t in row) + tree.size <= ROW_TOKENS), None)
        if home is None:
            rows.append([tree])
        else:
            home.append(tree)
    return tuple(_pack_row(row) for row in rows)


class _Tree:
    """The token tree of one example: a shared prefix and one branch per choice."""

    def __init__(self, encoded: Sequence[tuple[list[int], int]], slot: int) -> None:
        self.encoded, self.slot = encoded, slot
        inputs = [ids[:-1] for ids, _ in encoded]  # the last token is only ever predicted
        shared = 0
        for column in zip(*inputs, strict=False):
            if any(token != column[0] for token in column):
                break
            shared += 1
        self.shared = shared
        self.branches = [ids[shared:] for ids in inputs]
        self.prefix = inputs[0][:shared]
        self.size = shared + sum(map(len, self.branches))


def _pack_row(trees: Iterable[_Tree]) -> PackedRow:
    ids: list[int] = []
    positions: list[int] = []
    owner: list[tuple[int, int]] = []  # (tree, branch); branch -1 is the prefix
    wanted: list[tuple[int, int, int]] = []  # (position in row, token, slot)
    for number, tree in enumerate(trees):
        start = len(ids)
        ids += tree.prefix
        positions += range(tree.shared)
        owner += [(number, -1)] * tree.shared
        for choice, branch in enumerate(tree.branches):
            offset = len(ids) - tree.shared
            whole, context = tree.encoded[choice]
            for index in range(context, len(whole)):
                place = index - 1
                position = (start if place < tree.shared else offset) + place
                wanted.append((position, whole[index], tree.slot + choice))
            ids += branch
            positions += range(tree.shared, tree.shared + len(branch))
            owner += [(number, choice)] * len(branch)
    keep = sorted({position for position, _, _ in wanted})
    at = {position: index for index, position in enumerate(keep)}
    tree_of, branch_of = torch.tensor(owner, dtype=torch.int32).T
    same_tree = tree_of[:, None] == tree_of[None, :]
    reachable = (branch_of[None, :] == -1) | (branch_of[:, None] == branch_of[None, :])
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return PackedRow(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        mask=same_tree & reachable & causal,
        keep=torch.tensor(keep),
        index=torch.tensor([at[position] for position, _, _ in wanted]),
        token=torch.tensor([token for _, token, _ in wanted]),
        slot=torch.tensor([slot for _, _, slot in wanted]),
    )


@torch.inference_mode()
def log_likelihoods(model: nn.Module, task: Packed) -> Tensor:
    """Summed log-probability of every choice of every tree, in order: (slots,) float64, nats.

    Raises:
        ScoringError: a non-finite value, naming the task, the row (from 0) and the layer it began in.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    lowest = torch.finfo(dtype).min
    sums = torch.zeros(task.slots, dtype=torch.float64)
    for number, row in enumerate(task.rows):
        mask = torch.zeros(row.mask.shape, dtype=dtype, device=device)
        mask.masked_fill_(~row.mask.to(device), lowest)
        forward = partial(
            model,
            row.ids[None].to(device),
            attention_mask=mask[None, None],
            position_ids=row.positions[None].to(device),
            logits_to_keep=row.keep.to(device),
            use_cache=False,
        )
        logits = forward().logits[0]
        scores = logits.float().log_softmax(-1)[row.index.to(device), row.token.to(device)]
        scores = scores.double().cpu()
        if not (torch.isfinite(scores).all() and all_finite(logits)):
            raise ScoringError(
                f"{task.name}: non-finite log-likelihood in packed row {number} of {len(task.rows)}, "
                f"{culprit(model, forward)}"
            )
        sums.index_add_(0, row.slot, scores)
    return sums


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
