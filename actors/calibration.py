"""Moments of every target, streamed over the calibration text under a memory budget.

The targets are cut into groups whose moments fit; each group takes one pass over the text. Where a method
needs gradients a pass goes forward through the whole model and back down to the group's first block;
otherwise it ends at the group's last target. Of a target that runs several times in a pass every call counts.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from actors.decompose import require_finite
from actors.linears import bias_of, weight_of
from actors.models import decoder_blocks
from actors.moments import Moments, Scatter, unit_trace
from actors.passes import checkpointed, entered
from actors.planning import full_inputs, plan
from actors.types import BuildPlan, RankfrontError, TargetSpec

Tensor = torch.Tensor
Result = TypeVar("Result")

# The power of its gradient's norm with which a token counts for `curvature`. Two is the Fisher matrix itself:
# a few tokens with large gradients own it, and what it says of 16,384 tokens holds less well for others.
# Zero leaves only directions. benchmarks/results/decomposition.md.
GRADIENT_POWER = 1.0


class _Enough(Exception):  # noqa: N818 (no error: everything this pass is for has been seen)
    pass


class _Sums:
    """The sums of one group of targets, fed by hooks; see `Moments` for what is kept of which side.

    A token's vector meets its gradient on the way back, so it is held from when it is computed: in the
    forward pass, or, where that is `checkpointed`, when the block is computed again. Where the model goes on
    to change it in place (Falcon adds its attention to what leaves the MLP) a copy is held.
    """

    def __init__(
        self,
        targets: Sequence[TargetSpec],
        made: BuildPlan,
        gradients: Collection[str],
        spreads: Collection[str],
    ) -> None:
        self._targets, self._leaders = {target.name: target for target in targets}, made.leaders
        self._checkpointed, self._repeated = made.checkpointed, made.repeated
        self._overwritten = made.overwritten
        spread = [target for target in targets if target.name in spreads]
        full = full_inputs(spread, made.leaders)
        self._inputs = {made.leaders[t.name]: Scatter(full=made.leaders[t.name] in full) for t in targets}
        self._outputs = {t.name: Scatter(full=True) for t in spread if made.leaders[t.name] not in full}
        chosen = [target.name for target in targets if target.name in gradients]
        self._gradients = {name: Scatter(full=True, centred=False) for name in chosen}
        self._weighted = {name: Scatter(full=True) for name in chosen}
        self._squares: dict[str, Tensor | float] = dict.fromkeys(chosen, 0.0)
        self._waiting: dict[str, Tensor] = {}
        # A pass that measures part of a shared input's readers feeds it by the first of them.
        self._feeds = {
            leader: name for name, leader in reversed([(t.name, made.leaders[t.name]) for t in targets])
        }
        self._backward = False
        self._unseen: set[str] = set()

    def forward(self) -> None:
        """Before each batch."""
        self._backward, self._unseen = False, set(self._targets)

    def backward(self) -> None:
        """Before its way back: hooks that run from here on belong to blocks computed again."""
        self._backward = True

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in self._targets:
                module = model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._before(name)).remove)
                stack.callback(module.register_forward_hook(self._after(name)).remove)
            yield

    def _before(self, name: str) -> Callable[..., Any]:
        target = self._targets[name]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
            if name not in self._gradients or target.rows <= target.cols:
                return None
            # A view of its own, so that its gradient is what this target alone sends back: W^T g.
            own = args[0].view_as(args[0])
            self._await(name, own, own)
            return (own, *args[1:])

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        target, leader = self._targets[name], self._leaders[name]

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in self._gradients and target.rows <= target.cols:
                self._await(name, output, _without_bias(module, output))
            if self._backward:
                return
            if self._feeds[leader] == name:
                self._inputs[leader].add(args[0])
            if name in self._outputs:
                self._outputs[name].add(_without_bias(module, output))
            self._unseen.discard(name)
            if not self._gradients and not self._unseen and not self._repeated:
                raise _Enough

        return hook

    def _await(self, name: str, tensor: Tensor, vectors: Tensor) -> None:
        """Bring together `vectors` and the gradient of `tensor`, whichever comes first.

        A block computed again starts at the first gradient that needs it: that of its last target is there
        before.
        """
        if not self._backward and tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._meet(name, gradient=gradient))
        if self._backward == self._checkpointed:
            vectors = vectors.detach()
            self._meet(name, vectors=vectors.clone() if name in self._overwritten else vectors)

    def _meet(self, name: str, vectors: Tensor | None = None, gradient: Tensor | None = None) -> None:
        """One half has come: it waits for the other, or both are added."""
        mine = vectors if gradient is None else gradient
        assert mine is not None
        if name not in self._waiting:
            self._waiting[name] = mine
            return
        other = self._waiting.pop(name)
        vectors, gradient = (mine, other) if gradient is None else (other, mine)
        gradient = gradient.detach().float()
        norms = gradient.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self._gradients[name].add(gradient * norms ** (GRADIENT_POWER / 2 - 1))
        self._weighted[name].add(vectors, weights=norms**GRADIENT_POWER)
        self._squares[name] += norms.square().sum(dtype=torch.float64)

    def moments(self) -> dict[str, Moments]:
        """The averages of everything seen; the sums are used up."""
        means = {leader: (scatter.mean(), scatter.tokens) for leader, scatter in self._inputs.items()}
        shared = {leader: each.take_spread() for leader, each in self._inputs.items() if each.full}
        found = {}
        for name in self._targets:
            leader = self._leaders[name]
            mean, tokens = means[leader]
            side, spread = "input", shared.get(leader)
            if name in self._outputs:
                side, spread = "output", self._outputs[name].take_spread()
            gradient = weighted = None
            if name in self._gradients:
                weighted = self._weighted[name].take_spread()
                gradient = unit_trace(self._gradients[name].take_second())
                gradient *= self._squares[name] / tokens
            found[name] = Moments(mean, tokens, side, spread, gradient, weighted)
        return found


def _without_bias(module: nn.Module, output: Tensor) -> Tensor:
    bias = bias_of(module)
    return output if bias is None else output - bias


def collect(
    model: nn.Module,
    targets: Sequence[TargetSpec],
    windows: Tensor,
    made: BuildPlan,
    gradients: Collection[str] = (),
    labels: str = "sampled",
    first_window: int = 0,
    spreads: Collection[str] | None = None,
) -> Generator[int, None, dict[str, Moments]]:
    """Moments of `targets`, one group of a plan, in one pass over `windows` (windows, window).

    Yields the windows of each batch as it is done; returns the moments. `gradients` names the targets whose
    gradients are measured, and what they weight; `spreads` those whose spread over all tokens alike is,
    without it every target's.

    Gradients are of the loss summed over tokens, in nats: of the text's own next tokens for `data`, of
    tokens drawn from the model's predictions for `sampled` (labels of window i depend on `first_window` + i
    and on nothing else, so shards add up to the whole). Their averages are per predicted token.

    Raises:
        RankfrontError: non-finite activations, naming the first target that has them.
    """
    device = next(model.parameters()).device
    needed = [target.name for target in targets if target.name in gradients]
    sums = _Sums(targets, made, needed, {t.name for t in targets} if spreads is None else spreads)
    _, blocks = decoder_blocks(model)
    first = min((target.block for target in targets if target.name in gradients), default=0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sums.attached(model))
        if needed:
            stack.enter_context(entered(blocks[first], lambda hidden: hidden.detach().requires_grad_(True)))
            if made.checkpointed:
                stack.enter_context(checkpointed(blocks[first:]))
        stack.enter_context(torch.enable_grad() if needed else torch.no_grad())
        # Asked for one logit, Gemma 4 takes the last token alone through blocks without K/V of their own: so
        # only passes that come as far as the head ask for one.
        to_the_head = made.repeated and not needed
        asked = {"logits_to_keep": 1} if to_the_head and _may_keep_last(model) else {}
        for start in range(0, len(windows), made.rows):
            batch = windows[start : start + made.rows].to(device)
            sums.forward()
            try:
                logits = model(batch, use_cache=False, **asked).logits
            except _Enough:
                logits = None
            if needed:
                gradient = _loss_gradient(logits.detach(), batch, labels, first_window + start)
                if not torch.isfinite(gradient).all():
                    _name_non_finite(model, made.leaders, batch)
                sums.backward()
                logits.backward(gradient)
                del logits, gradient
            yield len(batch)
    return sums.moments()


def _may_keep_last(model: nn.Module) -> bool:
    """Whether a model can be asked for its last logits alone; code that came with a model may know nothing of
    it."""
    known = inspect.signature(model.forward).parameters
    return "logits_to_keep" in known or any(each.kind is each.VAR_KEYWORD for each in known.values())


def _loss_gradient(logits: Tensor, batch: Tensor, labels: str, first_window: int) -> Tensor:
    """d(summed cross-entropy)/d(logits) = softmax - label, scaled so that averages over all tokens are
    averages over predicted ones; the shape and type of `logits` (windows, window, vocabulary)."""
    probabilities = torch.softmax(logits.float(), dim=-1)
    if labels == "sampled":
        drawn = torch.stack([_draw(rows, first_window + index) for index, rows in enumerate(probabilities)])
        probabilities.scatter_add_(-1, drawn[..., None], -torch.ones_like(probabilities[..., :1]))
        return probabilities.to(logits.dtype)
    ahead = batch[:, 1:, None]
    probabilities[:, :-1].scatter_add_(-1, ahead, -torch.ones_like(probabilities[:, :-1, :1]))
    probabilities[:, -1] = 0  # nothing follows a window's last token
    window = batch.shape[1]
    return probabilities.mul_(math.sqrt(window / (window - 1))).to(logits.dtype)


def _draw(probabilities: Tensor, seed: int) -> Tensor:
    """One token for each row of `probabilities` (tokens, vocabulary), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(len(probabilities), generator=generator).to(probabilities.device)
    drawn = [
        torch.searchsorted(rows.cumsum(-1), point[:, None] * rows.sum(-1, keepdim=True))
        for rows, point in zip(probabilities.split(64), points.split(64), strict=True)
    ]
    return torch.cat(drawn)[:, 0].clamp_max(probabilities.shape[1] - 1)


