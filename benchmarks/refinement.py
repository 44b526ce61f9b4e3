"""What refining the factors of SmolLM2-135M gives at 70% of its parameters, on text it never saw.

    python benchmarks/refinement.py [--calibration VALID.txt --test RAW-TEST.txt] [--rates 3e-4 ...]
    python benchmarks/refinement.py --tiny      # the same on random weights, to see that it runs

The quick start's model, factors and text (BoolQ's passages), or the two files of WikiText-2: the word-level
validation file, its `<unk>` deleted with the space before it, to calibrate, and the raw test file. The
allocation is uniform. The same factors are scored as they are, refitted target by target in closed form
(`actors.refit`), and refined by steps of KL to the dense model (`actors.refine`) at each learning rate. What
a refinement keeps is decided by the search split; the test split is scored once for each row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import CACHE, ROOT, machine, prepared, quick_start, table, uniform_at

from actors.refined import RefinedFactors
from actors.refinement import REFIT, RefinementSpec, file_of, refinement_fingerprint
from actors.refiner import Refiner
from actors.storage import ITEMSIZE
from actors.types import Allocation, Prepared, ReplicaSpec, Score
from search.config import Config, parse_config
from search.cost import CostModel


def config_of(arguments: argparse.Namespace) -> Config:
    """The quick start without tasks, with the test tokens asked for; of other texts where they are given."""
    window = 256
    sections: dict[str, Any] = {
        "scoring": {
            "window": window,
            "tokens": {"search": arguments.held_out, "test": arguments.test_tokens},
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


def tiny_config(folder: Path) -> Config:
    """A tiny Llama of random weights and its text, made in `folder`."""
    sys.path.append(str(ROOT / "tests"))
    import tiny

    return parse_config(tiny.tiny_config(folder, scoring={"tasks": []}))


def uniform(config: Config, ready: Prepared, budget: float) -> Allocation:
    """As `uniform_at`, of a prepared model."""
    itemsize = ITEMSIZE[config.model.dtype]
    cost = CostModel(ready.targets, ready.model_parameters, config.storage, config.factors.bias, itemsize)
    return uniform_at(cost, budget)


def specs_of(arguments: argparse.Namespace) -> dict[str, RefinementSpec]:
    """Every refinement by what the table calls it, the closed form first."""
    steps, tokens, every = arguments.steps, arguments.step_tokens, arguments.every
    held_out = arguments.held_out
    gradients = {
        f"refined, learning rate {rate:g}": RefinementSpec(
            steps, tokens, rate, held_out=held_out, evaluate_every=every, patience=3
        )
        for rate in arguments.rates
    }
    return {
        "refitted in closed form": RefinementSpec(method=REFIT, held_out=held_out, evaluate_every=every),
        **gradients,
    }


def refined(
    refiner: Refiner,
    folder: Path,
    allocation: Allocation,
    name: str,
    spec: RefinementSpec,
    ready: Prepared,
) -> tuple[dict[str, Any], Score, float]:
    """The manifest, the test score and the seconds of a refinement; one that is there already is scored."""
    file = file_of(refinement_fingerprint(ready.fingerprints, allocation, spec))
    start = time.perf_counter()
    if not (folder / file).exists():
        for step in refiner.refine(allocation, spec, {}):
            say(f"{name}: {step}")
    seconds = time.perf_counter() - start
    return RefinedFactors(folder / file).manifest, refiner.score(allocation, "test", file), seconds


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def measured(config: Config, arguments: argparse.Namespace, folder: Path) -> str:
    """The tables, in Markdown; refined factors are kept in `folder`."""
    ready = prepared(config.preparation())
    allocation = uniform(config, ready, arguments.budget)
    replica = ReplicaSpec("benchmark", config.preparation(), ready, torch.get_num_threads())
    refiner = Refiner(replica, folder)
    dense = refiner.score(Allocation.dense(ready.targets), "test", None)
    before = refiner.score(allocation, "test", None)
    say(f"perplexity: dense {dense.text.perplexity:.2f}, before {before.text.perplexity:.2f}")
    rows = [
        ["dense", "", "", "", f"{dense.text.perplexity:.1f}", ""],
        ["as they are", "", "", "", f"{before.text.perplexity:.1f}", ""],
    ]
    curves = []
    for name, spec in specs_of(arguments).items():
        manifest, after, seconds = refined(refiner, folder, allocation, name, spec, ready)
        say(f"{name}: perplexity {after.text.perplexity:.2f}")
        rows.append(row_of(name, manifest, before, after, seconds))
        scores = ", ".join(f"{step}: {value:.3f}" for step, value in manifest["scores"])
        curves.append([name, scores, manifest["ended"]])
    head = ["factors", "kept step", "held-out KL", "minutes", "test perplexity", "test nats/token, change"]
    tokens, test = ready.tokens["calibration"], ready.tokens["test"]
    return "\n\n".join(
        [
            table(head, rows),
            "KL to the dense model on the held-out text (nats/token) by step (refitted: by block):",
            table(["factors", "step: KL", "ended by"], curves),
            f"{tokens:,} calibration tokens, {arguments.step_tokens:,} a step; {test:,} test tokens; uniform "
            f"allocation, {config.factors.method}, storage {config.storage}, fp32, "
            f"{torch.get_num_threads()} thread(s); {machine()}",
        ]
    )


def row_of(name: str, manifest: dict[str, Any], before: Score, after: Score, seconds: float) -> list[str]:
    """A refinement's row of the table."""
    gain, kl = after.minus(before, "nll"), manifest["held_out"]
    return [
        name,
        f"{manifest['step']} of {manifest['scores'][-1][0]}",
        f"{kl['before']:.3f} → {kl['after']:.3f}",
        f"{seconds / 60:.1f}",
        f"{after.text.perplexity:.1f}",
        f"{gain.mean:+.3f} ± {gain.stderr:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--tiny", action="store_true", help="on random weights, in a temporary folder")
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=8_192, help="of calibration")
    parser.add_argument("--held-out", type=int, default=4_096, help="tokens, of the search split")
    parser.add_argument("--test-tokens", type=int, default=8_192)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-tokens", type=int, default=1_536)
    parser.add_argument("--every", type=int, default=10, help="steps or blocks between held-out scores")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4])
    arguments = parser.parse_args()
    if (arguments.calibration is None) != (arguments.test is None):
        parser.error("give both --calibration and --test, or neither")
    if arguments.tiny:
        with tempfile.TemporaryDirectory() as place:
            print(measured(tiny_config(Path(place)), arguments, Path(place) / "refined"))
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    found = measured(config_of(arguments), arguments, CACHE / "refined")
    print(f"# Refining factors: SmolLM2-135M at {arguments.budget:.0%} of its parameters\n")
    print(f"`python benchmarks/refinement.py {' '.join(sys.argv[1:])}`\n")
    print(found)


if __name__ == "__main__":
    main()
