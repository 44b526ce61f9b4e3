"""Warm starts: what sources give in this study's own terms, and what is said of those that give nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from fakes import TARGETS, cost_model, open_study, propose_and_complete, score_of, space_of, stored

from actors.types import Allocation, Prepared, RankfrontError, TargetSpec
from search.begun import write_identity
from search.config import Config, parse_config
from search.constraints import Constraint
from search.folder import CONFIG, PREPARED
from search.packing import PLAN, RESULT, result_of
from search.pareto import front, hypervolume
from search.study import SearchStudy
from search.warm import ORIGIN, check_sources, warm_allocations

COST = cost_model()
HUB = {"model": {"source": "org/model"}, "text": {"source": "org/text"}}


def prepared(targets: tuple[TargetSpec, ...] = TARGETS) -> Prepared:
    return Prepared("", "", targets, 10**9, {}, {}, {}, {}, reused=True)


def source(folder: Path, factors: dict[str, Any] | None = None, **study: Any) -> SearchStudy:
    """Another study in its folder, as a driver leaves it."""
    folder.mkdir(parents=True)
    raw = {"study": "made-up", **HUB, "text": {"source": "/gone"}, "factors": factors or {}}
    (folder / CONFIG).write_text(yaml.safe_dump(raw))
    (folder / PREPARED).write_text(json.dumps(prepared().to_dict()))
    return open_study(folder, levels=40, **study)


def config_of(tmp_path: Path, *sources: object, limit: int = 16, **sections: Any) -> Config:
    warm = {"sources": [str(name) for name in sources], "limit": limit}
    runs = str(tmp_path / "runs")
    return parse_config({"study": "ours", "runs": runs, **HUB, "warm_start": warm, **sections})


def given(config: Config, said: list[str] | None = None) -> list[Allocation]:
    check_sources(config)
    found = warm_allocations(config, TARGETS, None, (said if said is not None else []).append)
    assert {origin for _, origin in found} <= {ORIGIN}
    return [allocation for allocation, _ in found]


def members(study: SearchStudy) -> list[Allocation]:
    """The compressed front, by falling budget."""
    rows = [row for row in study.rows() if row.values is not None and row.feasible]
    chosen = [rows[index] for index in front([row.values for row in rows])]
    chosen.sort(key=lambda row: -row.budget_model)
    return [row.allocation for row in chosen if not row.allocation.is_dense]


def by_size(allocations: list[Allocation]) -> list[Allocation]:
    return sorted(allocations, key=COST.linear, reverse=True)


@pytest.mark.parametrize("named", ["path", "name"])
def test_the_front_of_a_study_is_taken(tmp_path: Path, named: str) -> None:
    """Not the dense model, not what is dominated, fails or violates a constraint, not what still runs."""
    other = source(tmp_path / "runs" / "theirs", constraints=(Constraint("budget.model", 0.9),))
    other.enqueue([(other.dense, "dense"), (COST.uniform(0.95), "uniform")])
    propose_and_complete(other, 30)
    other.fail(other.propose("random").number, "broken")
    other.propose("random")
    expected = members(other)
    assert 3 < len(expected) < 30
    assert COST.uniform(0.95) not in expected
    said: list[str] = []
    name = tmp_path / "runs" / "theirs" if named == "path" else "theirs"
    found = given(config_of(tmp_path, name, limit=30), said)
    assert by_size(found) == expected
    assert said[0].startswith(f"warm start: {len(expected)} allocations of ")


def test_at_most_the_limit_those_that_add_most_hypervolume(tmp_path: Path) -> None:
    other = source(tmp_path / "theirs")
    other.enqueue((COST.uniform(share), "uniform") for share in np.linspace(0.3, 0.95, 14))
    propose_and_complete(other, 14)
    rows = other.rows()
    points = np.array([row.values for row in rows])
    reference = points.max(axis=0) + 0.1 * (points.max(axis=0) - points.min(axis=0))
    others = [np.delete(points, index, axis=0) for index in range(14)]
    added = [hypervolume(points, reference) - hypervolume(rest, reference) for rest in others]
    order = sorted(range(14), key=lambda index: -added[index])
    config = config_of(tmp_path, tmp_path / "theirs", limit=5)
    assert given(config) == [rows[index].allocation for index in order[:5]]


def test_an_unfinished_study_gives_nothing(tmp_path: Path) -> None:
    source(tmp_path / "theirs").propose("random")
    assert given(config_of(tmp_path, tmp_path / "theirs")) == []


def test_files_give_all_they_list(tmp_path: Path) -> None:
    """A configuration alone, a list, JSON lines; a method that this study has no factors of is let go of."""
    ranks = {"layers.0.q_proj": 3, "layers.1.up_proj": 7, "layers.2.q_proj": None}
    alone = {"format": "rankfront-allocation-1", "ranks": ranks, "factors": {"method": "feature"}}
    alone["methods"] = {"layers.1.up_proj": "weight"}
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump(alone))
    (tmp_path / "list.json").write_text(json.dumps([{"layers.0.q_proj": 1}, {"layers.0.q_proj": 2}]))
    lines = [{"layers.3.q_proj": rank} for rank in (4, 5, 6)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    names = [tmp_path / name for name in ("ranks.yaml", "list.json", "lines.jsonl")]
    said: list[str] = []
    found = given(config_of(tmp_path, *names, limit=1), said)
    assert found[0] == Allocation.of(ranks, TARGETS)
    assert found[1:] == [
        Allocation.of(line, TARGETS) for line in ({"layers.0.q_proj": 1}, {"layers.0.q_proj": 2}, *lines)
    ]
    assert said[0].endswith(
        "; 2 targets are cut by other methods than there, which this study has no factors of"
    )
    chosen = config_of(
        tmp_path, *names, space={"methods": ["feature", "curvature"]}, factors={"method": "curvature"}
    )
    assert given(chosen)[0] == Allocation.of(ranks, TARGETS, methods={"layers.0.q_proj": "feature"})


def test_a_member_keeps_the_method_it_was_cut_by(tmp_path: Path) -> None:
    """Theirs is by feature but for one target; here curvature goes without saying."""
    other = source(tmp_path / "theirs", factors={"method": "feature", "methods": {"*.0.*": "curvature"}})
    theirs = Allocation.of({"layers.0.q_proj": 3, "layers.1.q_proj": 4}, TARGETS)
    other.enqueue([(theirs, "enqueued")])
    propose_and_complete(other, 1)
    config = config_of(tmp_path, tmp_path / "theirs", space={"methods": ["feature", "curvature"]})
    [found] = given(config)
    assert found == Allocation.of(theirs.to_dict(), TARGETS, methods={"layers.1.q_proj": "feature"})


def test_true_ranks_are_enqueued_and_the_nearest_levels_told(tmp_path: Path) -> None:
    other = source(tmp_path / "theirs")
    propose_and_complete(other, 12)
    (tmp_path / "ours").mkdir()
    ours = open_study(tmp_path / "ours", "nsga2")
    found = given(config_of(tmp_path, tmp_path / "theirs"))
    ours.enqueue((allocation, ORIGIN) for allocation in found)
    assert ours.enqueue((allocation, ORIGIN) for allocation in found) == [], "a resumed search adds none"
    proposed = propose_and_complete(ours, len(found))
    assert [planned.allocation for planned in proposed] == found
    assert [row.origin for row in ours.rows()] == [ORIGIN] * len(found)
    space = space_of(COST)
    assert [trial.params for trial in stored(tmp_path / "ours")] == [space.params(each) for each in found]
    assert any(space.allocation(space.params(each)) != each for each in found)


def test_a_study_of_the_same_database_is_found_by_its_name(tmp_path: Path) -> None:
    """Another machine has its folder."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    storage = optuna.storages.RDBStorage(url)
    theirs = parse_config({"study": "theirs", "runs": str(tmp_path / "elsewhere"), **HUB})
    write_identity(storage, theirs, prepared())
    other = optuna.load_study(study_name="theirs", storage=storage)
    score, ranks = score_of(COST.uniform(0.8)), [rank for _, rank in COST.uniform(0.8)]
    plan = {PLAN: {"origin": "tpe", "ranks": ranks}}
    other.add_trial(optuna.trial.create_trial(values=[0.1, -math.inf], user_attrs=plan))  # no score of ours
    kept = {**plan, RESULT: result_of(score)}
    other.add_trial(optuna.trial.create_trial(values=[0.8, score.text.nll], user_attrs=kept))
    config = config_of(tmp_path, "theirs", "nobody's", database=url)
    check_sources(config)
    with pytest.raises(
        RankfrontError, match=r"sources\[1\]: \"nobody's\" is no .*, nor a study of the database"
    ):
        warm_allocations(config, TARGETS, storage, print)
    config = config_of(tmp_path, "theirs", database=url)
    assert warm_allocations(config, TARGETS, storage, print) == [(COST.uniform(0.8), ORIGIN)]


