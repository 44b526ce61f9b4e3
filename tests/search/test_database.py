"""A study on a real PostgreSQL: who may drive it, what comes back, and what is never said."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import optuna
import psycopg
import pytest
from fakes import OBJECTIVES, TARGETS, Time, cost_model, propose_and_complete, score_of, space_of
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from postgres import PASSWORD, SECRET, new_database, running_server
from sqlalchemy.exc import OperationalError

from actors.types import Allocation, Prepared, RankfrontError
from search.begun import stored_identity, write_identity
from search.config import parse_config
from search.database import (
    lease_holder,
    leased,
    open_database,
    open_tables,
    resolve,
)
from search.packing import RESULT, result_of
from search.patience import Patience
from search.samplers import make_sampler
from search.sections import SamplerSection
from search.study import SearchStudy, open_storage_study

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server() as socket:
        yield socket


@pytest.fixture
def database(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty database, as a config names it."""
    monkeypatch.setenv(SECRET, PASSWORD)  # and taken away again
    return new_database(server, f"made_up_{next(NUMBERS)}")


def study_of(storage: BaseStorage, sampler: str = "random") -> SearchStudy:
    cost = cost_model()
    section = SamplerSection(name=sampler, population=6)
    study = open_storage_study(storage, "made-up", OBJECTIVES)
    return SearchStudy(study, make_sampler(section), 0, space_of(cost), cost, OBJECTIVES)


def seen(database: str) -> list[optuna.trial.FrozenTrial]:
    """As any Optuna program sees them."""
    url = resolve(database).render_as_string(hide_password=False)
    return optuna.load_study(study_name="made-up", storage=url).get_trials()


# -- the study --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_a_reopened_study_is_the_study(database: str, sampler: str) -> None:
    with leased(database, "made-up") as storage:
        study = study_of(storage, sampler)
        study.enqueue([(Allocation.of({"layers.1.up_proj": 7}, TARGETS), "enqueued")])
        done = propose_and_complete(study, 8)
        study.fail(study.propose(sampler).number, "broken")
        flying = study.propose(sampler)
        before = seen(database)
        rows = study.rows()
    with leased(database, "made-up") as storage:
        again = study_of(storage, sampler)
        assert again.rows() == rows
        assert again.in_flight() == [flying]
        assert seen(database) == before, "opening writes nothing"
        again.complete(flying, score_of(flying.allocation))
        assert again.propose(sampler).number == 10
    trials = seen(database)
    assert [trial.number for trial in trials] == list(range(11))
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 8 + ["FAIL", "COMPLETE", "RUNNING"]
    assert [trial.values[1] for trial in trials[:8]] == [score_of(p.allocation).text.nll for p in done]


