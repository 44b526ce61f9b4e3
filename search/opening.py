"""Open a study to drive it: lock it, hold it against what it was, start Ray, prepare it."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from optuna.storages import BaseStorage
from rich.console import Console
from rich.markup import escape

from actors.types import Prepared
from search.begun import Identity, folder_identity, stored_identity, write_identity
from search.config import Config, check_names, parse_saved
from search.database import leased
from search.files import write_atomic
from search.fitting import crowding
from search.folder import CONFIG, PREPARED, StudyFolder
from search.gpus import gpu_shortage
from search.identity import config_differences, fingerprint_differences, refuse
from search.journal import JOURNAL, LOCK, driver_lock, open_journal, repair_journal
from search.patience import SECONDS, Patience
from search.pool import Machine, connect
from search.preparing import builder_count, prepare
from search.screen import ProgressBar
from search.stored import begin_storage_study


@dataclass(frozen=True)
class Session:
    """A study that this process drives: prepared and in its folder, with the machine it runs on."""

    folder: StudyFolder
    machine: Machine
    say: Callable[[str], None]


def _nothing_more(session: Session) -> None:
    pass


def _any_machine(machine: Machine) -> None:
    pass


@contextlib.contextmanager
def opened(
    config: Config,
    console: Console,
    path: Path | None = None,
    check: Callable[[Session], None] = _nothing_more,
    suits: Callable[[Machine], None] = _any_machine,
) -> Iterator[Session]:
    """Lock the study of a config, hold the config against what the study was, prepare it, save both.

    All of it in the folder `path`, where the study's is not the one that the config names: its config is the
    saved one, and stays. What `suits` raises of the machine, and `check` of the study as it will be prepared,
    ends it before the long work.

    Only a trial binds a config. Before the first one a study may have been prepared, and its targets scored
    alone (`search.sensitivity`); what is in its storage then follows the config.

    Raises:
        RankfrontError: another driver holds the study, it is another study, or it cannot start.
    """
    check_names(config)
    own, path = path is None, path or config.folder
    say = _sayer(console)
    patience = Patience(SECONDS, say)
    with _study_folder(path), _storage(config, patience) as storage:
        identity = _identity(config, path, storage)
        if identity is not None:
            saved = parse_saved(identity.config, identity.where)
            refuse(config.study, config_differences(saved, config))
        repaired = repair_journal(path)
        if repaired:
            say(f"journal: {repaired}")
        machine = connect()
        suits(machine)
        if not (path / PREPARED).exists():
            gpu_shortage(config.replicas, machine)  # refused before the long work, not after it
            crowded = crowding(config.replicas, machine)
            if crowded is not None:
                say(crowded)
        same = _fingerprint_check(config.study, identity)
        count = builder_count(config.builders, machine)
        checked: list[Session] = []

        def session_of(prepared: Prepared) -> Session:
            session = Session(StudyFolder(path, config, prepared, storage, patience), machine, say)
            if not checked:  # before the long work, where there is any
                check(session)
                checked.append(session)
            return session

        with ProgressBar(console) as bar:
            prepared = prepare(config.preparation(), machine, count, say, bar.progress, same, session_of)
        session = session_of(prepared)
        # The storage first: where it refuses, the folder says what it said before.
        if storage is not None and own:
            write_identity(storage, config, prepared)
        elif storage is None and identity is None and (path / JOURNAL).exists():
            begin_storage_study(open_journal(path, patience), config.study, config.named_objectives)
        if own:
            write_atomic(path / CONFIG, config.to_yaml())
        write_atomic(path / PREPARED, json.dumps(prepared.to_dict(), indent=1))
        yield session


def _storage(config: Config, patience: Patience) -> contextlib.AbstractContextManager[BaseStorage | None]:
    """The study's database, held as its driver; None where the study is the journal of its folder."""
    if config.database is None:
        return contextlib.nullcontext()
    return leased(config.database, config.study, patience)


def _identity(config: Config, path: Path, storage: BaseStorage | None) -> Identity | None:
    """What the study was begun with, None where it has no trial yet."""
    found = None if storage is None else stored_identity(storage, config.study)
    # The folder too: a study does not move, be it from a journal or a database, by a change of its config.
    return found or folder_identity(path, config.database)


@contextlib.contextmanager
def _study_folder(path: Path) -> Iterator[None]:
    """The folder, locked; a folder that nothing came of is taken away again, while it is locked."""
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    with driver_lock(path):
        try:
            yield
        finally:
            if new and {file.name for file in path.iterdir()} <= {LOCK}:
                shutil.rmtree(path)


def _fingerprint_check(study: str, identity: Identity | None) -> Callable[[Mapping[str, str]], None]:
    """Refuses fingerprints other than those the study was prepared with, if it was."""

    def check(found: Mapping[str, str]) -> None:
        if identity is not None and identity.fingerprints is not None:
            refuse(study, fingerprint_differences(identity.fingerprints, found))

    return check


def _sayer(console: Console) -> Callable[[str], None]:
    start = time.monotonic()

    def say(line: str) -> None:
        clock = f"[dim]{time.monotonic() - start:6.1f} s[/]"
        console.print(f"{clock}  {escape(line)}", highlight=False, soft_wrap=True)

    return say
