"""Mistral: Llama's block without biases, with a sliding window of attention."""

from __future__ import annotations

from actors.families.family import Family

MISTRAL = Family("mistral", model_types=("mistral",))
