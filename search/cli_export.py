"""The commands that write models and configurations: wiring only."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from actors.types import RankfrontError
from search.applying import apply_configuration
from search.choosing import chosen
from search.exporting import (
    already_there,
    check_folder,
    destinations,
    export_trial,
    refuse_taken,
    write_configuration,
)
from search.folder import find_study, summarise
from search.records import FACTORS
from search.terminal import Runs, note_untold, override, refuse_given, tell, warn_infeasible

OF_STUDY = ("trial", "budget", "max_nll", "all_front", "variant", "format_", "config_only", "to")


class Form(StrEnum):
    """Forms of a folder, by the names `actors.export` has for them."""

    rankfront = "rankfront"
    dense = "dense"


FormOption = Annotated[
    Form, typer.Option("--format", help="rankfront: low rank; dense: ordinary weights, no smaller.")
]
DeviceOption = Annotated[str, typer.Option(help="Where it is checked: auto, cpu, cuda, cuda:1, ...")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the folder's or file's configuration."
    ),
]


def export_command(
    context: typer.Context,
    study: Annotated[
        str | None, typer.Argument(metavar="STUDY", help="The study's folder, or its name in --runs.")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="Which trial.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="The best front point at or under this model budget.")
    ] = None,
    max_nll: Annotated[
        float | None, typer.Option(help="The smallest front point at or under this loss, nats/token.")
    ] = None,
    all_front: Annotated[
        bool,
        typer.Option(
            "--all-front",
            help="Every compressed point of the front that is not there yet, a folder each.",
        ),
    ] = False,
    variant: Annotated[
        str | None, typer.Option(help="Refined factors of the trial, such as refined-0a1b2c3d.")
    ] = None,
    format_: FormOption = Form.rankfront,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="The configuration alone, as YAML and JSON; no weights.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(help="Instead: reload an exported folder and compare it with its own record."),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to write; must not exist.")] = None,
    device: DeviceOption = "auto",
    set_: SetOption = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write allocations as model folders that transformers loads, each checked against the record."""
    if check is not None:
        refuse_given(context, OF_STUDY, f"not with --check {check}, which reads that folder alone")
        _check(check, study, set_ or [], device)
        return
    if study is None:
        raise RankfrontError("export: name a study, or a folder with --check")
    if set_:
        raise RankfrontError("export: --set is for --check; a study's own config decides what is exported")
    if variant is not None and (config_only or all_front):
        raise RankfrontError("export: --variant names the factors of one trial; ranks alone have none")
    if config_only:
        refuse_given(context, ["format_", "device"], "not with --config-only, which writes no model")
    folder = find_study(study, runs)
    summary = summarise(folder, folder.read_study())
    rows = chosen(summary, trial, budget, max_nll, all_front)
    note_untold(folder, summary, budget)
    warn_infeasible(summary, rows)
    suffix = "-config" if config_only else "" if variant is None else f"-{variant}"
    places = destinations(folder, rows, to, all_front, suffix)
    form = None if config_only else format_
    there = already_there(folder, summary, rows, places, form) if all_front else set()
    refuse_taken(place for place in places if place not in there)
    for row, place in zip(rows, places, strict=True):
        if place in there:
            tell(f"Trial {row.number}: there already, in ", (f"{place}/", "bold"))
            continue
        if config_only:
            write_configuration(folder, summary, row, place)
            tell(f"Trial {row.number}: ranks.yaml, ranks.json in ", (f"{place}/", "bold"))
            continue
        lines = export_trial(folder, summary, row, place, format_, variant or FACTORS, device)
        kept = f"{row.budget_model:.1%} of all parameters"
        tell(f"Trial {row.number} ({kept}) written to ", (f"{place}/", "bold"))
        _print_written(lines, place, format_)


def _check(folder: Path, study: str | None, settings: list[str], device: str) -> None:
    if study is not None:
        raise RankfrontError(f"export: give a study or --check FOLDER, not both ({study}, {folder})")
    for line in check_folder(folder, dict(map(override, settings)), device):
        tell(f"  {line}")
    tell((f"{folder}/", "bold"), " is the model that was written")


def apply_command(
    config: Annotated[Path, typer.Argument(help="A configuration: ranks.yaml or ranks.json of an export.")],
    model: Annotated[str, typer.Argument(help="The model to decompose, named as in a study's config.")],
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    format_: FormOption = Form.rankfront,
    device: DeviceOption = "auto",
    set_: SetOption = None,
    runs: Runs = Path("runs"),
) -> None:
    """Decompose a model as a configuration says that someone else found, and write it as a folder."""
    overrides = dict(map(override, set_ or []))
    lines = apply_configuration(config, model, overrides, to, format_, runs, tell, device)
    tell(f"{config} applied to {model}, written to ", (f"{to}/", "bold"))
    _print_written(lines, to, format_)


def _print_written(lines: list[str], folder: Path, form: Form) -> None:
    for line in lines:
        tell(f"  {line}")
    if form == Form.dense:
        tell("  not smaller than the base model: its weights are dense products of the factors")
    first = (
        ""
        if form == Form.dense
        else "import actors.modeling_rankfront  # or trust_remote_code=True without it\n"
    )
    tell(
        f"\nLoad it:\n  {first}".rstrip() + "\n"
        "  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'  model = AutoModelForCausalLM.from_pretrained("{folder}")'
    )
