"""`rankfront search --deterministic` with one real replica and with two: the same trials, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import FrozenTrial
from studies import Ended, Study

from search.folder import StudyFolder
from search.lagged import DECIMALS
from search.records import TrialRow

TRIALS, LAG = 26, 2


def searched(root: Path, cluster: str, sampler: str, replicas: int) -> tuple[Ended, tuple[TrialRow, ...]]:
    """A search whose replicas are all loaded before the first trial is sent to one, and its rows."""
    study = Study(
        root,
        f"{sampler}-{replicas}",
        cluster,
        sampler={"name": sampler},
        run={"lag": LAG},
        scoring={"stages": [64]},
        replicas={"count": replicas, "min": replicas},
    )
    ended = study.run("search", study.config, "--deterministic", "--trials", TRIALS)
    assert ended.code == 0, ended.err
    return ended, StudyFolder.open(study.folder).read_study().rows()


def decided(trial: FrozenTrial, row: TrialRow) -> tuple[object, ...]:
    """All that decides what a trial is, and how it ended. Of one that was stopped, what stopped it too."""
    stopped_by = row.score.stopped_by if row.score else None
    return trial.number, trial.state, trial.params, trial.values, row.origin, row.allocation, stopped_by


@pytest.mark.slow  # four searches, two of them on both of the cluster's cores
@pytest.mark.parametrize("sampler", ["exchange", "tpe"])
def test_the_same_trials_with_one_replica_and_with_two(tmp_path: Path, cluster: str, sampler: str) -> None:
    """Of many more trials than `tpe` draws blindly, ten. Each replica has a part in its search."""
    (one, rows), (two, other) = (searched(tmp_path, cluster, sampler, count) for count in (1, 2))
    assert {row.replica for row in rows} == {"replica-0"}
    assert {row.replica for row in other} == {"replica-0", "replica-1"}
    assert [trial.number for trial in one.trials] == list(range(TRIALS))
    assert [*map(decided, two.trials, other)] == [*map(decided, one.trials, rows)]
    told = [row.values[1] for row in rows if row.values is not None]
    assert told == [round(value, DECIMALS) for value in told]
    assert len({row.allocation for row in rows if row.origin == sampler}) > 10
