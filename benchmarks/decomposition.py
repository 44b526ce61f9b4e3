"""Perplexity of SmolLM2-135M by decomposition method, storage and budget; WikiText-2, uniform allocations.

    python benchmarks/decomposition.py --calibration VALID.txt --test RAW-TEST.txt [--only PART ...]

The budget is of all parameters: every target keeps the same share of its own, the largest that fits. The
calibration text is the WikiText-2 validation file of the word-level form; its `<unk>` tokens are deleted
with the space before them, everything else is left as it is. The test text is the raw test file. Both are
cut into windows of 512 tokens; every window's tokens but the first are predicted.

`paper-text` is `feature` in factored storage, the method of arXiv 2405.13039 as its text has it.
`paper-code` is what its released code computes: one pass in which every layer finds its eigenvectors behind
layers that are already truncated to rank mn/(m+n), and a bias that is identically zero.

Finished points are kept in runs/benchmarks/decomposition.json and not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import CACHE, machine, quick_start, table
from torch import nn

from actors import calibration
from actors import decompose as maths
from actors.calibration import collect_moments
from actors.decompose import Factors, decompose
from actors.linears import weight_of
from actors.low_rank import TrialModel
from actors.models import count_parameters, list_targets, load_model, load_tokenizer, materialise
from actors.moments import Moments
from actors.perplexity import score_text
from actors.types import Allocation, TargetSpec
from search.cost import CostModel

Tensor = torch.Tensor
BUDGETS = (0.95, 0.9, 0.8, 0.7, 0.6)
TWO = (0.9, 0.8)  # where every variant is measured
WINDOW, TEST_TOKENS, BATCH_TOKENS = 512, 16_384, 1024
CALIBRATION_TOKENS = (16_384, 32_768, 65_536)


class Memory:
    """A factor store in memory."""

    def __init__(self) -> None:
        self.factors: dict[str, Factors] = {}

    def rank(self, name: str, rank: int, method: str | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        factors = self.factors[name]
        left, right = factors.left[:, :rank], factors.right[:rank]
        bias = None
        if factors.offset is not None and factors.shift is not None:
            bias = (factors.offset - left @ factors.shift[:rank]).float()
        return left.T.float(), right.float(), bias


def mean_relative(share: float) -> Callable[[Tensor], float]:
    return lambda values: share * values.mean().item() or 1.0


def median_relative(share: float) -> Callable[[Tensor], float]:
    return lambda values: share * values.median().item() or 1.0


def shrinkage(share: float) -> Callable[[Tensor], float]:
    """(1 - share) G + share mean(values) I, up to a factor nothing depends on: Ledoit and Wolf (2004)."""
    return mean_relative(share / (1 - share))


DAMPINGS = {
    "median x 0.01": median_relative(1e-2),
    "median x 0.1": median_relative(0.1),
    "median x 1": median_relative(1.0),
    "mean x 0.01": mean_relative(1e-2),
    "shrinkage 0.1": shrinkage(0.1),
}
POWERS = (0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Point:
    """One perplexity to measure. `damping` names one of DAMPINGS, or is the constant of actors.decompose;
    `power` is that of a token's gradient norm in its weight."""

    method: str
    storage: str
    budget: float
    tokens: int = CALIBRATION_TOKENS[0]
    labels: str = "sampled"
    bias: str = "mean"
    damping: str = "as shipped"
    power: float = calibration.GRADIENT_POWER

    @property
    def factors(self) -> tuple[str | float, ...]:
        """Points with the same are measured with the same factors."""
        return (self.method, self.tokens, self.labels, self.power, self.bias, self.damping)


def parts() -> dict[str, list[Point]]:
    """What each part of the result file is made of."""
    storages = ("factored", "pivoted")
    methods = ("weight", "feature", "curvature")
    code = [Point("paper-code", "factored", b, bias="none") for b in BUDGETS]
    grid = [Point(m, s, b) for m in methods for s in storages for b in BUDGETS]
    more = [
        Point(m, "pivoted", b, tokens=t)
        for t in CALIBRATION_TOKENS
        for m in ("feature", "curvature")
        for b in BUDGETS
    ]
    variants = [Point(m, "pivoted", b) for m in ("feature", "curvature") for b in TWO]
    variants += [Point("curvature", "pivoted", b, labels="data") for b in TWO]
    variants += [Point(m, "pivoted", b, bias="none") for m in ("feature", "curvature") for b in TWO]
    damped = [Point("curvature", "pivoted", b, damping=d) for d in DAMPINGS for b in TWO]
    weights = [Point("curvature", "pivoted", b, power=p) for p in POWERS for b in TWO]
    return {
        "methods": code + grid,
        "damping": damped,
        "weights": weights,
        "variants": variants,
        "tokens": more,
    }


