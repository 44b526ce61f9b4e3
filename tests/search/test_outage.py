"""Which errors of a database may pass."""

from __future__ import annotations

import pytest
from optuna.exceptions import StorageInternalError
from psycopg import errors
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import ProgrammingError as Mistake

from search.outage import OwnSessionError, passing


def test_a_server_that_is_away_or_refuses_is_quoted_by_its_first_line() -> None:
    away = errors.AdminShutdown("terminating connection due to administrator command\nCONTEXT: no more")
    assert (
        passing(OperationalError("SELECT 1", {}, away))
        == "terminating connection due to administrator command"
    )
    assert (
        passing(InterfaceError("SELECT 1", {}, Exception("the connection is closed")))
        == "the connection is closed"
    )
    full = errors.DiskFull("could not extend file: No space left on device")
    assert passing(OperationalError("INSERT", {}, full)) == "could not extend file: No space left on device"
    behind = errors.ReadOnlySqlTransaction("cannot execute INSERT in a read-only transaction")
    assert passing(InternalError("INSERT", {}, behind)) == "cannot execute INSERT in a read-only transaction"
    assert passing(OwnSessionError("held for the last session")) == "held for the last session"
    assert passing(OperationalError("SELECT 1", {}, Exception())) == "OperationalError"


def test_optunas_wrapping_changes_nothing() -> None:
    wrapped = StorageInternalError("An exception is raised during the commit.")
    wrapped.__cause__ = OperationalError("COMMIT", {}, errors.AdminShutdown("shutting down"))
    assert passing(wrapped) == "shutting down"
    wrapped.__cause__ = DataError("COMMIT", {}, errors.StringDataRightTruncation("too long"))
    assert passing(wrapped) is None


@pytest.mark.parametrize("kind", [DataError, IntegrityError, InternalError, Mistake])
def test_what_would_come_again_does_not_pass(kind: type[Exception]) -> None:
    assert passing(kind("INSERT", {}, errors.UniqueViolation("there already"))) is None  # type: ignore[call-arg]
