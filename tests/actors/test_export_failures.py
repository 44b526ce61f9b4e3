"""Exports that fail say why and leave nothing behind."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import Case, make_case, off_by_a_row

from actors import export as exporting
from actors.modeling_rankfront import PivotedLinear, RankfrontForCausalLM
from actors.types import RankfrontError


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("tied"), "llama", "pivoted", "mean")


def test_an_existing_destination_is_left_alone(tied: Case, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(RankfrontError, match=r"mine exists already; name another folder with --to"):
        tied.export(tmp_path / "mine")
    assert [file.name for file in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_place_that_cannot_be_written_is_said(tied: Case, tmp_path: Path) -> None:
    """A file in the way of a folder: the same refusal by the system as of a read-only one, for root too."""
    (tmp_path / "file").write_text("keep")
    with pytest.raises(RankfrontError, match=r"export to .*/file/new: .*Not a directory"):
        tied.export(tmp_path / "file" / "new")
    assert [file.name for file in tmp_path.rglob("*")] == ["file"]
    with pytest.raises(RankfrontError, match=r"export to /proc/new: "):
        tied.export(Path("/proc/new"))


def test_a_destination_is_one_folder_whatever_its_name(tied: Case, tmp_path: Path) -> None:
    """`..` at the end is the folder it stands for, which is there; a dangling link is not written through."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "far")
    with pytest.raises(RankfrontError, match="exists already"):
        tied.export(tmp_path / "inner" / "..")
    with pytest.raises(RankfrontError, match="exists already"):
        tied.export(tmp_path / "link")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["inner", "link"]


def test_a_lost_factor_store_is_said(tied: Case, tmp_path: Path) -> None:
    lost = replace(tied.prepared, factor_store=str(tmp_path / "gone"))
    with pytest.raises(RankfrontError, match=r"factor store .*/gone is gone; run the search command again"):
        tied.export(tmp_path / "new", prepared=lost)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_midway_leaves_nothing(tied: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RankfrontForCausalLM, "save_pretrained", fail)
    with pytest.raises(RankfrontError, match=r"export to .*/new: .*No space left on device"):
        tied.export(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tied: Case, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the same failing write, from the same libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(RankfrontError, match=r"export to .*/new: .*File too large"):
            tied.export(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_the_scored_model_is_not_written(
    tied: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "pivot", off_by_a_row)
    with pytest.raises(RankfrontError, match="the reloaded logits differ by"):
        tied.export(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_than_were_counted_are_refused(
    tied: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order kept in eight bytes an index is the searched model, but not what its budget says."""
    save = RankfrontForCausalLM.save_pretrained

    def widened(self: Any, folder: Path) -> None:
        for module in self.modules():
            if isinstance(module, PivotedLinear):
                module.order = module.order.long()
        save(self, folder)

    monkeypatch.setattr(RankfrontForCausalLM, "save_pretrained", widened)
    with pytest.raises(RankfrontError, match=r"files hold [\d,]+ bytes of tensors; [\d,]+ were counted"):
        tied.export(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_recorded_score_of_another_model_is_refused(tied: Case, tmp_path: Path) -> None:
    """`check` promises an error where logits *or loss* differ by more than rounding."""
    text = replace(tied.score.text, nats=tied.score.text.nats * 1.5)
    with pytest.raises(RankfrontError, match=r"nll"):
        tied.export(tmp_path / "new", score=replace(tied.score, text=text))
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_room_is_said(tied: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("actors.check.score_split", full)
    with pytest.raises(RankfrontError, match=r"^--device cpu: out of memory, .*; --device cpu needs none"):
        tied.export(tmp_path / "new", device="cpu")
    assert list(tmp_path.iterdir()) == []
