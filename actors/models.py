"""Load a pretrained causal language model by name and list its targets. No pickle is ever read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from actors.families import family_of
from actors.families.experts import NO_ADAPTER, experts_of_config
from actors.linears import bias_of, weight_of
from actors.node_cache import CARD_FILES, MODEL_FILES, locked, settle
from actors.sources import Source, fingerprint_files
from actors.types import ModelSource, RankfrontError, TargetSpec, digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PROBE = "The quick\n\nbrown fox's 1234 ünïcode test."
_WEIGHT_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")


def _arguments(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """The first argument and the keywords that transformers' `from_pretrained` calls share."""
    place = Source.parse(source.source)
    keywords: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if place.hub_id is not None:
        return place.hub_id, {**keywords, "revision": place.revision or "main"}
    assert place.path is not None
    if place.path.suffix == ".gguf":
        return str(place.path.parent), {**keywords, "gguf_file": place.path.name}
    if not (place.path / "config.json").exists():
        raise RankfrontError(f"{source.source}: no config.json; a model is a folder with one or a .gguf file")
    return str(place.path), keywords


def check_causal(source: ModelSource, config: Any) -> None:
    """See that a config is of a causal language model rankfront can work on.

    Raises:
        RankfrontError: not a causal language model, or a mixture of experts.
    """
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (known or remote):
        raise RankfrontError(
            f"{source.source}: {config.model_type!r} is not a causal language model (AutoModelForCausalLM)"
        )
    # Transformers gives encoders a causal head too; only as decoders do they not see what they predict.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise RankfrontError(
            f"{source.source}: {config.model_type!r} sees the tokens it is to predict; a causal language "
            "model of this type has is_decoder: true in its config.json"
        )
    if experts_of_config(config) > 1:
        raise RankfrontError(f"{source.source}: {config.model_type!r} {NO_ADAPTER}")


def _config(source: ModelSource) -> Any:
    name, keywords = _arguments(source)
    with _understood(f"{source.source}: cannot be read as a model"):
        return AutoConfig.from_pretrained(name, **keywords)


@contextmanager
def _understood(otherwise: str) -> Iterator[None]:
    """What transformers and tokenizers make of a model's files, or why not, in one line behind `otherwise`.

    Files that are not what they must be end in errors of every class: of checks, and of code that trips.

    Raises:
        RankfrontError: they make nothing of them.
    """
    try:
        yield
    except Exception as error:
        cause = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, KeyError) and " " not in cause:
            cause = f"{cause!r} is missing, or unknown to transformers"
        raise RankfrontError(f"{otherwise}: {' '.join(cause.split()) or type(error).__name__}") from error


def _refuse_quantised(source: ModelSource, config: Any) -> None:
    """Factors are made of the weights as they are stored: those of a quantised model are codes and scales."""
    settings = getattr(config, "quantization_config", None)
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        by = "" if method is None else f" by {method}"
        raise RankfrontError(
            f"{source.source}: quantised{by}; name the unquantised model, or a .gguf file of it"
        )


def fingerprint(source: ModelSource) -> str:
    """Identity of weights, tokenizer and precision: of the files, or the commit of a hub model."""
    place = Source.parse(source.source)
    if place.path is not None:
        content = fingerprint_files(place.path, _WEIGHT_SUFFIXES)
    else:
        commit = getattr(_config(source), "_commit_hash", None)
        if commit is None:
            raise RankfrontError(f"{source.source}: the hub names no commit; give one as org/name@commit")
        content = f"{place.hub_id}@{commit}"
    return digest(["model", content, source.dtype])


def materialise(source: ModelSource, cache: Path) -> Path:
    """A folder of safetensors that replicas can map: the source's own, or a converted copy in `cache`.

    GGUF files are dequantised once. The copy appears whole or not at all.

    Raises:
        RankfrontError: the source is no model that rankfront can work on, or is quantised in another form.
    """
    name, keywords = _arguments(source)
    if "gguf_file" not in keywords:
        config = _config(source)
        check_causal(source, config)
        _refuse_quantised(source, config)
        return Path(name) if Path(name).is_dir() else download(name, keywords["revision"])
    folder = cache / "models" / fingerprint(source)[:16]
    if not folder.exists():
        with locked(folder):  # the replicas of a node ask at once
            if not folder.exists():
                _convert(source, folder)
    return folder


