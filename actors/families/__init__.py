"""Model families: one small file each, registered here by a line in FAMILIES."""

from __future__ import annotations

from torch import nn

from actors.families.experts import NO_ADAPTER, find_experts
from actors.families.family import Family
from actors.families.gemma3 import GEMMA3
from actors.families.generic import generic
from actors.families.gpt2 import GPT2
from actors.families.llama import LLAMA
from actors.families.mistral import MISTRAL
from actors.families.qwen2 import QWEN2
from actors.families.qwen3 import QWEN3
from actors.types import RankfrontError

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, GPT2)


def family_of(model: nn.Module) -> Family:
    """The family that is for the model's `config.model_type`, else a generic one, whose `note` says so.

    Raises:
        RankfrontError: the model has no list of decoder blocks, or mixes experts.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    named = (family for family in FAMILIES if model_type in family.model_types)
    family = next(named, None) or generic(model, model_type)
    experts = find_experts(family.decoder_blocks(model))
    if experts is not None:
        raise RankfrontError(f"{type(model).__name__} {NO_ADAPTER} ({family.blocks}, {experts})")
    return family
