"""The command line on a tiny model, a real Ray and a real journal: search, kill, resume, export.

One study lives through the whole module: searched to eight trials, given ranks by hand, killed with
`kill -9`, resumed to its end. Each step is a fixture; the tests look at what it left. Commands that need
no worker run in this process, all others in their own.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState
from studies import PATIENCE_SECONDS, Ended, Study, complete, search_windows

from actors.types import Prepared

BY_HAND = {"model.layers.0.self_attn.q_proj": 5, "model.layers.2.mlp.down_proj": 11}
FILES = (
    "study.journal", "config.yaml", "prepared.json", "trials.parquet", "evaluations.parquet", "front.json",
    "front.png", "report.html",
)  # fmt: skip


def origin(trial: FrozenTrial) -> str:
    return str(trial.user_attrs["rankfront.plan"]["origin"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end-to-end")


@pytest.fixture(scope="module")
def study(root: Path) -> Study:
    return Study(root, "tiny", address=None, sampler={"name": "exchange"})


@pytest.fixture(scope="module")
def first(study: Study) -> Ended:
    """Eight trials on a Ray of the command's own."""
    return study.run("search", study.config)


@pytest.fixture(scope="module")
def first_files(study: Study, first: Ended) -> dict[str, bytes]:
    return study.content()


@dataclass(frozen=True)
class Killed:
    trials: list[FrozenTrial]
    second_driver: Ended
    while_driven: Ended
    gone: Ended


@pytest.fixture(scope="module")
def killed(study: Study, first_files: dict[str, bytes], cluster: str) -> Killed:
    """Ranks by hand enqueued; the search continued, a second driver tried, then kill -9."""
    study.address = cluster
    (study.root / "mine.yaml").write_text(yaml.safe_dump({"ranks": BY_HAND}))
    assert study.here("enqueue", "tiny", "mine.yaml").code == 0
    driver = study.start("search", study.config, "--trials", 10_000)
    try:
        study.wait_for(driver, 12)
        second = study.here("search", study.config)
        status = study.here("status", "tiny", "--json")
        assert driver.poll() is None
    finally:
        driver.kill()  # SIGKILL
        driver.communicate()
    return Killed(study.trials(), second, status, study.here("status", "tiny"))


@dataclass(frozen=True)
class SideBySide:
    resumed: Ended
    interrupted: Ended


@pytest.fixture(scope="module")
def side_by_side(study: Study, killed: Killed, root: Path, cluster: str) -> SideBySide:
    """Two drivers of two studies on one cluster.

    The killed search again, with an end this time; and three objectives, plain SVD, NSGA-II, ended by Ctrl-C.
    """
    three = Study(
        root,
        "three",
        cluster,
        objectives=["budget.model", "nll", "reasoning.acc"],
        factors={"method": "weight", "bias": "none"},
        sampler={"name": "nsga2", "population": 4},
        stop={"trials": 10_000},
    )
    again = study.start("search", study.config, "--trials", len(killed.trials) + 4)
    other = three.start("search", three.config)
    try:
        three.wait_for(other, 9)
        other.send_signal(signal.SIGINT)
        return SideBySide(interrupted=three.end(other), resumed=study.end(again))
    finally:
        again.kill()
        other.kill()


@pytest.fixture(scope="module")
def resumed(side_by_side: SideBySide) -> Ended:
    return side_by_side.resumed


@pytest.fixture(scope="module")
def interrupted(side_by_side: SideBySide) -> Ended:
    return side_by_side.interrupted


# -- a search from nothing --------------------------------------------------------------------


def test_a_search_scores_its_trials(first: Ended) -> None:
    assert first.code == 0, first.err
    assert [trial.state.name for trial in first.trials] == ["COMPLETE"] * 8
    assert [origin(trial) for trial in first.trials] == ["dense", *["uniform"] * 2, *["exchange"] * 5]
    assert first.trials[0].values[0] == 1.0
    assert all(math.isfinite(value) for trial in first.trials for value in trial.values)
    assert len({trial.values[1] for trial in first.trials}) > 5, "ranks change the loss"


def test_a_search_says_what_it_did_and_what_is_next(study: Study, first: Ended) -> None:
    assert "Stopped: 8 trials. 8 trials scored" in first.out
    assert str(study.folder) in first.out
    assert f"search {study.config} --trials 48" in first.out
    assert f"export {study.folder} --budget 0.9" in first.out
    assert "Traceback" not in first.err


def test_the_folder_holds_the_study(first_files: dict[str, bytes]) -> None:
    assert set(FILES) <= set(first_files)
    assert first_files["front.png"].startswith(b"\x89PNG")
    assert not [name for name in first_files if name.endswith(".tmp")]


