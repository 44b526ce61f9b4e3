"""Write an allocation as a folder that transformers loads, and check what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

import actors.modeling_rankfront as modeling
from actors.check import PROBE, Checked, Scored, check, own_bytes
from actors.claimed import claimed
from actors.dense_weights import dense_model
from actors.devices import device_here, room_on
from actors.licence import copy_licence_files
from actors.linears import bias_of, weight_of
from actors.low_rank import Ranks
from actors.modeling_rankfront import RankfrontConfig, RankfrontForCausalLM
from actors.models import copy_side_files, load_model, load_tokenizer, name_tokenizer, own_code
from actors.node_cache import settle
from actors.pivoting import pivot
from actors.plain import to_yaml
from actors.replica import quieten
from actors.sources import from_home
from actors.storage import FACTORED, PIVOTED, stored_layer
from actors.types import Allocation, RankfrontError

Tensor = torch.Tensor

DESCRIPTION = "ranks.yaml"
CARD = "README.md"

LOW_RANK, DENSE_WEIGHTS = "rankfront", "dense"
FORMATS = (LOW_RANK, DENSE_WEIGHTS)
"""Forms of a folder: a model type of its own that stores what was counted, or the base model's own type with
the products of the factors as its weights, which is no smaller."""


def low_rank_layer(
    dense: nn.Module, store: Ranks, name: str, rank: int, storage: str, method: str | None = None
) -> tuple[nn.Module, Mapping[str, Any]]:
    """A target at a rank, stored in the dense layer's precision, and what the config says of it."""
    weight, own = weight_of(dense), bias_of(dense)
    left, right, bias = store.rank(name, rank, method)
    if own is not None:
        bias = own if bias is None else bias + own
    rows, cols = weight.shape
    form = stored_layer(storage, rows, cols, rank, bias is not None, weight.element_size()).form
    layer = modeling.FORMS[form](cols, rows, rank, bias is not None).to(weight.dtype)
    parts = _parts(form, left, right)
    if bias is not None:
        parts["bias"] = _pivoted_bias(bias, parts, weight.dtype) if form == PIVOTED else bias
    layer.load_state_dict(parts)
    entry = {"form": form, "rank": rank, "bias": bias is not None, "in": cols, "out": rows}
    return layer, entry


def _parts(form: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The tensors of a form, by name, of A_r^T (r, m) and B_r (r, n)."""
    if form == PIVOTED:
        return dict(zip(("pivots", "coefficients", "order"), pivot(left, right), strict=True))
    if form == FACTORED:
        return {"left": left.T, "right": right}
    return {"weight": left.T.double() @ right.double()}


def _pivoted_bias(bias: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """[c; b - C c] (m,) in the order of the pivoted rows, by the coefficients as they are stored."""
    placed = torch.empty(len(bias), dtype=torch.float64)
    placed[parts["order"].long()] = bias.double().cpu()
    own, others = placed.tensor_split((len(parts["pivots"]),))
    others -= parts["coefficients"].to(dtype).double() @ own
    return placed


def low_rank_model(
    dense: nn.Module, store: Ranks, allocation: Allocation, storage: str
) -> RankfrontForCausalLM:
    """The exportable model: `dense` is changed in place and becomes its inside."""
    layers: dict[str, Mapping[str, Any]] = {}
    for name, rank in allocation:
        if rank is None:
            continue
        layer, layers[name] = low_rank_layer(
            dense.get_submodule(name), store, name, rank, storage, allocation.method_of(name)
        )
        dense.set_submodule(name, layer)
    base: Any = dense.config
    config = RankfrontConfig(base=base.to_dict(), layers=layers, dtype=base.dtype)
    config.architectures = ["RankfrontForCausalLM"]
    config.auto_map = dict(modeling.AUTO_MAP)
    with torch.device("meta"):
        model = RankfrontForCausalLM(config)
    model.base = dense
    if getattr(dense, "generation_config", None) is not None:
        model.generation_config = dense.generation_config
    model.eval()
    return model


def export(
    scored: Scored,
    destination: Path,
    facts: Mapping[str, Any],
    card: Callable[[Checked], str],
    form: str = LOW_RANK,
    device: str = "auto",
) -> list[str]:
    """Write `destination` whole or not at all; returns what was checked, in words.

    `facts` go into ranks.yaml before the ranks; `card` writes the model card once the folder is measured.
    `form` is one of FORMATS; it is checked on `device`.

    Raises:
        RankfrontError: the folder exists, the disk is full, the device is not there or has no room, the model
            has no dense form, or the reloaded model is not the scored one.
    """
    quieten()
    device = device_here(device)
    refuse_existing(destination)
    destination = from_home(destination, "--to").resolve()
    prepared, allocation = scored.prepared, scored.allocation
    store = scored.factors()
    description = {**facts, "storage": scored.storage, "ranks": allocation.to_dict()}
    if allocation.methods:
        description["methods"] = dict(allocation.methods)
    try:
        with claimed(destination) as partial:
            refuse_existing(destination)  # by one that was waited for
            added = _write_model(scored, store, partial, form)
            copy_side_files(prepared.model_folder, partial)
            if form == LOW_RANK:
                name_tokenizer(partial, load_tokenizer(prepared.model_folder, scored.preparation.model))
            copy_licence_files(prepared.model_folder, partial)
            (partial / DESCRIPTION).write_text(to_yaml(description), encoding="utf-8")
            with room_on(device):
                checked = check(partial, scored, added, device)
            (partial / PROBE).write_text(json.dumps(checked.probe), encoding="utf-8")
            (partial / CARD).write_text(card(checked), encoding="utf-8")
            for file in partial.iterdir():
                settle(file)
            partial.rename(destination)
    except (OSError, SafetensorError) as error:  # a full disk is the latter where safetensors writes
        raise RankfrontError(f"export to {destination}: {error}") from error
    return list(checked.lines)


def refuse_existing(destination: Path) -> None:
    """Raises RankfrontError where there is something at `destination`."""
    if destination.exists() or destination.is_symlink():
        raise RankfrontError(f"{destination} exists already; name another folder with --to")


def _write_model(scored: Scored, store: Ranks, folder: Path, form: str) -> int | None:
    """Config and weights, and what they take more than the dense model's; None where the search counted that.

    The model is gone when this returns: what was written is all that is checked.
    """
    dense = load_model(scored.prepared.model_folder, scored.preparation.model)
    if own_code(dense):
        raise RankfrontError(
            f"export of {scored.preparation.model.source}: a model whose code comes with it has no "
            "export; write the configuration alone with --config-only"
        )
    if form == DENSE_WEIGHTS:
        before = own_bytes(dense)
        dense_model(dense, store, scored.allocation).save_pretrained(folder)
        return own_bytes(dense) - before
    low_rank_model(dense, store, scored.allocation, scored.storage).save_pretrained(folder)
    return None
