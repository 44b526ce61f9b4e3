"""A study in a database: named by a URL without secrets, driven by whoever holds its lease.

The lease is a PostgreSQL advisory lock, and a driver has one connection: the one that holds it. Every write
so goes through a session that holds the lease, and the server lets go of it when that session ends, however
the driver ends. A connection that is made anew takes the lease anew, or is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError

from actors.types import RankfrontError
from search.database_storage import StudyDatabase
from search.outage import OwnSessionError
from search.patience import Patience

# A variable of the environment, written in a config in place of its value.
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SECRETS = ("password", "sslpassword")
CONNECT_SECONDS = 10
# A machine that vanished says no goodbye: the server asks after it, and ends its session in about 25 s.
_KEEPALIVE = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
# The advisory lock of who makes the tables: one number, so none of a study's leases, which are pairs.
_TABLES = int.from_bytes(hashlib.sha256(b"rankfront/tables").digest()[:8], "big", signed=True)
# PostgreSQL cuts an application's name at this length.
_NAME_BYTES = 63


def check_url(value: object) -> str | None:
    """A database as a config may name it: a URL whose password, if any, is a variable `${NAME}`.

    Raises:
        ValueError: it is none; the message never repeats the value, which may hold a password.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("write one URL, such as postgresql://user:${PGPASSWORD}@host/database")
    if _VARIABLE.fullmatch(value):
        return value
    try:
        url = sqlalchemy.make_url(value)
    except (ArgumentError, ValueError):
        raise ValueError("no URL; write postgresql://user:${PGPASSWORD}@host/database") from None
    if any(secret is not None and not _VARIABLE.fullmatch(secret) for secret in _secrets(url)):
        raise ValueError("the password stands in it; write ${NAME} in its place, and set NAME outside")
    return value


def _secrets(url: URL) -> list[str | None]:
    found = [url.query.get(name) for name in _SECRETS]
    return [
        url.password,
        *(value if isinstance(value, str) or value is None else str(value) for value in found),
    ]


def secrets_of(template: str | None) -> list[str]:
    """What must never be shown of a database as a config names it, in the clear and as a URL spells it."""
    if template is None:
        return []
    found = [secret for secret in _secrets(resolve(template)) if secret]
    return [*found, *(quote(secret, safe="") for secret in found)]


def resolve(template: str) -> URL:
    """The URL to connect to, its variables filled in.

    Raises:
        RankfrontError: a variable is not set, or its value is no URL.
    """
    if _VARIABLE.fullmatch(template):
        try:
            url = sqlalchemy.make_url(_filled(template) or "")
        except (ArgumentError, ValueError):
            raise RankfrontError(f"database: the value of {template} is no URL") from None
    else:
        url = sqlalchemy.make_url(template)
        url = url.set(
            username=_filled(url.username),
            password=_filled(url.password),
            host=_filled(url.host),
            database=_filled(url.database),
        )
        url = url.update_query_dict({k: _filled(v) or "" for k, v in url.query.items() if isinstance(v, str)})
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url


