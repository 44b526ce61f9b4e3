"""optuna-dashboard on a study that is being searched: it needs nothing of ours to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna_dashboard
from fakes import TARGETS, open_study, propose_and_complete, score_of
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from actors.types import Allocation
from search.journal import JOURNAL
from search.packing import PLAN


def ask(application: Any, path: str) -> Any:
    """The JSON of a GET, by the application itself: no server, no port."""
    environment: dict[str, Any] = {}
    setup_testing_defaults(environment)
    environment |= {"PATH_INFO": path, "QUERY_STRING": "", "REQUEST_METHOD": "GET"}
    status: list[str] = []
    body = b"".join(application(environment, lambda line, headers, error=None: status.append(line)))
    assert status == ["200 OK"], body
    return json.loads(body)


def test_it_shows_a_study_as_it_is_searched(tmp_path: Path) -> None:
    study = open_study(tmp_path, "nsga2")
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    propose_and_complete(study, 3)
    study.fail(study.propose("nsga2").number, "nll is nan")
    flying = study.propose("nsga2")
    storage = JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL)))
    application = optuna_dashboard.wsgi(storage)
    [listed] = ask(application, "/api/studies")["study_summaries"]
    assert listed["study_name"] == "made-up"
    assert listed["directions"] == ["minimize", "minimize"]
    path = f"/api/studies/{listed['study_id']}"
    shown = ask(application, path)
    assert [trial["state"] for trial in shown["trials"]] == [*["Complete"] * 3, "Fail", "Running"]
    assert shown["objective_names"] == ["budget.model", "nll"]
    for row, trial in zip(study.rows(), shown["trials"], strict=True):
        assert tuple(trial.get("values", ())) == (row.values or ())
        levels = {each["name"]: each["param_internal_value"] for each in trial["params"]}
        assert levels == study.frozen()[row.number].params
        kept = {each["key"]: each["value"] for each in trial["user_attrs"]}
        assert row.origin in kept[PLAN]
    assert {trial["number"] for trial in shown["best_trials"]} == {row.number for row in study.front}

    study.complete(flying, score_of(flying.allocation))
    propose_and_complete(study, 1)
    again = ask(optuna_dashboard.wsgi(storage), path)  # one keeps what it read for some seconds
    assert [trial["state"] for trial in again["trials"]] == [*["Complete"] * 3, "Fail", *["Complete"] * 2]
    assert tuple(again["trials"][4]["values"]) == study.rows()[4].values
