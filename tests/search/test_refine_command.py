"""The refine command on a tiny study whose worker runs in this process, and the export of what it leaves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tiny_study import Tiny

import search.refine
from actors.refined import RefinedFactors
from actors.refinement import RefinementStep
from actors.refiner import Refiner
from actors.types import RankfrontError
from search.cli import main
from search.evaluations import Evaluations
from search.event_log import LOG
from search.folder import StudyFolder
from search.refine import comparison_cells, refine_by, refined_file, refined_path
from search.runner import Stop


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    """The exit code of `rankfront ARGUMENTS`, and what it printed."""
    monkeypatch.setattr("sys.argv", ["rankfront", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


def test_a_trial_is_refined_scored_beside_its_own_factors_and_exported(
    study: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study.folder.path

    def run(*arguments: str) -> str:
        code, out, err = command(monkeypatch, capsys, *arguments)
        assert code == 0, err
        return out

    out = run("refine", str(path), "--trial", "1", "--steps", "4")
    assert "Stopped: 4 steps" in out
    variant = re.search(r"--variant (refined-[0-9a-f]{8})", out)
    assert variant
    rows = {(e.trial, e.variant, e.split): e.score for e in Evaluations(path, [study.row()]).rows}
    name = variant[1]
    assert set(rows) == {(1, "factors", "test"), (1, name, "search"), (1, name, "test")}
    (file,) = (path / "refined").iterdir()
    manifest = RefinedFactors(file).manifest
    assert (manifest["trial"], manifest["spec"]["steps"], manifest["variant"]) == (1, 4, name)
    assert f"{rows[1, name, 'test'].text.nll:.4f} ±" in out
    assert study.asked == [("search", file.name), ("test", None), ("test", file.name)]
    noted = [json.loads(line)["event"] for line in (path / LOG).read_text().splitlines()]
    assert noted == ["started", "stopped"]

    again = run("refine", str(path), "--trial", "1", "--steps", "4")
    assert "Stopped: it was refined before" in again
    assert len(study.asked) == 3, "known scores are not asked for again"

    exported = run("export", str(path), "--trial", "1", "--variant", name)
    assert f"nll on the search split: {rows[1, name, 'search'].text.nll:.6f} reloaded" in exported
    description = yaml.safe_load((path / "exports" / f"trial-00001-{name}" / "ranks.yaml").read_text())
    assert description["variant"] == name


def test_what_is_refined_anew_is_scored_anew(study: Tiny) -> None:
    """On another machine other factors may come of it: nothing is known of those."""
    found = study.refine()
    asked = [*study.asked]
    found.path.unlink()
    study.refine()
    assert study.asked == [*asked, ("search", found.path.name), ("test", found.path.name)]


def test_a_refit_is_another_variant_of_the_trial(
    study: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(study.folder.path)
    code, out, err = command(monkeypatch, capsys, "refine", path, "--trial", "1", "--method", "refit")
    assert (code, "Stopped: 3 blocks" in out) == (0, True), err
    variant = re.search(r"--variant (refit-[0-9a-f]{8})", out)
    assert variant
    file, score = refined_file(study.folder, study.row(), variant[1])
    assert RefinedFactors(file).manifest["variant"] == variant[1]
    assert study.asked == [("search", file.name), ("test", None), ("test", file.name)]
    code, out, err = command(monkeypatch, capsys, "export", path, "--trial", "1", "--variant", variant[1])
    assert code == 0, err
    assert f"nll on the search split: {score.text.nll:.6f} reloaded" in out
    for given, said in (
        (("--method", "refit", "--steps", "4"), "refine: --steps for the method gradient; a refit takes no"),
        (("--method", "least"), "refine.method: 'least'"),
    ):
        code, out, err = command(monkeypatch, capsys, "refine", path, "--trial", "1", *given)
        assert code == 2
        assert said in err


def test_a_stopped_run_goes_on(study: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    class Signalled(Stop):
        """A signal that comes while the third step is drawn."""

        looks = 0

        def __getattribute__(self, name: str) -> Any:
            if name == "reason":
                Signalled.looks += 1
                return "SIGINT" if Signalled.looks > 3 else None
            return super().__getattribute__(name)

    with monkeypatch.context() as patch:
        patch.setattr(search.refine, "Stop", Signalled)
        found = study.refine()
    assert (found.ended, found.scores) == ("SIGINT", {})
    assert study.asked == []
    assert [file.suffix for file in found.path.parent.iterdir()] == [".partial"]
    assert study.refine().ended == "6 steps"
    assert [file.suffix for file in found.path.parent.iterdir()] == [".safetensors"]


def test_a_worker_whose_files_the_driver_does_not_see_is_refused(
    study: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is computed; and what is gone afterwards is no success."""

    @contextlib.contextmanager
    def elsewhere(folder: StudyFolder, *others: Any) -> Iterator[Refiner]:
        with study.refiner(folder, *others) as worker:
            worker._folder = tmp_path / "of its node"
            monkeypatch.setattr(worker, "find", finds or worker.find)
            yield worker

    finds: Any = None
    monkeypatch.setattr(search.refine, "refiner", elsewhere)
    said = rf"of its node: node {re.escape(platform.node())}, which refines, does not see .* set runs to a"
    with pytest.raises(RankfrontError, match=said):
        study.refine()
    assert not (tmp_path / "of its node").exists()

    finds = lambda file: None  # noqa: E731 (a folder that is lost while it works)
    with pytest.raises(RankfrontError, match=r"safetensors: refined, and not there for the driver"):
        study.refine()
    assert len(list((tmp_path / "of its node").iterdir())) == 1
    assert list((study.folder.path / "refined").iterdir()) == []
    assert study.asked == []


