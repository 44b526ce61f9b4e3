"""Marks in a folder: who sees them, and that nothing of them stays."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from actors.shared_folder import leave_mark, sees, take_mark
from actors.types import RankfrontError


def test_a_mark_is_seen_until_it_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "factors" / "x.partial"
    mark = leave_mark(folder)
    assert (mark.node, mark.file.parent) == (platform.node(), folder)
    assert sees(mark.file)
    assert list(folder.iterdir()) == [mark.file], "looking leaves nothing"
    take_mark(mark)
    assert not sees(mark.file)
    assert list((tmp_path / "runs" / "factors").iterdir()) == [], "nor does taking, where it was alone"


def test_what_is_beside_a_mark_stays(tmp_path: Path) -> None:
    mark = leave_mark(tmp_path)
    (tmp_path / "kept").touch()
    take_mark(mark)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_looking_where_nothing_is_makes_no_folder(tmp_path: Path) -> None:
    assert not sees(tmp_path / "a" / "b" / "file")
    assert list(tmp_path.iterdir()) == []


def test_one_looks_again_by_a_change_beside_what_was_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS only that ends what is remembered of a folder."""
    changed: list[Path] = []
    touch = Path.touch

    def noted(self: Path) -> None:
        changed.append(self.parent)
        touch(self)

    monkeypatch.setattr(Path, "touch", noted)
    (tmp_path / "runs").mkdir()
    assert not sees(tmp_path / "runs" / "factors" / "x.partial" / "file")
    assert changed == [tmp_path / "runs"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(RankfrontError, match=rf"^{tmp_path}/runs/factors: node \S+ cannot write there: "):
        leave_mark(tmp_path / "runs" / "factors")
    assert not sees(tmp_path / "runs" / "factors" / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read_is_looked_into(tmp_path: Path) -> None:
    mark = leave_mark(tmp_path / "read")
    (tmp_path / "read").chmod(0o500)
    assert sees(mark.file)
    (tmp_path / "read").chmod(0o700)
