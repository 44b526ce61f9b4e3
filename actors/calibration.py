"""Moments of every target, streamed over the calibration text under a memory budget.

The targets are cut into groups whose moments fit; each group takes one pass over the text. Where a method
needs gradients a pass goes forward through the whole model and back down to the group's first block;
otherwise it ends at the group's last target.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from actors.decompose import require_finite
from actors.linears import bias_of, weight_of
from actors.models import decoder_blocks
from actors.moments import Moments, Scatter
from actors.types import BuildPlan, RankfrontError, TargetSpec

Tensor = torch.Tensor
Result = TypeVar("Result")

ITEMSIZE = 8  # bytes of a moment's entry, float64
# Tokens of a forward pass: enough for efficient matrix products, few enough for small activations.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
PROBE_TOKENS = 16
# Beside what autograd keeps: gradients under way and temporaries of the widest layers.
ACTIVATION_SLACK = 1.25
# Float64 copies of d x d and m x n that decomposing a target holds at its peak (actors.decompose).
WORK_SQUARES, WORK_RECTANGLES = 9, 5


def plan(
    model: nn.Module,
    targets: Sequence[TargetSpec],
    windows: Tensor,
    gradients: Collection[str],
    memory: float,
) -> BuildPlan:
    """Fit groups and batches of `windows` (windows, window) into `memory` bytes.

    `gradients` names the targets that need them.

    Activations are kept where they fit beside the moments, else recomputed block by block (checkpointing).

    Raises:
        RankfrontError: the memory does not hold one window and one target.
    """
    window = windows.shape[1]
    probe = _probe(model, targets, gradients)
    work = max(
        ITEMSIZE * (WORK_SQUARES * t.full_rank**2 + WORK_RECTANGLES * t.rows * t.cols) for t in targets
    )
    everything = _moment_bytes(targets, probe.leaders, gradients)
    rows = max(1, BATCH_TOKENS.get(next(model.parameters()).device.type, 1024) // window)
    choices = [(rows, False), (1, False), (rows, True), (1, True)] if gradients else [(rows, True), (1, True)]
    for number, (rows, checkpointed) in enumerate(choices):
        activations = probe.activations(rows * window, checkpointed, bool(gradients))
        left = memory - max(activations, work)
        # Recomputing costs less than a second pass: activations are kept only beside all moments.
        if left >= everything or (number >= len(choices) - 2 and left > 0):
            groups = _groups(targets, probe.leaders, gradients, left)
            if groups is not None:
                by_name = {target.name: target for target in targets}
                largest = max(
                    _moment_bytes([by_name[n] for n in group], probe.leaders, gradients) for group in groups
                )
                return BuildPlan(
                    groups, probe.leaders, len(windows), rows, checkpointed, largest, activations
                )
    one = max(_moment_bytes([target], probe.leaders, gradients) for target in targets)
    needed = max(probe.activations(window, True, bool(gradients)), work) + one
    # A hundredth more: what is said is rounded, and must do.
    raise RankfrontError(
        f"calibration.memory_gb: {memory / 1e9:g} is too small, one window of {window} tokens and one target "
        f"need {1.01 * needed / 1e9:.3g}"
    )


def _groups(
    targets: Sequence[TargetSpec], leaders: Mapping[str, str], gradients: Collection[str], left: float
) -> tuple[tuple[str, ...], ...] | None:
    """Runs of targets whose moments fit into `left` bytes; None where one alone does not."""
    groups: list[list[TargetSpec]] = [[]]
    for target in targets:
        if groups[-1] and _moment_bytes([*groups[-1], target], leaders, gradients) > left:
            groups.append([])
        groups[-1].append(target)
        if _moment_bytes(groups[-1], leaders, gradients) > left:
            return None
    return tuple(tuple(target.name for target in group) for group in groups)


def _full_inputs(targets: Sequence[TargetSpec], leaders: Mapping[str, str]) -> set[str]:
    """Leaders whose input moment is accumulated: some target that reads it has no smaller output side."""
    return {leaders[target.name] for target in targets if target.cols <= target.rows}


def _moment_bytes(
    targets: Sequence[TargetSpec], leaders: Mapping[str, str], gradients: Collection[str]
) -> int:
    full = _full_inputs(targets, leaders)
    inputs = {leaders[t.name]: t.cols for t in targets if leaders[t.name] in full}
    outputs = [t.rows for t in targets if leaders[t.name] not in full]
    backward = [t.full_rank for t in targets if t.name in gradients]
    return ITEMSIZE * sum(width**2 for width in (*inputs.values(), *outputs, *backward))


@dataclass(frozen=True)
class _Probe:
    """What one short forward pass tells: `leaders` names for every target the first target that reads the
    same input; the rest are bytes a token: what autograd keeps of the blocks, one block's input, logits."""

    leaders: Mapping[str, str]
    kept: float
    boundary: int
    logits: int
    blocks: int

    def activations(self, tokens: int, checkpointed: bool, gradients: bool) -> int:
        """Bytes a batch of `tokens` takes beside weights and moments."""
        kept = self.kept / self.blocks if checkpointed else self.kept
        each = ACTIVATION_SLACK * kept + self.boundary * (self.blocks if checkpointed else 1)
        return int(tokens * (each + (self.logits if gradients else 0)))


