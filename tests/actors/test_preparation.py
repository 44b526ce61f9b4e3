"""A preparation end to end on the tiny model: what it says, what it keeps, when it builds again."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from actors.factors import FactorStore
from actors.models import count_parameters, load_model, load_tokenizer
from actors.preparation import prepare
from actors.types import (
    Foreseen,
    ModelSource,
    PreparationSpec,
    Prepared,
    Progress,
    RankfrontError,
    TextSource,
)
from search.config import parse_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preparation")
    tiny.tiny_config(root)
    return root


def spec_of(root: Path, **overrides: Any) -> PreparationSpec:
    return parse_config(tiny.tiny_config(root, **overrides)).preparation()


def run(root: Path, **overrides: Any) -> tuple[list[str], Prepared]:
    *said, prepared = prepare(spec_of(root, **overrides))
    assert isinstance(prepared, Prepared)
    lines = [item for item in said if isinstance(item, str)]
    prints, *foreseen = (item for item in said if not isinstance(item, str | Progress))
    assert prints == prepared.fingerprints
    for each in foreseen:  # where factors were built
        assert isinstance(each, Foreseen)
        assert replace(each.prepared, seconds=prepared.seconds) == prepared
    assert len(foreseen) == (not prepared.reused)
    return lines, prepared


def fingerprints(root: Path, **overrides: Any) -> Mapping[str, str]:
    """The fingerprints come before the long work: what comes after is not waited for."""
    steps = prepare(spec_of(root, **overrides))
    found = next(item for item in steps if isinstance(item, Mapping))
    steps.close()
    return dict(found)


def test_what_was_prepared_is_said(root: Path) -> None:
    lines, prepared = run(root)
    model = load_model(root / "model", ModelSource(str(root / "model")))
    assert prepared.model_folder == str(root / "model")
    assert prepared.model_parameters == count_parameters(model)
    assert len(prepared.targets) == 21
    assert {name: prepared.tokens[name] for name in ("calibration", "search", "test")} == {
        "calibration": 512,
        "search": 128,
        "test": 128,
    }
    assert prepared.examples == {
        "search": {"arc_easy": 6, "piqa": 6},
        "choice": {},
        "test": {"arc_easy": 10, "piqa": 10},
    }
    assert prepared.tokens["choice"] == prepared.tokens["choice.forward"] > 128
    parts = {"model", "tokenizer", "calibration", "search", "choice", "test", "factors"}
    assert prepared.fingerprints.keys() == parts
    assert len({*prepared.fingerprints.values()}) == 7
    assert json.loads(json.dumps(prepared.to_dict()))["factor_store"] == prepared.factor_store
    assert any(line.startswith("text: 512 calibration tokens") for line in lines)


def test_progress_is_counted_in_windows_and_then_in_targets(root: Path) -> None:
    said = prepare(spec_of(root, runs=str(root / "counted")))
    progress = [item for item in said if isinstance(item, Progress)]
    calibrating = [item for item in progress if item.step == "calibrating"]
    assert progress == calibrating + [Progress("decomposing", done, 21) for done in range(1, 22)]
    assert calibrating[-1] == Progress("calibrating", 16, 16)


def test_a_store_is_built_once_and_damage_is_repaired(root: Path) -> None:
    overrides = {"runs": str(root / "own-runs")}
    _, first = run(root, **overrides)
    assert not first.reused
    lines, second = run(root, **overrides)
    assert second.reused
    assert second.fingerprints == first.fingerprints
    assert lines[-1] == f"factor store: reused, {first.factor_store}"
    file = Path(first.factor_store) / "model.layers.1.mlp.up_proj.curvature.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    lines, third = run(root, **overrides)
    assert not third.reused
    assert f"{file.name} fails its checksum" in " ".join(lines)
    assert file.read_bytes() == whole  # the same to the bit


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({"factors": {"method": "weight"}}, "factors"),
        ({"factors": {"methods": {"*.1.mlp.up_proj": "weight"}}}, "factors"),
        ({"space": {"methods": ["curvature", "feature"]}}, "factors"),
        ({"factors": {"bias": "none"}}, "factors"),
        ({"factors": {"dtype": "bfloat16"}}, "factors"),
        ({"targets": {"exclude": ["*.q_proj"]}}, "factors"),
        ({"model": {"dtype": "bfloat16"}}, "model factors"),
        ({"calibration": {"tokens": 480}}, "calibration factors"),
        ({"calibration": {"window": 16}}, "calibration factors"),
        ({"calibration": {"labels": "data"}}, "factors"),
        # how the work is cut decides nothing
        ({"calibration": {"memory_gb": 0.5}}, ""),
        ({"calibration": {"builders": 2}}, ""),
        # 512 calibration tokens reach into the next document, 128 scoring tokens do not
        ({"text": {"join": " "}}, "calibration factors choice"),
        ({"scoring": {"tokens": {"search": 96}}}, "search choice"),
        ({"scoring": {"tokens": {"choice": 96}}}, "choice"),
        ({"scoring": {"window": 16}}, "search choice test"),
        ({"scoring": {"examples": {"test": 9}}}, "test"),
        ({"scoring": {"seed": 1}}, "search test"),
        ({"scoring": {"batch_tokens": 64}}, ""),
        ({"storage": "factored"}, ""),
        ({"stop": {"trials": 99}}, ""),
    ],
    ids=str,
)
def test_fingerprints_change_with_what_they_identify_and_with_nothing_else(
    overrides: dict[str, Any], changed: str, root: Path
) -> None:
    before, after = fingerprints(root), fingerprints(root, **overrides)
    assert {name for name in before if before[name] != after[name]} == {*changed.split()}


def test_labels_decide_nothing_where_no_gradient_is_used(root: Path) -> None:
    prints = [
        fingerprints(root, factors={"method": "feature"}, calibration={"labels": labels})
        for labels in ("sampled", "data")
    ]
    assert prints[0] == prints[1]


def test_too_little_memory_is_said_and_enough_gives_the_same_factors(root: Path) -> None:
    def with_memory(memory: float, folder: str) -> list[Any]:
        calibration = {"tokens": 128, "memory_gb": memory}
        chosen = {"runs": str(root / folder), "targets": {"include": ["*.1.*"]}, "calibration": calibration}
        return [*prepare(spec_of(root, **chosen))]

    with pytest.raises(RankfrontError, match=r"calibration\.memory_gb: 1e-06 is too small") as caught:
        with_memory(1e-6, "little")
    [enough] = re.findall(r"need (\S+)", str(caught.value))
    little, plenty = with_memory(float(enough), "little"), with_memory(1.0, "plenty")
    steps = {item.step for item in little if isinstance(item, Progress)}
    assert "calibrating, pass 2/" in " ".join(steps)
    same_factors(little[-1].factor_store, plenty[-1].factor_store)


def test_a_text_shorter_than_asked_for_is_calibrated_on_whole(root: Path) -> None:
    short = tiny.tiny_text(root / "short", count=1)
    spec = spec_of(root, runs=str(root / "shorter"))
    calibration = replace(spec.calibration, text=TextSource(str(short)), tokens=10**6)
    *_, prepared = prepare(replace(spec, calibration=calibration))
    assert isinstance(prepared, Prepared)
    tokens = load_tokenizer(short.parent / "model", spec.model)(tiny.documents(1)[0])["input_ids"]
    assert prepared.tokens["calibration"] == len(tokens) // 32 * 32


def spoil(folder: Path, module: str, to: Path) -> Path:
    """The model with one weight that is no number."""
    model = load_model(folder, ModelSource(str(folder)))
    model.get_submodule(module).weight[0, 0] = torch.nan
    model.save_pretrained(to)
    load_tokenizer(folder, ModelSource(str(folder))).save_pretrained(to)
    return to


@pytest.mark.parametrize("method", ["weight", "feature", "curvature"])
def test_a_weight_that_is_no_number_leaves_no_target_behind(method: str, root: Path, tmp_path: Path) -> None:
    """And lets go of the store: who tries again, in this process even, is told the same."""
    model = spoil(root / "model", "model.layers.1.self_attn.v_proj", tmp_path / "model")
    raw = {"model": {"source": str(model)}, "runs": str(tmp_path / "runs"), "factors": {"method": method}}
    for _ in range(2):
        with pytest.raises(RankfrontError, match=r"layers\.1\.self_attn\.v_proj: 1 non-finite .* weight"):
            run(root, **raw)
        [left] = (tmp_path / "runs" / "factors").iterdir()
        assert left.suffix == ".lock"
        with left.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def same_factors(found: str | Path, expected: str | Path) -> None:
    """Stores that approximate every target alike at every rank, though vectors may change their sign."""
    one, other = FactorStore(found), FactorStore(expected)
    assert one.targets == other.targets
    for target in one.targets:
        assert one.methods[target.name] == other.methods[target.name]
        for method in one.methods[target.name]:
            scale = other.energy(target.name, method).max()
            torch.testing.assert_close(
                one.energy(target.name, method), other.energy(target.name, method), rtol=0, atol=1e-5 * scale
            )
            for rank in (1, 3, 8, target.full_rank):
                products, biases = [], []
                for store in (one, other):
                    left, right, bias = store.rank(target.name, rank, method)
                    products.append(left.T.double() @ right.double())
                    biases.append(bias)
                assert (products[0] - products[1]).norm() < 1e-4 * products[1].norm(), (target.name, rank)
                torch.testing.assert_close(*biases, rtol=0, atol=1e-4)


def break_window(root: Path) -> dict[str, Any]:
    return {"calibration": {"window": 257}}


def break_example(root: Path) -> dict[str, Any]:
    row = {**tiny.piqa_rows(1)[0], "goal": "very long " * 300}
    (root / "long.jsonl").write_text(json.dumps(row) + "\n")
    return {"scoring": {"tasks": [{"name": "piqa", "source": str(root / "long.jsonl")}]}}


def break_single(root: Path) -> dict[str, Any]:
    (root / "single.jsonl").write_text(json.dumps(tiny.piqa_rows(1)[0]) + "\n")
    return {"scoring": {"tasks": [{"name": "piqa", "source": str(root / "single.jsonl")}]}}


def break_targets(root: Path) -> dict[str, Any]:
    return {"targets": {"include": ["*.q_project"]}}


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (break_window, r"calibration\.window: 257 tokens, the model reads 256"),
        (break_example, r"long\.jsonl: row 0 of piqa has \d+ tokens, the model reads 256"),
        # found before the search, not by its last step, which scores the test split
        (break_single, r"piqa.* no example.* test"),
        (break_targets, r"targets\.include\[0\]: '\*\.q_project' fits none of the 21 linear layers"),
    ],
)
def test_what_cannot_be_scored_stops_the_preparation(
    break_it: Callable[[Path], dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    tiny.tiny_config(tmp_path)
    with pytest.raises(RankfrontError, match=reason):
        run(tmp_path, **break_it(tmp_path))
