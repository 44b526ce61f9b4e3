"""`rankfront sensitivity` on a tiny model: killed, resumed, compared with scores by hand, searched after.

The search begins with all that a search can begin with: references, seeds of both kinds, a warm start.

One study lives through the module. Each step is a fixture; the tests look at what it left.
"""

from __future__ import annotations

import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from studies import PATIENCE_SECONDS, Ended, Study, calibration_windows, search_windows

from actors.types import Allocation
from search.alone import Log
from search.folder import StudyFolder
from search.seeds import ladder, measured, predicted

# So many that the first run is killed long before its end.
SHARES = tuple(number / 20 for number in range(19, 3, -1))
TARGETS = 3 * 7
FILES = ("sensitivity.parquet", "sensitivity.html", "sensitivity.png")
SPECTRA, MEASURED = (0.8, 0.6), (0.9, 0.7, 0.5)
WARM = ({"model.layers.0.mlp.up_proj": 9}, {"model.layers.2.mlp.down_proj": 7})
ENQUEUED = ["dense", *["uniform"] * 2, *["seed"] * (len(SPECTRA) + len(MEASURED)), *["warm"] * len(WARM)]


def records(study: Study) -> list[dict[str, Any]]:
    """The whole lines on disk."""
    path = study.folder / "sensitivity.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Study:
    root = tmp_path_factory.mktemp("sensitivity")
    (root / "warm.yaml").write_text(yaml.safe_dump(list(WARM)))
    return Study(
        root,
        "alone",
        cluster,
        factors={"method": "feature", "bias": "mean"},
        space={"methods": ["feature", "curvature"]},  # the latter needs gradients, and so do predicted losses
        storage="pivoted",
        sensitivity={"shares": list(SHARES)},
        seeds={"spectra": list(SPECTRA), "sensitivity": list(MEASURED)},
        warm_start={"sources": [str(root / "warm.yaml")]},
        stop={"trials": len(ENQUEUED) + 1},
    )


@pytest.fixture(scope="module")
def killed(study: Study) -> list[dict[str, Any]]:
    """What is on disk after kill -9 in the middle of the first run."""
    driver = study.start("sensitivity", study.config)
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while len(records(study)) < 5:
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline, "the scores do not come on"
            time.sleep(0.02)
    finally:
        driver.kill()  # SIGKILL
        driver.communicate()
    return records(study)


@dataclass(frozen=True)
class Resumed:
    ended: Ended
    records: list[dict[str, Any]]
    files: dict[str, bytes]

    @property
    def table(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(self.files["sensitivity.parquet"])).to_pylist()
        return rows


@pytest.fixture(scope="module")
def resumed(study: Study, killed: list[dict[str, Any]]) -> Resumed:
    ended = study.run("sensitivity", study.config)
    assert ended.code == 0, ended.err
    return Resumed(ended, records(study), study.content())


@pytest.fixture(scope="module")
def searched(study: Study, resumed: Resumed) -> Ended:
    return study.run("search", study.config, "--set", "space.levels=9")


def test_a_killed_run_loses_nothing_and_repeats_nothing(
    killed: list[dict[str, Any]], resumed: Resumed
) -> None:
    assert resumed.records[: len(killed)] == killed
    keys = [record["allocation"] for record in resumed.records]
    assert len(set(keys)) == len(keys) > len(killed)
    assert (killed[0]["target"], killed[0]["rank"]) == (None, None), "the dense model comes first"
    assert f"{len(killed)} known" in resumed.ended.out


def test_every_target_is_there_at_every_share(resumed: Resumed) -> None:
    table = resumed.table
    assert len(table) == TARGETS * len(SHARES)
    assert len({(row["target"], row["share"]) for row in table}) == len(table)
    assert all(math.isfinite(row["nll_increase"]) and row["reason"] is None for row in table)
    for row in table:
        assert row["stored_parameters"] <= row["share"] * row["parameters"]
        assert 0 < row["energy_kept"] <= 1
        assert 1 <= row["rank_99"] <= min(row["rows"], row["cols"])
    assert len({row["nll"] for row in table}) > TARGETS, "ranks change the loss"


def test_the_run_says_what_it_found_and_where(study: Study, resumed: Resumed) -> None:
    assert set(FILES) <= set(resumed.files)
    assert resumed.files["sensitivity.png"].startswith(b"\x89PNG")
    for part in ("Lose least", "Lose most", "By module type", str(study.folder), *FILES):
        assert part in resumed.ended.out
    assert "Traceback" not in resumed.ended.err


@dataclass(frozen=True)
class ByHand:
    """Dense loss and that of one target alone, nats/token; share of the energy kept; rank of 99% of it."""

    dense: float
    alone: float
    kept: float
    rank_99: int


