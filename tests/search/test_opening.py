"""Opening a study: what its preparation says is on the screen, what it runs on, what is left of a failure."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import search.opening
from actors.types import Prepared, RankfrontError
from search.config import Config, parse_config
from search.pool import Machine
from search.replicas import replica_plan

PREPARED = Prepared("", "", (), 10**9, {}, {}, {}, {}, reused=True)


def config_of(tmp_path: Path, **sections: Mapping[str, Any]) -> Config:
    hub = {"model": {"source": "org/model"}, "text": {"source": "org/text"}}
    return parse_config({"study": "s", "runs": str(tmp_path), **hub, **sections})


def test_all_that_the_preparation_says_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets too, which a terminal's markup would swallow."""
    lines = ["model: no family of its own for 'x': every linear layer is a target", "model: ./a[b]/[red]c"]

    def prepare(spec: Any, machine: Any, count: int, say: Any, *rest: Any) -> Prepared:
        for line in lines:
            say(line)
        raise RankfrontError("enough")

    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", prepare)
    shown = io.StringIO()
    config = config_of(tmp_path)
    with pytest.raises(RankfrontError, match="enough"), search.opening.opened(config, Console(file=shown)):
        pass
    assert [line.partition(" s  ")[2] for line in shown.getvalue().splitlines()] == lines
    assert not config.folder.exists()


@pytest.mark.parametrize(
    ("machine", "section", "plan"),
    [
        (Machine(cores=16, gpus=4, memory=1), {}, (4, 4)),
        (Machine(cores=8, gpus=0, memory=2**40), {}, (8, 1)),
        (Machine(cores=8, gpus=0, memory=2**40), {"threads": 4}, (2, 4)),
        (Machine(cores=8, gpus=0, memory=1), {}, (1, 8)),
        (Machine(cores=8, gpus=0, memory=1), {"count": 2}, (2, 4)),
    ],
    ids=str,
)
def test_a_gpu_each_or_what_cores_and_memory_allow(
    machine: Machine, section: dict[str, Any], plan: tuple[int, int], tmp_path: Path
) -> None:
    assert replica_plan(config_of(tmp_path, replicas=section), PREPARED, machine) == plan


def test_what_replicas_keep_counts_as_their_memory(tmp_path: Path) -> None:
    machine = Machine(cores=8, gpus=0, memory=60 * 10**9)
    config = config_of(tmp_path, scoring={"prefix_memory_mb": 12_500.0})
    assert replica_plan(config_of(tmp_path), PREPARED, machine) == (4, 2)
    assert replica_plan(config, PREPARED, machine) == (2, 4)
