"""Refinements that several modules look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from decomposed import decomposed
from refinements import Setting

from actors.types import Allocation, FactorSpec


@pytest.fixture(scope="module", params=[("llama", "mean"), ("biased_llama", "none")])
def setting(
    request: pytest.FixtureRequest, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    """Some targets dense, some at ranks that run as a product and some that run as factors."""
    which, bias = request.param
    folder: Path = request.getfixturevalue(which)
    place = tmp_path_factory.mktemp("stores") / "store"
    made = decomposed(folder, place, ids, FactorSpec("feature", bias=bias))
    shares = (None, 0.25, 0.5, 0.75)
    ranks = {
        target.name: None if shares[n % 4] is None else int(target.full_rank * shares[n % 4])
        for n, target in enumerate(made.targets)
    }
    allocation = Allocation.of(ranks, made.targets)
    return Setting(folder, made.targets, made.store, allocation, tiny.refinement_texts(ids))


@pytest.fixture(scope="module")
def refined(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refined") / "done.safetensors"
    assert [step.step for step in setting.steps(path)] == [*range(13), 12]
    return path
