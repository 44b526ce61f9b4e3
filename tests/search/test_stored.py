"""An Optuna study of other objectives: made anew by its driver while it has no trial, then refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection

from actors.types import RankfrontError
from search.database import open_database
from search.journal import open_journal
from search.records import Objective
from search.stored import begin_storage_study, has_trial, open_storage_study

LOSS = (Objective("budget.model", minimize=True), Objective("nll", minimize=True))
ACCURACY = (Objective("budget.model", minimize=True), Objective("reasoning.acc", minimize=False))
OTHERS = {
    "another direction": ACCURACY,
    "another metric": (LOSS[0], Objective("kl", minimize=True)),
    "one more": (*LOSS, Objective("kl", minimize=True)),
    "another order": LOSS[::-1],
}


@pytest.fixture(params=["memory", "journal", "database"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], BaseStorage]:
    """Opens one storage again and again, as programs one after the other do."""
    memory = InMemoryStorage()
    ways: dict[str, Callable[[], BaseStorage]] = {
        "memory": lambda: memory,
        "journal": lambda: open_journal(tmp_path),
        "database": lambda: open_database(f"sqlite:///{tmp_path / 'studies.db'}"),
    }
    return ways[request.param]


@pytest.mark.parametrize("objectives", OTHERS.values(), ids=OTHERS)
def test_without_a_trial_the_driver_makes_it_anew(
    reopen: Callable[[], BaseStorage], objectives: tuple[Objective, ...]
) -> None:
    begin_storage_study(reopen(), "s", LOSS).set_user_attr("note", "kept")
    storage = reopen()
    begun = begin_storage_study(storage, "s", objectives)
    begun.add_trial(optuna.trial.create_trial(values=[1.0] * len(objectives)))
    assert has_trial(storage, "s")
    seen = optuna.load_study(study_name="s", storage=reopen())
    assert [d == StudyDirection.MINIMIZE for d in seen.directions] == [o.minimize for o in objectives]
    assert seen.metric_names == [objective.name for objective in objectives]
    assert seen.user_attrs == {"note": "kept"}
    assert len(seen.trials) == 1


def test_equal_objectives_are_the_study_as_it_is(reopen: Callable[[], BaseStorage]) -> None:
    first = begin_storage_study(reopen(), "s", LOSS)
    assert begin_storage_study(reopen(), "s", LOSS)._study_id == first._study_id
    assert open_storage_study(reopen(), "s", LOSS)._study_id == first._study_id


@pytest.mark.parametrize("objectives", OTHERS.values(), ids=OTHERS)
def test_with_a_trial_of_any_state_other_objectives_are_refused(
    reopen: Callable[[], BaseStorage], objectives: tuple[Objective, ...]
) -> None:
    study = begin_storage_study(reopen(), "s", LOSS)
    study.enqueue_trial({"x": 1})
    for opening in (begin_storage_study, open_storage_study):
        with pytest.raises(RankfrontError) as refused:
            opening(reopen(), "s", objectives)
        said = str(refused.value)
        assert "'s': its objectives are budget.model (minimize), nll (minimize); those of this" in said
        assert f"{objectives[-1].name} ({'minimize' if objectives[-1].minimize else 'maximize'})" in said
        assert "give the new study another name" in said
    assert len(optuna.load_study(study_name="s", storage=reopen()).trials) == 1


def test_who_does_not_drive_deletes_nothing(reopen: Callable[[], BaseStorage]) -> None:
    """A driver may just have begun it, and hold it by its id."""
    driven = begin_storage_study(reopen(), "s", ACCURACY)
    with pytest.raises(RankfrontError, match=r"no trial yet, and `rankfront search` makes it anew"):
        open_storage_study(reopen(), "s", LOSS)
    assert optuna.load_study(study_name="s", storage=reopen())._study_id == driven._study_id
    assert not has_trial(reopen(), "s")
    assert not has_trial(reopen(), "none")


def test_a_study_that_another_program_created_is_named(reopen: Callable[[], BaseStorage]) -> None:
    """Where its directions are those of the config; else it is told by them."""
    optuna.create_study(storage=reopen(), study_name="s", directions=["minimize", "maximize"])
    with pytest.raises(RankfrontError, match=r"are unnamed \(minimize\), unnamed \(maximize\); those"):
        open_storage_study(reopen(), "s", LOSS)
    assert open_storage_study(reopen(), "s", ACCURACY).metric_names == ["budget.model", "reasoning.acc"]
