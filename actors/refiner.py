"""A worker that refines: the resident model, the calibration text, and what is measured of what comes out."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.factors import FactorStore
from actors.harness_results import HarnessScore, HarnessSpec, metrics_of
from actors.helper import Helper
from actors.models import load_tokenizer
from actors.refinable import Texts, first_windows
from actors.refine import Helping, helping, refine
from actors.refined import RefinedFactors
from actors.refinement import REFIT, RefinementSpec, RefinementStep, file_of, refinement_fingerprint
from actors.refit import refit
from actors.resident import resident
from actors.scoring import Scorer
from actors.shared_folder import sees
from actors.text import calibration_windows, fingerprint_windows
from actors.types import Allocation, RankfrontError, ReplicaSpec, Score

if TYPE_CHECKING:
    from torch import Tensor

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
        self._held = contextlib.ExitStack()
        self._helping: Helping | None = None

    def refine(
        self,
        allocation: Allocation,
        spec: RefinementSpec,
        facts: Mapping[str, Any],
        helpers: Sequence[Helper] = (),
    ) -> Iterator[RefinementStep]:
        """Refine as `spec` says, or go on doing so; `facts` are added to the file's manifest.

        `helpers` take shares of the steps, where there are any.

        Raises:
            RankfrontError: the calibration text is another than the study's, or what `actors.refine` and
                `actors.refit` say.
        """
        scorer, prints = self._scorer, self._spec.prepared.fingerprints
        texts = Texts(self._windows(), first_windows(scorer.split("search").text, spec.held_out))
        fingerprint = refinement_fingerprint(prints, allocation, spec)
        path = self._folder / file_of(fingerprint)
        facts, factors = {**facts, "fingerprint": fingerprint}, self._factors()
        if spec.method == REFIT:
            yield from refit(scorer.model, factors, allocation, texts, spec, path, facts)
        else:
            yield from refine(scorer.model, factors, allocation, texts, spec, path, facts, helpers)

    def help(self, allocation: Allocation, spec: RefinementSpec) -> None:
        """Be ready for shares of another worker's refinement; raises as `refine` does."""
        self._held.close()
        self._helping = None  # before there is another: one of them fills the memory
        factors, windows = self._factors(), self._windows()
        self._helping = self._held.enter_context(
            helping(self._scorer.model, factors, allocation, windows, spec)
        )

    def _factors(self) -> FactorStore:
        """The study's, read from disk rank by rank, for a model that is dense from now on: beside what moves
        the device may have no room for all ranks, nor for the products of trials."""
        self._scorer.store.release()
        store = FactorStore(self._spec.prepared.factor_store)
        self._scorer.trial_model.use(store)
        return store

    @property
    def helping(self) -> Helping:
        """What answers for shares, once it is to `help`."""
        assert self._helping is not None
        return self._helping

    def _windows(self) -> Tensor:
        """The calibration text (windows, window).

        Raises:
            RankfrontError: it is another than the study's.
        """
        preparation = self._spec.preparation
        ids = calibration_windows(preparation, self._scorer.tokenizer)
        if fingerprint_windows(ids) != self._spec.prepared.fingerprints["calibration"]:
            raise RankfrontError(
                f"{preparation.calibration.text.source}: no longer the text the factors were made from"
            )
        return ids

    def find(self, file: str) -> None:
        """Raises RankfrontError where the folder here has no such `file`, which the driver sees in it."""
        if not sees(self._folder / file):
            raise RankfrontError(
                f"{self._folder}: node {platform.node()}, which refines, does not see the driver's files "
                "in it, and the driver would not see what is refined; set runs to a folder that both share, "
                "or start the driver on that node"
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
        if file is None:
            self._factors()
        else:
            device = str(self._scorer.model.device)
            self._scorer.trial_model.use(RefinedFactors(self._folder / file, device))