def _probe(model: nn.Module, targets: Sequence[TargetSpec], gradients: Collection[str]) -> _Probe:
    device = next(model.parameters()).device
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
    tap = _Tap()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    boundary = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), storage.nbytes())
        return tensor

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            tap.note(name, args[0])

        return hook

    def start(hidden: Tensor) -> Tensor:
        nonlocal boundary
        boundary = hidden.nbytes // PROBE_TOKENS
        return hidden.detach().requires_grad_(True)

    _, blocks = decoder_blocks(model)
    with contextlib.ExitStack() as stack:
        for target in targets:
            hook = model.get_submodule(target.name).register_forward_hook(hook_of(target.name))
            stack.callback(hook.remove)
        stack.enter_context(_entered(blocks[0], start))
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        logits = model(tokens, use_cache=False).logits
        width = logits.shape[-1] * (2 * logits.element_size() + 8)  # logits, their gradient, float32 twice
    return _Probe(tap.leaders, sum(kept.values()) / PROBE_TOKENS, boundary, width, len(blocks))


class _Tap:
    """Finds which targets read the same tensor (q/k/v, gate/up): the first of a run leads the others.

    The last tensor is held, so its identity cannot be taken over by another meanwhile.
    """

    def __init__(self) -> None:
        self.leaders: dict[str, str] = {}
        self._tensor: Tensor | None = None
        self._leader = ""

    def note(self, name: str, inputs: Tensor) -> None:
        if inputs is not self._tensor:
            self._tensor, self._leader = inputs, name
        self.leaders[name] = self._leader


