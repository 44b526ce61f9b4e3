"""Which targets are measured together, in which batches: moments and activations under a memory budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from actors.models import decoder_blocks
from actors.passes import counted, entered
from actors.types import BuildPlan, RankfrontError, TargetSpec

Tensor = torch.Tensor

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
    spreads: Collection[str] | None = None,
) -> BuildPlan:
    """Fit groups and batches of `windows` (windows, window) into `memory` bytes.

    `gradients` and `spreads` name the targets that need them; see `actors.calibration.collect`.

    Activations are kept where they fit beside the moments, else recomputed block by block (checkpointing).

    Raises:
        RankfrontError: the memory does not hold one window and one target, a target never runs, or gradients
            are asked for of a model that runs a target or its block more than once in a pass.
    """
    window = windows.shape[1]
    probe = _probe(model, targets, gradients)
    unused = sorted({target.module for target in targets if target.name not in probe.leaders})
    if unused:
        patterns = ", ".join(f"'*.{module}'" for module in unused)
        raise RankfrontError(
            f"{type(model).__name__} reads the weights of {', '.join(unused)} without calling the layers, so "
            f"they cannot be replaced; leave them out by targets: {{exclude: [{patterns}]}}"
        )
    if gradients and probe.again is not None:
        raise RankfrontError(
            f"factors.method: curvature needs the gradient of one call, and {type(model).__name__} runs "
            f"{probe.again} more than once in a pass; use feature for all targets, which averages over calls"
        )
    wanted = {target.name for target in targets} if spreads is None else set(spreads)

    def moments(chosen: Sequence[TargetSpec]) -> int:
        return _moment_bytes(chosen, probe.leaders, gradients, wanted)

    work = max(
        ITEMSIZE * (WORK_SQUARES * t.full_rank**2 + WORK_RECTANGLES * t.rows * t.cols) for t in targets
    )
    everything = moments(targets)
    rows = max(1, BATCH_TOKENS.get(next(model.parameters()).device.type, 1024) // window)
    choices = [(rows, False), (1, False), (rows, True), (1, True)] if gradients else [(rows, True), (1, True)]
    found = []
    for rows, checkpointed in choices:
        activations = probe.activations(rows * window, checkpointed, bool(gradients))
        left = memory - max(activations, work)
        # Recomputing costs less than a second pass: activations are kept only beside all moments.
        groups = _groups(targets, moments, left) if checkpointed or left >= everything else None
        if groups is not None:
            names = tuple(tuple(target.name for target in group) for group in groups)
            largest = max(map(moments, groups))
            found.append(
                BuildPlan(
                    groups=names,
                    leaders=probe.leaders,
                    windows=len(windows),
                    rows=rows,
                    checkpointed=checkpointed,
                    moments=largest,
                    activations=activations,
                    repeated=probe.again is not None,
                    overwritten=probe.overwritten,
                )
            )
    if found:
        return min(found, key=lambda made: len(made.groups))  # on a tie the first: the larger batches
    one = max(moments([target]) for target in targets)
    needed = max(probe.activations(window, True, bool(gradients)), work) + one
    # A hundredth more: what is said is rounded, and must do.
    raise RankfrontError(
        f"calibration.memory_gb: {memory / 1e9:g} is too small, one window of {window} tokens and one target "
        f"need {1.01 * needed / 1e9:.3g}"
    )


def _groups(
    targets: Sequence[TargetSpec], moments: Callable[[Sequence[TargetSpec]], int], left: float
) -> list[list[TargetSpec]] | None:
    """Runs of targets whose moments fit into `left` bytes; None where one alone does not."""
    groups: list[list[TargetSpec]] = [[]]
    for target in targets:
        if groups[-1] and moments([*groups[-1], target]) > left:
            groups.append([])
        groups[-1].append(target)
        if moments(groups[-1]) > left:
            return None
    return groups


def full_inputs(targets: Sequence[TargetSpec], leaders: Mapping[str, str]) -> set[str]:
    """Leaders whose input's spread is accumulated: some target that reads it has no smaller output side."""
    return {leaders[target.name] for target in targets if target.cols <= target.rows}