def _convert(source: ModelSource, folder: Path) -> None:
    """Dequantise a GGUF file into a folder, which appears whole or not at all; under its lock."""
    name, keywords = _arguments(source)
    model = whole_model(name, source.source, dtype=DTYPES[source.dtype], **keywords)
    check_causal(source, model.config)
    # A dequantised model still says it is quantised, and then refuses to be saved: rebuild it.
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        plain = type(model)(type(model.config)(**settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(name, **keywords).save_pretrained(partial)
        for file in partial.iterdir():  # a folder that is there is never looked into again
            settle(file)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise RankfrontError(f"{source.source}: cannot be converted into {folder.parent}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def download(hub_id: str, revision: str) -> Path:
    """The folder of a hub model in this node's cache, every file that is read of it there."""
    from huggingface_hub import snapshot_download

    patterns = [*MODEL_FILES, *CARD_FILES]
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))


def load_model(folder: str | Path, source: ModelSource, device: str = "cpu") -> PreTrainedModel:
    """The model of a materialised folder, in evaluation mode, without gradients.

    Raises:
        RankfrontError: it cannot be loaded from safetensors, or lacks a weight.
    """
    keywords = {"dtype": DTYPES[source.dtype], "trust_remote_code": source.trust_remote_code}
    model = whole_model(folder, source.source, use_safetensors=True, **keywords)
    model.requires_grad_(False)
    return model.to(device).eval()  # type: ignore[no-any-return]


def whole_model(folder: str | Path, named: str, **keywords: Any) -> Any:
    """What transformers loads from a folder, where it has every weight: one that is missing would be made up,
    in every process another.

    Raises:
        RankfrontError: it cannot be loaded, or lacks a weight; says so of the model as it is `named`.
    """
    with _understood(f"{named}: cannot be loaded as a model"):
        model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **keywords)
    missing = sorted(told["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RankfrontError(f"{named}: its files lack {missing[0]}{others} of {type(model).__name__}")
    return model


def own_code(model: Any) -> bool:
    """Whether a model's class came with its files, not with transformers: it has no export."""
    return type(model).__module__.startswith("transformers_modules.")


def context_limit(model: Any) -> int | None:
    """Tokens that a model reads at once, as the config of its text says; None where that names no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def load_tokenizer(folder: str | Path, source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a materialised folder.

    Raises:
        RankfrontError: there is none: it cannot be read, or makes nothing of a text.
    """
    with _understood(f"{source.source}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
        probed = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    if not probed:
        raise RankfrontError(f"{source.source}: its tokenizer makes no token of a text; are its files there?")
    return tokenizer  # type: ignore[no-any-return]


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Identity of a tokenizer: its vocabulary and what it makes of a probe text."""
    probe = tokenizer(_PROBE)["input_ids"]
    return digest(["tokenizer", sorted(tokenizer.get_vocab().items()), probe])


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks, by the model's family.

    Raises:
        RankfrontError: the model has no list of blocks, or mixes experts.
    """
    family = family_of(model)
    return family.blocks, family.decoder_blocks(model)


def list_targets(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> tuple[TargetSpec, ...]:
    """The linear layers that the model's family declares, in the model's order, chosen by shell patterns; not
    those that share their weight (`Family.linears`).

    Raises:
        RankfrontError: there is none, a pattern fits none, a block lacks one the family declares, or the
            model mixes experts.
    """
    family = family_of(model)
    targets = tuple(
        TargetSpec(
            name=f"{family.blocks}.{block}.{module}",
            rows=weight_of(linear).shape[0],
            cols=weight_of(linear).shape[1],
            bias=bias_of(linear) is not None,
            block=block,
            module=module,
        )
        for block, module, linear in family.linears(model)
    )
    if not targets:
        shared = family.shared(model)
        but = f" but {len(shared)} that share their weight, such as {shared[0]}" if shared else ""
        raise RankfrontError(
            f"{type(model).__name__} has no targets: no linear layer inside {family.blocks}{but}"
        )
    idle = [
        f"targets.{key}[{index}]: {pattern!r} fits none"
        for key, patterns in (("include", include), ("exclude", exclude))
        for index, pattern in enumerate(patterns)
        if not any(fnmatchcase(target.name, pattern) for target in targets)
    ]
    if idle:
        modules = ", ".join(dict.fromkeys(target.module for target in targets))
        raise RankfrontError(
            f"{'; '.join(idle)} of the {len(targets)} linear layers that may be compressed: "
            f"{family.blocks}.N.MODULE with {modules}"
        )
    chosen = tuple(
        target
        for target in targets
        if any(fnmatchcase(target.name, pattern) for pattern in include)
        and not any(fnmatchcase(target.name, pattern) for pattern in exclude)
    )
    if not chosen:
        raise RankfrontError(
            f"targets: include {list(include)} less exclude {list(exclude)} leaves none of {len(targets)} "
            f"linear layers, such as {targets[0].name}"
        )
    return chosen


def count_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def same_tokenizers(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same of a text, and call the same tokens special."""
    return (
        fingerprint_tokenizer(one) == fingerprint_tokenizer(other)
        and one.special_tokens_map == other.special_tokens_map
    )


def name_tokenizer(destination: Path, tokenizer: Any) -> None:
    """Name a tokenizer's class beside its files.

    Without that transformers goes by the type of the model, which in an export is another, and may take
    another class, which has other special tokens or splits a text otherwise.
    """
    if type(tokenizer).__module__.startswith("transformers_modules."):  # its code comes with it, and is named
        return
    # By the name that transformers 4 knows it by too, where it has an own one for it.
    name = (
        "PreTrainedTokenizerFast" if type(tokenizer) is PreTrainedTokenizerFast else type(tokenizer).__name__
    )
    path = destination / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if settings.get("tokenizer_class") != name:
        path.write_text(json.dumps({**settings, "tokenizer_class": name}, indent=2), encoding="utf-8")


def copy_side_files(folder: str | Path, destination: Path) -> None:
    """Tokenizer and generation settings of a model folder, as they are, beside an export."""
    for file in sorted(Path(folder).iterdir()):
        is_weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        wanted = file.suffix in _WEIGHT_SUFFIXES and not is_weights and file.name != "config.json"
        if file.is_file() and wanted:
            shutil.copyfile(file, destination / file.name)
    settings = destination / "generation_config.json"
    if settings.exists():
        GenerationConfig.from_dict(json.loads(settings.read_text()))  # refuse to ship a broken one
