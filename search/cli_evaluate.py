"""The command `evaluate`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.harness_results import HarnessSpec, task_fingerprints
from actors.types import RankfrontError, TextSource
from search.cells import cells_table
from search.choosing import chosen
from search.evaluating import evaluate_folder, is_model_folder, make_room
from search.finals import evaluate_study, split_cells
from search.folder import CONFIG, StudyFolder, find_study, summarise
from search.harness_run import evaluate_tasks
from search.harness_table import LEFT, harness_cells
from search.records import StudySummary
from search.terminal import Runs, console, exit_if_stopped, refuse_given, tell

OF_TASKS = ("limit", "batch_size", "include_path")
OF_TEXT = ("subset", "split", "column", "window", "tokens")
OF_FOLDER = ("text", *OF_TEXT, "device", "output")


def evaluate_command(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="FOLDER|STUDY", help="A model folder, or a study as elsewhere.")
    ],
    trial: Annotated[
        list[int] | None, typer.Option(help="Of a study: these trials, not the front; may be repeated.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Of a study: the best front point at or under this model budget.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-evaluation-harness tasks by name, a,b; of a study, not its test split."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="With --tasks: factors, refined-..., refit-...; may be repeated. All, if not given."
        ),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions in a batch of the harness.")] = 1,
    text: Annotated[str | None, typer.Option(help="Of a folder: perplexity on this text.")] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of the text's data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the text's data set.")] = None,
    column: Annotated[str, typer.Option(help="Column of the text's data set.")] = "text",
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window of the text.")] = 512,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text at most.")] = 65_536,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file to write; replaced if it exists.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Measure a model folder on tasks and a text, or the trials of a study on its test split or on tasks."""
    harness = None
    if tasks is None:
        refuse_given(context, OF_TASKS, "only with --tasks")
    else:
        names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
        if not names:
            raise RankfrontError("evaluate: --tasks names no task; write --tasks a,b")
        own = None if include_path is None else include_path.resolve()
        harness = HarnessSpec(names, limit, batch_size, own)
    if not is_model_folder(Path(target)):
        only = f"for a model folder, and {target} is none; write the trial with `rankfront export`"
        refuse_given(context, OF_FOLDER, f"{only} and evaluate that folder")
        known = any((folder / CONFIG).exists() for folder in (Path(target), runs / target))
        if Path(target).is_dir() and not known:
            raise RankfrontError(
                f"{target}: neither a study ({CONFIG}) nor a model folder (config.json) to measure"
            )
        _evaluate_study(find_study(target, runs), trial or [], budget, harness, variant or [])
        return
    if trial or variant or budget is not None:
        raise RankfrontError(
            f"{target} is a model folder: --trial, --variant and --budget choose from a study"
        )
    if text is None:
        refuse_given(context, OF_TEXT, "only with --text")
    source = None if text is None else TextSource(text, subset, split, column)
    if output is not None:
        make_room(output)
    evaluated = evaluate_folder(Path(target), harness, source, window, tokens, device)
    for listed in evaluated.tables():
        console.print(listed)
    if output is not None:
        evaluated.write(output)
        tell("Written to ", (str(output), "bold"))


def _evaluate_study(
    folder: StudyFolder,
    trials: list[int],
    budget: float | None,
    harness: HarnessSpec | None,
    variants: list[str],
) -> None:
    if trials and budget is not None:
        raise RankfrontError("evaluate: give either --trial N or --budget B, or neither for the front")
    if variants and harness is None:
        raise RankfrontError(
            "evaluate: --variant is for --tasks; `rankfront refine` scores both splits itself"
        )
    if budget is not None:
        trials = [row.number for row in chosen(summarise(folder, folder.read_study()), budget=budget)]
    if harness is None:
        summary, reason = evaluate_study(folder, trials, console)
        console.print(cells_table(split_cells(summary, trials), f"{summary.study}: test split"))
    else:
        summary, reason = evaluate_tasks(folder, trials, variants, harness, console)
        _print_tasks(summary, trials, harness)
    tell("Saved in ", (f"{folder.path}/", "bold"), ": evaluations.parquet, report.html")
    exit_if_stopped(reason or "")


def _print_tasks(summary: StudySummary, trials: list[int], harness: HarnessSpec) -> None:
    cells = harness_cells(summary, trials, task_fingerprints(harness).values())
    if cells is not None:
        console.print(cells_table(cells, f"{summary.study}: lm-evaluation-harness", left=LEFT))
