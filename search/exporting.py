"""Exports as the driver sees them: which trials, where to, and what the folders tell of themselves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.claimed import claimed
from actors.plain import to_yaml
from actors.sources import from_home
from actors.types import RankfrontError, Score
from search.allocation_file import facts, read_configuration, whole
from search.card import CardFacts, model_card
from search.folder import StudyFolder, factor_fact
from search.panels import dense_row
from search.plain import read_yaml
from search.records import FACTORS, StudySummary, TrialRow
from search.refine import refined_file

DESCRIPTION, LISTED = "ranks.yaml", "ranks.json"
DECIDES = ("format", "study", "trial", "variant", "storage", "ranks", "methods")
"""Keys of a description that say which model it is, given the same base model and factors."""


def destinations(
    folder: StudyFolder, rows: list[TrialRow], to: Path | None, each: bool, suffix: str = ""
) -> list[Path]:
    """Where each trial is written: to `to` itself, or, where `each` has a folder of its own, below it.

    Raises:
        RankfrontError: there is no such home.
    """
    if to is not None and not each:
        places = [to]
    else:
        parent = to or folder.path / "exports"
        places = [parent / f"trial-{row.number:05d}{suffix}" for row in rows]
    return [from_home(place, "--to").resolve() for place in places]


def already_there(
    folder: StudyFolder, summary: StudySummary, rows: list[TrialRow], places: list[Path], form: str | None
) -> set[Path]:
    """The places that hold their trial in a form already; a form of None is the configuration alone."""
    found = set()
    for row, place in zip(rows, places, strict=True):
        document = whole(facts(folder, row, summary), folder.config.storage, row)
        if _holds(place, document, form):
            found.add(place)
    return found


def refuse_taken(places: Iterable[Path]) -> None:
    """Raises RankfrontError where there is something at a place; names every one."""
    there = [f"{place} exists already; name another folder with --to" for place in places if place.exists()]
    if there:
        raise RankfrontError("\n".join(there))


def _holds(place: Path, document: Mapping[str, Any], form: str | None) -> bool:
    """Whether a folder is the export of a configuration in a form. Test scores may have come since."""
    try:
        found = read_yaml(place / DESCRIPTION)
        if _form(place) != form:
            return False
        prints = (found["fingerprints"], document["fingerprints"])
        same = all(found.get(name) == document.get(name) for name in DECIDES)
        return same and all(prints[0][name] == prints[1][name] for name in ("model", "factors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whatever else lies there
        return False


def _form(place: Path) -> str | None:
    """The form of a written folder; None where it is a configuration alone."""
    config = place / "config.json"
    if not config.exists():
        (place / LISTED).stat()
        return None
    told = json.loads(config.read_text(encoding="utf-8"))
    return "dense" if told["model_type"] != "rankfront" and told["rankfront"] else "rankfront"


def export_trial(
    folder: StudyFolder,
    summary: StudySummary,
    row: TrialRow,
    destination: Path,
    form: str,
    variant: str = FACTORS,
    device: str = "auto",
) -> list[str]:
    """Write a trial, of its own factors or a refined variant, as a folder, checked on `device`; what was
    checked, in words."""
    from actors.check import Scored
    from actors.devices import device_here
    from actors.export import export
    from actors.licence import base_licence
    from actors.resident import local_source, resident

    device = device_here(device)
    refined = None
    if variant != FACTORS:
        refined, score = refined_file(folder, row, variant)
        row = replace(row, score=score)
    assert row.score is not None
    config = folder.config
    described = facts(folder, row, summary, variant)
    preparation = config.preparation()
    prepared = resident(preparation, folder.prepared)
    told = CardFacts(
        config=config,
        calibration_tokens=prepared.tokens["calibration"],
        licence=base_licence(local_source(preparation), prepared.model_folder),
        factors=factor_fact(config.factor_spec),
        scores=_by_split(row, summary, variant),
        dense=_by_split(dense_row(summary), summary),
        commands=_commands(folder, row, form, variant),
        smaller=form != "dense",
        study=config.study,
        trial=row.number,
    )
    scored = Scored(preparation, prepared, row.allocation, config.storage, row.score, refined)
    return export(scored, destination, described, lambda checked: model_card(told, checked), form, device)


def _commands(folder: StudyFolder, row: TrialRow, form: str, variant: str) -> tuple[str, ...]:
    """What makes the folder again; refined factors are in their study alone."""
    flags = f"{_form_flag(form)}" + ("" if variant == FACTORS else f" --variant {variant}")
    here = f"rankfront export {shlex.quote(str(folder.path))} --trial {row.number}{flags}  # in the study"
    if variant != FACTORS:
        return (here,)
    return here, apply_command(folder.config.model.source, form) + "  # anywhere"


def _by_split(row: TrialRow | None, summary: StudySummary, variant: str = FACTORS) -> dict[str, Score]:
    if row is None or row.score is None:
        return {}
    test = summary.test_score(row.number, variant)
    return {"search": row.score} | ({"test": test} if test is not None else {})


def _form_flag(form: str) -> str:
    return " --format dense" if form == "dense" else ""


def apply_command(source: str, form: str) -> str:
    """The command that makes a folder again from its own description."""
    return f"rankfront apply {DESCRIPTION} {shlex.quote(source)} --to FOLDER{_form_flag(form)}"


def write_configuration(folder: StudyFolder, summary: StudySummary, row: TrialRow, destination: Path) -> None:
    """Write a trial's configuration alone as YAML and as JSON, both or neither.

    Raises:
        RankfrontError: the disk is full or the place cannot be written.
    """
    document = whole(facts(folder, row, summary), folder.config.storage, row)
    try:
        with claimed(destination) as partial:
            (partial / DESCRIPTION).write_text(to_yaml(document), encoding="utf-8")
            text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
            (partial / LISTED).write_text(text + "\n", encoding="utf-8")
            partial.rename(destination)
    except OSError as error:
        raise RankfrontError(f"export to {destination}: {error}") from error


def check_folder(path: Path, overrides: Mapping[str, Any], device: str = "auto") -> list[str]:
    """Reload an exported folder on `device` and hold it against its own record; what was found, in words.

    Raises:
        RankfrontError: there is no such device, it is no export, its text is not here, or it is not what was
            written.
    """
    if not path.is_dir():
        raise RankfrontError(f"--check {path}: no such folder")
    if not (path / DESCRIPTION).exists():
        raise RankfrontError(f"--check {path}: no export, there is no {DESCRIPTION} in it")
    found = read_configuration(path / DESCRIPTION, str(path.resolve()), overrides)
    if "nll" not in found.recorded:
        raise RankfrontError(f"{path / DESCRIPTION}: scores.search.nll is missing: nothing to compare with")
    from actors.check import recheck
    from actors.devices import device_here, room_on
    from actors.replica import quieten

    quieten()
    device = device_here(device)
    with room_on(device):
        return recheck(path, found.config.preparation(), found.recorded, device)
