"""What the moments of SmolLM2-135M cost: time next to a forward pass, and memory next to the budget.

    python benchmarks/calibration.py [--tokens 16384] [--rounds 3] [--threads 2]

Time: in turn, in one process, a forward pass with its loss over the tokens, the moments of all targets with
gradients (labels sampled), as `curvature` needs them, those `feature` needs, and the decomposition of all
targets. Memory: a process of its own
for each budget measures the moments of fewer tokens group by group and decomposes them; its largest resident
memory is counted above what it held with the model loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import CACHE, PeakMemory, machine, quick_start, table

from actors.calibration import collect, finished
from actors.decompose import decompose
from actors.linears import weight_of
from actors.models import list_targets, load_model, materialise
from actors.moments import Moments
from actors.planning import plan
from search.preparing import MEMORY_ENVIRONMENT

WINDOW = 512
BUDGETS_GB = (0.5, 0.75, 1.0, 2.0, 4.0)
MEMORY_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory is not None:
        print(json.dumps(measure_memory(arguments.memory)))
        return
    print("# What calibration costs\n")
    print(f"`python benchmarks/calibration.py --rounds {arguments.rounds}`\n")
    print(times(arguments.tokens, arguments.rounds))
    print(f"\nMemory, {MEMORY_TOKENS:,} tokens in windows of {WINDOW}:\n")
    rows = []
    for budget in BUDGETS_GB:
        command = [sys.executable, __file__, "--memory", str(budget), "--threads", str(arguments.threads)]
        environment = {**os.environ, **MEMORY_ENVIRONMENT}
        ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        answer = json.loads(ran.stdout)
        kept = "computed twice" if answer["checkpointed"] else "kept"
        share = f"{answer['peak'] / 1e9 / budget:.0%}"
        rows.append([f"{budget:g}", answer["passes"], kept, f"{answer['peak'] / 1e9:.2f}", share])
    head = ("memory_gb", "passes over the text", "activations", "peak above the model, GB", "of the budget")
    print(table(head, rows))
    print(f"\nSmolLM2-135M-Instruct, fp32, {arguments.threads} threads; {machine()}")


def _model() -> Any:
    source = quick_start().preparation().model
    return load_model(materialise(source, CACHE / "factors"), source)


def _tokens(model: Any, count: int) -> torch.Tensor:
    """Text of the model's own making would cost the same; random tokens do."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (count // WINDOW, WINDOW), generator=generator)


def times(count: int, rounds: int) -> str:
    """The table of times."""
    model = _model()
    targets = list_targets(model)
    names = [target.name for target in targets]
    windows = _tokens(model, count)
    made = plan(model, targets, windows, names, 4e9, ())
    plain = plan(model, targets, windows, (), 4e9)
    moments: dict[str, Moments] = {}

    def forward() -> None:
        with torch.inference_mode():
            for batch in windows.split(made.rows):
                logits = model(batch, use_cache=False).logits.float()
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def with_gradients() -> None:
        moments.update(finished(collect(model, targets, windows, made, names, spreads=())))

    def without_gradients() -> None:
        finished(collect(model, targets, windows, plain))

    def factors() -> None:
        for name in names:
            decompose(name, weight_of(model.get_submodule(name)), moments[name], "curvature", "mean")

    steps: dict[str, Callable[[], None]] = {
        "forward pass and loss": forward,
        "moments for `curvature`": with_gradients,
        "moments for `feature`": without_gradients,
        "all factors by curvature": factors,
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            found[name].append(time.perf_counter() - start)
            print(f"{name}: {found[name][-1]:.1f} s", file=sys.stderr, flush=True)
    base = found["forward pass and loss"]
    rows = []
    for name, seconds in found.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
        spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
        rows.append([name, f"{statistics.median(seconds):.1f}", f"{statistics.median(ratios):.2f}", spread])
    passes = f"{len(made.groups)} pass, activations {'computed twice' if made.checkpointed else 'kept'}"
    note = f"\n\n{count:,} tokens in windows of {WINDOW}, memory_gb 4 ({passes}), {rounds} rounds."
    return table(("step", "seconds (median)", "of a forward pass", "min..max"), rows) + note


def measure_memory(budget: float) -> dict[str, Any]:
    """One calibration and decomposition under `budget` (10^9 bytes), as a builder does it."""
    model = _model()
    targets = {target.name: target for target in list_targets(model)}
    windows = _tokens(model, MEMORY_TOKENS)
    with torch.inference_mode():
        model(windows[:1, :16])  # whatever the first call allocates for good is not the calibration's
    gc.collect()
    with PeakMemory() as peak:
        made = plan(model, list(targets.values()), windows, list(targets), budget * 1e9, ())
        for group in made.groups:
            chosen = [targets[name] for name in group]
            moments = finished(collect(model, chosen, windows, made, list(targets), spreads=()))
            for name in group:
                decompose(name, weight_of(model.get_submodule(name)), moments.pop(name), "curvature", "mean")
    return {"passes": len(made.groups), "checkpointed": made.checkpointed, "peak": peak.bytes}


if __name__ == "__main__":
    main()