def by_hand(study: Study, name: str, rank: int) -> ByHand:
    """Float64, by the definition: W_r = V V^T W, V the top eigenvectors of cov(y); the mean in the bias."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(study.root / "model").double().eval()
    layer = model.get_submodule(name)
    seen: list[torch.Tensor] = []
    ids = torch.tensor(search_windows(study))

    def loss() -> float:
        logits = model(ids).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    with torch.no_grad():
        dense = loss()
        hook = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, 1)))
        model(torch.tensor(calibration_windows(study)))
        hook.remove()
        x, weight = torch.cat(seen), layer.weight.clone()
        y = (x - x.mean(0)) @ weight.T
        values, vectors = torch.linalg.eigh(y.T @ y / len(y))
        top = vectors[:, -rank:]
        kept = top @ top.T @ weight
        layer.weight.copy_(kept)
        layer.bias = torch.nn.Parameter((weight - kept) @ x.mean(0))
        energy = values.flip(0).clamp_min(0)
        shares = energy.cumsum(0) / energy.sum()
        rank_99 = 1 + int((shares < 0.99).sum())
        return ByHand(dense, loss(), float(shares[rank - 1]), rank_99)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("model.layers.0.self_attn.q_proj", 0.5),
        ("model.layers.1.mlp.up_proj", 0.75),
        ("model.layers.2.mlp.down_proj", 0.3),
        ("model.layers.2.self_attn.k_proj", 0.2),
    ],
)
def test_a_cell_is_the_loss_computed_by_hand(study: Study, resumed: Resumed, name: str, share: float) -> None:
    [row] = [row for row in resumed.table if (row["target"], row["share"]) == (name, share)]
    expected = by_hand(study, name, row["rank"])
    assert abs(expected.alone - expected.dense) > 1e-2, "a rank that changes nothing shows nothing"
    assert row["nll"] == pytest.approx(expected.alone, abs=1e-4)
    assert row["nll_increase"] == pytest.approx(expected.alone - expected.dense, abs=1e-4)
    assert row["energy_kept"] == pytest.approx(expected.kept, abs=1e-6)
    assert row["rank_99"] == expected.rank_99


def test_a_search_begins_in_the_same_folder(study: Study, resumed: Resumed, searched: Ended) -> None:
    """With a space of its own: what was scored alone binds nothing of the search."""
    assert searched.code == 0, searched.err
    assert "factor store: reused" in searched.out
    assert {trial.state.name for trial in searched.trials} == {"COMPLETE"}
    [dense] = [record for record in resumed.records if record["target"] is None]
    text = dense["score"]["text"]
    assert searched.trials[0].values[1] == pytest.approx(text["nats"] / text["tokens"], abs=1e-6)
    after = study.content()
    assert {name: after[name] == resumed.files[name] for name in FILES} == dict.fromkeys(FILES, True)


def test_a_search_begins_with_references_then_seeds_then_the_warm_start(
    study: Study, resumed: Resumed, searched: Ended
) -> None:
    """In that order, each once, as they are worked out from the folder; then the sampler proposes."""
    folder = StudyFolder.open(study.folder)
    cost, floor = folder.cost, folder.config.space.floor
    log = Log(folder.path, folder.prepared.fingerprints)
    by_spectra = predicted(cost, floor, folder.config.factor_spec, folder.factor_store)
    expected = [
        Allocation.dense(cost.targets),
        *map(cost.uniform, (0.8, 0.5)),
        *ladder(cost, by_spectra, SPECTRA),
        *ladder(cost, measured(cost, floor, SHARES, log), MEASURED),
        *(Allocation.of(ranks, cost.targets) for ranks in WARM),
    ]
    *enqueued, proposed = folder.read_study().rows()
    assert [row.allocation for row in enqueued] == expected
    assert [row.origin for row in enqueued] == ENQUEUED
    assert proposed.origin == "exchange"
    assert "warm start: 2 allocations of " in searched.out


def test_beside_a_study_nothing_is_scored_twice(study: Study, resumed: Resumed, searched: Ended) -> None:
    before = study.content()
    refused = study.here("sensitivity", study.config, "--set", "space.levels=5")
    assert refused.code == 2
    assert "space.levels: was 9, now 5" in refused.err
    assert study.content() == before
    again = study.run("sensitivity", study.config, "--set", "space.levels=9")
    assert again.code == 0, again.err
    assert "sensitivity: 0 of" in again.out
    assert records(study) == resumed.records
    assert again.trials == searched.trials


def test_a_folder_of_targets_alone_has_a_report_of_no_trial(
    study: Study, resumed: Resumed, tmp_path: Path
) -> None:
    """`rankfront report` on a folder without a journal, whose tables list no trial, says nothing wrong."""
    import shutil

    copy = tmp_path / "runs" / "alone"
    shutil.copytree(study.folder, copy)
    for name in ("study.journal", "trials.parquet", "evaluations.jsonl"):
        (copy / name).unlink(missing_ok=True)
    assert study.here("report", copy).code == 0
    assert json.loads((copy / "front.json").read_text())["front"] == []
