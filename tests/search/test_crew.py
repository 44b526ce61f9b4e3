"""How a crew lets go of its replicas. What real ones do is in the tests of the pool and of nodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.types import ReplicaSpec
from search.crew import Crew
from search.slots import Slot


@pytest.mark.parametrize("detached", [True, False])
def test_only_replicas_that_have_a_node_are_waited_for(
    detached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others do not answer, and their process may not live as long as it takes to notice."""
    done: list[tuple[str, Any]] = []
    monkeypatch.setattr("search.crew.ray.kill", lambda actor: done.append(("killed", actor)))
    monkeypatch.setattr("search.crew.end_all", lambda actors, token: done.append(("asked", actors)))
    spec = ReplicaSpec("r", None, None, 1)  # type: ignore[arg-type]
    crew: Any = Crew.__new__(Crew)
    crew.launch = SimpleNamespace(tenure=object() if detached else None, token="mine")
    crew.slots = [Slot(spec, node="n", actor="on a node"), Slot(spec, node="n"), Slot(spec, actor="waits")]
    crew.close()
    left = [("killed", "waits"), ("asked", ["on a node"])]
    assert done == (left if detached else [("killed", "on a node"), left[0], ("asked", [])])
    assert crew.slots == []
