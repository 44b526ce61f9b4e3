"""How a pass goes through a model: entered at a block, activations kept or computed again, calls counted,
what blocks leave for others behind them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

Tensor = torch.Tensor


@contextlib.contextmanager
def entered(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
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
def counted(modules: Mapping[str, nn.Module]) -> Iterator[Counter[str]]:
    """While open, counts how often each of `modules` is called, by name: more than once in a pass of a model
    that loops over its blocks."""
    calls: Counter[str] = Counter()

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, args: calls.update((name,))

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook_of(name)).remove)
        yield calls


def left_in(args: Iterable[Any], keywords: Mapping[str, Any]) -> Callable[[], bool]:
    """Asked later, tells whether a mutable mapping among these arguments has changed since, in any entry.

    By such a mapping a block hands on more than it returns: in Gemma 3n and Gemma 4 the K/V that later
    blocks read instead of making their own.
    """
    mappings = [given for given in (*args, *keywords.values()) if isinstance(given, MutableMapping)]
    before = [dict(mapping) for mapping in mappings]

    def changed() -> bool:
        """By identity: tensors that are equal do not say so in one truth value."""
        return any(
            now.keys() != then.keys() or any(now[key] is not then[key] for key in now)
            for now, then in zip(map(dict, mappings), before, strict=True)
        )

    return changed


@contextlib.contextmanager
def leaving(modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """While open, collects which of `modules` leave something in a mapping that they are called with."""
    found: set[str] = set()
    changed: dict[str, Callable[[], bool]] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda module, args, keywords: changed.update({name: left_in(args, keywords)})

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, keywords, output: found.update([name] if changed[name]() else [])

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name), with_kwargs=True).remove)
        yield found


@contextlib.contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, autograd keeps only the blocks' inputs and computes the rest again on the way back."""
    blocks = list({id(block): block for block in blocks}.values())  # some models have one in several places

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    for block in blocks:
        block.forward = wrap(block.forward)  # type: ignore[method-assign]
    try:
        with set_checkpoint_early_stop(False):  # hooks at a block's end are waited for
            yield
    finally:
        for block in blocks:
            del block.forward
