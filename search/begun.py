"""What a study was begun with: kept beside its journal, or in its database where any machine finds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from actors.types import Prepared, RankfrontError
from search.config import Config
from search.database import open_tables
from search.folder import CONFIG, PREPARED, refuse_lost
from search.journal import journal_has_trial
from search.plain import read_own
from search.stored import begin_storage_study, has_trial
from search.study import IDENTITY


@dataclass(frozen=True)
class Identity:
    """The config of a study as it was saved `where`, and the fingerprints it was prepared with, if it was."""

    where: str
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str] | None


def folder_identity(path: Path, asked: str | None) -> Identity | None:
    """Of a study in a folder; None where it has no config, or neither its journal nor its database a trial.

    `asked` is a database that has none, as its caller knows.

    Raises:
        RankfrontError: a file of it is damaged, or its trials were lost.
    """
    if not (path / CONFIG).exists():
        return None
    config, study = read_own(path / CONFIG, lambda found: (found, found["study"]))
    database = config.get("database")
    left = database not in (None, asked) and _may_have_trial(database, study)
    if not left and not journal_has_trial(path, study):
        refuse_lost(path)
        return None
    fingerprints = None
    if (path / PREPARED).exists():
        fingerprints = read_own(path / PREPARED, lambda found: found["fingerprints"])
    return Identity(str(path / CONFIG), config, fingerprints)


def _may_have_trial(database: str, study: str) -> bool:
    """Whether a study has a trial in a database; one that cannot be asked may hold some."""
    try:
        storage = open_tables(database)
    except RankfrontError:
        return True
    return storage is not None and has_trial(storage, study)


def stored_identity(storage: BaseStorage, study: str) -> Identity | None:
    """Of a study in a database; None where it has no trial, or no driver prepared it."""
    found = next((known for known in storage.get_all_studies() if known.study_name == study), None)
    if found is None or IDENTITY not in found.user_attrs or not has_trial(storage, study):
        return None
    kept = found.user_attrs[IDENTITY]
    return Identity(f"study {study!r} of the database", kept["config"], kept["prepared"]["fingerprints"])


def stored_preparation(storage: BaseStorage, study: str) -> tuple[Mapping[str, Any], Prepared] | None:
    """The config, as plain data, and the preparation of a study in a database; None where it has none."""
    found = next((known for known in storage.get_all_studies() if known.study_name == study), None)
    if found is None or IDENTITY not in found.user_attrs:
        return None
    kept = found.user_attrs[IDENTITY]
    return kept["config"], Prepared.from_dict(kept["prepared"])


def write_identity(storage: BaseStorage, config: Config, prepared: Prepared) -> None:
    """Keep config and preparation with the study of a database, which is begun if it is not.

    Raises:
        RankfrontError: it has trials of other objectives.
    """
    study = begin_storage_study(storage, config.study, config.named_objectives)
    identity = {"config": config.model_dump(mode="json"), "prepared": prepared.to_dict()}
    if study.user_attrs.get(IDENTITY) != json.loads(json.dumps(identity)):
        study.set_user_attr(IDENTITY, identity)
