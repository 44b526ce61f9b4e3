"""The command `evaluate`: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.types import RankfrontError, TextSource
from search.choosing import chosen
from search.evaluating import HarnessSpec, evaluate_folder, is_model_folder
from search.finals import evaluate_study, split_cells
from search.findings import cells_table
from search.folder import StudyFolder, find_study, summarise
from search.terminal import Runs, console, exit_if_stopped


def evaluate_command(
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
        str | None, typer.Option(help="Of a folder: lm-evaluation-harness tasks by name, a,b.")
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
    """Measure a model folder on tasks and a text, or the trials of a study on its test split."""
    if not is_model_folder(Path(target)):
        if (tasks, text, output) != (None, None, None):
            raise RankfrontError(
                f"{target} is no model folder, and --tasks, --text and --output are for one: write the trial "
                "with `rankfront export` and evaluate that folder"
            )
        _evaluate_study(find_study(target, runs), trial or [], budget)
        return
    if trial or budget is not None:
        raise RankfrontError(f"{target} is a model folder: --trial and --budget choose from a study")
    source = None if text is None else TextSource(text, subset, split, column)
    harness = None
    if tasks is not None:
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        harness = HarnessSpec(names, limit, batch_size, include_path)
    evaluated = evaluate_folder(Path(target), harness, source, window, tokens, device)
    for listed in evaluated.tables():
        console.print(listed)
    if output is not None:
        evaluated.write(output)
        console.print(f"Written to [bold]{output}[/]", soft_wrap=True)


def _evaluate_study(folder: StudyFolder, trials: list[int], budget: float | None) -> None:
    if trials and budget is not None:
        raise RankfrontError("evaluate: give either --trial N or --budget B, or neither for the front")
    if budget is not None:
        trials = [row.number for row in chosen(summarise(folder, folder.open_study()), budget=budget)]
    summary, reason = evaluate_study(folder, trials, console)
    console.print(cells_table(split_cells(summary, trials), f"{summary.study}: test split"))
    console.print(f"Saved in [bold]{folder.path}/[/]: evaluations.parquet, report.html", soft_wrap=True)
    exit_if_stopped(reason or "")
