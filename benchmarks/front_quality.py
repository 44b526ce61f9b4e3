"""Fronts that strategies find at equal cost: same model, same factors, same number of scored tokens.

    python benchmarks/front_quality.py --validation VALID.txt --test RAW-TEST.txt [--minutes 60]
    python benchmarks/front_quality.py --tiny
    python benchmarks/front_quality.py --table

What is compared is in `_front_runs.py`, on what in `_front_setup.py`; both are fixed there. An allocation is
scored once and shared: its score is in a file under benchmarks/results (`_front_book.py`), committed.
An invocation ends when `--minutes` are over, or whenever it is stopped, and the next one goes on, here or on
another machine; factors are built where they are missing, in runs/benchmarks. What is asked of our front is
measured first: its seeds, our search, the picks of both refined, and the six tasks (`_front_finals.py`).
`--table` writes the table and the picture of what is known, without a model; so does every invocation at its
end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from _common import CACHE, ROOT
from _front_book import Book, Pick
from _front_calibration import OutOfTimeError, say
from _front_finals import Finals
from _front_report import report
from _front_runs import Bench, Player, Run, every_run
from _front_setup import SMOLLM2, WIKITEXT, Setup, Texts, cut_texts, tiny

from actors.types import Allocation, digest
from search.files import write_atomic

RESULTS = ROOT / "benchmarks" / "results"


def play(bench: Bench) -> None:
    """All runs and what their picks come to, as far as time allows, in the order of their worth.

    Raises:
        OutOfTimeError: time is over before they are through.
    """
    ready = bench.folder().prepared
    prints = [ready.fingerprints[name] for name in ("model", "factors", "search", "test")]
    bench.book.begin(digest([prints, bench.setup.identity]))
    identity = bench.score(Allocation.dense(ready.targets), "test")
    bench.book.pick("dense", Pick(identity, 1.0, 1.0, 1))
    finals = Finals(bench)
    seeds, ours, uniform, *others = every_run(bench.setup)
    if not bench.same_seeds:
        say("the factors here give other seeds than the book's: what was begun from those stays as it is")
    for run in (seeds, ours, uniform):
        played(bench, run)
    for run in (ours, seeds):
        finals.refine(run, bench.setup.refinement)
    for trials in bench.setup.checkpoints[-2:]:
        for run in others:
            walked(bench, run, trials)
    for run in others:
        played(bench, run)
    finals.ask()
    finals.refine(seeds, bench.setup.refit)  # beside the steps of the same picks


def played(bench: Bench, run: Run) -> None:
    """Play a run to its picks, unless it was or cannot be."""
    trials = bench.setup.trials if run.counted else 1
    if bench.plays(run) and not bench.book.reached(run.name, trials):
        say(f"{run.name}, {trials} trials" if run.counted else run.name)
        Player(bench, run).play(trials)


def walked(bench: Bench, run: Run, trials: int) -> None:
    """First trials of a strategy that has our seeds, without its picks, unless they are there."""
    if run.seeded and bench.plays(run) and len(bench.book.runs[run.name]) < trials:
        say(f"{run.name}, {trials} trials")
        Player(bench, run).walk(trials)


def run(setup: Setup, texts: Texts, place: Path, cache: Path, minutes: float) -> Book:
    """Play until it is through or time is over; what was found is in the book at `place`."""
    deadline = time.monotonic() + 60 * minutes
    book = Book(place)
    if book.repaired:
        say(f"{place}: {book.repaired}")
    try:
        play(Bench(setup, texts, book, cache, deadline))
        say("complete")
    except OutOfTimeError:
        say(f"{minutes:g} minutes are over; the next invocation goes on")
    return book


def write(setup: Setup, book: Book, folder: Path, where: str) -> None:
    """The table and the picture."""
    stem = f"front_quality_{setup.name}"
    parts = report(setup, book, folder / f"{stem}.png", where)
    write_atomic(folder / f"{stem}.md", "\n\n".join(parts) + "\n")


def tried(folder: Path, minutes: float) -> Book:
    """The whole comparison on a tiny model made in `folder`."""
    sys.path.append(str(ROOT / "tests"))
    from tiny import documents, tiny_llama, tiny_tasks

    tasks = tiny_tasks(folder / "tasks")
    setup = tiny(tiny_llama(folder / "model"), {name: tasks[name] for name in ("arc_easy", "piqa")})
    text = "\n".join(documents())
    texts = cut_texts(folder / "texts", text, "\n".join(reversed(documents(40))))
    place = folder / "front_quality_tiny.jsonl"
    book = run(setup, texts, place, folder, minutes)
    write(setup, book, folder, place.name)
    return book


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--validation", type=Path, help="WikiText-2, validation, the word-level form")
    parser.add_argument("--test", type=Path, help="WikiText-2, raw test")
    parser.add_argument("--minutes", type=float, default=60.0)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tiny", action="store_true", help="on random weights, in a temporary folder")
    mode.add_argument("--table", action="store_true", help="only write what is known")
    arguments = parser.parse_args()
    if arguments.tiny:
        with tempfile.TemporaryDirectory() as place:
            tried(Path(place), arguments.minutes)
            print((Path(place) / "front_quality_tiny.md").read_text())
        return
    place = RESULTS / f"front_quality_{SMOLLM2.name}.jsonl"
    if arguments.table:
        write(SMOLLM2, Book(place, writable=False), RESULTS, place.name)
        return
    if arguments.validation is None or arguments.test is None:
        parser.error("give --validation and --test, or --tiny, or --table")
    texts = cut_texts(WIKITEXT, arguments.validation.read_text(), arguments.test.read_text())
    book = run(SMOLLM2, texts, place, CACHE, arguments.minutes)
    write(SMOLLM2, book, RESULTS, place.name)


if __name__ == "__main__":
    main()
