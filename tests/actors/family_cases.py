"""One tiny random model of each family, for every suite that all of them must pass.

A new family is one line in CASES: its model type, the (m, n) of every target of a block, and where
the type differs from the usual, its settings, the path of its blocks, which targets have a bias, and
where its checkpoints file the blocks under another path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny

from actors.factors import FactorStore
from actors.low_rank import TrialModel
from actors.models import load_model
from actors.moments import Moments
from actors.types import Allocation, ModelSource, TargetSpec

BLOCKS = 3


def gated(head_dim: int = 8) -> dict[str, tuple[int, int]]:
    """Llama's block at hidden 32 and intermediate 64, with 4 heads that share 2 keys and values."""
    queries, keys = 4 * head_dim, 2 * head_dim
    return {
        "self_attn.q_proj": (queries, 32),
        "self_attn.k_proj": (keys, 32),
        "self_attn.v_proj": (keys, 32),
        "self_attn.o_proj": (32, queries),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }


GPT2 = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
NEOX = {
    "attention.query_key_value": (96, 32),
    "attention.dense": (32, 32),
    "mlp.dense_h_to_4h": (64, 32),
    "mlp.dense_4h_to_h": (32, 64),
}
OPT = {f"self_attn.{side}_proj": (32, 32) for side in ("k", "v", "q", "out")} | {
    "fc1": (64, 32),
    "fc2": (32, 64),
}
GEMMA3 = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
# The model of images and text, whose config nests those of both; it is asked about text alone.
GEMMA3_IMAGES = {
    "text_config": GEMMA3 | {"layer_types": GEMMA3["layer_types"][:BLOCKS]},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": tiny.VOCABULARY - 1,
}
OPT_SETTINGS = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": tiny.INITIALIZER_RANGE}


@dataclass(frozen=True)
class Case:
    model_type: str
    shapes: Mapping[str, tuple[int, int]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    blocks: str = "model.layers"
    biased: tuple[str, ...] = ()
    generic: bool = False
    filed: str | None = None

    def name_in_file(self, target: str) -> str:
        """What its checkpoint calls a target."""
        return target if self.filed is None else target.replace(self.blocks, self.filed)


CASES = (
    Case("llama", gated(), {"attention_bias": True, "mlp_bias": True}, biased=("*",)),
    Case("mistral", gated(), {"sliding_window": 8, "tie_word_embeddings": False}),
    Case("qwen2", gated(), biased=("*.[qkv]_proj",)),
    Case("qwen3", gated(head_dim=16), {"head_dim": 16}),
    Case("gemma3_text", gated(head_dim=16), GEMMA3 | {"layer_types": GEMMA3["layer_types"][:BLOCKS]}),
    Case(
        "gemma3",
        gated(head_dim=16),
        GEMMA3_IMAGES,
        "model.language_model.layers",
        generic=True,
        filed="language_model.model.layers",
    ),
    Case("gpt2", GPT2, blocks="transformer.h", biased=("*",)),
    Case("opt", OPT, OPT_SETTINGS, "model.decoder.layers", biased=("*",), generic=True),
    Case("gpt_neox", NEOX, blocks="gpt_neox.layers", biased=("*",), generic=True),
)


@dataclass(frozen=True)
class Setting:
    """A saved tiny model, its targets, their moments and a store of their factors by two methods."""

    case: Case
    folder: Path
    targets: tuple[TargetSpec, ...]
    moments: Mapping[str, Moments]
    store: FactorStore

    def dense(self) -> Any:
        return load_model(self.folder, ModelSource(str(self.folder)))

    def allocation(self, share: float, method: str | None = None) -> Allocation:
        """The same share of full rank for every target, all by one method."""
        ranks = {target.name: max(1, int(share * target.full_rank)) for target in self.targets}
        return Allocation.of(
            ranks, self.targets, methods=dict.fromkeys(ranks, method) if method is not None else None
        )

    def mixed(self) -> Allocation:
        """Dense targets, low and high ranks, and both methods, side by side."""
        shares, methods = (None, 0.5, 0.9, 0.3, 1.0), (None, "feature", None)
        ranks, chosen = {}, {}
        for number, target in enumerate(self.targets):
            share, method = shares[number % len(shares)], methods[number % len(methods)]
            if share is not None:
                ranks[target.name] = int(share * target.full_rank)
                if method is not None:
                    chosen[target.name] = method
        return Allocation.of(ranks, self.targets, methods=chosen)

    def installed(self, allocation: Allocation, tokens: int) -> tuple[Any, TrialModel]:
        model = self.dense()
        trial = TrialModel(model, self.targets, self.store)
        trial.install(allocation, tokens)
        return model, trial
