"""A refinement by two workers in processes of their own, of which one is killed and started anew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
import torch

from actors.preparation import prepare
from actors.refined import read
from actors.refinement import RefinementSpec, RefinementStep
from actors.types import Allocation, Prepared
from search.config import parse_config
from search.folder import StudyFolder
from search.pool import Machine
from search.worker import refiner

SPEC = RefinementSpec(steps=12, tokens=128, warmup=2, held_out=64, evaluate_every=4, top_k=16)
MACHINE = Machine(cores=2, gpus=0, memory=2**30)


@pytest.mark.slow  # three processes that load a model
def test_two_workers_refine_as_one_does_and_one_goes_on_alone(cluster: str, tmp_path: Path) -> None:
    config = parse_config(tiny.tiny_config(tmp_path))
    *_, prepared = prepare(config.preparation())
    assert isinstance(prepared, Prepared)
    folder = StudyFolder(config.folder, config, prepared)
    allocations = [
        Allocation.of({t.name: t.full_rank // part for t in prepared.targets}, prepared.targets)
        for part in (4, 3, 2)
    ]

    def taken(worker: Any, allocation: Allocation, kill_at: int | None = None) -> list[RefinementStep]:
        told = []
        for step in worker.refine(allocation, SPEC, {}):
            told.append(step)
            if step.step == kill_at:
                ray.kill(worker._actors[1])
        return told

    def kept() -> dict[str, Any]:
        return {file.name: read(file) for file in (folder.path / "refined").iterdir()}

    with refiner(folder, MACHINE, 2) as worker:
        taken(worker, allocations[0])
        ray.get(worker._actors[1].__ray_ready__.remote())  # type: ignore[attr-defined]
        shared = taken(worker, allocations[1])
        assert shared[-1].workers == 2
        dead, left = worker._actors[1], taken(worker, allocations[2], kill_at=6)[-1]  # type: ignore[attr-defined]
        assert left.workers == 1
        assert left.ended is not None
        assert re.match(r"12 steps; a worker was left out at step \d+: ActorDiedError: ", left.ended)
        taken(worker, allocations[2])
        assert worker._actors[1] is not dead  # type: ignore[attr-defined]
        assert ray.get(worker._actors[1].__ray_ready__.remote())  # type: ignore[attr-defined]
    several = kept()
    for file in (folder.path / "refined").iterdir():
        file.unlink()
    with refiner(folder, MACHINE) as worker:
        for allocation in allocations:
            assert {step.workers for step in taken(worker, allocation)} == {1}
    alone = kept()
    assert several.keys() == alone.keys()
    assert len(alone) == 3
    for name, (tensors, manifest) in alone.items():
        mine, told = several[name]
        assert told["held_out"]["after"] == pytest.approx(manifest["held_out"]["after"], rel=1e-4)
        for part, value in tensors.items():
            assert torch.allclose(mine[part], value, rtol=1e-3, atol=1e-4 * value.abs().max().item()), part
