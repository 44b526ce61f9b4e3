"""The strategies of a comparison, each played against the same scores.

    uniform, seeds      every target at one share, or seeds of equal marginal loss, at a ladder of budgets
    ladder              the seeds, and more of them at budgets spread evenly: as many trials as ours
    exchange            ours, from the seeds; it aims at no budget below those that count
    random, nsga2, tpe  Optuna's, bare (from the dense model alone) or warm (from the same seeds)
    surgical/paper      arXiv 2405.13039: `feature` factors, stored factored, its ladder scanned upwards
    surgical/ours       the same walk over our factors, shares halved

Samplers are driven as a search drives them, through `search.study.SearchStudy`; the study is in memory, and
what a replica would be asked is asked here, in this process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from _common import machine, uniform_at
from _front_book import Book, Pick, Trial
from _front_calibration import OutOfTimeError, prepared_in_parts, say
from _front_setup import Setup, Texts, linear_budget
from optuna.storages import InMemoryStorage

from actors.refinement import REFIT, RefinementSpec
from actors.scoring import Scorer
from actors.types import Allocation, ReplicaSpec, Score, digest
from search.aims import van_der_corput
from search.choosing import APART
from search.folder import StudyFolder
from search.samplers import make_sampler
from search.sections import SamplerSection, SurgicalSection
from search.seeds import ladder, predicted
from search.study import SearchStudy, open_storage_study
from search.surgical import Walk, make_rule


@dataclass(frozen=True)
class Run:
    """A strategy with its seed. `start` is what it is given: nothing but dense, or our seeds too."""

    strategy: str
    seed: int = 0
    warm: bool = False

    @property
    def name(self) -> str:
        return f"{self.label}/{self.seed}" if self.sampler else self.strategy

    @property
    def label(self) -> str:
        return f"{self.strategy} warm" if self.warm and self.strategy != OURS else self.strategy

    @property
    def sampler(self) -> bool:
        return self.strategy in SAMPLERS

    @property
    def seeded(self) -> bool:
        """Whether its first trials are our seeds."""
        return self.warm or self.strategy in (SEEDS, LADDER)

    @property
    def counted(self) -> bool:
        """Whether it goes on for as many trials as a setup says."""
        return self.sampler or self.strategy == LADDER


# What a score is of: the texts of the search split, of the choice among picks and of the test split.
SEARCH, CHOICE, TEST, TASKS = "search", "choice", "test", "tasks"
OURS = "exchange"
SAMPLERS = (OURS, "tpe", "nsga2", "random")
PAPER, IMPROVED, SEEDS, LADDER = "surgical/paper", "surgical/ours", "seeds", "ladder"
# What else takes time: a pick asked the tasks, a step of its refinement, its refit.
STEP, WHOLE_REFIT = "step", "refit"
# Seconds on one core, until one has been measured: nothing begins that would not end in time.
FIRST_SECONDS = {SEARCH: 20.0, CHOICE: 80.0, TEST: 80.0, TASKS: 400.0, STEP: 60.0, WHOLE_REFIT: 900.0}


def every_run(setup: Setup) -> list[Run]:
    """In the order they are played: what is required first, then what it is held against, seed by seed."""
    (ours, *first), *others = ([Run(name, seed, warm=True) for name in SAMPLERS] for seed in setup.seeds)
    return [
        Run(SEEDS),
        ours,
        Run("uniform"),
        Run(LADDER),
        *first,
        *chain(*others),
        Run(IMPROVED),
        Run(PAPER),
        *(Run(name, seed) for seed in setup.seeds for name in SAMPLERS[1:]),
    ]


DENSE = Run("dense")


def asked_runs(setup: Setup) -> list[Run]:
    """Whose picks are asked the tasks."""
    ours = Run(OURS, setup.seeds[0], warm=True)
    return [DENSE, Run("uniform"), Run(SEEDS), ours, Run(IMPROVED), Run(PAPER)]


def refined_name(run: Run, spec: RefinementSpec) -> str:
    """What a run's picks are called once they are refined as the spec says."""
    return f"{run.name} {'refit' if spec.method == REFIT else 'refined'}"


