"""What picks of a comparison come to: ours refined, and several asked the six tasks."""

from __future__ import annotations

from _front_book import Asked, Pick
from _front_calibration import say
from _front_runs import (
    CHOICE,
    DENSE,
    SEARCH,
    STEP,
    TASKS,
    WHOLE_REFIT,
    Bench,
    Kept,
    Player,
    Run,
    asked_runs,
    refined_name,
)

from actors.refinable import Texts, first_windows
from actors.refine import refine
from actors.refined import RefinedFactors
from actors.refinement import (
    FOLDER,
    REFIT,
    RefinementSpec,
    RefinementStep,
    file_of,
    refinement_fingerprint,
)
from actors.refit import refit
from actors.splits import load_split
from actors.text import calibration_windows
from actors.types import Allocation, digest


class Finals:
    """The picks of runs that were played."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._picks: dict[str, dict[float, Kept]] = {}

    def refine(self, run: Run, spec: RefinementSpec) -> None:
        """Refine what a run picked, from the largest budget to the smallest.

        Raises:
            OutOfTimeError: it is not through; the steps that were taken stay, up to the last held-out score.
        """
        if not self._bench.plays(run):
            return
        for under, kept in self._picked(run).items():
            identity = self._refined_score(kept.allocation, spec)
            self._bench.book.pick(refined_name(run, spec), Pick(identity, under, kept.budget, kept.number))

    def ask(self) -> None:
        """Ask what was picked at the tasks' budget, refined by steps or not, unless it was asked already.

        Raises:
            OutOfTimeError: it is not through; the answers to whole sets of tasks are in the book.
        """
        bench, under, spec = self._bench, self._bench.setup.task_budget, self._bench.setup.refinement
        for run in asked_runs(bench.setup):
            method = Player(bench, run).method
            if run == DENSE:
                if self._open(run.name, 1.0):
                    self._ask(run.name, Allocation.dense(bench.folder().prepared.targets), 1.0, method, "")
                continue
            refined = refined_name(run, spec)
            if not bench.plays(run) or not (self._open(run.name, under) or self._open(refined, under)):
                continue
            kept = self._picked(run)[under]
            if self._open(run.name, under):
                self._ask(run.name, kept.allocation, under, method, "")
            if self._open(refined, under):
                file = file_of(self._fingerprint(kept.allocation, spec))
                self._ask(refined, kept.allocation, under, method, file)

    def _open(self, name: str, under: float) -> bool:
        """Whether what was picked under that name is still to be asked."""
        pick, known = self._bench.book.picks.get(name, {}).get(under), self._bench.book.asked.get(name)
        return pick is not None and (known is None or known.score != pick.score)

    def _ask(self, name: str, allocation: Allocation, under: float, method: str, file: str) -> None:
        bench = self._bench
        pick = bench.book.picks[name][under]
        say(f"{name}: asked {bench.setup.examples} questions of each task")
        scorer = bench.scorer(method, TASKS)
        factors = RefinedFactors(bench.cache / FOLDER / file) if file else scorer.store
        scorer.trial_model.use(factors)
        with bench.timed(TASKS):
            found = scorer.score(allocation, "test").tasks
        acc = {task: score.acc for task, score in found.items()}
        stderr = {task: score.stderr for task, score in found.items()}
        examples = min(score.examples for score in found.values())
        bench.book.ask(name, Asked(pick.score, pick.budget, examples, acc, stderr))
        scorer.trial_model.use(scorer.store)

    def _picked(self, run: Run) -> dict[float, Kept]:
        """A run's picks with their allocations: it is played again, from its scores."""
        if run.name not in self._picks:
            self._picks[run.name] = Player(self._bench, run).play(self._bench.setup.trials)
        return self._picks[run.name]

    def _fingerprint(self, allocation: Allocation, spec: RefinementSpec) -> str:
        bench = self._bench
        prints, held = (bench.folder(asked=text).prepared.fingerprints for text in (SEARCH, CHOICE))
        made = refinement_fingerprint({**prints, "search": held["search"]}, allocation, spec)
        return digest([made, bench.setup.refine_windows])

    def _refined_score(self, allocation: Allocation, spec: RefinementSpec) -> str:
        """The id of the test score of an allocation's refined factors, which is in the book."""
        bench = self._bench
        fingerprint = self._fingerprint(allocation, spec)
        identity = digest([fingerprint, bench.folder().prepared.fingerprints["test"]])[:16]
        if identity not in bench.book.scores:
            path = bench.cache / FOLDER / file_of(fingerprint)
            scorer = bench.scorer()
            if not path.exists():
                self._refine(allocation, spec, fingerprint)
            scorer.trial_model.use(RefinedFactors(path))
            bench.book.add_score(identity, scorer.score(allocation, "test").text)
            scorer.trial_model.use(scorer.store)
        return identity

    def _refine(self, allocation: Allocation, spec: RefinementSpec, fingerprint: str) -> None:
        bench, scorer = self._bench, self._bench.scorer()
        training = calibration_windows(bench.folder().config.preparation(), scorer.tokenizer)
        chooses = bench.folder(asked=CHOICE).config.preparation()
        held = first_windows(
            load_split(chooses, "search", scorer.tokenizer, scorer.limit).text, spec.held_out
        )
        texts = Texts(training[: bench.setup.refine_windows], held)
        path = bench.cache / FOLDER / file_of(fingerprint)
        path.parent.mkdir(exist_ok=True)
        scorer.trial_model.use(scorer.store)  # every target is dense now
        facts = {"fingerprint": fingerprint}
        arguments = scorer.model, scorer.store, allocation, texts, spec, path, facts
        if spec.method == REFIT:  # which does not go on where it was stopped
            with bench.timed(WHOLE_REFIT):
                for step in refit(*arguments):
                    self._say(step, spec)
            return
        steps = refine(*arguments)
        while True:
            with bench.timed(STEP):
                taken = next(steps, None)
            if taken is None:
                return
            self._say(taken, spec)

    @staticmethod
    def _say(step: RefinementStep, spec: RefinementSpec) -> None:
        if step.step % spec.evaluate_every == 0:
            say(f"{spec.method}: step {step.step} of {step.steps}, held-out KL {step.held_out:.4f}")
