"""What goes into a pool and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from actors.types import Allocation, Rival, Score


@dataclass(frozen=True)
class Job:
    """One allocation to score on one split, under a key of the caller's; `rivals` may stop it early.

    `moves` counts the nodes that left while they scored it, which cost no attempt.
    """

    key: int
    allocation: Allocation
    split: str = "search"
    attempt: int = 1
    rivals: tuple[Rival, ...] = ()
    moves: int = 0


@dataclass(frozen=True)
class Outcome:
    """The end of a job: a score, or the reason there is none.

    `lost` says that the reason is none of the model's: the replica died, was stopped, had too little memory,
    or met an error that nobody foresaw.
    """

    job: Job
    score: Score | None
    reason: str | None = None
    lost: bool = False
