"""What a command that drives a study notes of itself: that it began, and how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from search.database import secrets_of
from search.event_log import event_log
from search.events import Note
from search.folder import StudyFolder
from search.runner import Stop


@contextlib.contextmanager
def logged(folder: StudyFolder, say: Callable[[str], None], command: str, stop: Stop) -> Iterator[Note]:
    """While open, events go to the study's log, those of its storage too."""
    study = folder.config.study
    with event_log(folder.path, secrets_of(folder.config.database), say) as note:
        folder.patience.note = note
        note("started", study=study, command=command)
        with ends_told(lambda reason: note("stopped", reason=reason), stop):
            yield note


@contextlib.contextmanager
def ends_told(tell: Callable[[str], None], stop: Stop) -> Iterator[None]:
    """Tell how it ended, however that was."""
    reason = "done"
    try:
        yield
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        tell(stop.reason or reason)