def test_every_source_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    other = source(tmp_path / "theirs")
    propose_and_complete(other, 2)
    rest = (replace(TARGETS[1], rows=7), *TARGETS[2:], replace(TARGETS[0], name="lm_head"))
    (tmp_path / "theirs" / PREPARED).write_text(json.dumps(prepared(rest).to_dict()))
    (tmp_path / "bad.json").write_text('{"layers.0.q_proj": 99, "layers.9.q_proj": 1}')
    (tmp_path / "bad.jsonl").write_text('{"layers.0.q_proj": 9}\n{"layers.0')
    names = [tmp_path / name for name in ("theirs", "bad.json", "bad.jsonl")]
    with pytest.raises(RankfrontError) as caught:
        given(config_of(tmp_path, *names))
    message = str(caught.value)
    assert "warm_start.sources[0]: its targets differ: lm_head is no target here; " in message
    assert "layers.0.q_proj is no target there; layers.0.up_proj is 7 x 24 there, 48 x 24 here" in message
    assert "layers.0.q_proj: rank 99 is not an integer in 1..24" in message
    assert "'layers.9.q_proj' is no target of this model" in message
    assert "bad.jsonl:2: cannot be read" in message


@pytest.mark.parametrize(
    ("kept", "said"),
    [({"study": "renamed"}, "its journal has no study 'renamed'"), ({}, "'study' is missing")],
)
def test_a_folder_whose_config_was_changed_by_hand_is_named(
    tmp_path: Path, kept: dict[str, str], said: str
) -> None:
    propose_and_complete(source(tmp_path / "theirs"), 2)
    (tmp_path / "theirs" / CONFIG).write_text(yaml.safe_dump({**HUB, **kept}))
    with pytest.raises(RankfrontError, match=rf"sources\[0\]: .*theirs.*{said}"):
        given(config_of(tmp_path, tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"factors": "feature"}, "[0]: factors: no mapping"),
        ({"factors": None}, "[0]: factors: no mapping"),
        ({"factors": {"methods": ["a"]}}, "[0]: factors: no mapping, or its methods are none"),
        ({"factors": {"method": "feture"}}, "[0]: 'feture' is no method of a target; there are weight, "),
        ({"methods": {"layers.0.q_proj": "feture"}}, "[0]: 'feture' is no method of a target"),
        ({"methods": {"layers.0.qproj": "weight"}}, "[0].methods: layers.0.qproj: no ranks are given"),
    ],
)
def test_a_file_that_says_nonsense_of_its_factors_is_named(
    tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump({"ranks": {"layers.0.q_proj": 3}, **more}))
    with pytest.raises(RankfrontError) as caught:
        given(config_of(tmp_path, tmp_path / "ranks.yaml"))
    assert f"sources[0]: {said}" in str(caught.value)


def test_sources_that_are_nowhere_are_named_before_anything_starts(tmp_path: Path) -> None:
    config = config_of(tmp_path, "nowhere", tmp_path / "gone.yaml", "ours")
    with pytest.raises(RankfrontError) as caught:
        check_sources(config)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == [f"warm_start.sources[{i}]" for i in range(3)]
    assert "'nowhere' is no folder of a study, no file, no study in" in lines[0]
    assert "'ours' is this study itself" in str(caught.value)


def test_a_path_is_saved_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    sources = config_of(tmp_path, "mine.yaml", "theirs").warm_start.sources
    assert sources == (str(tmp_path / "mine.yaml"), "theirs")
    (tmp_path / "theirs").mkdir()
    assert config_of(tmp_path, "theirs").warm_start.sources == ("theirs",), "a folder that is no study"
