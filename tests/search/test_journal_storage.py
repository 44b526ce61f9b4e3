"""The journal as a driver uses it, held against Optuna's own on the same file."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest
from fakes import open_study, plain, propose_and_complete, score_of
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from search.journal import JOURNAL, journal_has_trial, open_journal, repair
from search.study import TakenError


def as_optuna_reads(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    return optuna.load_study(study_name="made-up", storage=storage).get_trials()


def lines(folder: Path) -> list[bytes]:
    return (folder / JOURNAL).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("sampler", ["random", "nsga2"])
def test_it_reads_what_optuna_reads(tmp_path: Path, sampler: str) -> None:
    study = open_study(tmp_path, sampler)
    propose_and_complete(study, 5)
    study.fail(study.propose(sampler).number, "broken")
    study.propose(sampler)
    plain(tmp_path).enqueue_trial({"q_proj": 1})
    assert open_journal(tmp_path).get_all_trials(0) == as_optuna_reads(tmp_path)


def test_whether_a_study_has_a_trial_is_what_optuna_says(tmp_path: Path) -> None:
    """Of several studies in one journal, of one that was deleted, and of one of its name made after it."""
    assert not journal_has_trial(tmp_path, "a")
    assert not (tmp_path / JOURNAL).exists(), "a look makes no journal"
    storage = open_journal(tmp_path)
    at = {name: optuna.create_study(storage=storage, study_name=name) for name in ("a", "b", "c")}

    def hold(*filled: str) -> None:
        known = {study.study_name: study._study_id for study in open_journal(tmp_path).get_all_studies()}
        for name in at:
            told = name in known and open_journal(tmp_path).get_n_trials(known[name]) > 0
            assert journal_has_trial(tmp_path, name) == told == (name in filled)

    hold()
    at["b"].enqueue_trial({"x": 1})
    hold("b")
    storage.delete_study(at["b"]._study_id)
    hold()
    optuna.create_study(storage=storage, study_name="b")
    hold()
    at["c"].enqueue_trial({"x": 1})
    hold("c")
    optuna.load_study(study_name="b", storage=storage).enqueue_trial({"x": 1})
    hold("b", "c")


@pytest.mark.parametrize("torn", [b'{"op_code":4,"stu', b"\0\0\0\n\0\0\n", b"[]\n"])
def test_a_torn_record_is_no_trial(tmp_path: Path, torn: bytes) -> None:
    """Nor does it stop one who asks before the journal is repaired."""
    storage = open_journal(tmp_path)
    study = optuna.create_study(storage=storage, study_name="a")
    for filled in (False, True):
        whole = (tmp_path / JOURNAL).read_bytes()
        (tmp_path / JOURNAL).write_bytes(whole + torn)
        assert journal_has_trial(tmp_path, "a") == filled
        (tmp_path / JOURNAL).write_bytes(whole)
        study.enqueue_trial({"x": 1})


def test_the_end_of_a_trial_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    before, calls = lines(tmp_path), []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(descriptor), fsync(descriptor)))
    study.complete(planned, score_of(planned.allocation))
    assert len(calls) == 1
    assert len(lines(tmp_path)) == len(before) + 2


def test_a_torn_end_leaves_the_result_or_nothing(tmp_path: Path) -> None:
    """Whatever byte the write stopped at: never a final state without its result."""
    study = open_study(tmp_path)
    planned = study.propose("random")
    before = lines(tmp_path)
    study.complete(planned, score_of(planned.allocation))
    content = (tmp_path / JOURNAL).read_bytes()
    result, state = lines(tmp_path)[len(before) :]
    for torn in (1, len(state), len(state) + 1, len(state) + len(result) - 1):
        (tmp_path / JOURNAL).write_bytes(content[:-torn])
        repair(tmp_path / JOURNAL)
        again = open_study(tmp_path)
        assert [row.state for row in again.rows()] == ["RUNNING"]
        assert (again.in_flight() == [planned]) == (torn > len(state))
        assert again.replay() == ([0] if torn <= len(state) else [])


def test_both_writes_to_a_trial_that_another_program_ended_are_refused(tmp_path: Path) -> None:
    """And what is written later is not taken for them."""
    study = open_study(tmp_path)
    planned, other = study.propose("random"), study.propose("random")
    plain(tmp_path).tell(0, [0.5, 3.0])
    with pytest.raises(TakenError):
        study.complete(planned, score_of(planned.allocation))
    study.complete(other, score_of(other.allocation))
    states = [trial.state for trial in as_optuna_reads(tmp_path)]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE]
    assert as_optuna_reads(tmp_path)[0].values == [0.5, 3.0]
    assert [row.values for row in study.rows()] == [(0.5, 3.0), study.rows()[1].values]