def _moment_bytes(
    targets: Sequence[TargetSpec],
    leaders: Mapping[str, str],
    gradients: Collection[str],
    spreads: Collection[str],
) -> int:
    spread = [target for target in targets if target.name in spreads]
    full = full_inputs(spread, leaders)
    inputs = {leaders[t.name]: t.cols for t in spread if leaders[t.name] in full}
    outputs = [t.rows for t in spread if leaders[t.name] not in full]
    backward = [t.full_rank for t in targets if t.name in gradients]
    return ITEMSIZE * sum(width**2 for width in (*inputs.values(), *outputs, *backward, *backward))


@dataclass(frozen=True)
class _Probe:
    """What one short forward pass tells: `leaders` names for every target the first target that reads the
    same input in every call; `again` names a target, or a block of one, that runs more than once;
    `overwritten` those of whose held vectors, as the model changes them in place, a copy is kept; the rest
    are bytes a token: what is kept of the blocks until the way back, by autograd or to meet its gradient; one
    block's input; logits."""

    leaders: Mapping[str, str]
    kept: float
    boundary: int
    logits: int
    blocks: int
    again: str | None
    overwritten: tuple[str, ...]

    def activations(self, tokens: int, checkpointed: bool, gradients: bool) -> int:
        """Bytes a batch of `tokens` takes beside weights and moments."""
        kept = self.kept / self.blocks if checkpointed else self.kept
        each = ACTIVATION_SLACK * kept + self.boundary * (self.blocks if checkpointed else 1)
        return int(tokens * (each + (self.logits if gradients else 0)))


def _probe(model: nn.Module, targets: Sequence[TargetSpec], gradients: Collection[str]) -> _Probe:
    device = next(model.parameters()).device
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
    tap = Tap()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes over an address meanwhile
    held: dict[str, tuple[Tensor, int]] = {}  # with its version, which every change in place raises
    boundary = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    def hook_of(target: TargetSpec) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            tap.note(target.name, args[0])
            if target.name in gradients:
                vectors = keep(output if target.rows <= target.cols else args[0])
                held[target.name] = vectors, vectors._version

        return hook

    def start(hidden: Tensor) -> Tensor:
        nonlocal boundary
        boundary = hidden.nbytes // PROBE_TOKENS
        return hidden.detach().requires_grad_(True)

    prefix, blocks = decoder_blocks(model)
    watched = {f"{prefix}.{target.block}": blocks[target.block] for target in targets}
    watched |= {target.name: model.get_submodule(target.name) for target in targets}
    with contextlib.ExitStack() as stack:
        for target in targets:
            hook = model.get_submodule(target.name).register_forward_hook(hook_of(target))
            stack.callback(hook.remove)
        calls = stack.enter_context(counted(watched))
        stack.enter_context(entered(blocks[0], start))
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        logits = model(tokens, use_cache=False).logits
        width = logits.shape[-1] * (2 * logits.element_size() + 8)  # logits, their gradient, float32 twice
    copied = {name: tensor for name, (tensor, version) in held.items() if tensor._version != version}
    storages = [*kept.values(), *(tensor.untyped_storage() for tensor in copied.values())]
    each = sum(storage.nbytes() for storage in storages) / PROBE_TOKENS
    leaders = {name: leader if calls[name] == calls[leader] else name for name, leader in tap.leaders.items()}
    again = next((name for name in watched if calls[name] > 1), None)
    return _Probe(leaders, each, boundary, width, len(blocks), again, tuple(copied))


class Tap:
    """Finds which targets read the same tensor (q/k/v, gate/up): the first of a run leads the others.

    One that runs again behind another leader leads itself. The last tensor is held, so its identity cannot be
    taken over by another meanwhile.
    """

    def __init__(self) -> None:
        self.leaders: dict[str, str] = {}
        self._tensor: Tensor | None = None
        self._leader = ""

    def note(self, name: str, inputs: Tensor) -> None:
        if inputs is not self._tensor:
            self._tensor, self._leader = inputs, name
        self.leaders[name] = self._leader if self.leaders.get(name, self._leader) == self._leader else name