def test_what_killed_processes_left_is_removed_and_a_checkpoint_is_kept(study: Tiny) -> None:
    row, seen = study.row(), list[str]()
    _, path = refined_path(study.folder, row)

    class Looking:
        """A worker that only looks at its folder."""

        def find(self, file: str) -> None:
            assert (path.parent / file).exists()
            seen.append(file)

        def refine(self, *asked: Any) -> Any:
            seen.extend(file.name for file in path.parent.iterdir())
            raise RankfrontError("enough")

    def left(*endings: str) -> None:
        path.parent.mkdir(exist_ok=True)
        for ending in endings:
            path.with_name(path.name + ending).touch()

    other = path.with_name(f"another.safetensors.{os.getpid()}.tmp")
    left(".partial", ".partial.71.tmp", ".72.tmp")
    other.touch()
    with pytest.raises(RankfrontError, match="enough"):
        refine_by(Looking(), study.folder, row, Stop(), Console(file=io.StringIO()))  # type: ignore[arg-type]
    probe, *there = seen
    assert sorted(there) == sorted([probe, f"{path.name}.partial", other.name])
    assert {file.name for file in path.parent.iterdir()} == {f"{path.name}.partial", other.name}

    path.with_name(f"{path.name}.partial").unlink()
    study.refine()
    left(".partial", ".73.tmp")
    assert study.refine().ended == "it was refined before"
    assert {file.name for file in path.parent.iterdir()} == {path.name, other.name}


def test_what_cannot_be_refined_is_said(study: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankfrontError, match="--trial 0: every target is dense"):
        study.refine(0)
    with pytest.raises(
        RankfrontError, match=r"--variant refined-0: trial 1 has no such variant; it has none"
    ):
        refined_file(study.folder, study.row(), "refined-0")
    gone = replace(study.folder.prepared, factor_store=str(study.folder.path / "nothing"))
    study.folder = replace(study.folder, prepared=gone)
    with pytest.raises(RankfrontError, match=r"the factor store .*nothing is gone"):
        study.refine()


def test_the_table_pairs_the_scores(study: Tiny) -> None:
    before, after = study.row(1).score, study.row(0).score
    assert before is not None
    assert after is not None
    cells = {row[:2]: row[2:] for row in comparison_cells({"search": (before, after)}).rows}
    assert [metric for _, metric in cells] == ["perplexity", "nll", "kl", "reasoning.acc", "reasoning.margin"]
    gap = after.minus(before, "nll")
    assert cells["search", "nll"] == (
        f"{before.text.nll:.4f} ± {before.text.stderr:.4f}",
        f"{after.text.nll:.4f} ± {after.text.stderr:.4f}",
        f"{gap.mean:+.4f} ± {gap.stderr:.4f}",
    )
    old = replace(before, text=replace(before.text, windows=""))
    assert comparison_cells({"search": (old, after)}).rows[1][-1] == "not kept"


def test_the_line_says_how_far_it_is() -> None:
    console = Console(file=io.StringIO(), width=200)
    with search.refine._Screen(console) as screen:
        screen.redraw(RefinementStep(0, 20, None, 0.5, 0.5, 0))
        line = screen._line(RefinementStep(10, 20, 0.25, 0.4, 0.375, 5), screen._first[1] + 30)  # type: ignore[index]
        several = screen._line(RefinementStep(10, 20, 0.25, 0.4, 0.375, 5, workers=3), 0.0)
    assert line == "refining 10/20 | KL 0.2500 | held out 0.4000, best 0.3750 at 5 | ETA 0:30"
    assert several.startswith("refining 10/20 by 3 workers | KL 0.2500")
