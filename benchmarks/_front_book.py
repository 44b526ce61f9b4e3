"""What a comparison has measured so far: an append-only file of scores and of the trials that asked for them.

Its records, one a line of JSON:

    setup   the identity of what everything is measured on; it never changes
    score   `id` of (allocation, factors, text), and the loss: an allocation is scored once, whoever asks
    trial   the `number`-th point of a run: its budget, and the tokens that it cost the run
    pick    the point of a run that is best at or under a budget, to be scored on the test split
    end     of a run, behind its picks: how many trials it was played to, and on what machine at last
    asked   what a pick answers on the test split of tasks

A table is made of these alone. Runs are played anew each time, and answered from the scores: a trial that is
not the one recorded under its number (other versions of a sampler's libraries may propose others) replaces it
and all that follow. So an interrupted run, or one copied to another machine, goes on where it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.types import RankfrontError, TextScore
from search.files import append_record, read_records
from search.journal import repair


@dataclass(frozen=True)
class Trial:
    """A point of a run. `budget` is of all parameters, None where the run does not keep the allocation;
    `tokens` are those of the forward passes that it cost, none where the run had scored it before."""

    score: str
    budget: float | None
    tokens: int


@dataclass(frozen=True)
class Pick:
    """The best point of a run's first `trials` at or `under` a budget; `score` is that of the test split."""

    score: str
    under: float
    budget: float
    trials: int


@dataclass(frozen=True)
class Asked:
    """What the model that was picked (by its test `score`) is right about: of each task the share of the
    `examples`, and its standard error."""

    score: str
    budget: float
    examples: int
    acc: Mapping[str, float]
    stderr: Mapping[str, float]


class Book:
    """The records of one comparison.

    Raises:
        RankfrontError: the file is damaged other than by a torn last line, which is cut off.
    """

    def __init__(self, path: Path, writable: bool = True) -> None:
        self._path = path
        self.repaired = repair(path) if writable else None
        self._identity: str | None = None
        self.scores: dict[str, TextScore] = {}
        self.runs: dict[str, list[Trial]] = defaultdict(list)
        self.picks: dict[str, dict[float, Pick]] = defaultdict(dict)
        self._ends: dict[str, tuple[int, str]] = {}
        self.asked: dict[str, Asked] = {}
        for record in read_records(path, dict[str, Any]):
            self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        values = {key: value for key, value in record.items() if key not in ("kind", "run", "number", "of")}
        if record["kind"] == "setup":
            self._identity = record["of"]
        elif record["kind"] == "score":
            self.scores[record["of"]] = TextScore(**values)
        elif record["kind"] == "trial":
            trials = self.runs[record["run"]]
            del trials[record["number"] :]
            trials.append(Trial(**values))
        elif record["kind"] == "end":
            self._ends[record["run"]] = values["trials"], values.get("machine", "")
        elif record["kind"] == "asked":
            self.asked[record["run"]] = Asked(**values)
        else:
            self.picks[record["run"]][values["under"]] = Pick(**values)

    def _add(self, record: dict[str, Any]) -> None:
        append_record(self._path, record)
        self._take(record)

    def begin(self, identity: str) -> None:
        """Records to come are of this identity.

        Raises:
            RankfrontError: those that are there are of another.
        """
        if self._identity is None:
            self._add({"kind": "setup", "of": identity})
        elif self._identity != identity:
            raise RankfrontError(
                f"{self._path}: was measured on {self._identity}, this is {identity}: another model, texts, "
                "calibration or space; move the file away to begin anew"
            )

    def reached(self, run: str, trials: int) -> bool:
        """Whether a run was played to its picks over at least so many trials."""
        return self._ends.get(run, (0, ""))[0] >= trials

    def machine(self, run: str) -> str:
        """What a run was played on, empty where it has not ended."""
        return self._ends.get(run, (0, ""))[1]

    def end(self, run: str, trials: int, machine: str) -> None:
        """A run's picks over so many trials are all there."""
        if not self.reached(run, trials):
            self._add({"kind": "end", "run": run, "trials": trials, "machine": machine})

    def add_score(self, of: str, score: TextScore) -> None:
        """Durable when it returns, as all that is added."""
        self._add({"kind": "score", "of": of, **asdict(score)})

    def note(self, run: str, number: int, trial: Trial) -> bool:
        """Record a trial under its number unless it is there; whether it replaced another one."""
        known = self.runs[run]
        if number < len(known) and known[number] == trial:
            return False
        replaced = number < len(known)
        self._add({"kind": "trial", "run": run, "number": number, **asdict(trial)})
        return replaced

    def pick(self, run: str, pick: Pick) -> None:
        if self.picks[run].get(pick.under) != pick:
            self._add({"kind": "pick", "run": run, **asdict(pick)})

    def ask(self, run: str, asked: Asked) -> None:
        self._add({"kind": "asked", "run": run, **asdict(asked)})
