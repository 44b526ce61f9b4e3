"""The licence of a base model, from wherever its files state one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from actors.sources import Source
from actors.types import ModelSource

_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def base_licence(source: ModelSource, folder: str | Path) -> str | None:
    """The identifier of the licence (`apache-2.0`): of the model card in a folder, or of a GGUF file.

    None where neither names one.
    """
    card = _front_matter(Path(folder) / "README.md").get("license")
    if isinstance(card, str):
        return card
    place = Source.parse(source.source).path
    return _gguf_licence(place) if place is not None and place.suffix == ".gguf" else None


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes of a model card; empty where there is none."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _gguf_licence(file: Path) -> str | None:
    from gguf import GGUFReader

    stated = GGUFReader(file).get_field("general.license")
    return str(stated.contents()) if stated is not None else None


def copy_licence_files(folder: str | Path, destination: Path) -> None:
    """The base model's own licence and notice files, as they are, beside an export."""
    for pattern in _LICENCE_FILES:
        for file in sorted(Path(folder).glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, destination / file.name)
