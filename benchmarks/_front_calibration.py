"""A calibration that an interruption costs one part of: moments are kept between the parts of its text.

As several builders share a calibration (`actors.builder`), so do the parts of one here, one after another;
what the parts before have summed up is a file beside the factors until these are whole.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from actors.builder import Builder
from actors.moments import Moments, merge
from actors.types import BuildPlan, PreparationSpec, Prepared

# Windows of a part: of 512 tokens, a minute on two cores.
PART = 16


class OutOfTimeError(Exception):
    """What is next would not end in time."""


def prepared_in_parts(spec: PreparationSpec, deadline: float) -> Prepared:
    """What a preparation of this spec leaves behind; it begins nothing that would not end by `deadline`
    (of `time.monotonic`), as far as the part before it tells.

    Raises:
        OutOfTimeError: it is not through; what was measured is kept.
    """
    builder = Builder(spec, torch.get_num_threads())
    try:
        for item in builder.inspect():
            if isinstance(item, Prepared):
                return item
            if isinstance(item, BuildPlan):
                return _built(builder, item, Path(spec.cache), deadline)
            if isinstance(item, str):
                say(item)
    finally:
        builder.close()
    raise RuntimeError("the preparation ended without a result")


def _built(builder: Builder, made: BuildPlan, cache: Path, deadline: float) -> Prepared:
    """The last part is measured with the decompositions: its moments stay where they are summed."""
    (names,) = made.groups  # of a model that one pass is enough for
    kept = cache / f"moments-{builder.fingerprints['factors'][:16]}.pt"
    parts = max(1, made.windows // PART)
    done, before = _read(kept)
    seconds = 0.0
    for part in range(done, parts):
        if time.monotonic() + 1.5 * seconds > deadline:
            raise OutOfTimeError
        start = time.monotonic()
        _measure(builder, made, part, parts)
        seconds = time.monotonic() - start
        if part == parts - 1:
            break
        for name in names:
            mine = builder.part(name)
            before[name] = merge([before[name], mine]) if name in before else mine
        _write(kept, part + 1, before)
    say("decomposing")
    for name in names:
        builder.build(name, *([before.pop(name)] if name in before else ()))
    ready = builder.finish()
    kept.unlink(missing_ok=True)
    return ready


def _measure(builder: Builder, made: BuildPlan, part: int, parts: int) -> None:
    windows = max((step.done for step in builder.collect(made, 0, part, parts)), default=0)
    say(f"calibrating, part {part + 1} of {parts}: {windows} windows")


def _read(path: Path) -> tuple[int, dict[str, Moments]]:
    """How many parts there are, and what they sum up to."""
    if not path.exists():
        return 0, {}
    found: dict[str, Any] = torch.load(path, weights_only=False)  # our own, of a moment ago
    return found["parts"], found["moments"]


def _write(path: Path, parts: int, moments: dict[str, Moments]) -> None:
    """A crash at any instant leaves the old or the new file."""
    temporary = path.with_suffix(".tmp")
    torch.save({"parts": parts, "moments": moments}, temporary)
    os.replace(temporary, path)  # noqa: PTH105 - the name that says atomic


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
