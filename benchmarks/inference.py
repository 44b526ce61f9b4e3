"""Prefill and decode speed of a model that is dense, factored or pivoted, at equal parameters.

    python benchmarks/inference.py [--budgets 0.9 0.7] [--rounds 7] [--threads 2]

SmolLM2-135M's shapes in float32 on the CPU; where there is a GPU, Llama-7B's in bfloat16 on that too. Weights
are random: only the time counts. All sides are in one process and take turns; each ratio is of a side to the
dense one of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _common import CACHE, machine, quick_start, table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from actors.modeling_rankfront import FORMS
from actors.models import count_parameters, list_targets, materialise
from search.cost import CostModel

# (batch, tokens of each row); decoding starts behind a prompt of PROMPT tokens.
PREFILLS = ((1, 256), (16, 32))
DECODES = (1, 16)
PROMPT, STEPS = 32, 8
SPREAD = 0.02
COLUMNS = ["work", "form", "budget.model", "tokens/s (median)", "of dense (median)", "min..max"]


def dense(config: Any, device: str, dtype: torch.dtype) -> Any:
    """A model of random weights."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def compressed(config: Any, device: str, dtype: torch.dtype, storage: str, budget: float) -> Any:
    """One whose targets hold the same share of their parameters each, so that the model holds `budget`."""
    model = dense(config, device, dtype)
    targets = list_targets(model)
    cost = CostModel(targets, count_parameters(model), storage, "mean", dtype.itemsize)
    share = cost.linear_room(budget) / cost.linear_parameters
    for target, (_, rank) in zip(targets, cost.uniform(share).ranks, strict=True):
        layer = FORMS[cost.form(target, rank)](target.cols, target.rows, rank, True).to(device, dtype)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=SPREAD)
        if hasattr(layer, "order"):
            layer.order.copy_(torch.randperm(target.rows))
        model.set_submodule(target.name, layer.requires_grad_(False))
    return model


def sides(config: Any, device: str, dtype: torch.dtype, budgets: list[float]) -> dict[tuple[str, float], Any]:
    found = {("dense", 1.0): dense(config, device, dtype)}
    for budget in budgets:
        for storage in ("factored", "pivoted"):
            found[storage, budget] = compressed(config, device, dtype, storage, budget)
    return found


@torch.inference_mode()
def prefill(model: Any, batch: int, length: int) -> float:
    """Tokens per second of a prompt, of which the last logits are asked for."""
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)
    return batch * length / seconds(lambda: model(ids, logits_to_keep=1), model.device)


@torch.inference_mode()
def decode(model: Any, batch: int) -> float:
    """Tokens per second behind a prompt, one step after the other."""
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=model.device)
    prompt = model(ids, logits_to_keep=1)

    def steps() -> None:
        state = prompt
        for _ in range(STEPS):
            token = state.logits[:, -1:].argmax(-1)
            state = model(token, past_key_values=state.past_key_values)

    return batch * STEPS / seconds(steps, model.device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(models: dict[tuple[str, float], Any], rounds: int) -> Iterator[list[str]]:
    """A row for each kind of work and side, from `rounds` turns after one that warms up."""
    works: dict[str, Callable[[Any], float]] = {
        f"prefill {batch} x {length}": lambda model, b=batch, n=length: prefill(model, b, n)
        for batch, length in PREFILLS
    }
    works |= {f"decode, batch {batch}": lambda model, b=batch: decode(model, b) for batch in DECODES}
    for name, work in works.items():
        speeds: dict[tuple[str, float], list[float]] = {side: [] for side in models}
        for turn in range(rounds + 1):
            order = [*models.items()]
            for side, model in order[turn % len(order) :] + order[: turn % len(order)]:
                speed = work(model)
                if turn:
                    speeds[side].append(speed)
        for (form, budget), found in speeds.items():
            ratios = [one / other for one, other in zip(found, speeds["dense", 1.0], strict=True)]
            spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
            cells = [f"{statistics.median(found):,.1f}", f"{statistics.median(ratios):.3f}", spread]
            yield [name, form, f"{budget:.0%}", *cells]


def print_table(models: dict[tuple[str, float], Any], rounds: int) -> None:
    """Line by line, so that a run that is cut off leaves what it measured."""
    print(table(COLUMNS, []), flush=True)
    for row in measured(models, rounds):
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.7])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    folder = materialise(quick_start().preparation().model, CACHE)
    cpu = sides(AutoConfig.from_pretrained(folder), "cpu", torch.float32, arguments.budgets)
    print("SmolLM2-135M's shapes, float32\n")
    print_table(cpu, arguments.rounds)
    print(f"\n{arguments.threads} threads, {arguments.rounds} rounds; {machine()}")
    if torch.cuda.is_available():
        del cpu
        gpu = sides(LlamaConfig(), "cuda", torch.bfloat16, arguments.budgets)
        print("\nLlama-7B's shapes, bfloat16\n")
        print_table(gpu, arguments.rounds)
        print(f"\n{torch.cuda.get_device_name()}, {arguments.rounds} rounds")


if __name__ == "__main__":
    main()