def _filled(text: str | None) -> str | None:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise RankfrontError(f"database: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return None if text is None else _VARIABLE.sub(value, text)


def shown(url: URL) -> str:
    """A URL without its secrets, for people."""
    return url.difference_update_query(_SECRETS).render_as_string(hide_password=True)


def open_database(template: str) -> BaseStorage:
    """The storage of a database, for one who reads or enqueues. Its tables are made where there are none.

    Raises:
        RankfrontError: it cannot be reached, or its driver is not installed.
    """
    return optuna.storages.get_storage(_connected(resolve(template), {}))


def open_tables(template: str) -> BaseStorage | None:
    """The storage of a database for one who only reads; None where it has no tables, and none are made.

    Raises:
        RankfrontError: as `open_database`.
    """
    url = resolve(template)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return None  # to connect would make the file
    with _said(url), _installed(url), _engine(url) as engine:
        there = sqlalchemy.inspect(engine).has_table("studies")
    return open_database(template) if there else None


def lease_holder(template: str, study: str) -> str | None:
    """Who drives a study of a PostgreSQL database, None where nobody does.

    Raises:
        RankfrontError: as `open_database`.
    """
    url = resolve(template)
    if url.get_backend_name() != "postgresql":
        return None
    with _said(url), _installed(url), _engine(url) as engine, engine.connect() as connection:
        return _Lease(study).holder(connection.connection.cursor())


def _connected(url: URL, pool: dict[str, Any]) -> StudyDatabase:
    with _said(url), _installed(url), _making_tables(url):
        return StudyDatabase(
            url.render_as_string(hide_password=False),
            {"connect_args": _arguments(url), "hide_parameters": True, **pool},
        )


@contextlib.contextmanager
def _making_tables(url: URL) -> Iterator[None]:
    """One process at a time: of those that make the tables of an empty database at once, all but one fail."""
    if url.get_backend_name() != "postgresql":
        yield
        return
    with _engine(url) as engine, engine.connect() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": _TABLES})
        yield


@contextlib.contextmanager
def _engine(url: URL) -> Iterator[Engine]:
    """An engine whose sessions end here, and what they hold with them."""
    engine = sqlalchemy.create_engine(url, connect_args=_arguments(url), hide_parameters=True)
    try:
        yield engine
    finally:
        engine.dispose()


def _arguments(url: URL) -> dict[str, Any]:
    """What a connection tells PostgreSQL of itself, beside what the URL has it say."""
    if url.get_backend_name() != "postgresql":
        return {}
    options = " ".join((*url.normalized_query.get("options", ()), _KEEPALIVE))
    said = {"application_name": _application(), "options": options}
    return said if "connect_timeout" in url.query else {**said, "connect_timeout": CONNECT_SECONDS}


def _application() -> str:
    """What the server calls a session of this process."""
    return f"rankfront process {os.getpid()} on {socket.gethostname()}"[:_NAME_BYTES]


@contextlib.contextmanager
def _installed(url: URL) -> Iterator[None]:
    try:
        yield
    except (ImportError, NoSuchModuleError) as error:
        raise RankfrontError(
            f"database: {shown(url)}: its driver is not installed; "
            "for PostgreSQL: in the project's folder, pip install -e '.[postgres]'"
        ) from error


@contextlib.contextmanager
def _said(url: URL) -> Iterator[None]:
    """Errors of the connection in one line, without secrets.

    Raises:
        RankfrontError: the database cannot be reached, or went away.
    """
    try:
        yield
    except (OperationalError, InterfaceError, StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        text = str(getattr(cause, "orig", None) or cause or error).strip().splitlines()[0]
        for secret in filter(None, _secrets(url)):
            text = text.replace(secret, "***")
        raise RankfrontError(f"database: {shown(url)}: {text}") from None


@contextlib.contextmanager
def leased(template: str, study: str, patience: Patience | None = None) -> Iterator[BaseStorage]:
    """The storage of a database, held as the study's one driver.

    With patience a server that goes away is waited for, once the lease is held.

    On anything but PostgreSQL there is no lease; the lock of the study's folder is all that holds a second
    driver off.

    Raises:
        RankfrontError: another driver holds the study, says which; or the database cannot be reached, also
            later, while the lease is held.
    """
    url = resolve(template)
    postgres = url.get_backend_name() == "postgresql"
    storage = _connected(url, {"pool_size": 1} if postgres else {})
    try:
        if postgres:
            # The connections that made the tables hold no lease: let them go, and take it with the next one.
            # A second one beside that would be refused the lease, so that no write can go past it.
            storage.engine.dispose()
            sqlalchemy.event.listen(storage.engine, "connect", _Lease(study))
        with _said(url):
            with storage.engine.connect():
                pass
            storage.patience = patience or storage.patience
            yield optuna.storages.get_storage(storage)
    finally:
        storage.engine.dispose()


class _Lease:
    """Takes a study's advisory lock on every connection that is made."""

    def __init__(self, study: str) -> None:
        self._study = study
        digest = hashlib.sha256(f"rankfront/{study}".encode()).digest()
        self._high, self._low = (
            int.from_bytes(digest[start : start + 4], "big", signed=True) for start in (0, 4)
        )

    def __call__(self, connection: Any, record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_lock(%s, %s)", (self._high, self._low))
            if cursor.fetchone()[0]:
                connection.commit()  # the lock is the session's: it outlives the transaction
                return
            holder = self.holder(cursor) or "it is just ending"
        connection.close()
        own = holder.startswith(f"{_application()} since")
        refusal = f"study {self._study!r} has a driver already: {holder}"
        raise OwnSessionError(refusal) if own else RankfrontError(refusal)

    def holder(self, cursor: Any) -> str | None:
        """Whose session holds the lock, None where none does."""
        cursor.execute(
            "SELECT a.application_name, to_char(a.backend_start, 'YYYY-MM-DD HH24:MI:SS') "
            "FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
            "WHERE l.locktype = 'advisory' AND l.granted "
            "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
            "AND l.classid = %s::int8::oid AND l.objid = %s::int8::oid",
            (self._high % 2**32, self._low % 2**32),
        )
        row = cursor.fetchone()
        return f"{row[0]} since {row[1]} (the database's clock)" if row else None
