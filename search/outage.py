"""A database that is away: which errors say so, and may pass."""

from __future__ import annotations

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from actors.types import RankfrontError

# A server that turned read-only, as one does that another has taken over from: not yet an operational error.
READ_ONLY = "25006"


class OwnSessionError(RankfrontError):
    """The server holds the study for a session of this process, and has not noticed yet that it is gone."""


OUTAGES = (SQLAlchemyError, StorageInternalError, OwnSessionError)


def passing(error: Exception) -> str | None:
    """What the server, or its absence, says in a line; None where asking again will not help."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    said = getattr(cause, "orig", None)
    away = isinstance(cause, OperationalError | InterfaceError | OwnSessionError)
    if not away and getattr(said, "sqlstate", None) != READ_ONLY:
        return None
    return next(iter(str(said or cause).strip().splitlines()), type(cause).__name__)
