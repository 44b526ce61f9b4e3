"""Gemma 3, the text model: norms over the heads of q and k and around both halves of a block."""

from __future__ import annotations

from actors.families.family import Family

GEMMA3 = Family("gemma3", model_types=("gemma3_text",), bias_switches=("attention_bias",))
