"""Hold a written export against the searched model, its cost and its scores: once as it is written, and again
from what the folder itself remembers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.agreement import compare_logits, hold
from actors.factors import FactorStore
from actors.low_rank import Ranks, TrialModel
from actors.modeling_rankfront import PivotedLinear, RankfrontConfig
from actors.models import context_limit, load_model, load_tokenizer, same_tokenizers, whole_model
from actors.refined import RefinedFactors
from actors.scoring import score_split
from actors.splits import load_split
from actors.storage import FORMS, ITEMSIZE, stored_target
from actors.types import Allocation, PreparationSpec, Prepared, RankfrontError, Score

Tensor = torch.Tensor

PROBE = "check.json"
# What a folder remembers of the searched model's logits: 64 positions by 32 words, 20 kB as text.
PROBE_POSITIONS = 64
PROBE_WORDS = 32


@dataclass(frozen=True)
class Scored:
    """A scored allocation, and all that decides which model that is; `refined` is the file of its refined
    factors, where the score is theirs."""

    preparation: PreparationSpec
    prepared: Prepared
    allocation: Allocation
    storage: str
    score: Score
    refined: Path | None = None

    def factors(self, device: str = "cpu") -> Ranks:
        """The factors it is cut from, read to a device.

        Raises:
            RankfrontError: they are gone.
        """
        if self.refined is not None:
            return RefinedFactors(self.refined, device)
        store = self.prepared.factor_store
        if not (Path(store) / "manifest.json").exists():
            raise RankfrontError(
                f"the factor store {store} is gone; run the search command again to rebuild it"
            )
        return FactorStore(store, device)


@dataclass(frozen=True)
class Checked:
    """What a written folder holds, what the dense model would, and what was found right, in words."""

    parameters: int
    bytes: int
    dense_parameters: int
    dense_bytes: int
    lines: tuple[str, ...]
    probe: Mapping[str, Any]


@torch.inference_mode()
def check(folder: Path, scored: Scored, added_bytes: int | None = None, device: str = "cpu") -> Checked:
    """Reload a written folder and hold it against the searched model, its cost and its recorded loss.

    `added_bytes` is what it holds more than the dense model; None where the search counted that. Models
    are on `device` one after the other, never two at a time.

    Raises:
        RankfrontError: the tokenizer is another; the files hold other bytes than were counted; logits or loss
            differ by more than rounding.
    """
    preparation, prepared = scored.preparation, scored.prepared
    tokenizer = load_tokenizer(folder, preparation.model)
    ours = load_tokenizer(prepared.model_folder, preparation.model)
    if not same_tokenizers(tokenizer, ours):
        raise RankfrontError(
            f"the folder's tokenizer, as transformers loads it ({type(tokenizer).__name__}), is not the "
            f"model's ({type(ours).__name__}): text would be other tokens"
        )
    store = scored.factors(device)
    model = load_model(prepared.model_folder, preparation.model, device)
    size, whole = tensor_bytes(folder), own_bytes(model)
    counted = whole + (_difference(scored) if added_bytes is None else added_bytes)
    if size != counted:
        raise RankfrontError(f"the files hold {size:,} bytes of tensors; {counted:,} were counted")
    limit = context_limit(model)
    data = load_split(_of_text(preparation), "search", tokenizer, limit)
    probe = data.windows[:1]
    # of the whole split: the products that the search picked for it
    TrialModel(model, prepared.targets, store).install(scored.allocation, prepared.tokens["search.forward"])
    expected = _logits(model, probe)
    del model
    loaded = reload(folder, device)
    found = _logits(loaded, probe)
    score = score_split(loaded, data, preparation.scoring.batch_tokens, "export")
    stored = sum(parameter.numel() for parameter in loaded.parameters())
    forms = _forms(loaded)
    del loaded
    exact = expected
    if preparation.model.dtype != "float32":
        model = load_model(prepared.model_folder, replace(preparation.model, dtype="float32"), device)
        # for one token no product of factors is made: the model's own weights are all it holds
        TrialModel(model, prepared.targets, store).install(scored.allocation, tokens=1)
        exact = _logits(model, probe)
        del model
    logits = compare_logits(found, expected, exact)
    nll, recorded = score.text.nll, scored.score.text.nll
    hold(score, {"nll": recorded}, preparation.model.dtype)
    lines = (
        f"parameters: {stored:,} stored, {stored / prepared.model_parameters:.4f} of the dense model's",
        f"bytes: {size:,} stored, {size / whole:.4f} of the dense model's",
        *forms,
        f"logits of the reloaded folder: {logits}",
        f"nll on the search split: {nll:.6f} reloaded, {recorded:.6f} recorded, "
        f"difference {abs(nll - recorded):.1e} nats/token",
        f"perplexity: {score.text.perplexity:.4f}, recorded {scored.score.text.perplexity:.4f}",
    )
    remembered = _probe(probe, expected, exact) | {"bytes": size}
    return Checked(stored, size, prepared.model_parameters, whole, lines, remembered)


def _of_text(preparation: PreparationSpec) -> PreparationSpec:
    """The same, with nothing to score but its text."""
    scoring = replace(preparation.scoring, tasks=(), bias=(), corpora=(), kl_top_k=None)
    return replace(preparation, scoring=scoring)


def _logits(model: Any, ids: Tensor) -> Tensor:
    """In float32, on the CPU: (rows, positions, words) of ids (rows, positions)."""
    logits: Tensor = model(ids.to(model.device)).logits
    return logits.float().cpu()


def _probe(ids: Tensor, expected: Tensor, exact: Tensor) -> dict[str, Any]:
    """Ids (positions,) of a text, and the logits (positions, words) of evenly spaced words after each."""
    ids = ids[0, :PROBE_POSITIONS]
    words = torch.linspace(0, expected.shape[-1] - 1, PROBE_WORDS).long()
    kept = {"searched": expected, "exact": exact}
    logits = {name: values[0, : len(ids)][:, words].tolist() for name, values in kept.items()}
    return {"ids": ids.tolist(), "words": words.tolist(), **logits}


@torch.inference_mode()
def recheck(
    folder: Path, preparation: PreparationSpec, recorded: Mapping[str, float], device: str = "cpu"
) -> list[str]:
    """Reload a folder and hold it against what it remembers of the searched model; what was found, in words.

    `recorded` are metrics of the search split by name. Text and tasks are found by their sources, the rest in
    the folder.

    Raises:
        RankfrontError: no whole export; bytes, logits or a metric are not those it was written with.
    """
    remembered = read_probe(folder)
    size = tensor_bytes(folder)
    if size != remembered["bytes"]:
        raise RankfrontError(
            f"{folder}: its files hold {size:,} bytes of tensors, {remembered['bytes']:,} were written"
        )
    model = reload(folder, device)
    found = _logits(model, torch.tensor([remembered["ids"]]))[0][:, remembered["words"]]
    searched, exact = (torch.tensor(remembered[name]) for name in ("searched", "exact"))
    logits = compare_logits(found, searched, exact)
    limit = context_limit(model)
    data = load_split(preparation, "search", load_tokenizer(folder, preparation.model), limit)
    score = score_split(model, data, preparation.scoring.batch_tokens, "check")
    metrics = hold(score, recorded, preparation.model.dtype)
    return [f"bytes: {size:,}, as written", f"logits: {logits}", *metrics]


def read_probe(folder: Path) -> dict[str, Any]:
    """What a folder remembers of the searched model.

    Raises:
        RankfrontError: nothing, or nothing that can be read.
    """
    try:
        remembered: dict[str, Any] = json.loads((folder / PROBE).read_text(encoding="utf-8"))
        missing = {"ids", "words", "searched", "exact", "bytes"} - remembered.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise RankfrontError(
            f"{folder} is no export of rankfront: {PROBE} cannot be read ({error})"
        ) from error
    if missing:
        raise RankfrontError(f"{folder / PROBE}: {', '.join(sorted(missing))} missing")
    return remembered


def reload(folder: Path, device: str = "cpu") -> Any:
    """The model of an exported folder, as everyone loads it, on a device.

    Raises:
        RankfrontError: it cannot be loaded, or lacks a weight.
    """
    assert RankfrontConfig.model_type == "rankfront", "imported: transformers knows the type from now on"
    return whole_model(folder, str(folder), dtype="auto", use_safetensors=True).to(device).eval()


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in a folder's safetensors files, their headers excluded."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:  # 8 bytes of length, then a header of that length, then tensors
            header = int.from_bytes(stream.read(8), "little")
        total += path.stat().st_size - 8 - header
    return total


def own_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and saved buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def _difference(scored: Scored) -> int:
    """Bytes that an allocation adds to the dense model's (mostly fewer than 0), as the search counts them."""
    factors, itemsize = scored.preparation.factors, ITEMSIZE[scored.preparation.model.dtype]
    return sum(
        stored_target(scored.storage, target, rank, factors.bias, itemsize).bytes
        - stored_target(scored.storage, target, None, factors.bias, itemsize).bytes
        for target, (_, rank) in zip(scored.prepared.targets, scored.allocation, strict=True)
    )


def _forms(model: Any) -> list[str]:
    """How many targets are stored in each form, and the largest |coefficient| of the pivoted ones."""
    if not hasattr(model.config, "layers"):
        return []
    counts = Counter(layer["form"] for layer in model.config.layers.values())
    found = ", ".join(f"{counts[form]} {form}" for form in FORMS if form in counts) or "none"
    pivoted = [module.coefficients for module in model.modules() if isinstance(module, PivotedLinear)]
    largest = max((part.abs().max().item() for part in pivoted if part.numel()), default=None)
    coefficient = "" if largest is None else f"; largest coefficient {largest:.2f}"
    return [f"compressed targets: {found}{coefficient}"]