class Bench:
    """The models, prepared when they are first needed, and the book of what they were asked."""

    def __init__(self, setup: Setup, texts: Texts, book: Book, cache: Path, deadline: float) -> None:
        self.setup, self.book = setup, book
        self._texts, self.cache, self._deadline = texts, cache, deadline
        self._folders: dict[tuple[str, str], StudyFolder] = {}
        self._scorer: tuple[tuple[str, str], Scorer] | None = None
        self._seconds = dict(FIRST_SECONDS)
        self._measured: set[str] = set()

    def folder(self, method: str = "curvature", asked: str = SEARCH) -> StudyFolder:
        """What the factors of a method make of the model; `asked` the search and test text, the text that
        chooses, or tasks. Its folder is not written to.

        Raises:
            OutOfTimeError: they are not there, and building them does not end in time.
        """
        if (method, asked) not in self._folders:
            setup, storage = self.setup, "auto" if method == "curvature" else "factored"
            made = {SEARCH: setup.config, CHOICE: setup.choice_config, TASKS: setup.task_config}[asked]
            config = made(self._texts, self.cache, method, storage)
            ready = prepared_in_parts(config.preparation(), self._deadline)
            self._folders[method, asked] = StudyFolder(self.cache, config, ready)
        return self._folders[method, asked]

    @cached_property
    def same_seeds(self) -> bool:
        """Whether the factors here give the seeds that the book's runs began with.

        Another kind of processor rounds otherwise, so other labels are drawn for the gradients' moments: a
        loss hardly differs, a seed does by a few ranks. What was begun from others cannot go on.
        """
        recorded = [trial.score for trial in self.book.runs.get(SEEDS, ())][1:]
        found = [self._identity(each, SEARCH) for each in self.seeds()]
        return recorded == found[: len(recorded)]

    def plays(self, run: Run) -> bool:
        """Whether a run can go on here."""
        return not run.seeded or self.same_seeds

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """
        Raises:
            OutOfTimeError: what is of this kind would not end in time, as far as the longest so far tells.
        """
        start = time.monotonic()
        if start + 1.5 * self._seconds[kind] > self._deadline:
            raise OutOfTimeError
        yield
        seconds = time.monotonic() - start
        self._seconds[kind] = max(seconds, self._seconds[kind]) if kind in self._measured else seconds
        self._measured.add(kind)

    def score(self, allocation: Allocation, text: str = SEARCH, method: str = "curvature") -> str:
        """The id of an allocation's score, which is in the book when this returns.

        Raises:
            OutOfTimeError: it is not there, and scoring would not end in time.
        """
        identity = self._identity(allocation, text, method)
        if identity not in self.book.scores:
            scorer = self.scorer(method, _asked(text))
            with self.timed(text):
                score = scorer.score(allocation, _split(text))
            self.book.add_score(identity, score.text)
        return identity

    def _identity(self, allocation: Allocation, text: str, method: str = "curvature") -> str:
        ready = self.folder(method, _asked(text)).prepared
        prints = [ready.fingerprints[name] for name in ("model", "factors", _split(text))]
        return digest([allocation.key, *prints])[:16]

    def scorer(self, method: str = "curvature", asked: str = SEARCH) -> Scorer:
        """The model with the factors of a method, as `folder` has them. One at a time is loaded."""
        if self._scorer is None or self._scorer[0] != (method, asked):
            self._scorer = None
            folder, threads = self.folder(method, asked), torch.get_num_threads()
            spec = ReplicaSpec("benchmark", folder.config.preparation(), folder.prepared, threads)
            self._scorer = (method, asked), Scorer(spec)
        return self._scorer[1]

    def whole(self, identity: str) -> Score:
        """A score of the book as a study takes it."""
        text = self.book.scores[identity]
        return Score("search", text, {}, self.setup.search_tokens, seconds=0.0, replica="benchmark")

    def seeds(self, at: Sequence[float] = ()) -> list[Allocation]:
        """Equal marginal loss per parameter at some budgets, or at the ladder's, by the spectra."""
        folder = self.folder()
        cost, store = folder.cost, Path(folder.prepared.factor_store)
        curves = predicted(cost, self.setup.floor, folder.config.factor_spec, store)
        budgets = [linear_budget(cost, budget) for budget in at or self.setup.ladder]
        return [allocation for allocation in ladder(cost, curves, budgets) if allocation is not None]


def _asked(text: str) -> str:
    """Which folder of a bench has a text."""
    return CHOICE if text == CHOICE else SEARCH


def _split(text: str) -> str:
    """As what split it has it."""
    return "test" if text == TEST else "search"


@dataclass(frozen=True)
class Kept:
    """An allocation that a run keeps as its `number`-th trial; its loss on the search split, and the id of
    that score."""

    allocation: Allocation
    budget: float
    nll: float
    score: str
    number: int


