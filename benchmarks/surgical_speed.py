"""The surgical search over the last targets next to a plain re-implementation of arXiv 2405.13039's.

    python benchmarks/surgical_speed.py [--calibration VALID.txt --text RAW-TEST.txt] [--targets 56 ...]

`plain` is written here, of torch alone: from the last target to the first, ranks in rising order, a deep copy
of the layer put aside, the truncated factors put in its place, the whole model run over all of the text, and
the first rank taken whose perplexity is at most dense (1 + growth)^t. `exact` is `rankfront surgical` as the
paper has it (feature, factored storage, its ladder, ranks scanned); `improved` has curvature, automatic
storage, equal shares, and halves the ladder. Both keep the dense model's states (`scoring.prefix_memory_mb`),
score in this process, and record candidates and steps in a folder as the command does. Decompositions are not
timed; `plain` and `exact` cut their ranks from the same factors.

Fronts are of the share of all parameters and the loss on the search text, over the dense model and what
every step accepts, which are the trials of the study; the area is bounded by the dense size and the loss that
is allowed at the end. A point of `plain` is covered where a point is no larger and no worse, but for
rounding. The last allocation of each is scored on the test text too.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import CACHE, machine, prepared, quick_start, table
from torch import nn

from actors.factors import FactorStore
from actors.models import load_model
from actors.scoring import Scorer
from actors.types import Allocation, Prepared, ReplicaSpec, Score, TargetSpec
from search.alone import Log
from search.config import Config
from search.folder import StudyFolder
from search.pareto import hypervolume
from search.pool import Job, Outcome
from search.runner import Stop
from search.surgical import STEPS, Walk, make_rule
from search.surgical_run import FILE, Answers, accept

IMPROVED = {"ladder": "shares", "ranks": "bisect"}

# nats/token: two orders of the same sums in float32.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Found:
    """A search that has ended: `front` holds the budget of all parameters and nats/token of each accepted
    allocation, the dense one first."""

    name: str
    seconds: float
    scored: int
    ranks: dict[str, int | None]
    front: list[tuple[float, float]]
    test: Score


def config_of(arguments: argparse.Namespace, improved: bool) -> Config:
    """The quick start's, of other texts and another model where they are given."""
    tokens = {"search": arguments.tokens, "test": arguments.test_tokens}
    calibration: dict[str, Any] = {"tokens": arguments.calibration_tokens, "window": arguments.window}
    if arguments.calibration is not None:
        cleaned = arguments.folder / "calibration.txt"
        cleaned.write_text(arguments.calibration.read_text().replace(" <unk>", ""))
        calibration["text"] = {"source": str(cleaned)}
    sections: dict[str, Any] = {
        "runs": str(arguments.folder),
        "scoring": {
            "window": arguments.window,
            "tokens": tokens,
            "batch_tokens": 1024,
            "prefix_memory_mb": arguments.memory,
        },
        "calibration": calibration,
        "factors": {"method": "curvature" if improved else "feature", "bias": "mean"},
        "storage": "auto" if improved else "factored",
        "surgical": {"skip_blocks": 0, "growth": arguments.growth, **(IMPROVED if improved else {})},
    }
    if arguments.model is not None:
        sections["model"] = {"source": str(arguments.model)}
    if arguments.text is not None:
        sections["text"] = {"source": str(arguments.text.resolve())}
    return quick_start(**sections)


class Factored(nn.Module):
    """y = A (B x) + b."""

    def __init__(self, dense: nn.Module, left: torch.Tensor, right: torch.Tensor, bias: Any) -> None:
        super().__init__()
        self.weight, own = dense.weight, getattr(dense, "bias", None)
        self.left, self.right = left.T.contiguous(), right.contiguous()
        self.bias = own if bias is None else bias if own is None else own + bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)