@contextlib.contextmanager
def _entered(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `change` is applied to the hidden states that enter `block`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, autograd keeps only the blocks' inputs and computes the rest again on the way back."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    for block in blocks:
        block.forward = wrap(block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Enough(Exception):  # noqa: N818 (no error: everything this pass is for has been seen)
    pass


class _Sums:
    """The sums of one group of targets, fed by hooks; see `Moments` for what is kept of which side."""

    def __init__(self, targets: Sequence[TargetSpec], made: BuildPlan, gradients: Collection[str]) -> None:
        self._targets, self._leaders = {target.name: target for target in targets}, made.leaders
        full = _full_inputs(targets, made.leaders)
        self._inputs = {made.leaders[t.name]: Scatter(full=made.leaders[t.name] in full) for t in targets}
        self._outputs = {t.name: Scatter(full=True) for t in targets if made.leaders[t.name] not in full}
        self._gradients = {t.name: Scatter(full=True, centred=False) for t in targets if t.name in gradients}
        # A pass that measures part of a shared input's readers feeds it by the first of them.
        self._feeds = {
            leader: name for name, leader in reversed([(t.name, made.leaders[t.name]) for t in targets])
        }
        self.backward = False  # the hooks run again where checkpointing recomputes: those runs do not count
        self._unseen: set[str] = set()

    def begin(self) -> None:
        """Before each batch."""
        self.backward, self._unseen = False, set(self._targets)

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
            if own.requires_grad and not self.backward:
                own.register_hook(self._gradients[name].add)
            return (own, *args[1:])

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        target, leader = self._targets[name], self._leaders[name]

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.backward:
                return
            if self._feeds[leader] == name:
                self._inputs[leader].add(args[0])
            if name in self._outputs:
                bias = bias_of(module)
                self._outputs[name].add(output if bias is None else output - bias)
            if name in self._gradients and target.rows <= target.cols and output.requires_grad:
                output.register_hook(self._gradients[name].add)
            self._unseen.discard(name)
            if not self._gradients and not self._unseen:
                raise _Enough

        return hook

    def moments(self) -> dict[str, Moments]:
        """The averages of everything seen; the sums are used up."""
        inputs = {leader: (scatter.mean(), scatter.tokens) for leader, scatter in self._inputs.items()}
        shared: dict[str, Tensor] = {}
        found = {}
        for name in self._targets:
            leader = self._leaders[name]
            mean, tokens = inputs[leader]
            gradient = self._gradients[name].take_second() if name in self._gradients else None
            if name in self._outputs:
                output = self._outputs[name]
                found[name] = Moments("output", output.take_second(), output.mean(), mean, tokens, gradient)
            else:
                if leader not in shared:
                    shared[leader] = self._inputs[leader].take_second()
                found[name] = Moments("input", shared[leader], mean, mean, tokens, gradient)
        return found


def collect(
    model: nn.Module,
    targets: Sequence[TargetSpec],
    windows: Tensor,
    made: BuildPlan,
    gradients: Collection[str] = (),
    labels: str = "sampled",
    first_window: int = 0,
) -> Generator[int, None, dict[str, Moments]]:
    """Moments of `targets`, one group of a plan, in one pass over `windows` (windows, window).

    Yields the windows of each batch as it is done; returns the moments.

    Gradients are of the loss summed over tokens, in nats: of the text's own next tokens for `data`, of
    tokens drawn from the model's predictions for `sampled` (labels of window i depend on `first_window` + i
    and on nothing else, so shards add up to the whole). Their averages are per predicted token.

    Raises:
        RankfrontError: non-finite activations, naming the first target that has them.
    """
    device = next(model.parameters()).device
    needed = [target.name for target in targets if target.name in gradients]
    sums = _Sums(targets, made, needed)
    _, blocks = decoder_blocks(model)
    first = min((target.block for target in targets if target.name in gradients), default=0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sums.attached(model))
        if needed:
            stack.enter_context(_entered(blocks[first], lambda hidden: hidden.detach().requires_grad_(True)))
            if made.checkpointed:
                stack.enter_context(_checkpointed(blocks[first:]))
        stack.enter_context(torch.enable_grad() if needed else torch.no_grad())
        for start in range(0, len(windows), made.rows):
            batch = windows[start : start + made.rows].to(device)
            sums.begin()
            try:
                logits = model(batch, use_cache=False, **({} if needed else {"logits_to_keep": 1})).logits
            except _Enough:
                logits = None
            if needed:
                gradient = _loss_gradient(logits.detach(), batch, labels, first_window + start)
                if not torch.isfinite(gradient).all():
                    _name_non_finite(model, made.leaders, batch)
                sums.backward = True
                logits.backward(gradient)
                del logits, gradient
            yield len(batch)
    return sums.moments()


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