class Bench:
    """The model, its texts, and the points already measured."""

    def __init__(self, calibration: Path, test: Path) -> None:
        source = quick_start().preparation().model
        folder = materialise(source, CACHE / "factors")
        tokenizer = load_tokenizer(folder, source)
        self.model = load_model(folder, source)
        self.targets = list_targets(self.model)
        self.parameters = count_parameters(self.model)
        self._calibration = _windows(tokenizer, calibration.read_text().replace(" <unk>", ""))
        self._test = _windows(tokenizer, test.read_text())[: TEST_TOKENS // WINDOW]
        self._matrices = {t.name: weight_of(self.model.get_submodule(t.name)) for t in self.targets}
        self._store = Memory()
        self._path = CACHE / "decomposition.json"
        self.found: dict[str, float] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._moments: dict[tuple[int, str, float], dict[str, Moments]] = {}
        self._trial = TrialModel(load_model(folder, source), self.targets, self._store)  # type: ignore[arg-type]

    def say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)

    def run(self, points: list[Point]) -> None:
        """Measure what is not known yet; points that share factors one after another."""
        missing = [point for point in points if repr(point) not in self.found]
        for key in dict.fromkeys(point.factors for point in missing):
            group = [point for point in missing if point.factors == key]
            self._store.factors = self._factors(group[0])
            for point in group:
                self.found[repr(point)] = self._perplexity(self.uniform(point))
                self._path.write_text(json.dumps(self.found, indent=0))
                self.say(f"{point}: {self.found[repr(point)]:.2f}")
        if "dense" not in self.found:
            self.found["dense"] = self._perplexity(Allocation.dense(self.targets))
            self._path.write_text(json.dumps(self.found, indent=0))

    def uniform(self, point: Point) -> Allocation:
        """Every target at the largest common share whose model is within the budget."""
        cost = CostModel(self.targets, self.parameters, point.storage, point.bias, itemsize=4)
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            within = cost.budgets(cost.uniform(middle))["budget.model"] <= point.budget
            low, high = (middle, high) if within else (low, middle)
        return cost.uniform(low)

    def _perplexity(self, allocation: Allocation) -> float:
        self._trial.install(Allocation.dense(self.targets), TEST_TOKENS)
        self._trial.install(allocation, TEST_TOKENS)
        with torch.inference_mode():
            return score_text(self._trial.model, self._test, BATCH_TOKENS, "wikitext2").perplexity

    def _factors(self, point: Point) -> dict[str, Factors]:
        windows = self._calibration[: point.tokens // WINDOW]
        if point.method == "paper-code":
            return dict(self._paper_code(windows))
        moments = self._measured(point, windows)
        start, usual = time.perf_counter(), maths.damping
        maths.damping = DAMPINGS.get(point.damping, usual)
        try:
            factors = {
                name: decompose(name, matrix, moments[name], point.method, point.bias)
                for name, matrix in self._matrices.items()
            }
        finally:
            maths.damping = usual
        self.say(f"{point.factors}: factors in {time.perf_counter() - start:.0f} s")
        return factors

    def _measured(self, point: Point, windows: Tensor) -> dict[str, Moments]:
        key = (point.tokens, point.labels, point.power)
        if key not in self._moments:
            self._moments.clear()
            start, usual = time.perf_counter(), calibration.GRADIENT_POWER
            calibration.GRADIENT_POWER = point.power
            try:
                self._moments[key] = collect_moments(
                    self.model, self.targets, windows, self._matrices, point.labels
                )
            finally:
                calibration.GRADIENT_POWER = usual
            self.say(f"{key}: moments in {time.perf_counter() - start:.0f} s")
        return self._moments[key]

    def _paper_code(self, windows: Tensor) -> Iterator[tuple[str, Factors]]:
        """V of each layer from one batch that went through the layers before it at rank mn/(m+n)."""
        found: dict[str, Tensor] = {}

        def hook_of(target: TargetSpec) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                rows = output.reshape(-1, target.rows).double()
                centred = rows - rows.mean(0)
                vectors = torch.linalg.eigh(centred.T @ centred / (len(rows) - 1)).eigenvectors.flip(1)
                found[target.name] = vectors
                kept = vectors[:, : target.rows * target.cols // (target.rows + target.cols)].float()
                return output @ kept @ kept.T

            return hook

        handles = [self.model.get_submodule(t.name).register_forward_hook(hook_of(t)) for t in self.targets]
        with torch.inference_mode():
            self.model(windows, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        for name, vectors in found.items():
            left = vectors[:, : min(self._matrices[name].shape)]
            right = left.T @ self._matrices[name].double()
            yield name, Factors(left, right, right.new_zeros(len(right)), None, None, None)


def _windows(tokenizer: object, text: str) -> Tensor:
    ids = torch.tensor(tokenizer(text)["input_ids"])  # type: ignore[operator]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def _cell(value: float) -> str:
    return f"{value:.1f}" if value < 10_000 else f"{value:.0e}".replace("e+0", "e")


def report(found: dict[str, float], measured: Sequence[str]) -> str:
    """The result file: the parts that were measured."""

    def line(label: list[str], points: list[Point]) -> list[str]:
        return [*label, *(_cell(found[repr(point)]) for point in points)]

    budgets = [f"{budget:.0%}" for budget in BUDGETS]
    command = (
        "python benchmarks/decomposition.py --calibration wikitext2-valid.txt --test wikitext2-raw-test.txt"
    )
    only = "" if set(measured) == set(parts()) else f" --only {' '.join(measured)}"
    sections = [
        "# Decomposition methods: perplexity of SmolLM2-135M on WikiText-2",
        f"`{command}{only}` (points that an interrupted run had measured are kept)",
        f"{TEST_TOKENS:,} tokens of the raw test file in windows of {WINDOW}, uniform allocation, budget of "
        f"all parameters, dense perplexity {_cell(found['dense'])}. Calibration: the validation file, "
        "`<unk>` deleted with the space before it. How each row is made: see the script's head.",
    ]
    if "methods" in measured:
        rows = [line(["paper-code", "factored"], parts()["methods"][: len(BUDGETS)])]
        for method in ("weight", "feature", "curvature"):
            for storage in ("factored", "pivoted"):
                label = "feature (`paper-text`)" if (method, storage) == ("feature", "factored") else method
                rows.append(line([label, storage], [Point(method, storage, b) for b in BUDGETS]))
        ratios = [
            (b, found[repr(Point("feature", "factored", b))] / found[repr(Point("curvature", "pivoted", b))])
            for b in BUDGETS
        ]
        gains = ", ".join(f"{ratio:.2f}x at {budget:.0%}" for budget, ratio in ratios)
        sections += [
            f"## Method and storage, {CALIBRATION_TOKENS[0]:,} calibration tokens",
            table(["method", "storage", *budgets], rows),
            f"Perplexity of `paper-text` over that of `curvature`, pivoted: {gains}.",
        ]
    if "tokens" in measured:
        rows = [
            line([method, f"{count:,}"], [Point(method, "pivoted", b, tokens=count) for b in BUDGETS])
            for method in ("feature", "curvature")
            for count in CALIBRATION_TOKENS
        ]
        sections += ["## More calibration tokens, pivoted", table(["method", "tokens", *budgets], rows)]
    if "damping" in measured:
        rows = [line([n], [Point("curvature", "pivoted", b, damping=n) for b in TWO]) for n in DAMPINGS]
        note = f"As shipped: median x {maths.DAMPING:g}."
        sections += ["## Damping of `curvature`, pivoted", note, table(["damping", "90%", "80%"], rows)]
    if "weights" in measured:
        rows = [line([f"{p:g}"], [Point("curvature", "pivoted", b, power=p) for b in TWO]) for p in POWERS]
        sections += [
            "## The power of a gradient's norm with which its token counts; `curvature`, pivoted",
            f"As shipped: {calibration.GRADIENT_POWER:g}. Two is the Fisher matrix, zero leaves directions.",
            table(["power", "90%", "80%"], rows),
        ]
    if "variants" in measured:
        rows = [
            line(["curvature", "sampled", "mean"], [Point("curvature", "pivoted", b) for b in TWO]),
            line(
                ["curvature", "data", "mean"], [Point("curvature", "pivoted", b, labels="data") for b in TWO]
            ),
            line(
                ["curvature", "sampled", "none"], [Point("curvature", "pivoted", b, bias="none") for b in TWO]
            ),
            line(["feature", "-", "mean"], [Point("feature", "pivoted", b) for b in TWO]),
            line(["feature", "-", "none"], [Point("feature", "pivoted", b, bias="none") for b in TWO]),
        ]
        sections += [
            "## Labels of the gradients, and the bias; pivoted",
            table(["method", "labels", "bias", "90%", "80%"], rows),
        ]
    return "\n\n".join([*sections, f"SmolLM2-135M-Instruct, fp32; {machine()}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--only", choices=list(parts()), nargs="+", default=list(parts()))
    arguments = parser.parse_args()
    bench = Bench(arguments.calibration, arguments.test)
    for part in arguments.only:
        bench.run(parts()[part])
    print(report(bench.found, arguments.only))


if __name__ == "__main__":
    main()