def _name_non_finite(model: nn.Module, names: Collection[str], batch: Tensor) -> None:
    """Raise for the first target whose weight, input or output is not finite, or for the loss itself.

    `names` are all targets, not those of one group: the loss comes out of the whole model.
    """
    for name in names:
        require_finite(name, "weight", weight_of(model.get_submodule(name)))

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            require_finite(name, "input on the calibration text", args[0])
            require_finite(name, "output on the calibration text", output)

        return hook

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook_of(name)).remove)
        with torch.no_grad():
            model(batch, use_cache=False)
    raise RankfrontError("calibration: the logits are not finite, though every target's output is")


def collect_moments(
    model: nn.Module,
    targets: Sequence[TargetSpec],
    windows: Tensor,
    gradients: Collection[str] = (),
    labels: str = "sampled",
    memory: float = float("inf"),
) -> dict[str, Moments]:
    """Moments of every target at once, in as many passes as `memory` bytes ask for; see `collect`."""
    made = plan(model, targets, windows, gradients, memory)
    found: dict[str, Moments] = {}
    for group in made.groups:
        chosen = [target for target in targets if target.name in set(group)]
        found |= finished(collect(model, chosen, windows, made, gradients, labels))
    return found


def finished(steps: Generator[Any, None, Result]) -> Result:
    """What a generator returns, its steps passed over."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
