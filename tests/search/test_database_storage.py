"""The relational storage as a driver uses it, held against Optuna's own on the same tables.

On SQLite, as the statements are the same; `test_database.py` has the study on PostgreSQL.
"""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import optuna
import pytest
from fakes import OBJECTIVES, TARGETS, MadeUpPool, Time, cost_model, propose_and_complete, score_of, space_of
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import TrialState, create_trial

from actors.types import Allocation
from search.database_storage import StudyDatabase
from search.patience import Patience
from search.runner import Runner, Stop
from search.samplers import make_sampler
from search.sections import SamplerSection, StopSection
from search.study import SearchStudy, open_storage_study


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def ours(url: str) -> BaseStorage:
    return get_storage(StudyDatabase(url, {}))


def study_of(storage: BaseStorage, sampler: str = "random") -> SearchStudy:
    cost = cost_model()
    study = open_storage_study(storage, "made-up", OBJECTIVES)
    section = SamplerSection(name=sampler, population=6)
    return SearchStudy(study, make_sampler(section), 0, space_of(cost), cost, OBJECTIVES)


def as_optuna_reads(url: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="made-up", storage=RDBStorage(url)).get_trials()


@pytest.mark.parametrize("sampler", ["random", "nsga2"])
def test_a_driver_sees_what_optuna_reads(url: str, sampler: str) -> None:
    """Of what it wrote itself, and of what it reads anew."""
    storage = ours(url)
    study = study_of(storage, sampler)
    propose_and_complete(study, 5)
    study.fail(study.propose(sampler).number, "broken")
    study.propose(sampler)
    optuna.load_study(study_name="made-up", storage=RDBStorage(url)).enqueue_trial({"q_proj": 1})
    read = as_optuna_reads(url)
    assert len(read) == 8
    assert ours(url).get_all_trials(1) == read
    assert storage.get_all_trials(1) == read
    propose_and_complete(study, 1)
    assert storage.get_all_trials(1) == as_optuna_reads(url)
    assert study.rows() == study_of(ours(url)).rows()


def test_any_trial_is_stored_as_optuna_stores_it(url: str) -> None:
    """Kinds of parameters, infinite values, attributes; in the order they were given."""
    trial = create_trial(
        state=TrialState.COMPLETE,
        params={"z": "b", "a": 0.5, "m": 3},
        distributions={
            "z": CategoricalDistribution(["a", "b"]),
            "a": FloatDistribution(0.1, 1.0, log=True),
            "m": IntDistribution(1, 9, step=2),
        },
        values=[math.inf, -math.inf],
        user_attrs={"mine": {"x": [1, None]}},
        system_attrs={"theirs": "y"},
    )
    study = open_storage_study(ours(url), "made-up", OBJECTIVES)
    theirs = optuna.load_study(study_name="made-up", storage=RDBStorage(url))
    study._storage.create_new_trial(study._study_id, trial)
    theirs.add_trial(trial)
    mine, reference = as_optuna_reads(url)
    assert list(mine.params.items()) == list(reference.params.items())
    for each in (mine, reference):
        each.number, each._trial_id = 0, 0
    assert mine == reference
    assert list(ours(url).get_all_trials(1)[0].params) == ["z", "a", "m"]


def test_what_another_program_ends_is_seen(url: str) -> None:
    storage = ours(url)
    study = study_of(storage)
    planned = [study.propose("random") for _ in range(3)]
    theirs = optuna.load_study(study_name="made-up", storage=RDBStorage(url))
    theirs.tell(1, [0.5, 3.0])
    study.complete(planned[0], score_of(planned[0].allocation))
    assert study.propose("random").number == 3
    assert [row.state for row in study.rows()] == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    assert study.rows()[1].values == (0.5, 3.0)
    assert storage.get_all_trials(1) == as_optuna_reads(url)


OUTAGE_SECONDS = 10.0


class Outages:
    """Every so-many-th commit of a storage fails, and so do all of the ten seconds after it.

    With `lost` that commit arrived: only the answer did not.
    """

    def __init__(self, storage: BaseStorage, every: int, lost: bool) -> None:
        beneath = storage._backend  # type: ignore[attr-defined]
        self.time, self.said = Time(), list[str]()
        beneath.patience = Patience(60.0, self.said.append, self.time.clock, self.time.sleep)
        dialect, self._every, self._lost = beneath.engine.dialect, every, lost
        self._commits, self._until, self._commit = 0, -1.0, dialect.do_commit
        dialect.do_commit = self

    def __call__(self, connection: object) -> None:
        if self.time.now >= self._until:
            self._commits += 1
            if self._commits % self._every:
                return self._commit(connection)
            self._until = self.time.now + OUTAGE_SECONDS
            if self._lost:
                self._commit(connection)
        raise sqlite3.OperationalError("server closed the connection unexpectedly\n\tno more of it")


def searched(
    url: str, outages: tuple[int, bool] | None = None
) -> tuple[list[tuple[object, ...]], Outages | None]:
    """What a driver leaves, and the outages it went through from before it began its study."""
    storage = ours(url)
    broken = outages and Outages(storage, *outages)
    study = study_of(storage)
    storage.set_study_user_attr(1, "begun", "with")
    mine = Allocation.of({TARGETS[4].name: 7}, TARGETS)
    study.enqueue([(Allocation.dense(TARGETS), "dense"), (mine, "seed")])
    Runner(study, MadeUpPool(), StopSection(trials=8), "random", Stop()).run()  # type: ignore[arg-type]
    return [(t.number, t.state, t.params, t.values, t.user_attrs) for t in as_optuna_reads(url)], broken


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("every", [3, 4, 7])
def test_a_database_that_is_away_costs_nothing_but_the_wait(every: int, lost: bool, tmp_path: Path) -> None:
    """Whether or not what was not answered had arrived: every trial is there once, as without an outage."""
    whole, _ = searched(f"sqlite:///{tmp_path / 'whole.db'}")
    found, outages = searched(f"sqlite:///{tmp_path / 'broken.db'}", (every, lost))
    assert found == whole
    assert outages is not None
    assert outages.time.now >= OUTAGE_SECONDS
    assert (
        outages.said[0] == "storage: server closed the connection unexpectedly; asking again for up to 60 s"
    )
    assert outages.said[1].startswith("storage: answers again after")
