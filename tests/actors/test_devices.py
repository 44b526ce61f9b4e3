"""Which devices a replica has, and how much of a shared one; the allocator itself where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors import devices
from actors.devices import CONTEXT_BYTES, device_here, devices_of, keep_to_share, memory_fraction
from actors.types import RankfrontError, ReplicaSpec

GIB = 2**30


def spec_of(gpus: float | None, device: str = "auto") -> ReplicaSpec:
    return ReplicaSpec("r", None, None, 1, device, gpus)  # type: ignore[arg-type]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that torch sees so many GPUs of 80 GiB; returns what fractions were set, by device."""

    def pretend(count: int) -> dict[int, float]:
        kept: dict[int, float] = {}
        memory = type("Properties", (), {"total_memory": 80 * GIB})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        monkeypatch.setattr(
            torch.cuda,
            "set_per_process_memory_fraction",
            lambda fraction, device: kept.update({device: fraction}),
        )
        return kept

    return pretend


@pytest.mark.parametrize(
    ("there", "spec", "expected"),
    [
        (0, spec_of(None), ("cpu",)),
        (2, spec_of(None), ("cuda",)),
        (1, spec_of(0.5), ("cuda",)),
        (2, spec_of(1), ("cuda",)),
        (2, spec_of(2), ("cuda:0", "cuda:1")),
        (0, spec_of(2, "cpu"), ("cpu", "cpu")),
        (1, spec_of(None, "cpu"), ("cpu",)),
    ],
    ids=str,
)
def test_a_replica_has_the_devices_it_asked_for(
    there: int, spec: ReplicaSpec, expected: tuple[str, ...], gpus: Any
) -> None:
    gpus(there)
    assert devices_of(spec) == expected


@pytest.mark.parametrize(("there", "asked"), [(0, 0.5), (0, 1), (1, 2)])
def test_a_gpu_that_is_not_there_is_no_cpu(there: int, asked: float, gpus: Any) -> None:
    gpus(there)
    with pytest.raises(RankfrontError, match=rf"replicas\.gpus: {asked} asked for, .* finds {there} here"):
        devices_of(spec_of(asked))


def test_shares_of_a_gpu_leave_room_for_every_context(gpus: Any) -> None:
    kept = gpus(1)
    for asked, device in ((None, "auto"), (1, "auto"), (2, "cpu"), (0.5, "cpu")):
        keep_to_share(spec_of(asked, device))
    assert kept == {}
    keep_to_share(spec_of(0.25))
    assert 4 * (kept[0] * 80 * GIB + CONTEXT_BYTES) == pytest.approx(80 * GIB)


def test_a_share_smaller_than_a_context_is_refused() -> None:
    with pytest.raises(RankfrontError, match=r"0\.01 of a GPU of 8\.6 GB is less than a CUDA context"):
        memory_fraction(0.01, 8 * GIB)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's allocator is held to a share")
def test_a_share_runs_out_where_the_gpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its twin without a GPU is `test_shares_of_a_gpu_leave_room_for_every_context`."""
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(devices, "CONTEXT_BYTES", 0)
    try:
        keep_to_share(spec_of(0.1))
        torch.empty(int(0.08 * total), dtype=torch.int8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.12 * total), dtype=torch.int8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        torch.cuda.empty_cache()


def test_a_device_is_one_of_those_that_are_there(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert [device_here(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda", "cuda", "cuda:1", "cpu",
    ]  # fmt: skip
    with pytest.raises(RankfrontError, match=r"cuda:2: .* one of auto, cpu, cuda, cuda:0, cuda:1$"):
        device_here("cuda:2")
    gpus(0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    assert device_here("auto") == "cpu"
    with pytest.raises(RankfrontError, match=r"^--device cuda: .*; one of auto, cpu$"):
        device_here("cuda")
