"""Write an allocation as a folder that transformers loads, and check what was written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import scipy.linalg
import torch
import yaml
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

import actors.modeling_rankfront as modeling
from actors.factors import FactorStore
from actors.low_rank import TrialModel
from actors.modeling_rankfront import FactoredLinear, PivotedLinear, RankfrontConfig, RankfrontForCausalLM
from actors.models import copy_side_files, load_model, load_tokenizer
from actors.replica import quieten
from actors.scoring import load_split, score_split
from actors.types import Allocation, PreparationSpec, Prepared, RankfrontError, Score

Tensor = torch.Tensor

# float32 rounding in the order of a long sum, relative to the largest logit; beyond it the folder is
# not the model that was scored.
LOGIT_TOLERANCE = 1e-3


def pivot(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pivot rows (r, n), coefficients (m - r, r) and row order (m,) of left^T right, float64 inside.

    left is (r, m). The pivots are the rows of A_r = left^T that column-pivoted QR of A_r^T picks: the
    other rows are C A_r[pivots], so W_r's other rows are C times its pivot rows. PIFA, arXiv 2501.19090.
    """
    rank, rows = left.shape
    _, order = scipy.linalg.qr(left.double().numpy(), mode="r", pivoting=True)
    permutation = torch.from_numpy(order.astype("int64"))
    basis, rest = left.double()[:, permutation[:rank]].T, left.double()[:, permutation[rank:]].T
    coefficients = torch.linalg.solve(basis, rest, left=False)
    inverse = torch.empty(rows, dtype=torch.int32)
    inverse[permutation] = torch.arange(rows, dtype=torch.int32)
    return basis @ right.double(), coefficients, inverse


def low_rank_layer(
    dense: nn.Linear, store: FactorStore, name: str, rank: int, storage: str
) -> FactoredLinear | PivotedLinear:
    """The stored form of a target at a rank, in the dense layer's precision."""
    left, right, bias = store.rank(name, rank)
    if dense.bias is not None:
        bias = dense.bias if bias is None else bias + dense.bias
    rows, cols = dense.weight.shape
    layer = modeling.FORMS[storage](cols, rows, rank, bias is not None).to(dense.weight.dtype)
    with torch.no_grad():
        if isinstance(layer, PivotedLinear):
            pivots, coefficients, order = pivot(left, right)
            layer.pivots.copy_(pivots)
            layer.coefficients.copy_(coefficients)
            layer.order.copy_(order)
        else:
            layer.left.copy_(left.T)
            layer.right.copy_(right)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    return layer


def low_rank_model(
    dense: nn.Module, store: FactorStore, allocation: Allocation, storage: str
) -> RankfrontForCausalLM:
    """The exportable model: `dense` is changed in place and becomes its inside."""
    layers: dict[str, Any] = {}
    for name, rank in allocation:
        if rank is None:
            continue
        layer = low_rank_layer(dense.get_submodule(name), store, name, rank, storage)  # type: ignore[arg-type]
        dense.set_submodule(name, layer)
        layers[name] = {
            "form": storage,
            "rank": rank,
            "bias": layer.bias is not None,
            "in": layer.in_features,
            "out": layer.out_features,
        }
    base: Any = dense.config
    config = RankfrontConfig(base=base.to_dict(), layers=layers, dtype=base.dtype)
    config.architectures = ["RankfrontForCausalLM"]
    config.auto_map = {
        "AutoConfig": "modeling_rankfront.RankfrontConfig",
        "AutoModelForCausalLM": "modeling_rankfront.RankfrontForCausalLM",
    }
    with torch.device("meta"):
        model = RankfrontForCausalLM(config)
    model.base = dense
    if getattr(dense, "generation_config", None) is not None:
        model.generation_config = dense.generation_config
    model.eval()
    return model


def export(
    preparation: PreparationSpec,
    prepared: Prepared,
    allocation: Allocation,
    storage: str,
    destination: Path,
    recorded: Score,
    facts: Mapping[str, Any],
) -> list[str]:
    """Write `destination` whole or not at all; returns what was checked, in words.

    Raises:
        RankfrontError: the folder exists, the disk is full, or the reloaded model is not the scored one.
    """
    quieten()
    if destination.exists():
        raise RankfrontError(f"{destination} exists already; name another folder with --to")
    if not (Path(prepared.factor_store) / "manifest.json").exists():
        raise RankfrontError(
            f"the factor store {prepared.factor_store} is gone; run the search command again to rebuild it"
        )
    store = FactorStore(prepared.factor_store)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        dense = load_model(prepared.model_folder, preparation.model)
        model = low_rank_model(dense, store, allocation, storage)
        model.save_pretrained(partial)
        copy_side_files(prepared.model_folder, partial)
        shutil.copyfile(modeling.__file__, partial / "modeling_rankfront.py")
        description = {**facts, "storage": storage, "ranks": allocation.to_dict()}
        (partial / "ranks.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
        lines = check(partial, preparation, prepared, allocation, recorded)
        partial.rename(destination)
    except (OSError, SafetensorError) as error:  # a full disk is the latter where safetensors writes
        raise RankfrontError(f"export to {destination}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return lines


@torch.inference_mode()
def check(
    folder: Path,
    preparation: PreparationSpec,
    prepared: Prepared,
    allocation: Allocation,
    recorded: Score,
) -> list[str]:
    """Reload a written folder and hold it against the searched model and its recorded score.

    Raises:
        RankfrontError: logits or loss differ by more than rounding.
    """
    tokenizer = load_tokenizer(folder, preparation.model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True).eval()
    searched = load_model(prepared.model_folder, preparation.model)
    limit = getattr(searched.config, "max_position_embeddings", None)
    data = load_split(preparation, "search", tokenizer, limit)
    TrialModel(searched, prepared.targets, FactorStore(prepared.factor_store)).install(
        allocation, data.tokens
    )
    probe = data.windows[:1]
    expected, found = searched(probe).logits.float(), loaded(probe).logits.float()
    difference = (found - expected).abs().max().item()
    largest = expected.abs().max().item()
    score = score_split(loaded, data, preparation.scoring.batch_tokens, "export")
    stored = sum(parameter.numel() for parameter in loaded.parameters())
    tolerance = LOGIT_TOLERANCE if preparation.model.dtype == "float32" else 0.05
    if difference > tolerance * largest:
        raise RankfrontError(f"the reloaded logits differ by {difference:.3g} (largest logit {largest:.3g})")
    if abs(score.text.nll - recorded.text.nll) > tolerance * recorded.text.nll:
        raise RankfrontError(
            f"nll is {score.text.nll:.6f} nats/token reloaded, {recorded.text.nll:.6f} recorded"
        )
    return [
        f"parameters: {stored:,} stored, {stored / prepared.model_parameters:.4f} of the dense model's",
        f"logits of the reloaded folder: max abs difference {difference:.2e} (largest logit {largest:.1f})",
        f"nll on the search split: {score.text.nll:.6f} reloaded, {recorded.text.nll:.6f} recorded, "
        f"difference {abs(score.text.nll - recorded.text.nll):.1e} nats/token",
        f"perplexity: {score.text.perplexity:.4f}, recorded {recorded.text.perplexity:.4f}",
    ]
