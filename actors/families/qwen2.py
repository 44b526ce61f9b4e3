"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v."""

from __future__ import annotations

from actors.families.family import Family

QWEN2 = Family("qwen2", model_types=("qwen2",))
