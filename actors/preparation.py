"""Everything done once before a search, in one process: convert, calibrate, decompose, fix the splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from actors.builder import Builder
from actors.types import BuildPlan, Foreseen, PreparationSpec, Prepared, Progress

Step = str | Mapping[str, str] | Foreseen | Progress | Prepared


def prepare(spec: PreparationSpec, threads: int | None = None) -> Iterator[Step]:
    """Yield lines and progress, before the long work the fingerprints and what is foreseen, and at last what
    was prepared.

    Raises:
        RankfrontError: the model, the text or a task cannot be used; says what and why.
    """
    builder = Builder(spec, threads)
    try:
        yield from _prepare(builder)
    finally:
        builder.close()


def _prepare(builder: Builder) -> Iterator[Step]:
    for item in builder.inspect():
        if not isinstance(item, BuildPlan):
            yield item
            continue
        done, total = 0, sum(map(len, item.groups))
        for number, group in enumerate(item.groups):
            yield from builder.collect(item, number, 0, 1)
            for name in group:
                builder.build(name)
                done += 1
                yield Progress("decomposing", done, total)
        prepared = builder.finish()
        yield f"factor store: built, {prepared.factor_store}"
        yield prepared
