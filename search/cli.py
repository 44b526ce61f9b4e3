"""The command line: wiring only."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from actors.types import RankfrontError, TextSource
from search.allocations import read_allocations
from search.config import load_config
from search.evaluating import HarnessSpec, evaluate_folder, is_model_folder
from search.finals import evaluate_study, split_cells
from search.findings import cells_table, front_table, headline
from search.folder import StudyFolder, find_study, repair_if_idle, report, summarise
from search.records import StudySummary, TrialRow
from search.sections import SamplerSection
from search.sensitivity import sensitivity
from search.sensitivity_table import Sensitivity, found, module_cells, target_cells
from search.session import search

app = typer.Typer(
    help="Search which rank each linear layer of a language model should keep.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# A pipe or a log has no width of its own: give it room for the front.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True, highlight=False)

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="The study's folder, or its name in --runs.")]
Runs = Annotated[Path, typer.Option(help="Folder that holds the studies.")]


@app.command("search")
def search_command(
    config: Annotated[Path, typer.Argument(help="The study's YAML config.")],
    trials: Annotated[int | None, typer.Option(help="Total trials of the study.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any config key.")
    ] = None,
) -> None:
    """Start the study of a config, or continue it."""
    overrides = dict(_override(text) for text in set_ or [])
    if trials is not None:
        overrides["stop.trials"] = trials
    folder, summary, reason = search(load_config(config, overrides), console)
    again = " ".join([str(config), *(f"--set {shlex.quote(text)}" for text in set_ or [])])
    _print_end(folder, summary, reason, again)
    if reason.startswith("SIG"):
        raise typer.Exit(130 if reason == "SIGINT" else 143)


def _override(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found:
        raise RankfrontError(f"--set {text!r}: write KEY=VALUE, such as stop.trials=100")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RankfrontError(f"--set {key}: {value!r} is no YAML value: {error}") from error


def _print_end(folder: StudyFolder, summary: StudySummary, reason: str, config: str) -> None:
    finished = sum(row.finished for row in summary.rows)
    failed = sum(row.state == "FAIL" for row in summary.rows)
    running = sum(row.state == "RUNNING" for row in summary.rows)
    console.print()
    if summary.front:
        console.print(front_table(summary))
    for sentence in headline(summary):
        console.print(f"  {sentence}", soft_wrap=True)
    console.print()
    counts = f"{finished} trials scored" + (f", {failed} failed" if failed else "")
    if running:
        counts += f", {running} in flight (they will be scored again under their numbers)"
    console.print(f"Stopped: {reason}. {counts}; all saved in [bold]{folder.path}/[/]", soft_wrap=True)
    console.print("  report.html, front.png   the front, to look at")
    console.print("  front.json, trials.parquet, evaluations.parquet   the same, to compute with")
    more = (folder.config.stop.trials or len(summary.rows)) + 40
    me = _program()
    console.print("\nNext:", style="bold")
    if reason.startswith("SIG"):
        console.print(f"  {me} search {config}   # goes on where it stopped", soft_wrap=True)
    console.print(f"  {me} search {config} --trials {more}   # search further", soft_wrap=True)
    console.print(
        f"  {me} export {folder.path} --budget 0.9   # write the best model at <= 90%", soft_wrap=True
    )
    console.print(f"  {me} report {folder.path}   # write the report again")


def _program() -> str:
    """How this program can be called again from here: by name where that finds it, else by its path."""
    found = shutil.which("rankfront")
    if found is not None and Path(found).resolve() == Path(sys.argv[0]).resolve():
        return "rankfront"
    return os.path.relpath(sys.argv[0])


@app.command("sensitivity")
def sensitivity_command(
    config: Annotated[Path, typer.Argument(help="The study's YAML config.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any config key.")
    ] = None,
) -> None:
    """Score every target alone, all others dense, and map what each loses; or continue doing so."""
    folder, table, reason = sensitivity(load_config(config, dict(map(_override, set_ or []))), console)
    _print_sensitivity(folder, table)
    console.print(f"\nStopped: {reason}; all saved in [bold]{folder}/[/]", soft_wrap=True)
    if table is not None:
        console.print("  sensitivity.html, sensitivity.png   the maps, to look at")
        console.print("  sensitivity.parquet   the same, to compute with")
    if reason.startswith("SIG"):
        again = " ".join([str(config), *(f"--set {shlex.quote(text)}" for text in set_ or [])])
        console.print("\nNext:", style="bold")
        console.print(f"  {_program()} sensitivity {again}   # goes on where it stopped", soft_wrap=True)
        raise typer.Exit(130 if reason == "SIGINT" else 143)


def _print_sensitivity(folder: Path, table: Sensitivity | None) -> None:
    console.print()
    if table is None:
        console.print("The dense model is not scored yet: there is nothing to compare with.")
        return
    share = f"per parameter saved, alone at {table.middle:.0%} of its parameters"
    for kind, listed in (("least", table.least), ("most", table.most)):
        if listed:
            console.print(cells_table(target_cells(listed), f"Lose {kind} {share}", left=("target",)))
    console.print(cells_table(module_cells(table), "By module type", left=("module",)))
    for sentence in found(table):
        console.print(f"  {sentence}", soft_wrap=True)
    missing = [row for row in table.rows if row.score is None]
    if missing:
        console.print(
            f"  {len(missing)} of {len(table.rows)} cells have no score; sensitivity.html says why."
        )


@app.command("report")
def report_command(study: StudyName, runs: Runs = Path("runs")) -> None:
    """Write tables, plots and the page again from the study, and show the front."""
    folder = find_study(study, runs)
    summary = report(folder, folder.open_study())
    if summary.front:
        console.print(front_table(summary))
    for sentence in headline(summary):
        console.print(f"  {sentence}", soft_wrap=True)
    console.print(
        f"Written to {folder.path}/: report.html, front.png, front.json, trials.parquet", soft_wrap=True
    )


@app.command("enqueue")
def enqueue_command(
    study: StudyName,
    file: Annotated[
        Path,
        typer.Argument(
            help="YAML or JSON: {target: rank or null}, {ranks: {...}, methods: {target: method}}, or a list."
        ),
    ],
    runs: Runs = Path("runs"),
) -> None:
    """Add allocations of your own; a running search takes them up next, a stopped one when it resumes."""
    folder = find_study(study, runs)
    allocations = read_allocations(file, folder.prepared.targets, folder.config.factor_spec)
    repair_if_idle(folder.path)
    numbers = folder.open_study(SamplerSection(name="random")).enqueue((a, "enqueued") for a in allocations)
    known = len(allocations) - len(numbers)
    listed = ", ".join(map(str, numbers)) or "none"
    console.print(f"Enqueued as trials: {listed}" + (f"; {known} are in the study already" if known else ""))


@app.command("export")
def export_command(
    study: StudyName,
    trial: Annotated[int | None, typer.Option(help="Which trial.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="The best front point at or under this model budget.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to write; must not exist.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write one allocation as a model folder that transformers loads, and check it against the record."""
    if (trial is None) == (budget is None):
        raise RankfrontError("export: give either --trial N or --budget B")
    folder = find_study(study, runs)
    row = _choose(report(folder, folder.open_study()), trial, budget)
    from actors.export import export

    destination = to or folder.path / "exports" / f"trial-{row.number:05d}"
    assert row.score is not None
    check = export(
        folder.config.preparation(),
        folder.prepared,
        row.allocation,
        folder.config.storage,
        destination,
        row.score,
        {
            "study": folder.config.study,
            "trial": row.number,
            "budget.model": row.budget_model,
            "budget.bytes": row.budget_bytes,
        },
    )
    console.print(
        f"Trial {row.number} ({row.budget_model:.1%} of all parameters) written to [bold]{destination}/[/]"
    )
    for line in check:
        console.print(f"  {line}", soft_wrap=True)
    console.print(
        "\nLoad it:\n"
        "  import actors.modeling_rankfront  # or trust_remote_code=True without rankfront\n"
        "  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'  model = AutoModelForCausalLM.from_pretrained("{destination}")',
        soft_wrap=True,
    )


