"""A worker that refines: the resident model, the calibration text, and what is measured of what comes out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.harness_results import HarnessScore, HarnessSpec, metrics_of
from actors.models import load_tokenizer
from actors.refine import refine
from actors.refined import RefinedFactors
from actors.refinement import REFIT, RefinementSpec, RefinementStep, file_of, refinement_fingerprint
from actors.refit import refit
from actors.resident import resident
from actors.scoring import Scorer
from actors.text import fingerprint_windows, text_parts, windows
from actors.types import Allocation, RankfrontError, ReplicaSpec, Score

if TYPE_CHECKING:
    from actors.harness import Harness


# How many of a task's is not known before it is read: so many that computing a product once costs nothing.
MANY_TOKENS = 10**9


class Refiner:
    """Holds one model; refined factors are files of `folder`."""

    def __init__(self, spec: ReplicaSpec, folder: Path) -> None:
        self._folder = folder
        self._spec = spec = replace(spec, prepared=resident(spec.preparation, spec.prepared))
        self._scorer = Scorer(spec)
        self._harness: Harness | None = None

    def refine(
        self, allocation: Allocation, spec: RefinementSpec, facts: Mapping[str, Any]
    ) -> Iterator[RefinementStep]:
        """Refine as `spec` says, or go on doing so; `facts` are added to the file's manifest.

        Raises:
            RankfrontError: the calibration text is another than the study's, or what `actors.refine` and
                `actors.refit` say.
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
        run = refit if spec.method == REFIT else refine
        yield from run(
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
        self._use(file)
        return self._scorer.score(allocation, split)

    def ask(self, allocation: Allocation, file: str | None, spec: HarnessSpec, task: str) -> HarnessScore:
        """What lm-evaluation-harness says of an allocation on one of the tasks of `spec`; factors as above.

        Raises:
            RankfrontError: the harness is not installed, or does not know one of the tasks.
            ScoringError: a logit that is not finite.
        """
        from actors.harness import Harness

        if self._harness is None or self._harness.spec != spec:
            self._harness = Harness(spec)
        self._use(file)
        scorer, start = self._scorer, time.perf_counter()
        scorer.trial_model.install(allocation, MANY_TOKENS)
        # Of its own: the harness gives a tokenizer a token for padding.
        tokenizer = load_tokenizer(self._spec.prepared.model_folder, self._spec.preparation.model)
        found = self._harness.results(scorer.model, tokenizer, [task])
        return HarnessScore(task, tuple(metrics_of(found)), time.perf_counter() - start)

    def _use(self, file: str | None) -> None:
        scorer = self._scorer
        device = str(scorer.model.device)
        store = scorer.store if file is None else RefinedFactors(self._folder / file, device)
        scorer.trial_model.use(store)