class Player:
    """One run against the bench. The book has every trial when the next one begins."""

    def __init__(self, bench: Bench, run: Run) -> None:
        self._bench, self._run = bench, run
        self.method = "feature" if run.strategy == PAPER else "curvature"
        self._count, self._asked = 0, set[str]()

    def play(self, trials: int) -> dict[float, Kept]:
        """The run's first `trials` trials (all there are, where it is not a sampler's); then its picks, which
        it returns by budget.

        Raises:
            OutOfTimeError: it is not through; what was scored is in the book.
        """
        kept = self.walk(trials)
        picks = {}
        for under in self._bench.setup.budgets:
            within = [each for each in kept if each.budget <= under]
            if within:
                picks[under] = best = self._chosen(within)
                identity = self._bench.score(best.allocation, TEST, self.method)
                self._bench.book.pick(self._run.name, Pick(identity, under, best.budget, self._count))
        self._bench.book.end(self._run.name, self._count, machine())
        return picks

    def walk(self, trials: int) -> list[Kept]:
        """The run's first trials alone; raises as `play` does."""
        return list(self._points(trials))

    def _chosen(self, points: Sequence[Kept]) -> Kept:
        """The point of least loss on the text that chooses, among the best by the search text that it cannot
        tell from the first of them."""
        bench = self._bench
        different = {each.allocation.key: each for each in reversed(points)}
        first, *others = sorted(different.values(), key=lambda each: each.nll)
        best = bench.whole(first.score)
        near = [
            each
            for each in others[: bench.setup.candidates - 1]
            if not bench.whole(each.score).minus(best, "nll").beyond(APART)
        ]
        if not near:
            return first
        found = {each: bench.score(each.allocation, CHOICE, self.method) for each in (first, *near)}
        return min(found, key=lambda each: bench.book.scores[found[each]].nll)

    def _points(self, trials: int) -> Iterator[Kept]:
        if self._run.sampler:
            yield from self._sampled(trials)
        elif self._run.strategy in (PAPER, IMPROVED):
            yield from self._walked()
        else:
            yield from self._listed(trials)

    def _listed(self, trials: int) -> Iterator[Kept]:
        bench, setup = self._bench, self._bench.setup
        folder = bench.folder()
        if self._run.strategy == "uniform":
            found: Sequence[Allocation] = [uniform_at(folder.cost, budget) for budget in setup.ladder]
        else:
            found = bench.seeds()
        if self._run.strategy == LADDER:
            more = (van_der_corput(number) for number in range(1, trials - len(found)))
            found = [*found, *bench.seeds([1 - (1 - setup.lowest) * share for share in more])]
        for allocation in (Allocation.dense(folder.prepared.targets), *found):
            yield self._keep(allocation)

    def _sampled(self, trials: int) -> Iterator[Kept]:
        bench, run = self._bench, self._run
        folder = bench.folder()
        objectives = folder.config.named_objectives
        study = SearchStudy(
            open_storage_study(InMemoryStorage(), run.name, objectives),
            make_sampler(SamplerSection(name=run.strategy, seed=run.seed), folder.landscape),
            run.seed,
            folder.space,
            folder.cost,
            objectives,
        )
        start = [(Allocation.dense(folder.prepared.targets), "dense")]
        study.enqueue([*start, *((each, "seed") for each in bench.seeds() if run.warm)])
        for _ in range(trials):
            planned = study.propose(run.strategy)
            kept = self._keep(planned.allocation)
            study.complete(planned, bench.whole(bench.score(planned.allocation)))
            yield kept

    def _walked(self) -> Iterator[Kept]:
        bench, method = self._bench, self.method
        folder = bench.folder(method)
        section = folder.config.surgical
        if self._run.strategy == IMPROVED:
            section = SurgicalSection(**{**section.model_dump(), "ladder": "shares", "ranks": "bisect"})
        known: dict[str, Score] = {}
        walk = Walk(folder.cost, section, make_rule(section, {}), lambda asked: known[asked.key])
        yield self._keep(walk.dense)
        known[walk.dense.key] = bench.whole(bench.score(walk.dense, method=method))
        while not walk.done:
            for step in walk.advance():
                if step.rank is not None:
                    yield self._keep(step.allocation)
            if walk.wanted:
                asked = walk.wanted[0].allocation
                self._note(asked, None)
                known[asked.key] = bench.whole(bench.score(asked, method=method))

    def _keep(self, allocation: Allocation) -> Kept:
        budget = self._bench.folder(self.method).cost.budgets(allocation)["budget.model"]
        identity = self._note(allocation, budget)
        return Kept(allocation, budget, self._bench.book.scores[identity].nll, identity, self._count)

    def _note(self, allocation: Allocation, budget: float | None) -> str:
        """Score an allocation and record it as the next trial."""
        book = self._bench.book
        identity = self._bench.score(allocation, method=self.method)
        tokens = 0 if identity in self._asked else self._bench.setup.search_tokens
        self._asked.add(identity)
        if book.note(self._run.name, self._count, Trial(identity, budget, tokens)):
            say(f"{self._run.name}: trial {self._count} is not the one recorded; those after it are dropped")
        self._count += 1
        return identity
