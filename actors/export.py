"""Write an allocation as a folder that transformers loads, and check what was written."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

import actors.modeling_rankfront as modeling
from actors.factors import FactorStore
from actors.linears import bias_of, weight_of
from actors.low_rank import Ranks, TrialModel
from actors.modeling_rankfront import PivotedLinear, RankfrontConfig, RankfrontForCausalLM
from actors.models import copy_side_files, load_model, load_tokenizer
from actors.pivoting import pivot
from actors.refined import RefinedFactors
from actors.replica import quieten
from actors.scoring import load_split, score_split
from actors.storage import FACTORED, FORMS, ITEMSIZE, PIVOTED, stored_layer, stored_target
from actors.types import Allocation, PreparationSpec, Prepared, RankfrontError, Score

Tensor = torch.Tensor

# float32 rounding in the order of a long sum, relative to the largest logit; beyond it the folder is
# not the model that was scored.
LOGIT_TOLERANCE = 1e-3
# In half precision, how much further off a float32 run the export may be than the searched model is: 0.8 to
# 1.2 times as far on random models of three families, and pivoted forms round up to 4 times as much.
ROUNDING_RATIO = 4
# Means over thousands of tokens, of which rounding moves some up and some down.
NLL_TOLERANCE_HALF = 0.05


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
    layer.load_state_dict(_parts(form, left, right) | ({} if bias is None else {"bias": bias}))
    entry = {"form": form, "rank": rank, "bias": bias is not None, "in": cols, "out": rows}
    return layer, entry


def _parts(form: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The tensors of a form, by name, of A_r^T (r, m) and B_r (r, n)."""
    if form == PIVOTED:
        return dict(zip(("pivots", "coefficients", "order"), pivot(left, right), strict=True))
    if form == FACTORED:
        return {"left": left.T, "right": right}
    return {"weight": left.T.double() @ right.double()}


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
    refined: Path | None = None,
) -> list[str]:
    """Write `destination` whole or not at all; returns what was checked, in words.

    With the file of its `refined` factors those are written, and `recorded` is their score.

    Raises:
        RankfrontError: the folder exists, the disk is full, or the reloaded model is not the scored one.
    """
    quieten()
    if destination.exists():
        raise RankfrontError(f"{destination} exists already; name another folder with --to")
    store = _ranks(prepared, refined)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        dense = load_model(prepared.model_folder, preparation.model)
        model = low_rank_model(dense, store, allocation, storage)
        model.save_pretrained(partial)
        del dense, model  # what was written is all that is checked
        copy_side_files(prepared.model_folder, partial)
        shutil.copyfile(modeling.__file__, partial / "modeling_rankfront.py")
        description = {**facts, "storage": storage, "ranks": allocation.to_dict()}
        if allocation.methods:
            description["methods"] = dict(allocation.methods)
        (partial / "ranks.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
        lines = check(partial, preparation, prepared, allocation, storage, recorded, refined)
        partial.rename(destination)
    except (OSError, SafetensorError) as error:  # a full disk is the latter where safetensors writes
        raise RankfrontError(f"export to {destination}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return lines


def _ranks(prepared: Prepared, refined: Path | None) -> Ranks:
    """The factors an export is made of: those of a refined file, or the study's."""
    if refined is not None:
        return RefinedFactors(refined)
    if not (Path(prepared.factor_store) / "manifest.json").exists():
        raise RankfrontError(
            f"the factor store {prepared.factor_store} is gone; run the search command again to rebuild it"
        )
    return FactorStore(prepared.factor_store)


@torch.inference_mode()
def check(
    folder: Path,
    preparation: PreparationSpec,
    prepared: Prepared,
    allocation: Allocation,
    storage: str,
    recorded: Score,
    refined: Path | None = None,
) -> list[str]:
    """Reload a written folder and hold it against the searched model, its cost and its recorded score.

    Models are in memory one after the other, never two at a time.

    Raises:
        RankfrontError: the files hold other bytes than were counted; logits or loss differ by more than
            rounding.
    """
    tokenizer = load_tokenizer(folder, preparation.model)
    store = _ranks(prepared, refined)
    model = load_model(prepared.model_folder, preparation.model)
    size, whole = tensor_bytes(folder), _own_bytes(model)
    counted = whole + _difference(preparation, prepared, allocation, storage)
    if size != counted:
        raise RankfrontError(f"the files hold {size:,} bytes of tensors; {counted:,} were counted")
    limit = getattr(model.config, "max_position_embeddings", None)
    data = load_split(preparation, "search", tokenizer, limit)
    probe = data.windows[:1]
    TrialModel(model, prepared.targets, store).install(allocation, data.tokens)
    expected = model(probe).logits.float()
    del model
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True).eval()
    found = loaded(probe).logits.float()
    score = score_split(loaded, data, preparation.scoring.batch_tokens, "export")
    stored = sum(parameter.numel() for parameter in loaded.parameters())
    forms = _forms(loaded)
    del loaded
    exact = expected
    if preparation.model.dtype != "float32":
        model = load_model(prepared.model_folder, replace(preparation.model, dtype="float32"))
        # for one token no product of factors is made: the model's own weights are all it holds
        TrialModel(model, prepared.targets, store).install(allocation, tokens=1)
        exact = model(probe).logits
        del model
    logits = compare_logits(found, expected, exact)
    tolerance = LOGIT_TOLERANCE if preparation.model.dtype == "float32" else NLL_TOLERANCE_HALF
    if not abs(score.text.nll - recorded.text.nll) <= tolerance * recorded.text.nll:
        raise RankfrontError(
            f"nll is {score.text.nll:.6f} nats/token reloaded, {recorded.text.nll:.6f} recorded"
        )
    return [
        f"parameters: {stored:,} stored, {stored / prepared.model_parameters:.4f} of the dense model's",
        f"bytes: {size:,} stored, {size / whole:.4f} of the dense model's",
        forms,
        f"logits of the reloaded folder: {logits}",
        f"nll on the search split: {score.text.nll:.6f} reloaded, {recorded.text.nll:.6f} recorded, "
        f"difference {abs(score.text.nll - recorded.text.nll):.1e} nats/token",
        f"perplexity: {score.text.perplexity:.4f}, recorded {recorded.text.perplexity:.4f}",
    ]


def compare_logits(found: Tensor, expected: Tensor, exact: Tensor) -> str:
    """Hold reloaded logits against the searched model's, in words.

    `exact` are those of a float32 run of the same factors: `expected` itself where that is one. Else both
    are off it by rounding, which a model may amplify as it likes: the reloaded ones may not be much
    further off than the searched ones are.

    Raises:
        RankfrontError: the difference is more than rounding, or not a number.
    """
    largest = exact.abs().max().item()
    difference = (found - expected).abs().max().item()
    rounding, apart = _rms(expected - exact), _rms(found - exact)
    if rounding == 0:
        if not difference <= LOGIT_TOLERANCE * largest:
            raise RankfrontError(
                f"the reloaded logits differ by {difference:.3g} (largest logit {largest:.3g})"
            )
        return f"max abs difference {difference:.2e} (largest logit {largest:.1f})"
    if not apart <= ROUNDING_RATIO * rounding:
        raise RankfrontError(
            f"the reloaded logits are {apart:.3g} off a float32 run of the same factors, the searched "
            f"model's are {rounding:.3g} (root mean squares; largest logit {largest:.3g}): beyond "
            f"{ROUNDING_RATIO} times as much it is not rounding"
        )
    return (
        f"{apart:.2e} off a float32 run of the same factors, the searched model's are {rounding:.2e} "
        f"(root mean squares; largest logit {largest:.1f})"
    )


def _rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in a folder's safetensors files, their headers excluded."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:  # 8 bytes of length, then a header of that length, then tensors
            header = int.from_bytes(stream.read(8), "little")
        total += path.stat().st_size - 8 - header
    return total


def _own_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and saved buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def _difference(
    preparation: PreparationSpec, prepared: Prepared, allocation: Allocation, storage: str
) -> int:
    """Bytes that an allocation adds to the dense model's (mostly fewer than 0), as the search counts them."""
    itemsize, bias = ITEMSIZE[preparation.model.dtype], preparation.factors.bias
    return sum(
        stored_target(storage, target, rank, bias, itemsize).bytes
        - stored_target(storage, target, None, bias, itemsize).bytes
        for target, (_, rank) in zip(prepared.targets, allocation, strict=True)
    )


def _forms(model: Any) -> str:
    """How many targets are stored in each form, and the largest |coefficient| of the pivoted ones."""
    counts = Counter(layer["form"] for layer in model.config.layers.values())
    found = ", ".join(f"{counts[form]} {form}" for form in FORMS if form in counts) or "none"
    pivoted = [module.coefficients for module in model.modules() if isinstance(module, PivotedLinear)]
    largest = max((part.abs().max().item() for part in pivoted if part.numel()), default=None)
    return f"compressed targets: {found}" + (
        "" if largest is None else f"; largest coefficient {largest:.2f}"
    )
