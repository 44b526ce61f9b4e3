"""Tokenizers as the hub has them: settings that leave it to the type of the model which class reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def _as_it_is(settings: dict[str, Any]) -> None:
    pass


def _digits_apart(settings: dict[str, Any]) -> None:
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}


def _spaces_first(settings: dict[str, Any]) -> None:
    marks = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    settings |= {"pre_tokenizer": marks, "decoder": None}


HUB: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], None]]] = {
    "gpt2": ({"model_max_length": 256}, _as_it_is),
    "olmo2": ({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<eos>"}, _digits_apart),
    "phi3": ({"tokenizer_class": "LlamaTokenizer", "eos_token": "<eos>"}, _spaces_first),
    "llama": ({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}, _as_it_is),
}
"""By model type: tokenizer_config.json, and what is done to the tiny tokenizer.json."""


def as_on_the_hub(folder: Path, model_type: str) -> None:
    """Give a tiny model's folder the tokenizer files that its type has on the hub."""
    settings, change = HUB[model_type]
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    whole = json.loads((folder / "tokenizer.json").read_text())
    change(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
