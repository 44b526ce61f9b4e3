"""What refining the factors of SmolLM2-135M gives at 70% of its parameters, on text it never saw.

    python benchmarks/refinement.py [--calibration VALID.txt --test RAW-TEST.txt] [--rates 3e-4 ...]

The quick start's model, factors and text (BoolQ's passages), or the two files of WikiText-2: the word-level
validation file, its `<unk>` deleted with the space before it, to calibrate, and the raw test file. The
allocation is uniform. The same factors are scored as they are, and refined by steps of KL to the dense model
(`actors.refine`) at each learning rate. What a refinement keeps is decided by a tenth of the calibration text
alone; the test split is scored once for each row.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _common import CACHE, machine, prepared, quick_start, table, uniform_at

from actors.refined import RefinedFactors
from actors.refinement import RefinementSpec, file_of, refinement_fingerprint
from actors.refiner import Refiner
from actors.storage import ITEMSIZE
from actors.types import Allocation, Prepared, ReplicaSpec, Score
from search.config import Config
from search.cost import CostModel

FOLDER = CACHE / "refined"


def config_of(arguments: argparse.Namespace) -> Config:
    """The quick start without tasks, with the test tokens asked for; of other texts where they are given."""
    window = 256
    sections: dict[str, Any] = {
        "scoring": {
            "window": window,
            "tokens": {"search": window, "test": arguments.test_tokens},
            "batch_tokens": 1024,
        },
        "calibration": {"fraction": 0.4, "tokens": arguments.tokens, "window": window},
    }
    if arguments.calibration is not None:
        cleaned = CACHE / "wikitext2-valid.txt"
        cleaned.write_text(arguments.calibration.read_text().replace(" <unk>", ""))
        sections["calibration"]["text"] = {"source": str(cleaned)}
        sections["text"] = {"source": str(arguments.test.resolve())}
    return quick_start(**sections)


def uniform(config: Config, ready: Prepared, budget: float) -> Allocation:
    """As `uniform_at`, of a prepared model."""
    itemsize = ITEMSIZE[config.model.dtype]
    cost = CostModel(ready.targets, ready.model_parameters, config.storage, config.factors.bias, itemsize)
    return uniform_at(cost, budget)


def refined(
    refiner: Refiner, allocation: Allocation, spec: RefinementSpec, ready: Prepared
) -> tuple[dict[str, Any], Score, float]:
    """The manifest, the test score and the seconds of a refinement; one that is there already is scored."""
    file = file_of(refinement_fingerprint(ready.fingerprints, allocation, spec))
    start = time.perf_counter()
    if not (FOLDER / file).exists():
        for step in refiner.refine(allocation, spec, {}):
            say(f"{spec.learning_rate:g}: {step}")
    seconds = time.perf_counter() - start
    return RefinedFactors(FOLDER / file).manifest, refiner.score(allocation, "test", file), seconds


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=8_192, help="of calibration")
    parser.add_argument("--test-tokens", type=int, default=8_192)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-tokens", type=int, default=1_536)
    parser.add_argument("--every", type=int, default=10, help="steps between held-out scores")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4])
    arguments = parser.parse_args()
    if (arguments.calibration is None) != (arguments.test is None):
        parser.error("give both --calibration and --test, or neither")
    CACHE.mkdir(parents=True, exist_ok=True)
    config = config_of(arguments)
    ready = prepared(config.preparation())
    allocation = uniform(config, ready, arguments.budget)
    replica = ReplicaSpec("benchmark", config.preparation(), ready, torch.get_num_threads())
    refiner = Refiner(replica, FOLDER)
    dense = refiner.score(Allocation.dense(ready.targets), "test", None)
    before = refiner.score(allocation, "test", None)
    say(f"perplexity: dense {dense.text.perplexity:.2f}, before {before.text.perplexity:.2f}")
    rows = [
        ["dense", "", "", "", f"{dense.text.perplexity:.1f}", ""],
        ["as they are", "", "", "", f"{before.text.perplexity:.1f}", ""],
    ]
    curves = []
    for rate in arguments.rates:
        spec = RefinementSpec(
            arguments.steps, arguments.step_tokens, rate, evaluate_every=arguments.every, patience=3
        )
        manifest, after, seconds = refined(refiner, allocation, spec, ready)
        say(f"{rate:g}: perplexity {after.text.perplexity:.2f}")
        gain, kl = after.minus(before, "nll"), manifest["held_out"]
        rows.append(
            [
                f"refined, learning rate {rate:g}",
                f"{manifest['step']} of {arguments.steps}",
                f"{kl['before']:.3f} → {kl['after']:.3f}",
                f"{seconds / 60:.1f}",
                f"{after.text.perplexity:.1f}",
                f"{gain.mean:+.3f} ± {gain.stderr:.3f}",
            ]
        )
        scores = ", ".join(f"{step}: {value:.3f}" for step, value in manifest["scores"])
        curves.append([f"{rate:g}", scores, manifest["ended"]])
    print(f"# Refining factors: SmolLM2-135M at {arguments.budget:.0%} of its parameters\n")
    print(f"`python benchmarks/refinement.py {' '.join(sys.argv[1:])}`\n")
    head = ["factors", "kept step", "held-out KL", "minutes", "test perplexity", "test nats/token, change"]
    print(table(head, rows))
    print("\nKL to the dense model on held-out calibration text (nats/token) by step:\n")
    print(table(["learning rate", "step: KL", "ended by"], curves))
    tokens, test = ready.tokens["calibration"], ready.tokens["test"]
    print(
        f"\n{tokens:,} calibration tokens, {arguments.step_tokens:,} a step; {test:,} test tokens; uniform "
        f"allocation, {config.factors.method}, storage {config.storage}, fp32, "
        f"{torch.get_num_threads()} thread(s); {machine()}"
    )


if __name__ == "__main__":
    main()