@torch.inference_mode()
def loss(model: nn.Module, windows: torch.Tensor, batch_tokens: int) -> float:
    """nats/token over every token of the windows but their first."""
    nats = 0.0
    for rows in windows.split(max(1, batch_tokens // windows.shape[1])):
        logits = model(rows).logits[:, :-1].float()
        nats += nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        ).item()
    return nats / (len(windows) * (windows.shape[1] - 1))


def paper_ranks(target: TargetSpec) -> list[int]:
    """Rank 1 and 10%, 20%, ... 90% of mn/(m+n)."""
    most = target.rows * target.cols // (target.rows + target.cols)
    return sorted({max(1, int(most * step / STEPS)) for step in range(STEPS)})


def plain(
    model: nn.Module,
    store: FactorStore,
    targets: Sequence[TargetSpec],
    windows: torch.Tensor,
    growth: float,
    batch_tokens: int,
) -> tuple[dict[str, int | None], list[float], int]:
    """The rank of each target; the loss of the dense model and after each accepted one; scores taken."""
    losses = [loss(model, windows, batch_tokens)]
    dense, scored, ranks = math.exp(losses[0]), 1, dict[str, int | None]()
    for visited, target in enumerate(targets, start=1):
        ranks[target.name] = None
        for rank in paper_ranks(target):
            kept = copy.deepcopy(model.get_submodule(target.name))
            model.set_submodule(target.name, Factored(kept, *store.rank(target.name, rank)))
            found, scored = loss(model, windows, batch_tokens), scored + 1
            if math.exp(found) <= dense * (1 + growth) ** visited:
                ranks[target.name] = rank
                losses.append(found)
                break
            model.set_submodule(target.name, kept)
        say(f"plain {visited}/{len(targets)}: {target.name} at {ranks[target.name]}, {scored} scored")
    return ranks, losses, scored


class OneReplica:
    """A pool of one replica in this process."""

    size = 1

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self._jobs, self.scored = scorer, list[Job](), 0

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        while self._jobs:
            job = self._jobs.pop(0)
            self.scored += 1
            yield Outcome(job, self._scorer.score(job.allocation))


def walked(name: str, config: Config, ready: Prepared, count: int) -> Found:
    """The last `count` targets decided as `rankfront surgical` decides them."""
    scorer = Scorer(ReplicaSpec("benchmark", config.preparation(), ready, torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as place:
        folder = StudyFolder(Path(place), config, ready)
        start = time.perf_counter()
        study = folder.open_study()
        dense = Allocation.dense(ready.targets)
        first = scorer.score(dense)
        study.add(dense, "dense", first)
        answers = Answers(study, Log(folder.path, ready.fingerprints, FILE))
        walk = Walk(folder.cost, config.surgical, make_rule(config.surgical, {}), answers)
        walk.order = walk.order[:count]
        pool: Any = OneReplica(scorer)
        accept(
            walk,
            answers,
            pool,
            Stop(),
            lambda: say(f"{name} {len(walk.steps)}/{count}, {pool.scored} scored"),
        )
        seconds = time.perf_counter() - start
        front = [(1.0, first.text.nll)]
        for allocation in (each for step in walk.steps for each in step.accepted):
            score = answers(allocation)
            if score is not None:
                front.append((folder.cost.budgets(allocation)["budget.model"], score.text.nll))
        ranks = {step.target.name: step.rank for step in walk.steps}
        return Found(
            name, seconds, pool.scored + 1, ranks, front, scorer.score(walk.steps[-1].allocation, "test")
        )


def compared(arguments: argparse.Namespace) -> list[Found]:
    """The three searches: plain, exact, improved."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    config = config_of(arguments, improved=False)
    ready = prepared(config.preparation())
    count = min(arguments.targets, len(ready.targets))
    exact = walked("exact", config, ready, count)
    scorer = Scorer(ReplicaSpec("benchmark", config.preparation(), ready, torch.get_num_threads()))
    model = load_model(ready.model_folder, config.preparation().model)
    targets = list(reversed(ready.targets))[:count]
    windows, batch = scorer.split("search").windows, config.scoring.batch_tokens
    start = time.perf_counter()
    ranks, losses, scored = plain(model, scorer.store, targets, windows, arguments.growth, batch)
    seconds = time.perf_counter() - start
    cost = StudyFolder(arguments.folder, config, ready).cost
    taken: dict[str, int | None] = {}
    budgets = [1.0]
    for name, rank in ranks.items():
        taken[name] = rank
        if rank is not None:
            budgets.append(cost.budgets(Allocation.of(taken, ready.targets))["budget.model"])
    test = scorer.score(Allocation.of(ranks, ready.targets), "test")
    front = list(zip(budgets, losses, strict=True))
    first = Found("plain", seconds, scored, ranks, front, test)
    config = config_of(arguments, improved=True)
    return [first, exact, walked("improved", config, prepared(config.preparation()), count)]


def covered(found: Found, other: Found) -> int:
    """How many points of `other`'s front a point of `found`'s equals or beats in both."""
    return sum(
        any(budget <= its_budget and nll <= its_nll + ROUNDING for budget, nll in found.front)
        for its_budget, its_nll in other.front
    )


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, help="a local folder; the quick start's where not given")
    made.add_argument("--calibration", type=Path)
    made.add_argument("--text", type=Path)
    made.add_argument("--targets", type=int, default=56)
    made.add_argument("--tokens", type=int, default=2_048, help="of the search text")
    made.add_argument("--test-tokens", type=int, default=4_096)
    made.add_argument("--calibration-tokens", type=int, default=16_384)
    made.add_argument("--window", type=int, default=512)
    made.add_argument("--growth", type=float, default=0.005)
    made.add_argument("--memory", type=float, default=512.0, help="of kept states, 10^6 bytes")
    made.add_argument("--folder", type=Path, default=CACHE, help="of factors and texts")
    return made


def report(arguments: argparse.Namespace, found: Sequence[Found]) -> Iterator[str]:
    """The table and what it was measured with, line by line."""
    first = found[0]
    count = len(first.ranks)
    bound = (1.0 + 1e-9, first.front[0][1] + count * math.log1p(arguments.growth) + 1e-9)
    area = hypervolume(first.front, bound)
    rows = [
        [
            one.name,
            f"{one.seconds:.1f}",
            one.scored,
            f"{one.seconds / one.scored:.3f}",
            f"{first.seconds / one.seconds:.2f} x",
            "yes" if one.ranks == first.ranks else "no",
            sum(rank is not None for rank in one.ranks.values()),
            f"{one.front[-1][0]:.2%}",
            f"{math.exp(one.front[-1][1]):.2f}",
            f"{one.test.text.perplexity:.2f}",
            f"{hypervolume(one.front, bound) / area:.2f} x" if area else "",
            f"{covered(one, first)} of {len(first.front)}",
        ]
        for one in found
    ]
    yield f"# Surgical search: the last {count} targets\n"
    yield f"`python benchmarks/surgical_speed.py {' '.join(sys.argv[1:])}`\n"
    columns = [
        "search",
        "seconds",
        "scored",
        "s each",
        "speed",
        "plain's ranks",
        "compressed",
        "kept at the end",
    ]
    columns += ["perplexity", "test perplexity", "front's area", "plain's points covered"]
    yield table(columns, rows)
    yield (
        f"\n{arguments.tokens:,} search tokens in windows of {arguments.window}, growth "
        f"{arguments.growth:g}, {arguments.calibration_tokens:,} calibration tokens, fp32, "
        f"{torch.get_num_threads()} thread(s); {machine()}"
    )


def main() -> None:
    arguments = parser().parse_args()
    for line in report(arguments, compared(arguments)):
        print(line)


if __name__ == "__main__":
    main()
