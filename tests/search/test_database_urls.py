"""The URL of a database: what it may say, how it is filled in, and what is never said of it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from actors.types import RankfrontError
from search.config import Config, ConfigError, parse_config
from search.database import check_url, lease_holder, open_database, open_tables, resolve, secrets_of, shown


def config_of(database: object) -> Config:
    hub = {"model": {"source": "org/model"}, "text": {"source": "org/text"}}
    return parse_config({"study": "made-up", "database": database, **hub})


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@host/db",
        "postgresql://me:x${A}hunter2@host/db",
        "postgresql://me@host/db?password=hunter2",
        "postgresql://me@host/db?sslpassword=hunter2",
        ["postgresql://me:hunter2@host/db"],
        "me:hunter2@host",
    ],
)
def test_a_password_in_a_config_is_refused_and_not_repeated(url: object) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(url)
    [mistake] = refused.value.mistakes
    assert mistake.startswith("database: ")
    assert "${" in mistake
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url", [None, "${DB}", "postgresql://me:${PW}@host/db", "postgresql://me@host/db", "sqlite:///a.db"]
)
def test_a_url_without_secrets_is_kept_as_it_is_written(
    url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW", "hunter2")
    monkeypatch.setenv("DB", "postgresql://me:hunter2@host/db")
    assert check_url(url) == url
    text = config_of(url).to_yaml()
    assert "hunter2" not in text
    assert config_of(url).database == url


def test_variables_are_filled_in_when_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", "p@ss:/%20")
    monkeypatch.setenv("HOST", "db.example")
    url = resolve("postgresql://me:${PW}@${HOST}:5433/studies?sslmode=require")
    assert (url.drivername, url.username, url.password) == ("postgresql+psycopg", "me", "p@ss:/%20")
    assert (url.host, url.port, url.database, url.query["sslmode"]) == (
        "db.example",
        5433,
        "studies",
        "require",
    )
    assert shown(url) == "postgresql+psycopg://me:***@db.example:5433/studies?sslmode=require"
    monkeypatch.setenv("DB", "postgresql://me:hunter2@host/db?sslpassword=hunter2")
    assert resolve("${DB}").password == "hunter2"
    assert "hunter2" not in shown(resolve("${DB}"))
    monkeypatch.setenv("DB", "hunter2")
    for template, says in (("${DB}", "the value of"), ("${NONE_SUCH}", "NONE_SUCH is not set")):
        with pytest.raises(RankfrontError, match=says) as refused:
            resolve(template)
        assert "hunter2" not in str(refused.value)


def test_secrets_are_known_as_they_are_and_as_a_url_spells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", "p@ss:/%20")
    assert secrets_of("postgresql://me:${PW}@host/db") == ["p@ss:/%20", "p%40ss%3A%2F%2520"]
    assert secrets_of("postgresql://me@host/db") == secrets_of(None) == []


def holder(url: str) -> str | None:
    return lease_holder(url, "made-up")


@pytest.mark.parametrize(
    ("look", "driver"),
    [
        *((look, driver) for look in (open_database, open_tables) for driver in ("mysql", "foo")),
        *((look, "postgresql+pg8000") for look in (open_database, open_tables, holder)),
    ],
)
def test_a_database_driver_that_is_not_installed_is_named(look: Callable[[str], object], driver: str) -> None:
    url = f"{driver}://me@host/db"
    with pytest.raises(RankfrontError, match=rf"database: {re.escape(url)}: its driver is not installed"):
        look(url)
