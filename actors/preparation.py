"""Everything done once before a search: convert, calibrate, decompose, fix the splits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from actors.calibration import collect_moments
from actors.factors import build_store, store_fingerprint, store_problem
from actors.models import (
    count_parameters,
    fingerprint,
    fingerprint_tokenizer,
    list_targets,
    load_model,
    load_tokenizer,
    materialise,
)
from actors.scoring import load_split
from actors.text import fingerprint_windows, text_parts, windows
from actors.types import SPLITS, PreparationSpec, Prepared

Progress = str | Mapping[str, str] | Prepared


def prepare(spec: PreparationSpec, threads: int | None = None) -> Iterator[Progress]:
    """Yield lines of progress, the fingerprints once they are known, and at last what was prepared.

    The fingerprints come before the long work: who expects others can stop there.

    Raises:
        RankfrontError: the model, the text or a task cannot be used; says what and why.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    cache = Path(spec.cache)
    yield f"model: {spec.model.source}"
    folder = materialise(spec.model, cache)
    tokenizer = load_tokenizer(folder, spec.model)
    model = load_model(folder, spec.model, "cuda" if torch.cuda.is_available() else "cpu")
    targets = list_targets(model, spec.include, spec.exclude)
    limit = getattr(model.config, "max_position_embeddings", None)
    clock.lap("load")

    calibration = spec.calibration
    parts = text_parts(calibration, spec.scoring, spec.calibration_fraction)
    ids = windows(
        parts["calibration"], calibration.text.join, tokenizer, calibration.window, calibration.tokens
    )
    splits = {name: load_split(spec, name, tokenizer, limit) for name in SPLITS}
    fingerprints = {
        "model": fingerprint(spec.model),
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "calibration": fingerprint_windows(ids),
        **{name: data.fingerprint for name, data in splits.items()},
    }
    fingerprints["factors"] = store_fingerprint(fingerprints, spec.factors, targets)
    clock.lap("text")
    yield fingerprints
    yield f"text: {ids.numel():,} calibration tokens, {splits['search'].tokens:,} search tokens a trial"

    store = cache / fingerprints["factors"][:16]
    problem = store_problem(store, fingerprints["factors"])
    if problem is not None:
        yield f"factor store: {problem}; calibrating {len(targets)} targets"
        moments = collect_moments(model, targets, ids)
        clock.lap("calibrate")
        yield f"calibrated in {seconds['calibrate']:.0f} s; decomposing by {spec.factors.method}"
        build_store(store, fingerprints["factors"], model, targets, moments, spec.factors)
        clock.lap("decompose")
    else:
        clock.lap("verify")
    yield f"factor store: {'built' if problem else 'reused'}, {store}"
    yield Prepared(
        model_folder=str(folder),
        factor_store=str(store),
        targets=targets,
        model_parameters=count_parameters(model),
        fingerprints=fingerprints,
        tokens={
            "calibration": ids.numel(),
            **{name: data.windows.numel() for name, data in splits.items()},
            **{f"{name}.forward": data.tokens for name, data in splits.items()},
        },
        examples={
            name: {task.name: len(task.examples) for task in data.tasks} for name, data in splits.items()
        },
        seconds=seconds,
        reused=problem is None,
    )


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name], self._last = now - self._last, now
