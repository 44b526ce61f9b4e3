"""What refining factors gives SmolLM2-135M at 70% of its parameters: perplexity on WikiText-2.

    python benchmarks/refinement.py --calibration VALID.txt --test RAW-TEST.txt [--rates 3e-4 ...]

The allocation is uniform, factors by curvature, storage pivoted. The same factors are scored as they are, and
refined by steps of KL to the dense model (`actors.refine`) at each learning rate. Texts are those of
benchmarks/decomposition.py. What a refinement keeps is decided by a tenth of the calibration text alone; the
test text is scored once for each row.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import CACHE, machine, quick_start, table

from actors.calibration import collect_moments
from actors.decompose import Factors, decompose
from actors.linears import weight_of
from actors.low_rank import Ranks, TrialModel
from actors.models import count_parameters, list_targets, load_model, load_tokenizer, materialise
from actors.perplexity import score_text
from actors.refine import refine
from actors.refined import RefinedFactors
from actors.refinement import RefinementSpec
from actors.samples import paired_difference, unpack_floats
from actors.types import Allocation, TextScore
from search.cost import CostModel

Tensor = torch.Tensor
WINDOW, BATCH_TOKENS = 512, 1024


class Memory:
    """Factors in memory, with the `rank` of a factor store."""

    def __init__(self) -> None:
        self.factors: dict[str, Factors] = {}

    def rank(self, name: str, rank: int, method: str | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        factors = self.factors[name]
        left, right = factors.left[:, :rank], factors.right[:rank]
        assert factors.offset is not None
        assert factors.shift is not None
        bias = factors.offset - left @ factors.shift[:rank]
        return left.T.float(), right.float(), bias.float()


@dataclass(frozen=True)
class Refined:
    """One learning rate: held-out KL by step, and what the kept point scores on the test text."""

    rate: float
    scores: list[tuple[int, float]]
    kept: int
    ended: str
    seconds: float
    score: TextScore


class Bench:
    """The model, its texts, its factors, and one allocation."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        source = quick_start().preparation().model
        folder = materialise(source, CACHE / "factors")
        tokenizer = load_tokenizer(folder, source)
        self.model = load_model(folder, source)
        self.targets = list_targets(self.model)
        cost = CostModel(self.targets, count_parameters(self.model), "pivoted", "mean", itemsize=4)
        self.allocation = _uniform(cost, arguments.budget)
        text = arguments.calibration.read_text().replace(" <unk>", "")
        self.windows = _windows(tokenizer, text)[: arguments.tokens // WINDOW]
        self.test = _windows(tokenizer, arguments.test.read_text())[: arguments.test_tokens // WINDOW]
        self.store = Memory()
        matrices = {t.name: weight_of(self.model.get_submodule(t.name)) for t in self.targets}
        moments = collect_moments(self.model, self.targets, self.windows, matrices, "sampled")
        for name, matrix in matrices.items():
            self.store.factors[name] = decompose(name, matrix, moments.pop(name), "curvature", "mean")
        say("factors are there")
        self.trial = TrialModel(self.model, self.targets, self.store)

    def score(self, store: Ranks, allocation: Allocation) -> TextScore:
        self.trial.use(store)
        self.trial.install(allocation, self.test.numel())
        return score_text(self.model, self.test, BATCH_TOKENS, "wikitext2")

    def refined(self, spec: RefinementSpec) -> Refined:
        path = CACHE / f"refinement-{spec.learning_rate:g}-{spec.steps}.safetensors"
        self.trial.use(self.store)
        start = time.perf_counter()
        for step in refine(self.model, self.store, self.allocation, self.windows, spec, path, {}):
            say(f"{spec.learning_rate:g}: {step}")
        seconds = time.perf_counter() - start
        factors = RefinedFactors(path)
        facts = factors.manifest
        score = self.score(factors, self.allocation)
        say(f"{spec.learning_rate:g}: perplexity {score.perplexity:.2f}")
        scores = [(step, kl) for step, kl in facts["scores"]]
        return Refined(spec.learning_rate, scores, facts["step"], facts["ended"], seconds, score)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _windows(tokenizer: object, text: str) -> Tensor:
    ids = torch.tensor(tokenizer(text)["input_ids"])  # type: ignore[operator]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def _uniform(cost: CostModel, budget: float) -> Allocation:
    """Every target at the largest common share whose model is within the budget."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        within = cost.budgets(cost.uniform(middle))["budget.model"] <= budget
        low, high = (middle, high) if within else (low, middle)
    return cost.uniform(low)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration")
    parser.add_argument("--test-tokens", type=int, default=8_192)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-tokens", type=int, default=1_536)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4])
    arguments = parser.parse_args()
    bench = Bench(arguments)
    dense = bench.score(bench.store, Allocation.dense(bench.targets))
    before = bench.score(bench.store, bench.allocation)
    say(f"dense {dense.perplexity:.2f}, before {before.perplexity:.2f}")
    rows = [["dense", "-", "-", "-", f"{dense.perplexity:.1f}", "-"]]
    rows.append(["as they are", "-", "-", "-", f"{before.perplexity:.1f}", "-"])
    curves = []
    for rate in arguments.rates:
        spec = RefinementSpec(arguments.steps, arguments.step_tokens, rate, batch_tokens=BATCH_TOKENS)
        found = bench.refined(spec)
        gain = paired_difference(unpack_floats(found.score.windows), unpack_floats(before.windows))
        kl = f"{found.scores[0][1]:.3f} → {min(kl for _, kl in found.scores):.3f}"
        minutes = f"{found.seconds / 60:.1f}"
        nats = f"{gain.mean:+.3f} ± {gain.stderr:.3f}"
        label = f"refined, learning rate {rate:g}"
        rows.append(
            [label, f"{found.kept} of {arguments.steps}", kl, minutes, f"{found.score.perplexity:.1f}", nats]
        )
        curves.append([f"{rate:g}", ", ".join(f"{step}: {kl:.3f}" for step, kl in found.scores), found.ended])
    rates = " ".join(f"{rate:g}" for rate in arguments.rates)
    head = ["factors", "kept step", "held-out KL", "minutes", "test perplexity", "nats/token less before"]
    print(f"# Refining factors: SmolLM2-135M at {arguments.budget:.0%} of its parameters, WikiText-2\n")
    print(
        "`python benchmarks/refinement.py --calibration wikitext2-valid.txt --test wikitext2-raw-test.txt "
        f"--tokens {arguments.tokens} --test-tokens {arguments.test_tokens} --steps {arguments.steps} "
        f"--step-tokens {arguments.step_tokens} --rates {rates}`\n"
    )
    print(table(head, rows))
    print("\nKL to the dense model on held-out calibration text (nats/token) by step:\n")
    print(table(["rate", "step: KL", "ended by"], curves))
    threads = torch.get_num_threads()
    print(f"\nUniform allocation, curvature, pivoted storage, fp32, {threads} thread(s); {machine()}")


if __name__ == "__main__":
    main()
