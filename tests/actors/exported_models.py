"""Tiny models that were prepared, allocated, scored and exported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny
import torch
from hub_tokenizers import as_on_the_hub
from transformers import GenerationConfig

from actors.check import Scored
from actors.export import export
from actors.factors import FactorStore
from actors.low_rank import TrialModel
from actors.models import load_model
from actors.pivoting import pivot
from actors.preparation import prepare
from actors.scoring import Scorer
from actors.storage import ITEMSIZE
from actors.types import Allocation, Prepared, ReplicaSpec, Score
from search.config import Config, parse_config
from search.cost import CostModel


@dataclass(frozen=True)
class Case:
    """A prepared model, an allocation of it, its score, and the folder it was exported to."""

    config: Config
    prepared: Prepared
    storage: str
    allocation: Allocation
    score: Score
    folder: Path
    lines: list[str]

    def searched(self) -> Any:
        model = load_model(self.prepared.model_folder, self.config.preparation().model)
        trial = TrialModel(model, self.prepared.targets, FactorStore(self.prepared.factor_store))
        trial.install(self.allocation, 10**9)
        return model

    @property
    def cost(self) -> CostModel:
        parameters, bias = self.prepared.model_parameters, self.config.factors.bias
        itemsize = ITEMSIZE[self.config.model.dtype]
        return CostModel(self.prepared.targets, parameters, self.storage, bias, itemsize)

    def export(self, destination: Path, **changes: Any) -> list[str]:
        form, device = changes.pop("form", "rankfront"), changes.pop("device", "auto")
        case = replace(self, **changes)
        preparation = case.config.preparation()
        facts = {"study": "tiny", "trial": 3}
        scored = Scored(preparation, case.prepared, case.allocation, case.storage, case.score)
        return export(scored, destination, facts, lambda checked: f"{checked.bytes:,} bytes", form, device)


def make_case(
    root: Path,
    model_type: str,
    storage: str,
    bias: str,
    dtype: str = "float32",
    hub: bool = False,
    **model_settings: Any,
) -> Case:
    """Every rank from one to full occurs, and some targets stay dense. `hub`: its tokenizer is as there."""
    tiny.tiny_model(root / "model", model_type, **model_settings)
    if hub:
        as_on_the_hub(root / "model", model_type)
    GenerationConfig(max_new_tokens=9).save_pretrained(root / "model")
    config = parse_config(
        tiny.tiny_config(root, model={"dtype": dtype}, factors={"bias": bias}, storage=storage)
    )
    *_, prepared = prepare(config.preparation())
    assert isinstance(prepared, Prepared)
    ranks = {
        target.name: None if number % 5 == 4 else max(1, target.full_rank * (number % 5 + 1) // 4)
        for number, target in enumerate(prepared.targets)
    }
    allocation = Allocation.of(ranks, prepared.targets)
    replica = ReplicaSpec("r", config.preparation(), prepared, threads=1, device="cpu")
    score = Scorer(replica).score(allocation)
    case = Case(config, prepared, storage, allocation, score, root / "exports" / storage, [])
    return replace(case, lines=case.export(case.folder))


def off_by_a_row(left: torch.Tensor, right: torch.Tensor) -> Any:
    """`pivot` with a mistake."""
    pivots, coefficients, order = pivot(left, right)
    return pivots, coefficients, order.roll(1)
