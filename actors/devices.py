"""The devices of a replica, and how much of a shared one it may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from actors.types import RankfrontError, ReplicaSpec

# What a process takes of a GPU outside of torch's allocator: its CUDA context and the code of its kernels.
CONTEXT_BYTES = 2**29


def devices_of(spec: ReplicaSpec) -> tuple[str, ...]:
    """The devices that hold a replica's model, in the order of its blocks.

    Raises:
        RankfrontError: this process sees fewer GPUs than it must have.
    """
    count = 1 if spec.gpus is None else max(1, int(spec.gpus))
    if spec.device != "auto":
        return (spec.device,) * count
    if spec.gpus is None:
        return ("cuda" if torch.cuda.is_available() else "cpu",)
    there = torch.cuda.device_count()
    if there < count:
        raise RankfrontError(
            f"replicas.gpus: {spec.gpus:g} asked for, and torch {torch.__version__} finds {there} here; is "
            "it a CUDA build, with a driver?"
        )
    return ("cuda",) if count == 1 else tuple(f"cuda:{index}" for index in range(count))


def device_here(name: str) -> str:
    """A device of this process by its name; `auto` is a GPU where there is one.

    Raises:
        RankfrontError: there is no such device; names those that there are.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = ["cpu"]
    accelerator, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    if accelerator is not None and count:
        there += [accelerator.type, *(f"{accelerator.type}:{index}" for index in range(count))]
    if name not in there:
        raise RankfrontError(
            f"--device {name}: torch {torch.__version__} finds no such device here; one of auto, "
            + ", ".join(there)
        )
    return name


@contextmanager
def room_on(device: str) -> Iterator[None]:
    """Raises RankfrontError where `device` has no room for what is done inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RankfrontError(
            f"--device {device}: out of memory, as where a search is using it; --device cpu needs none of its"
        ) from error


def memory_fraction(share: float, total: int) -> float:
    """The fraction of a GPU of `total` bytes that torch's allocator may take for a replica with a share.

    `torch.cuda.set_per_process_memory_fraction` bounds the allocator alone, and the contexts of all replicas
    on the GPU are beside it.

    Raises:
        RankfrontError: the share is less than a context.
    """
    allowed = share * total - CONTEXT_BYTES
    if allowed <= 0:
        raise RankfrontError(
            f"replicas.gpus: {share:g} of a GPU of {total / 1e9:.1f} GB is less than a CUDA context takes, "
            f"{CONTEXT_BYTES / 1e9:.1f} GB"
        )
    return allowed / total


def free_bytes(device: torch.device) -> int:
    """What this process may still take of a GPU, with what torch's allocator holds there and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def keep_to_share(spec: ReplicaSpec) -> None:
    """Have this process run out of memory where it would take more of a GPU than its share.

    Raises:
        RankfrontError: there is no GPU, or its share is too small.
    """
    if spec.gpus is None or spec.gpus >= 1 or spec.device == "cpu":
        return
    devices_of(spec)  # there is one
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_fraction(spec.gpus, total), 0)
