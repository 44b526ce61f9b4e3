"""A preparation end to end on the tiny model: what it says, what it keeps, when it builds again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from actors.models import count_parameters, load_model
from actors.preparation import prepare
from actors.types import ModelSource, Prepared, RankfrontError
from search.config import parse_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preparation")
    tiny.tiny_config(root)
    return root


def run(root: Path, **overrides: Any) -> tuple[list[str], Prepared]:
    *said, prepared = prepare(parse_config(tiny.tiny_config(root, **overrides)).preparation())
    assert isinstance(prepared, Prepared)
    lines = [line for line in said if isinstance(line, str)]
    assert [item for item in said if item not in lines] == [prepared.fingerprints]
    return lines, prepared


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
        "test": {"arc_easy": 10, "piqa": 10},
    }
    assert prepared.fingerprints.keys() == {"model", "tokenizer", "calibration", "search", "test", "factors"}
    assert len({*prepared.fingerprints.values()}) == 6
    assert json.loads(json.dumps(prepared.to_dict()))["factor_store"] == prepared.factor_store
    assert any(line.startswith("text: 512 calibration tokens") for line in lines)


def test_a_store_is_built_once_and_damage_is_repaired(root: Path) -> None:
    overrides = {"runs": str(root / "own-runs")}
    _, first = run(root, **overrides)
    assert not first.reused
    lines, second = run(root, **overrides)
    assert second.reused
    assert second.fingerprints == first.fingerprints
    assert lines[-1] == f"factor store: reused, {first.factor_store}"
    block = Path(first.factor_store) / "block-00001.safetensors"
    whole = block.read_bytes()
    block.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    lines, third = run(root, **overrides)
    assert not third.reused
    assert "block-00001.safetensors fails its checksum" in " ".join(lines)
    assert block.read_bytes() == whole  # the same to the bit


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({"factors": {"method": "weight"}}, {"factors"}),
        ({"factors": {"bias": "none"}}, {"factors"}),
        ({"factors": {"dtype": "bfloat16"}}, {"factors"}),
        ({"targets": {"exclude": ["*.q_proj"]}}, {"factors"}),
        ({"model": {"dtype": "bfloat16"}}, {"model", "factors"}),
        ({"calibration": {"tokens": 480}}, {"calibration", "factors"}),
        ({"calibration": {"window": 16}}, {"calibration", "factors"}),
        # 512 calibration tokens reach into the next document, 128 scoring tokens do not
        ({"text": {"join": " "}}, {"calibration", "factors"}),
        ({"scoring": {"tokens": {"search": 96}}}, {"search"}),
        ({"scoring": {"window": 16}}, {"search", "test"}),
        ({"scoring": {"examples": {"test": 9}}}, {"test"}),
        ({"scoring": {"seed": 1}}, {"search", "test"}),
        ({"scoring": {"batch_tokens": 64}}, set()),
        ({"storage": "factored"}, set()),
        ({"stop": {"trials": 99}}, set()),
    ],
    ids=str,
)
def test_fingerprints_change_with_what_they_identify_and_with_nothing_else(
    overrides: dict[str, Any], changed: set[str], root: Path
) -> None:
    before, after = run(root)[1].fingerprints, run(root, **overrides)[1].fingerprints
    assert {name for name in before if before[name] != after[name]} == changed


def break_text(root: Path) -> dict[str, Any]:
    return {"calibration": {"window": 2048}}


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
        (break_text, r"text too short: .* a window needs 2048"),
        (break_example, r"piqa: example 0 has \d+ tokens, the model reads 256"),
        # found before the search, not by its last step, which scores the test split
        (break_single, r"piqa.* no example.* test"),
        (break_targets, r"leaves none of 21 linear layers"),
    ],
)
def test_what_cannot_be_scored_stops_the_preparation(
    break_it: Callable[[Path], dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    tiny.tiny_config(tmp_path)
    with pytest.raises(RankfrontError, match=reason):
        run(tmp_path, **break_it(tmp_path))