def _choose(summary: StudySummary, trial: int | None, budget: float | None) -> TrialRow:
    if trial is not None:
        row = next((row for row in summary.rows if row.number == trial), None)
        if row is None:
            raise RankfrontError(f"--trial {trial}: the study has trials 0..{len(summary.rows) - 1}")
        if not row.finished:
            raise RankfrontError(
                f"--trial {trial}: it is {row.state}" + (f": {row.reason}" if row.reason else "")
            )
        return row
    assert budget is not None
    rows = {row.number: row for row in summary.rows}
    under = [rows[n] for n in summary.front if rows[n].budget_model <= budget and rows[n].score]
    if not under:
        lowest = min((rows[n].budget_model for n in summary.front), default=None)
        found = "the front is empty" if lowest is None else f"the front reaches down to {lowest:.3f}"
        raise RankfrontError(f"--budget {budget}: no front point at or under it; {found}")
    return min(under, key=lambda row: row.score.text.nll if row.score else 0.0)


@app.command("evaluate")
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
        trials = [_choose(summarise(folder, folder.open_study()), None, budget).number]
    summary, reason = evaluate_study(folder, trials, console)
    console.print(cells_table(split_cells(summary, trials), f"{summary.study}: test split"))
    console.print(f"Saved in [bold]{folder.path}/[/]: evaluations.parquet, report.html", soft_wrap=True)
    if reason is not None:
        raise typer.Exit(130 if reason == "SIGINT" else 143)


def main() -> None:
    """Run the command line; mistakes the user can mend are shown without a traceback."""
    try:
        app()
    except RankfrontError as error:
        errors.print(f"[bold red]rankfront:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("rankfront: interrupted; every finished trial is saved, the same command goes on")
        sys.exit(130)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