def test_the_front_is_strict_json_and_not_dominated(first: Ended, first_files: dict[str, bytes]) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    front = json.loads(first_files["front.json"], parse_constant=refuse)
    points = {trial.number: trial.values for trial in first.trials}
    best = {
        number
        for number, (budget, nll) in points.items()
        if not any((b <= budget and n < nll) or (b < budget and n <= nll) for b, n in points.values())
    }
    assert {member["trial"] for member in front["front"]} == best
    for member in front["front"]:
        assert list(member["values"].values()) == points[member["trial"]]
        assert member["search"]["tokens"] == 4 * 31, "four windows of 32 tokens predict 31 each"
        assert 0 <= member["search"]["reasoning.acc"] <= 1
        assert member["test"]["nll"] > 0
        assert member["test"]["nll"] != member["search"]["nll"]


def test_tables_hold_every_trial_and_the_test_scores(first: Ended, first_files: dict[str, bytes]) -> None:
    rows = pq.read_table(io.BytesIO(first_files["trials.parquet"])).to_pylist()
    assert [row["number"] for row in rows] == list(range(8))
    assert [row["search.nll"] for row in rows] == [trial.values[1] for trial in first.trials]
    assert all(row["search.reasoning.arc_easy.acc"] is not None for row in rows)
    evaluations = pq.read_table(io.BytesIO(first_files["evaluations.parquet"])).to_pylist()
    front = json.loads(first_files["front.json"])["front"]
    assert {row["trial"] for row in evaluations} == {0, *(member["trial"] for member in front)}
    assert {row["split"] for row in evaluations} == {"test"}


def test_no_process_is_left(first: Ended, root: Path) -> None:
    """A Ray of the command's own ends with it."""
    left = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = status.read_bytes().split(b"\0")
            if str(root).encode() in b" ".join(words):
                left.append(words)
    assert left == []


# -- killed and resumed -----------------------------------------------------------------------


def test_a_second_driver_is_refused_while_one_runs(killed: Killed) -> None:
    assert killed.second_driver.code == 2
    assert "has a driver already: process" in killed.second_driver.err
    assert "Traceback" not in killed.second_driver.err


def test_a_search_is_seen_while_it_runs_and_after_it_was_killed(
    study: Study, killed: Killed, resumed: Ended
) -> None:
    status = json.loads(killed.while_driven.out)
    assert status["driver"].startswith("process ")
    assert status["trials"]["COMPLETE"] >= 12
    assert status["tokens_per_second"] > 0
    assert {replica["name"] for replica in status["replicas"]} >= {"replica-0"}
    assert all(replica["starts"] == 1 for replica in status["replicas"])
    assert "driver gone" in killed.gone.out
    events = [json.loads(line) for line in (study.folder / "log.jsonl").read_text().splitlines()]
    runs = [line["event"] for line in events if line["event"] in ("started", "resumed", "stopped")]
    assert runs == ["started", "stopped", "resumed", "resumed", "stopped"], "the killed one could not say so"
    ended = {line["trial"] for line in events if line["event"] in ("finished", "copied")}
    unsaid = {trial.number for trial in complete(study.trials())} - ended
    assert len(unsaid) <= 1, "recorded when the driver was killed, not yet said"


def test_continuing_leaves_finished_trials_alone(first: Ended, killed: Killed) -> None:
    assert killed.trials[:8] == first.trials


def test_ranks_by_hand_are_scored_as_they_are(study: Study, killed: Killed) -> None:
    trial = killed.trials[8]
    assert origin(trial) == "enqueued"
    assert trial.state == TrialState.COMPLETE
    prepared = Prepared.from_dict(json.loads((study.folder / "prepared.json").read_text()))
    names = [target.name for target in prepared.targets]
    ranks = dict(zip(names, trial.user_attrs["rankfront.plan"]["ranks"], strict=True))
    assert {name: rank for name, rank in ranks.items() if rank is not None} == BY_HAND
    # q_proj is 32 x 32, factored, and down_proj 32 x 64, pivoted, each with a bias of 32 from the mean.
    saved = 32 * 32 - (5 * 64 + 32) + 32 * 64 - (11 * (96 - 11) + 32)
    assert trial.values[0] == pytest.approx(1 - saved / prepared.model_parameters, abs=1e-12)
    assert trial.values[1] != killed.trials[0].values[1]


def test_enqueue_lists_every_mistake(study: Study, resumed: Ended) -> None:
    (study.root / "bad.yaml").write_text(yaml.safe_dump({"model.nothing": 3, next(iter(BY_HAND)): 999}))
    refused = study.here("enqueue", "tiny", "bad.yaml")
    assert refused.code == 2
    assert "'model.nothing' is no target" in refused.err
    assert "rank 999 is not an integer in 1..32" in refused.err
    assert len(refused.trials) == len(resumed.trials)


def test_a_killed_search_loses_nothing_and_repeats_nothing(killed: Killed, resumed: Ended) -> None:
    assert resumed.code == 0, resumed.err
    flying = [trial for trial in killed.trials if trial.state == TrialState.RUNNING]
    assert flying, "the driver was killed with a trial in flight"
    for before, after in zip(killed.trials, resumed.trials, strict=False):
        if before.state == TrialState.COMPLETE:
            assert after == before
        else:
            assert after.state == TrialState.COMPLETE
            assert (after.number, after.params) == (before.number, before.params)
            assert after.user_attrs["rankfront.plan"] == before.user_attrs["rankfront.plan"]
    assert [trial.number for trial in resumed.trials] == list(range(len(killed.trials) + 4))
    assert {trial.state for trial in resumed.trials} == {TrialState.COMPLETE}


