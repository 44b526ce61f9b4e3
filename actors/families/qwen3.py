"""Qwen3: Llama's block with a norm over each head of q and k, and heads of a width of their own."""

from __future__ import annotations

from actors.families.family import Family

QWEN3 = Family("qwen3", model_types=("qwen3",), bias_switches=("attention_bias",))
