"""A worker that refines: the resident model and the calibration text, and scores of what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from actors.refine import refine
from actors.refined import RefinedFactors
from actors.refinement import RefinementSpec, RefinementStep, file_of, refinement_fingerprint
from actors.scoring import Scorer
from actors.text import fingerprint_windows, text_parts, windows
from actors.types import Allocation, RankfrontError, ReplicaSpec, Score


class Refiner:
    """Holds one model; refined factors are files of `folder`."""

    def __init__(self, spec: ReplicaSpec, folder: Path) -> None:
        self._spec, self._folder = spec, folder
        self._scorer = Scorer(spec)

    def refine(
        self, allocation: Allocation, spec: RefinementSpec, facts: Mapping[str, Any]
    ) -> Iterator[RefinementStep]:
        """Refine, or go on doing so; `facts` are added to the file's manifest.

        Raises:
            RankfrontError: the calibration text is another than the study's, or what `actors.refine` says.
        """
        preparation, prints = self._spec.preparation, self._spec.prepared.fingerprints
        calibration = preparation.calibration
        parts = text_parts(calibration, preparation.scoring, preparation.calibration_fraction)
        ids = windows(
            parts["calibration"],
            calibration.text.join,
            self._scorer.tokenizer,
            calibration.window,
            calibration.tokens,
        )
        if fingerprint_windows(ids) != prints["calibration"]:
            raise RankfrontError(f"{calibration.text.source}: no longer the text the factors were made from")
        fingerprint = refinement_fingerprint(prints, allocation, spec)
        scorer = self._scorer
        scorer.trial_model.use(scorer.store)  # every target is dense now
        yield from refine(
            scorer.model,
            scorer.store,
            allocation,
            ids,
            spec,
            self._folder / file_of(fingerprint),
            {**facts, "fingerprint": fingerprint},
        )

    def score(self, allocation: Allocation, split: str, file: str | None) -> Score:
        """Score an allocation by the refined factors of `file`, or by the study's where none is named.

        Raises:
            ScoringError: no valid score.
        """
        scorer = self._scorer
        device = str(scorer.model.device)
        store = scorer.store if file is None else RefinedFactors(self._folder / file, device)
        scorer.trial_model.use(store)
        return scorer.score(allocation, split)
