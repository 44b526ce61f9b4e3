"""One refinement on several workers: each takes a share of a step's windows, the first of them steps.

The lead has the factors, Adam's moments, the held-out windows and the files. Before each step its helpers get
its factors; each then makes the gradient of its own share, and the lead adds them up in order. All shares are
parts of one mean over the step's tokens, so the sum is the gradient one worker makes, up to the order of
float32 additions. A helper keeps nothing from one step to the next that it would not get again: it may come
late, and one that is gone, hangs or fails is ended and costs the step that was under way, which is taken
again without it.

What travels goes in pieces through Ray's objects: they need no ports and no rendezvous beside Ray's own, and
Ray says when a process is gone, where a collective would wait for it. Every step moves all factors to each
helper and all gradients back: it pays where a share's passes over its windows take longer than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from actors.helper import Answer, Gone, Helper
from actors.refinement import RefinementSpec
from actors.types import Allocation

Tensor = torch.Tensor
Share = Callable[[int, int, int], float]

# Numbers of a piece, 4 MB: two pieces of each helper are under way, and Ray's store on one machine is 80 MB.
PIECE = 2**20

# Seconds that a helper has for an answer, once the lead has made its own share: the least, for a piece over a
# network that stutters, and as a multiple of what the share took, for a machine that others use as well.
LEAST_WAIT = 60.0
SLOWEST = 10


def pieces(sizes: Sequence[int], most: int) -> list[list[tuple[int, int, int]]]:
    """Flat tensors of `sizes` cut into pieces of at most `most` numbers: (tensor, from, to) of each part."""
    found: list[list[tuple[int, int, int]]] = []
    room = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            if not room:
                found.append([])
                room = most
            stop = min(size, start + room)
            found[-1].append((index, start, stop))
            room -= stop - start
            start = stop
    return found


class Pieces:
    """What moves, and its gradients, as flat pieces on the CPU."""

    def __init__(self, moving: Sequence[torch.nn.Parameter], most: int) -> None:
        self._moving = list(moving)
        self._pieces = pieces([value.numel() for value in self._moving], most)

    def __len__(self) -> int:
        return len(self._pieces)

    def values(self, number: int) -> Tensor:
        """Of the factors."""
        parts = self._pieces[number]
        return torch.cat([self._moving[at].detach().view(-1)[start:stop].cpu() for at, start, stop in parts])

    @torch.no_grad()
    def set_values(self, number: int, values: Tensor) -> None:
        for (at, start, stop), part in self._parts(number, values):
            self._moving[at].view(-1)[start:stop].copy_(part)

    def gradients(self, number: int) -> Tensor:
        """Of the gradients; zero where there is none."""
        found = []
        for at, start, stop in self._pieces[number]:
            gradient = self._moving[at].grad
            flat = torch.zeros(stop - start) if gradient is None else gradient.view(-1)[start:stop].cpu()
            found.append(flat)
        return torch.cat(found)

    def add_gradients(self, number: int, values: Tensor) -> None:
        for (at, start, stop), part in self._parts(number, values):
            value = self._moving[at]
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            value.grad.view(-1)[start:stop] += part.to(value.device)

    def _parts(self, number: int, values: Tensor) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
        parts = self._pieces[number]
        return zip(parts, values.split([stop - start for _, start, stop in parts]), strict=True)


class Team:
    """The helpers of a run, as its lead sees them."""

    def __init__(self, helpers: Sequence[Helper], allocation: Allocation, spec: RefinementSpec) -> None:
        self._joining = [(helper, helper.ask("help", allocation, spec)) for helper in helpers]
        self._helpers: list[Helper] = []
        self._step, self._own = 0, 0.0
        self.left_out: list[str] = []
        """Which helpers are no more, in words."""

    @property
    def size(self) -> int:
        """Workers of the last step, the lead included."""
        return 1 + len(self._helpers)

    def gradient(self, step: int, share: Share, pieces: Pieces) -> float:
        """Leave the gradient of a whole step in what the lead moves; returns its KL, nats/token.

        `share` makes the lead's own (`actors.refine.Shares`), `pieces` are of what moves.

        Raises:
            RankfrontError: what a helper finds wrong, a ScoringError among it; and what `share` raises.
        """
        self._step = step
        while True:
            self._admit()
            try:
                return self._gathered(step, share, pieces)
            except Gone:
                continue  # with the rest

    def _admit(self) -> None:
        """Take in the helpers that are ready by now."""
        waiting = []
        for helper, answer in self._joining:
            if not answer.ready():
                waiting.append((helper, answer))
                continue
            try:
                answer.get(self._limit)
            except Gone as gone:
                self._leave_out(helper, gone)
                continue
            self._helpers.append(helper)
        self._joining = waiting

    def _gathered(self, step: int, share: Share, pieces: Pieces) -> float:
        """One attempt; raises Gone where a helper is, and leaves it out from then on."""
        if not self._helpers:
            return share(step, 0, 1)
        self._send(pieces)
        asked = [helper.ask("share", step, place, self.size) for place, helper in enumerate(self._helpers, 1)]
        start = time.monotonic()
        total = share(step, 0, self.size)
        self._own = time.monotonic() - start
        for part in self._answers(asked):
            total += part
        waiting = self._ask("piece", 0)
        for number in range(len(pieces)):
            following = self._ask("piece", number + 1) if number + 1 < len(pieces) else []
            for values in self._answers(waiting):
                pieces.add_gradients(number, values)
            waiting = following
        return total

    def _send(self, pieces: Pieces) -> None:
        """Give every helper the factors as they stand."""
        waiting: list[Answer] | None = None
        for number in range(len(pieces)):
            values = self._helpers[0].shared(pieces.values(number))
            following = self._ask("receive", number, values)
            if waiting is not None:
                self._answers(waiting)
            waiting = following
        if waiting is not None:
            self._answers(waiting)

    @property
    def _limit(self) -> float:
        """Seconds that a helper may take."""
        return max(LEAST_WAIT, SLOWEST * self._own)

    def _leave_out(self, helper: Helper, gone: Gone) -> None:
        """From now on. It is ended too: one that hangs, or whose GPU fails, is of no use to a later run."""
        helper.end()
        self.left_out.append(f"a worker was left out at step {self._step}: {gone}")

    def _ask(self, method: str, *arguments: Any) -> list[Answer]:
        return [helper.ask(method, *arguments) for helper in self._helpers]

    def _answers(self, asked: list[Answer]) -> list[Any]:
        """What each helper answered, in order. Raises Gone after leaving out those that are."""
        found, left = [], []
        for helper, answer in zip(self._helpers, asked, strict=True):
            try:
                found.append(answer.get(self._limit))
            except Gone as gone:
                self._leave_out(helper, gone)
                continue
            left.append(helper)
        if len(left) < len(self._helpers):
            self._helpers = left
            raise Gone
        return found
