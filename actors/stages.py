"""Scoring in stages: a candidate that a rival already dominates beyond the noise is not scored to the end.

Candidate and rival read the same windows, so the noise is that of their differences, window by window.
Standard library only: both sides import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.samples import pack_floats, paired_difference, unpack_floats

METRICS = ("nll", "kl")
"""Objectives that a stage can compare: those with a value for each window."""

# Standard errors of the mean difference from which a candidate stops. Of candidates that are in truth as
# good as a rival this stops one in 35 after four windows, one in 220 after sixteen (Student's t).
STOP_ERRORS = 3.0


@dataclass(frozen=True)
class Rival:
    """A scored trial that is nowhere larger than the candidate it is sent with.

    `windows` packs, for each objective that is no cost, the nats/token of each window of the split.
    """

    trial: int
    windows: Mapping[str, str]


class Judge:
    """Decides for one candidate, at the end of each stage, whether it goes on.

    `stages` are rising numbers of tokens, of windows of `window` tokens. A stage ends with the first batch
    that reaches it. `stopped_by` is the number of the rival that stopped the candidate, None while none did.
    """

    def __init__(self, stages: Sequence[int], window: int, rivals: Sequence[Rival]) -> None:
        self._stages, self._window = list(stages), window
        self._rivals = [
            (rival.trial, {name: unpack_floats(packed) for name, packed in rival.windows.items()})
            for rival in rivals
        ]
        self.stopped_by: int | None = None

    def due(self, windows: int) -> bool:
        """Whether a stage ended with the `windows` scored so far that had not ended before."""
        ended = [stage for stage in self._stages if stage <= windows * self._window]
        self._stages = self._stages[len(ended) :]
        return bool(ended and self._rivals)

    def stops(self, losses: Mapping[str, Sequence[float]]) -> bool:
        """Whether a rival is better in every objective beyond STOP_ERRORS, by the nats/token of each window.

        `losses` are by metric. One window has no error: nothing stops after it.
        """
        losses = {
            name: unpack_floats(pack_floats(values)) for name, values in losses.items()
        }  # as rivals' are
        beaten = (trial for trial, others in self._rivals if _dominated(losses, others))
        self.stopped_by = next(beaten, None)
        return self.stopped_by is not None


def _dominated(losses: Mapping[str, Sequence[float]], rival: Mapping[str, Sequence[float]]) -> bool:
    """By a rival whose values go on beyond those of `losses`."""
    gaps = [paired_difference(losses[name], values[: len(losses[name])]) for name, values in rival.items()]
    return all(gap.mean > STOP_ERRORS * gap.stderr for gap in gaps)
