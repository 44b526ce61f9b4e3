"""Stores of a tiny model's factors, built as a builder builds them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from actors.calibration import collect_moments
from actors.factors import FactorStore, StoreBuilder
from actors.models import list_targets, load_model
from actors.moments import Moments
from actors.types import FactorSpec, ModelSource, TargetSpec

SPEC = FactorSpec("feature")
MIXED = FactorSpec(
    "feature", methods=(("*.up_proj", "weight"), ("*.mlp.*", "curvature")), choices=("weight",)
)

Setting = tuple[nn.Module, tuple[TargetSpec, ...], dict[str, Moments]]


def setting_of(folder: Path, ids: torch.Tensor) -> Setting:
    model = load_model(folder, ModelSource(str(folder)))
    targets = list_targets(model)
    return model, targets, collect_moments(model, targets, ids, [target.name for target in targets], "data")


def one_block(setting: Setting) -> Setting:
    """The targets of one block: every file is synchronised with the disk, which may be slow."""
    model, targets, moments = setting
    return model, tuple(target for target in targets if target.block == 1), moments


def weight(setting: Setting, target: TargetSpec) -> torch.Tensor:
    return setting[0].get_submodule(target.name).weight


def write(builder: StoreBuilder, setting: Setting) -> None:
    """What is pending."""
    for target in builder.pending():
        builder.write(target, weight(setting, target), setting[2][target.name])


def build(folder: Path, setting: Setting, spec: FactorSpec = SPEC, fingerprint: str = "print") -> FactorStore:
    builder = StoreBuilder(folder, spec, setting[1])
    with builder.locked():
        write(builder, setting)
        builder.finish(fingerprint)
    return FactorStore(folder)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())