def test_the_restart_does_not_repeat_the_first_proposals(killed: Killed, resumed: Ended) -> None:
    first = {tuple(sorted(trial.params.items())) for trial in killed.trials[:8]}
    after = {tuple(sorted(trial.params.items())) for trial in resumed.trials[len(killed.trials) :]}
    assert first & after == set()


def test_the_factors_are_decomposed_once(first: Ended, resumed: Ended, root: Path) -> None:
    assert "factor store: built" in first.out
    assert "factor store: reused" in resumed.out
    manifests = [json.loads(path.read_text()) for path in root.glob("runs/factors/*/manifest.json")]
    methods = [made["methods"]["model.layers.0.mlp.up_proj"] for made in manifests]
    assert methods.count(["curvature"]) == 1


def test_the_new_front_has_test_scores_too(study: Study, resumed: Ended) -> None:
    front = json.loads((study.folder / "front.json").read_text())["front"]
    assert front
    assert all(member["test"]["nll"] > 0 for member in front)


# -- export and report ------------------------------------------------------------------------

RELOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.stdin.read()))
assert "actors" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.inference_mode():
    logits = model(ids).logits.double()[:, :-1]
losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
print(json.dumps([losses.item(), sum(p.numel() for p in model.parameters())]))
"""


def test_an_export_is_the_recorded_model(study: Study, resumed: Ended, root: Path) -> None:
    """Loaded by transformers alone, in a process and a folder that know nothing of rankfront."""
    exported = study.here("export", "tiny", "--budget", "0.9", "--to", root / "exported")
    assert exported.code == 0, exported.err
    description = yaml.safe_load((root / "exported" / "ranks.yaml").read_text())
    trial = resumed.trials[description["trial"]]
    front = json.loads((study.folder / "front.json").read_text())["front"]
    allowed = [member for member in front if member["budget_model"] <= 0.9]
    assert description["trial"] == min(allowed, key=lambda member: member["search"]["nll"])["trial"]
    ids = search_windows(study)
    away = root / "away"
    away.mkdir()
    loaded = subprocess.run(
        [sys.executable, "-c", RELOAD, str(root / "exported")],
        input=json.dumps(ids),
        cwd=away,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(away)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert loaded.returncode == 0, loaded.stderr
    nll, parameters = json.loads(loaded.stdout.splitlines()[-1])
    assert nll == pytest.approx(trial.values[1], abs=1e-4)
    prepared = json.loads((study.folder / "prepared.json").read_text())
    assert parameters / prepared["model_parameters"] == pytest.approx(trial.values[0], abs=1e-12)


def test_report_writes_its_files_anew(study: Study, resumed: Ended) -> None:
    before = study.content()
    for name in ("trials.parquet", "front.json", "front.png", "report.html"):
        (study.folder / name).unlink()
    again = study.here("report", study.folder)
    assert again.code == 0, again.err
    after = study.content()
    assert set(after) == set(before)
    same = ("study.journal", "config.yaml", "prepared.json", "evaluations.jsonl", "front.json")
    assert {name: after[name] == before[name] for name in same} == dict.fromkeys(same, True)
    assert "on the front" in again.out


# -- three objectives -------------------------------------------------------------------------


def test_three_objectives_with_reasoning(interrupted: Ended, root: Path) -> None:
    done = complete(interrupted.trials)
    assert len(done) >= 9
    assert len(done[0].values) == 3
    for trial in done:
        tasks = trial.user_attrs["rankfront.result"]["score"]["tasks"]
        assert trial.values[2] == pytest.approx((tasks["arc_easy"]["acc"] + tasks["piqa"]["acc"]) / 2)
    front = json.loads((root / "runs" / "three" / "front.json").read_text())
    assert [objective["minimize"] for objective in front["objectives"]] == [True, True, False]
    assert front["hypervolume"] > 0


def test_interrupt_stops_and_says_how_to_go_on(interrupted: Ended, root: Path) -> None:
    """The exit code of SIGTERM is looked at in tests/search/test_cli.py."""
    assert interrupted.code == 130
    assert "SIGINT: stopping" in interrupted.out
    assert "Stopped: SIGINT" in interrupted.out
    assert f"search {root / 'three.yaml'}   # goes on where it stopped" in interrupted.out
    assert "in flight" in interrupted.out
    assert "Traceback" not in interrupted.err
    assert {trial.state for trial in interrupted.trials} <= {TrialState.COMPLETE, TrialState.RUNNING}
    files = {path.name for path in (root / "runs" / "three").iterdir()}
    assert set(FILES) - {"evaluations.parquet"} <= files


def test_dense_scores_are_the_same_in_every_study(first: Ended, interrupted: Ended) -> None:
    """Another method, another sampler, another Ray: the dense model is the dense model."""
    assert interrupted.trials[0].values[:2] == pytest.approx(first.trials[0].values, abs=1e-6)
