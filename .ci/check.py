"""Check what a search left behind: `check.py FOLDER TRIALS`."""

import json
import sys
from pathlib import Path

import optuna
import pyarrow.parquet as parquet
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

folder, count = Path(sys.argv[1]), int(sys.argv[2])
for name in ("config.yaml", "prepared.json", "front.json", "front.png", "report.html"):
    assert (folder / name).stat().st_size > 500, name

storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
trials = optuna.load_study(study_name=folder.name, storage=storage).trials
assert [trial.number for trial in trials] == list(range(count)), "trial numbers"
assert all(trial.state.name == "COMPLETE" for trial in trials), [trial.state.name for trial in trials]

rows = parquet.read_table(folder / "trials.parquet").to_pylist()
assert len(rows) == count
dense = rows[0]
assert dense["origin"] == "dense"
assert dense["value.budget.model"] == 1.0
assert 2.5 < dense["value.nll"] < 4.0, dense["value.nll"]
uniform = [row for row in rows if row["origin"] == "uniform"]
assert len(uniform) == 5
kept, losses = zip(*sorted((row["value.budget.model"], row["value.nll"]) for row in uniform), strict=True)
assert list(losses) == sorted(losses, reverse=True), (kept, losses)

seeds = [row for row in rows if row["origin"] == "seed"]
assert len(seeds) == 5
for seed in seeds:  # of about the same size, its ranks must do better than equal shares
    near = min(uniform, key=lambda row: abs(row["value.budget.model"] - seed["value.budget.model"]))
    assert seed["value.nll"] < near["value.nll"], (seed["value.nll"], near["value.nll"])

front = json.loads((folder / "front.json").read_text())
tested = {row["trial"] for row in parquet.read_table(folder / "evaluations.parquet").to_pylist()}
members = {member["trial"] for member in front["front"]}
assert members, "the front is empty"
assert members <= tested, "a front point has no test score"
print(f"{folder}: {count} trials, {len(members)} on the front, all with test scores")