def test_a_result_and_its_state_are_there_together(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with leased(database, "made-up") as storage:
        study = study_of(storage)
        planned = study.propose("random")
        with monkeypatch.context() as patch:
            patch.setattr(storage, "set_trial_state_values", interrupt)
            with pytest.raises(KeyboardInterrupt):
                study.complete(planned, score_of(planned.allocation))
        [trial] = seen(database)
        assert (trial.state, RESULT in trial.user_attrs) == (TrialState.RUNNING, False)
        study.complete(planned, score_of(planned.allocation))
    [trial] = seen(database)
    assert (trial.state, RESULT in trial.user_attrs) == (TrialState.COMPLETE, True)


def test_a_result_without_its_state_is_replayed(database: str) -> None:
    """As a driver left it that wrote them apart."""
    with leased(database, "made-up") as storage:
        study = study_of(storage)
        planned = study.propose("random")
        storage.set_trial_user_attr(study._ids[0], RESULT, result_of(score_of(planned.allocation)))
    with leased(database, "made-up") as storage:
        again = study_of(storage)
        assert again.replay() == [0]
    [trial] = seen(database)
    assert (trial.state, trial.values[1]) == (TrialState.COMPLETE, score_of(planned.allocation).text.nll)


def test_trials_are_enqueued_beside_a_driver(database: str) -> None:
    """By our own command and by any Optuna program."""
    mine = Allocation.of({"layers.1.up_proj": 7}, TARGETS)
    with leased(database, "made-up") as storage:
        study = study_of(storage)
        propose_and_complete(study, 1)
        study_of(open_database(database)).enqueue([(mine, "enqueued")])
        plain = optuna.load_study(study_name="made-up", storage=open_database(database))
        plain.enqueue_trial({"q_proj": 1, "up_proj": 2})
        assert study.propose("random").allocation == mine
        assert study.propose("random").number == 2
    assert [trial.state.name for trial in seen(database)] == ["COMPLETE", "RUNNING", "RUNNING"]
    assert seen(database)[2].params["up_proj"] == 2


def test_what_a_study_was_begun_with_is_found_from_any_machine(database: str) -> None:
    hub = {"model": {"source": "org/model"}, "text": {"source": "org/text"}}
    config = parse_config({"study": "made-up", "database": database, **hub})
    prepared = Prepared("", "", TARGETS, 10, {"model": "f1"}, {}, {}, {}, reused=False)
    with leased(database, "made-up") as storage:
        assert stored_identity(storage, "made-up") is None
        write_identity(storage, config, prepared)
        assert stored_identity(storage, "made-up") is None, "no trial yet: nothing binds the config"
        other = config.model_copy(update={"objectives": ("nll", "budget.linear", "budget.bytes")})
        for told in (other, config):
            write_identity(storage, told, prepared)
            [begun] = storage.get_all_studies()
            assert len(begun.directions) == len(told.objectives)
        propose_and_complete(study_of(storage), 1)
    storage = open_database(database)
    found = stored_identity(storage, "made-up")
    assert found is not None
    assert parse_config(found.config) == config
    assert found.fingerprints == {"model": "f1"}
    [study] = storage.get_all_studies()
    assert PASSWORD not in str(study.user_attrs)


# -- the lease --------------------------------------------------------------------------------


def test_the_second_driver_is_refused_and_told_who_drives(database: str) -> None:
    with leased(database, "made-up"):
        for _ in range(2):
            with (
                pytest.raises(
                    RankfrontError, match=r"'made-up' has a driver already: rankfront process \d+ on"
                ),
                leased(database, "made-up"),
            ):
                raise AssertionError("two drivers")
        with leased(database, "another"):
            pass
    with leased(database, "made-up"):
        pass


def test_who_holds_the_lease_is_seen_by_one_who_only_looks(database: str) -> None:
    assert open_tables(database) is None
    assert open_tables(database) is None, "looking makes no table"
    assert lease_holder(database, "made-up") is None
    with leased(database, "made-up") as storage:
        propose_and_complete(study_of(storage), 1)
        assert (lease_holder(database, "made-up") or "").startswith(f"rankfront process {os.getpid()} on ")
        assert lease_holder(database, "another") is None
        read = open_tables(database)
        assert read is not None
        assert [trial.state.name for trial in read.get_all_trials(1)] == ["COMPLETE"]
    assert lease_holder(database, "made-up") is None


HOLD = """
import sys
from search.database import leased
with leased(sys.argv[1], "made-up"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_driver_holds_nobody_off(database: str) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, database], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RankfrontError, match=f"process {holder.pid} on "), leased(database, "made-up"):
            raise AssertionError("two drivers")
    finally:
        holder.kill()
        holder.communicate()
    _once_free(database)


def test_of_drivers_that_start_at_once_on_an_empty_database_one_drives(database: str) -> None:
    """Whose tables all of them would make."""
    command = [sys.executable, "-c", HOLD, database]
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    drivers = [subprocess.Popen(command, **pipes, text=True) for _ in range(3)]
    try:
        held = [driver for driver in drivers if driver.stdout.readline() == "held\n"]
        assert len(held) == 1
        for driver in drivers:
            if driver not in held:
                _, said = driver.communicate()
                assert f"study 'made-up' has a driver already: rankfront process {held[0].pid} on" in said
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate()


def _once_free(database: str) -> None:
    """Take the lease of a driver that was just killed; its session ends when the server sees it is gone."""
    for attempt in itertools.count():
        try:
            with leased(database, "made-up"):
                return
        except RankfrontError:
            assert attempt < 100


def cut(database: str) -> None:
    """End every session of the database: what a restart of the server or a lost network does."""
    url = resolve(database)
    with psycopg.connect(host=str(url.query["host"]), user="postgres", password=PASSWORD) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", (url.database,)
        )


def test_a_driver_that_lost_its_lease_writes_nothing(database: str) -> None:
    with leased(database, "made-up") as storage:
        study = study_of(storage)
        planned = study.propose("random")
        cut(database)
        with leased(database, "made-up") as other:
            with pytest.raises((OperationalError, StorageInternalError)):
                study.complete(planned, score_of(planned.allocation))
            with pytest.raises(RankfrontError, match="has a driver already"):
                study.complete(planned, score_of(planned.allocation))
            with pytest.raises(RankfrontError, match="has a driver already"):
                study.propose("random")
            assert [trial.state.name for trial in seen(database)] == ["RUNNING"]
            study_of(other).complete(planned, score_of(planned.allocation))
    assert [trial.state.name for trial in seen(database)] == ["COMPLETE"]


def admin(database: str, *statements: str) -> None:
    """Run statements on the server, from beside the database."""
    url = resolve(database)
    with psycopg.connect(
        host=str(url.query["host"]), user="postgres", password=PASSWORD, autocommit=True
    ) as to:
        for statement in statements:
            to.execute(statement.format(url.database))  # type: ignore[arg-type]


CLOSED = ("ALTER DATABASE {} ALLOW_CONNECTIONS false", "ALTER DATABASE {} ALLOW_CONNECTIONS true")
READ_ONLY = (
    "ALTER DATABASE {} SET default_transaction_read_only = on",
    "ALTER DATABASE {} RESET default_transaction_read_only",
)


@pytest.mark.parametrize(("refuse", "admit"), [CLOSED, READ_ONLY])
def test_a_server_that_refuses_for_ten_seconds_is_waited_for(database: str, refuse: str, admit: str) -> None:
    """Restarted, or taken over by one that cannot be written yet; the lease is held again at the end."""

    def back(seconds: float) -> None:
        if seconds >= 10.0:
            admin(database, admit)

    time, said = Time(back), list[str]()
    with leased(database, "made-up", Patience(60.0, said.append, time.clock, time.sleep)) as storage:
        study = study_of(storage)
        done = propose_and_complete(study, 2)
        flying = study.propose("random")
        for act in (
            lambda: study.complete(flying, score_of(flying.allocation)),
            lambda: done.append(study.propose("random")),
        ):
            admin(database, refuse)
            cut(database)
            time.now = 0.0
            act()
            assert 10.0 <= time.now < 60.0
        with pytest.raises(RankfrontError, match="has a driver already"), leased(database, "made-up"):
            raise AssertionError("two drivers")
    trials = seen(database)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3 + ["RUNNING"]
    assert [trial.values[1] for trial in trials[:3]] == [
        score_of(planned.allocation).text.nll for planned in (*done[:2], flying)
    ]
    assert "terminating connection" in said[0]
    answers = [line.startswith("storage: answers again") for line in said]
    assert answers == [False, True] * (len(said) // 2)


def test_a_database_that_goes_away_ends_the_run_in_one_line(database: str) -> None:

    def drive() -> None:
        with leased(database, "made-up") as storage:
            study = study_of(storage)
            cut(database)
            study.propose("random")

    with pytest.raises(RankfrontError) as ended:
        drive()
    assert str(ended.value).startswith("database: postgresql+psycopg://postgres:***@/made_up_")
    assert "terminating connection" in str(ended.value)
    assert PASSWORD not in str(ended.value)


def test_a_schema_that_the_url_names_is_where_the_study_is(database: str) -> None:
    plain = resolve(database).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain) as connection:
        connection.execute("CREATE SCHEMA lab")
    joined = "&" if "?" in database else "?"
    study_of(open_database(f"{database}{joined}options=-csearch_path%3Dlab"))
    with psycopg.connect(plain) as connection:
        found = connection.execute("SELECT schemaname FROM pg_tables WHERE tablename = 'studies'").fetchall()
    assert found == [("lab",)]


def test_a_refused_login_does_not_say_the_password(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "not-the-password")
    with pytest.raises(RankfrontError, match="password authentication failed") as refused:
        open_database(database)
    assert "not-the-password" not in str(refused.value)
    assert refused.value.__suppress_context__
