"""What can go wrong in a way that someone can act on. Standard library only."""

from __future__ import annotations


class RankfrontError(Exception):
    """A mistake or a condition the user can act on; shown without a traceback."""


class ScoringError(RankfrontError):
    """A trial has no valid score (non-finite loss, value out of range); its text is the reason."""


class ShortOfMemoryError(RankfrontError):
    """A worker's memory did not suffice for what it was asked, which says nothing of the model."""


class OpaqueModelError(RankfrontError):
    """A model that no text can be taken through block by block."""
