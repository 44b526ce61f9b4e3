"""Llama: `attention_bias` and `mlp_bias` of the config give every target of a block a bias."""

from __future__ import annotations

from actors.families.family import Family

LLAMA = Family("llama", model_types=("llama",), bias_switches=("attention_bias", "mlp_bias"))
