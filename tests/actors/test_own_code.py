"""A model whose code comes with it: everything but an export, which is said before the search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from actors.check import Scored
from actors.export import export
from actors.preparation import prepare
from actors.scoring import Scorer
from actors.types import Allocation, Prepared, RankfrontError, ReplicaSpec
from search.config import parse_config

CODE = """
from transformers import LlamaForCausalLM

class Ours(LlamaForCausalLM):
    pass
"""


def test_it_is_scored_and_what_it_lacks_is_said_first(tmp_path: Path) -> None:
    root = tmp_path / "own"
    raw = tiny.tiny_config(root)
    theirs = parse_config(raw).preparation()
    (root / "model" / "modeling_ours.py").write_text(CODE)
    described = json.loads((root / "model" / "config.json").read_text())
    described |= {"architectures": ["Ours"], "auto_map": {"AutoModelForCausalLM": "modeling_ours.Ours"}}
    (root / "model" / "config.json").write_text(json.dumps(described))
    spec = replace(theirs, model=replace(theirs.model, trust_remote_code=True))
    *said, prepared = prepare(spec)
    assert isinstance(prepared, Prepared)
    assert said[1] == "model: its code comes with it: what is found can be written as a configuration alone"
    allocation = Allocation.of({target.name: 8 for target in prepared.targets}, prepared.targets)
    score = Scorer(ReplicaSpec("r", spec, prepared, threads=1, device="cpu")).score(allocation)
    assert torch.isfinite(torch.tensor(score.text.nats))

    found = Scored(spec, prepared, allocation, "auto", score)
    with pytest.raises(RankfrontError, match=r"whose code comes with it has no export; .*--config-only"):
        export(found, tmp_path / "out", {"study": "tiny", "trial": 3}, lambda _: "", "rankfront", "cpu")
    assert [each.name for each in tmp_path.iterdir()] == ["own"]
