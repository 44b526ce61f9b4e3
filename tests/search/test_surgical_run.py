"""The walk over a real model against the plain loops of `benchmarks/surgical_speed.py`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def found(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    program: Any = importlib.import_module("surgical_speed")
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.documents()))
    settings = f"--model {llama} --text {tmp_path / 'text.txt'} --folder {tmp_path} --targets 14 --tokens 256"
    more = "--test-tokens 64 --calibration-tokens 256 --window 32 --growth 0.0002"
    arguments = program.parser().parse_args([*settings.split(), *more.split()])
    found = program.compared(arguments)
    assert len([*program.report(arguments, found)]) == 4
    return found


def test_the_papers_walk_accepts_what_a_plain_loop_does(found: Any) -> None:
    """Hidden states reused or not, by factors or by one product: the same ranks after as many scores."""
    plain, exact, improved = found
    assert exact.ranks == plain.ranks
    assert exact.scored == plain.scored
    assert {None, 1} < {*plain.ranks.values()}
    assert [nll for _, nll in exact.front] == pytest.approx([nll for _, nll in plain.front], abs=1e-5)
    assert [budget for budget, _ in exact.front] == [budget for budget, _ in plain.front]
    assert improved.ranks.keys() == plain.ranks.keys()
