"""What the commands share: where they print, and the arguments that name a study."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from actors.types import CHOICE, RankfrontError
from search.choosing import untold
from search.constraints import broken
from search.folder import StudyFolder
from search.plain import from_yaml
from search.records import StudySummary, TrialRow

# A pipe or a log has no width of its own: give it room for the front.
console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="The study's folder, or its name in --runs.")]
Runs = Annotated[Path, typer.Option(help="Folder that holds the studies.")]


def tell(*parts: str | tuple[str, str]) -> None:
    """Print parts, each a text or (text, style), as one line however wide: a command is copied whole.

    Nothing in them is read as markup: a path or a value in brackets is what its user wrote.
    """
    console.print(Text.assemble(*parts), soft_wrap=True)


def quoted(*words: object) -> str:
    """Words of a command, as a shell reads them back."""
    return shlex.join(map(str, words))


def override(text: str) -> tuple[str, Any]:
    """The key and the value of a `--set KEY=VALUE`.

    Raises:
        RankfrontError: it is none, or the value is no YAML.
    """
    key, found, value = text.partition("=")
    if not found:
        raise RankfrontError(f"--set {text!r}: write KEY=VALUE, such as stop.trials=100")
    try:
        return key, from_yaml(value)
    except ValueError as error:
        raise RankfrontError(f"--set {key}: {value!r} is no YAML value: {error}") from error


def refuse_given(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """See that options that would be passed over were not given; they are named by their parameters.

    Raises:
        RankfrontError: some were, for what `reason`.
    """
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        named = " and ".join(f"--{name.strip('_').replace('_', '-')}" for name in given)
        raise RankfrontError(f"{context.info_name}: {named}: {reason}")


def warn_infeasible(summary: StudySummary, rows: Iterable[TrialRow]) -> None:
    """Say of each chosen trial what constraints it violates: only one named by its number can."""
    for row in rows:
        if not row.feasible:
            passed = broken(summary.constraints, row)
            tell(("Warning:", "bold"), f" trial {row.number} violates {passed}")


def note_untold(folder: StudyFolder, summary: StudySummary, budget: float | None) -> None:
    """Say where what is chosen at a budget is a matter of the search text's chance, and what decides it."""
    near = untold(summary, budget) if budget is not None and CHOICE in folder.prepared.fingerprints else []
    if near:
        first, others = near[0], ", ".join(map(str, near[1:]))
        command = f"{program()} finalists {quoted(folder.path)} --budget {budget:g} --no-refine"
        told = f"the search text cannot tell trial {first} from {others}; a larger one can:"
        tell(f"Note: {told}\n  {command}")


def exit_if_stopped(reason: str) -> None:
    """With the exit code of the signal that ended a command, if one did."""
    if reason.startswith("SIG"):
        raise typer.Exit(130 if reason == "SIGINT" else 143)


def program() -> str:
    """How this program can be called again from here: by name where that finds it, else by its path."""
    found = shutil.which("rankfront")
    if found is not None and Path(found).resolve() == Path(sys.argv[0]).resolve():
        return "rankfront"
    return quoted(os.path.relpath(sys.argv[0]))
