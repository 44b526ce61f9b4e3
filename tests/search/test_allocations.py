"""Allocations in files: both forms, every mistake at once, and equal models with equal keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_up
import pytest
import yaml
from fakes import CHOOSING, TARGETS

from actors.types import Allocation, FactorSpec, RankfrontError
from search.allocation_file import AllocationFile
from search.allocations import TOLD, method_list, read_allocations
from search.tables import front_json

RANKS = {"layers.0.q_proj": 3, "layers.1.q_proj": 4, "layers.1.up_proj": None}


def read(tmp_path: Path, data: Any, factors: FactorSpec = CHOOSING) -> list[Allocation]:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data))
    return read_allocations(file, TARGETS, factors)


def refused(tmp_path: Path, data: Any, factors: FactorSpec = CHOOSING) -> list[str]:
    with pytest.raises(RankfrontError) as caught:
        read(tmp_path, data, factors)
    return str(caught.value).splitlines()


def test_ranks_alone_or_with_methods_one_or_several(tmp_path: Path) -> None:
    plain = Allocation.of(RANKS, TARGETS)
    methods = {"layers.0.q_proj": "curvature", "layers.1.q_proj": "weight"}
    chosen = Allocation.of(RANKS, TARGETS, methods=methods)
    assert chosen.methods == tuple(methods.items())
    assert read(tmp_path, RANKS) == [plain]
    assert read(tmp_path, {"ranks": RANKS}) == [plain]
    assert read(tmp_path, {"ranks": RANKS, "methods": None}) == [plain]
    assert read(tmp_path, {"ranks": RANKS, "methods": methods}) == [chosen]
    assert read(tmp_path, [{"trial": 7, "ranks": RANKS, "methods": methods}, RANKS]) == [chosen, plain]


def test_json_is_read_as_well(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"ranks": RANKS, "methods": {"layers.1.q_proj": "weight"}}))
    [found] = read_allocations(file, TARGETS, CHOOSING)
    assert found == Allocation.of(RANKS, TARGETS, methods={"layers.1.q_proj": "weight"})
    file.write_text(json.dumps([RANKS], indent="\t"))  # which is no YAML
    assert read_allocations(file, TARGETS, CHOOSING) == [Allocation.of(RANKS, TARGETS)]


def test_json_lines_are_read_as_well(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(each) for each in ({"ranks": RANKS}, {"layers.0.q_proj": 5})) + "\n")
    expected = [Allocation.of(RANKS, TARGETS), Allocation.of({"layers.0.q_proj": 5}, TARGETS)]
    assert read_allocations(file, TARGETS, CHOOSING) == expected
    file.write_text('{"layers.0.q_proj": 5}\n\n{"layers.0.q_proj": ')
    with pytest.raises(RankfrontError, match=r"mine\.jsonl:3: cannot be read"):
        read_allocations(file, TARGETS, CHOOSING)


@pytest.mark.parametrize("name", ["mine.yaml", "mine.json", "mine.jsonl"])
def test_a_target_that_is_there_twice_is_no_allocation(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text('{"ranks": {"layers.0.q_proj": 5, "layers.0.q_proj": 3}}\n')
    with pytest.raises(RankfrontError, match=r"mine.*: cannot be read: 'layers\.0\.q_proj' is there twice$"):
        read_allocations(file, TARGETS, CHOOSING)


def test_the_configured_method_goes_without_saying(tmp_path: Path) -> None:
    """layers.0.q_proj is cut by weight and layers.1.q_proj by feature, said or not."""
    said = {"layers.0.q_proj": "weight", "layers.1.q_proj": "feature"}
    [found] = read(tmp_path, {"ranks": RANKS, "methods": said})
    assert found.key == Allocation.of(RANKS, TARGETS).key
    [other] = read(tmp_path, {"ranks": RANKS, "methods": dict.fromkeys(said, "feature")})
    assert other.methods == (("layers.0.q_proj", "feature"),)


def test_a_file_that_says_how_it_was_found_is_cut_so(tmp_path: Path) -> None:
    """The ranks.yaml of another study: what goes without saying there may differ here."""
    told = {"ranks": RANKS, "factors": {"method": "curvature", "methods": {"layers.0.*": "feature"}}}
    [found] = read(tmp_path, told)
    assert found.methods == (("layers.0.q_proj", "feature"), ("layers.1.q_proj", "curvature"))
    [found] = read(tmp_path, {**told, "methods": {"layers.0.q_proj": "weight"}})
    assert found.methods == (("layers.1.q_proj", "curvature"),)
    assert refused(tmp_path, [told, RANKS], FactorSpec("feature")) == [
        "mine.yaml[0].factors: layers.1.q_proj was cut by 'curvature', and this study has no such factors of "
        "it; without `factors` the ranks are taken by 'feature'"
    ]
    [line] = refused(tmp_path, {"ranks": RANKS, "factors": {"method": "svd"}})
    assert line.startswith("mine.yaml[0]: 'svd' is no method of a target")


def test_every_mistake_of_every_item_is_listed(tmp_path: Path) -> None:
    found = refused(
        tmp_path,
        [
            {"ranks": {**RANKS, "layers.1.q_proj": 25}, "methods": {"layers.0.q_proj": "svd"}},
            RANKS,
            {"ranks": RANKS, "methods": {"layers.1.up_proj": "weight", "layers.9.q_proj": "weight"}},
            {"ranks": RANKS, "methods": {"layers.0.q_proj": 7}},
            {"ranks": RANKS, "methods": ["weight"]},
            {"ranks": 3},
            "words",
        ],
    )
    assert found == [
        "mine.yaml[0].layers.1.q_proj: rank 25 is not an integer in 1..24 (null keeps it dense)",
        "mine.yaml[0].layers.0.q_proj: this study has no factors by 'svd'; one of weight, feature, curvature",
        "mine.yaml[2]: 'layers.9.q_proj' is no target of this model",
        "mine.yaml[2].layers.1.up_proj: method 'weight' for a target that stays dense",
        "mine.yaml[3].layers.0.q_proj: this study has no factors by 7; one of weight, feature, curvature",
        "mine.yaml[4].methods: is no mapping of targets to methods",
        "mine.yaml[5]: is no mapping of targets to ranks",
        "mine.yaml[6]: is no mapping of targets to ranks",
    ]


def test_a_key_that_no_file_has_beside_ranks_is_refused(tmp_path: Path) -> None:
    """A misspelt one would be passed over, and the target cut by its configured method."""
    beside = "unknown key; beside ranks: methods, and what front.json and ranks.yaml tell of a trial"
    misspelt = {"ranks": RANKS, "methodes": {"layers.0.q_proj": "curvature"}, "note": "mine"}
    assert refused(tmp_path, [RANKS, misspelt]) == [
        f"mine.yaml[1].methodes: {beside}",
        f"mine.yaml[1].note: {beside}",
    ]


def test_keys_beside_ranks_are_those_that_are_written() -> None:
    member = json.loads(front_json(made_up.three()))["front"][0]
    assert {*member, *AllocationFile.model_fields} == TOLD | {"ranks", "methods"}


def test_a_study_that_chooses_no_methods_holds_only_the_configured(tmp_path: Path) -> None:
    factors = FactorSpec("feature", (("*.q_proj", "curvature"),))
    [line] = refused(tmp_path, {"ranks": RANKS, "methods": {"layers.0.q_proj": "feature"}}, factors)
    assert line.endswith("no factors by 'feature'; one of curvature")
    [found] = read(tmp_path, {"ranks": RANKS, "methods": {"layers.0.q_proj": "curvature"}}, factors)
    assert found == Allocation.of(RANKS, TARGETS)


@pytest.mark.parametrize(("text", "place"), [("{a: [", "1:6:"), ("a: 1\n\x00", "2:1:")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    for name, where in (("bad.yaml", place), ("none.yaml", "")):
        with pytest.raises(RankfrontError, match=rf"^{tmp_path / name}:{where} cannot be read: [^\n]*$"):
            read_allocations(tmp_path / name, TARGETS, CHOOSING)


def test_methods_are_listed_in_the_order_of_the_ranks() -> None:
    methods = {"layers.1.q_proj": "weight", "layers.0.q_proj": "curvature"}
    listed = method_list(Allocation.of(RANKS, TARGETS, methods=methods))
    assert len(listed) == len(TARGETS)
    assert {t.name: m for t, m in zip(TARGETS, listed, strict=True) if m is not None} == methods
