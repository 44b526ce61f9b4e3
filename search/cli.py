"""The command line: wiring only."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from actors.types import RankfrontError
from search.allocations import read_allocations
from search.cells import cells_table
from search.cli_evaluate import evaluate_command
from search.cli_export import apply_command, export_command
from search.cli_finalists import finalists_command
from search.cli_refine import refine_command
from search.cli_status import status_command
from search.config import load_config
from search.findings import front_table, headline, percent
from search.folder import StudyFolder, find_study, repair_if_idle, report
from search.further import further_table
from search.records import StudySummary
from search.sections import SamplerSection
from search.sensitivity import sensitivity
from search.sensitivity_table import Sensitivity, found, module_cells, target_cells
from search.session import search
from search.surgical_run import surgical
from search.terminal import Runs, StudyName, console, exit_if_stopped, override, program, quoted, tell

app = typer.Typer(
    help="Search which rank each linear layer of a language model should keep.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False)
# A full disk, a quota, the largest file that is allowed: none is a fault of the program.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@app.command("search")
def search_command(
    config: Annotated[Path, typer.Argument(help="The study's YAML config.")],
    trials: Annotated[int | None, typer.Option(help="Total trials of the study.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same trials again, with any number of replicas.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any config key.")
    ] = None,
) -> None:
    """Start the study of a config, or continue it."""
    overrides = dict(override(text) for text in set_ or [])
    if trials is not None:
        overrides["stop.trials"] = trials
    if deterministic:
        overrides["run.deterministic"] = True
    folder, summary, reason = search(load_config(config, overrides), console)
    given = _given(config, set_) + (" --deterministic" if deterministic else "")
    again = given if trials is None else f"{given} --trials {trials}"
    _print_end(folder, summary, reason, f"search {again}", given)
    exit_if_stopped(reason)
    if not any(row.finished for row in summary.rows):
        raise typer.Exit(1)  # a script that goes on with the front must not


def _given(config: Path, set_: list[str] | None) -> str:
    """The config and its overrides, as they were given."""
    return quoted(config, *(word for text in set_ or [] for word in ("--set", text)))


def _print_front(summary: StudySummary) -> None:
    if summary.front:
        console.print(front_table(summary))
    further = further_table(summary)
    if further is not None:
        console.print(further)


def _print_end(folder: StudyFolder, summary: StudySummary, reason: str, again: str, given: str) -> None:
    """What was found, and which commands lead on: `again` the same, and others of the `given` config."""
    finished = sum(row.finished for row in summary.rows)
    failed = sum(row.state == "FAIL" for row in summary.rows)
    stopped = sum(row.state == "PRUNED" for row in summary.rows)
    running = sum(row.state == "RUNNING" for row in summary.rows)
    console.print()
    _print_front(summary)
    for sentence in headline(summary):
        tell(f"  {sentence}")
    console.print()
    counts = f"{finished} trials scored" + (f", {failed} failed" if failed else "")
    infeasible = sum(row.finished and not row.feasible for row in summary.rows)
    if infeasible:
        counts += f", {infeasible} violate a constraint"
    if stopped:
        counts += f", {stopped} stopped early"
    if running:
        counts += f", {running} in flight (they will be scored again under their numbers)"
    tell(f"Stopped: {reason}. {counts}; all saved in ", (f"{folder.path}/", "bold"))
    console.print("  report.html, front.png   the front, to look at")
    console.print("  front.json, trials.parquet, evaluations.parquet   the same, to compute with")
    more = max(folder.config.stop.trials or 0, len(summary.rows)) + 40
    me, study = program(), quoted(folder.path)
    console.print("\nNext:", style="bold")
    if reason.startswith("SIG"):
        tell(f"  {me} {again}   # goes on where it stopped")
    tell(f"  {me} search {given} --trials {more}   # search further")
    tell(f"  {me} export {study} --budget 0.9   # write the best model at <= 90%")
    tell(f"  {me} report {study}   # write the report again")


@app.command("surgical")
def surgical_command(
    config: Annotated[Path, typer.Argument(help="The study's YAML config.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any config key.")
    ] = None,
) -> None:
    """Search target by target, last block to first, as arXiv 2405.13039 does; or continue doing so."""
    folder, summary, reason = surgical(load_config(config, dict(map(override, set_ or []))), console)
    given = _given(config, set_)
    _print_end(folder, summary, reason, f"surgical {given}", given)
    exit_if_stopped(reason)


@app.command("sensitivity")
def sensitivity_command(
    config: Annotated[Path, typer.Argument(help="The study's YAML config.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any config key.")
    ] = None,
) -> None:
    """Score every target alone, all others dense, and map what each loses; or continue doing so."""
    folder, table, reason = sensitivity(load_config(config, dict(map(override, set_ or []))), console)
    _print_sensitivity(folder, table)
    tell(f"\nStopped: {reason}; all saved in ", (f"{folder}/", "bold"))
    if table is not None:
        console.print("  sensitivity.html, sensitivity.png   the maps, to look at")
        console.print("  sensitivity.parquet   the same, to compute with")
    if reason.startswith("SIG"):
        console.print("\nNext:", style="bold")
        tell(f"  {program()} sensitivity {_given(config, set_)}   # goes on where it stopped")
    exit_if_stopped(reason)


def _print_sensitivity(folder: Path, table: Sensitivity | None) -> None:
    console.print()
    if table is None:
        console.print("The dense model is not scored yet: there is nothing to compare with.")
        return
    share = f"per parameter saved, alone at {percent(table.middle)} of its parameters"
    for kind, listed in (("least", table.least), ("most", table.most)):
        if listed:
            console.print(cells_table(target_cells(listed), f"Lose {kind} {share}", left=("target",)))
    console.print(cells_table(module_cells(table), "By module type", left=("module",)))
    for sentence in found(table):
        tell(f"  {sentence}")
    missing = [row for row in table.rows if row.score is None]
    if missing:
        console.print(
            f"  {len(missing)} of {len(table.rows)} cells have no score; sensitivity.html says why."
        )


@app.command("report")
def report_command(study: StudyName, runs: Runs = Path("runs")) -> None:
    """Write tables, plots and the page again from the study, and show the front."""
    folder = find_study(study, runs)
    summary = report(folder, folder.read_study())
    _print_front(summary)
    for sentence in headline(summary):
        tell(f"  {sentence}")
    tell(f"Written to {folder.path}/: report.html, front.png, front.json, trials.parquet")


@app.command("enqueue")
def enqueue_command(
    study: StudyName,
    file: Annotated[
        Path,
        typer.Argument(
            help="YAML, JSON, .jsonl: {target: rank or null}, {ranks: {...}, methods: {...}}, or a list."
        ),
    ],
    runs: Runs = Path("runs"),
) -> None:
    """Add allocations of your own; a running search takes them up next, a stopped one when it resumes."""
    folder = find_study(study, runs)
    allocations = read_allocations(file, folder.prepared.targets, folder.config.factor_spec)
    repaired = repair_if_idle(folder.path)
    if repaired:
        console.print(f"journal: {repaired}", highlight=False)
    numbers = folder.open_study(SamplerSection(name="random")).enqueue((a, "enqueued") for a in allocations)
    known = len(allocations) - len(numbers)
    listed = ", ".join(map(str, numbers)) or "none"
    console.print(f"Enqueued as trials: {listed}" + (f"; {known} are in the study already" if known else ""))


app.command("export")(export_command)
app.command("apply")(apply_command)
app.command("evaluate")(evaluate_command)
app.command("refine")(refine_command)
app.command("status")(status_command)
app.command("finalists")(finalists_command)


def main() -> None:
    """Run the command line; mistakes the user can mend are shown without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an encoding that lacks Δ or ± ends no command
    try:
        app()
    except RankfrontError as error:
        errors.print(_mistake(str(error)), soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.strerror is None:  # no answer of the system: what a library says in its own words
            raise
        said = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
        if error.errno in NO_ROOM:
            said += ": every finished trial is saved; make room, and the same command goes on"
        errors.print(_mistake(said), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("rankfront: interrupted; every finished trial is saved, the same command goes on")
        sys.exit(130)


def _mistake(text: str) -> Text:
    return Text.assemble(("rankfront:", "bold red"), " ", text)


if __name__ == "__main__":
    main()
