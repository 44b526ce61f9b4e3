"""The command line: wiring only."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from actors.types import RankfrontError
from search.allocations import read_allocations
from search.config import load_config, parse_config
from search.findings import cells_table, front_table, headline
from search.folder import StudyFolder, find_study, repair_if_idle, report
from search.records import StudySummary, TrialRow
from search.refine import comparison_cells, refine, refined_file
from search.sections import SamplerSection
from search.sensitivity import sensitivity
from search.sensitivity_table import Sensitivity, found, module_cells, target_cells
from search.session import search
from search.surgical_run import surgical

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
    _print_end(folder, summary, reason, "search", _again(config, set_))
    _exit_if_stopped(reason)


def _again(config: Path, set_: list[str] | None) -> str:
    """The config and its overrides, as they were given."""
    return " ".join([str(config), *(f"--set {shlex.quote(text)}" for text in set_ or [])])


def _exit_if_stopped(reason: str) -> None:
    """With the exit code of the signal that ended a command, if one did."""
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


def _print_end(folder: StudyFolder, summary: StudySummary, reason: str, command: str, config: str) -> None:
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
        console.print(f"  {me} {command} {config}   # goes on where it stopped", soft_wrap=True)
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


@app.command("surgical")
def surgical_command(
    config: Annotated[Path, typer.Argument(help="The study's YAML config.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any config key.")
    ] = None,
) -> None:
    """Search target by target, last block to first, as arXiv 2405.13039 does; or continue doing so."""
    folder, summary, reason = surgical(load_config(config, dict(map(_override, set_ or []))), console)
    _print_end(folder, summary, reason, "surgical", _again(config, set_))
    _exit_if_stopped(reason)


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
        console.print("\nNext:", style="bold")
        again = f"{_program()} sensitivity {_again(config, set_)}"
        console.print(f"  {again}   # goes on where it stopped", soft_wrap=True)
    _exit_if_stopped(reason)


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


@app.command("refine")
def refine_command(
    study: StudyName,
    trial: Annotated[int | None, typer.Option(help="Which trial.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="The best front point at or under this model budget.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; refine.steps where not given.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step; refine.tokens where not given.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Refine one trial's factors towards the dense model, ranks fixed, and score what came of it."""
    if (trial is None) == (budget is None):
        raise RankfrontError("refine: give either --trial N or --budget B")
    folder = find_study(study, runs)
    raw = folder.config.model_dump(mode="json")
    raw["refine"] |= {k: v for k, v in (("steps", steps), ("tokens", tokens)) if v is not None}
    folder = replace(folder, config=parse_config(raw, "refine"))
    row = _choose(report(folder, folder.open_study()), trial, budget)
    found = refine(folder, row, console)
    console.print(f"Stopped: {found.ended}", soft_wrap=True)
    if found.scores:
        title = f"Trial {row.number}, {row.budget_model:.1%} of all parameters: {found.variant}"
        console.print(cells_table(comparison_cells(found.scores), title, left=("split", "metric")))
        report(folder, folder.open_study())
        again = f"{_program()} export {folder.path} --trial {row.number} --variant {found.variant}"
        console.print(f"\nNext:\n  {again}", soft_wrap=True)
    _exit_if_stopped(found.ended)


@app.command("export")
def export_command(
    study: StudyName,
    trial: Annotated[int | None, typer.Option(help="Which trial.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="The best front point at or under this model budget.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Refined factors of the trial, such as refined-0a1b2c3d.")
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

    name = f"trial-{row.number:05d}" + (f"-{variant}" if variant else "")
    destination = to or folder.path / "exports" / name
    assert row.score is not None
    file, score = refined_file(folder, row, variant) if variant else (None, row.score)
    check = export(
        folder.config.preparation(),
        folder.prepared,
        row.allocation,
        folder.config.storage,
        destination,
        score,
        {
            "study": folder.config.study,
            "trial": row.number,
            "budget.model": row.budget_model,
            "budget.bytes": row.budget_bytes,
            **({"variant": variant} if variant else {}),
        },
        file,
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
