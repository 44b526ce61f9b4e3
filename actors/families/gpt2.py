"""GPT-2: Conv1D layers, which store W^T; q, k and v are one layer and so one target."""

from __future__ import annotations

from actors.families.family import Family

GPT2 = Family(
    "gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    modules=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
)
