"""Exports on the command line: which trials, what folders tell of themselves, models made of that."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
import yaml
from transformers import AutoModelForCausalLM

from actors.preparation import prepare
from actors.scoring import Scorer
from actors.types import Allocation, Prepared, ReplicaSpec
from search.allocation_file import read_configuration, schema
from search.cli import main
from search.config import parse_config
from search.evaluations import Evaluations
from search.folder import CONFIG, PREPARED, StudyFolder, summarise
from search.records import Evaluation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def folder(root: Path) -> StudyFolder:
    """Trials 0 dense, 1 and 2 on the front, 3 failed; 1 was scored on the test split too."""
    raw = tiny.tiny_config(root, calibration={"tokens": 256}, scoring={"tokens": {"search": 128, "test": 64}})
    tiny_card = "---\nlicense: openrail\n---\n# A tiny model\n"
    (root / "model" / "README.md").write_text(tiny_card)
    (root / "model" / "LICENSE.txt").write_text("All of it.")
    config = parse_config(raw)
    *_, prepared = prepare(config.preparation())
    assert isinstance(prepared, Prepared)
    config.folder.mkdir(parents=True)
    (config.folder / CONFIG).write_text(config.to_yaml())
    (config.folder / PREPARED).write_text(json.dumps(prepared.to_dict()))
    made = StudyFolder.open(config.folder)
    scorer = Scorer(ReplicaSpec("r", config.preparation(), prepared, threads=1, device="cpu"))
    study = made.open_study()
    uniform = made.cost.uniform(0.6)
    allocations = [Allocation.dense(prepared.targets), made.cost.uniform(0.9), uniform]
    study.enqueue((allocation, "enqueued") for allocation in allocations)
    for allocation in allocations:
        planned = study.propose("random")
        assert planned.allocation == allocation
        study.complete(planned, scorer.score(allocation))
    study.fail(study.propose("random").number, "the replica was struck by lightning")
    test = scorer.score(allocations[1], "test")
    tested = Evaluation(1, "factors", "test", prepared.fingerprints["test"], test)
    Evaluations(made.path, study.rows()).add(tested, print)
    return made


def run(*arguments: object) -> int:
    """The command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rankfront", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def exported(folder: StudyFolder, root: Path) -> Path:
    assert run("export", folder.path, "--budget", "0.95", "--to", root / "budget") == 0
    return root / "budget"


def description(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((path / "ranks.yaml").read_text())
    return found


def test_a_budget_takes_the_least_loss_and_a_loss_the_fewest_parameters(
    folder: StudyFolder, exported: Path, tmp_path: Path
) -> None:
    rows = summarise(folder, folder.open_study()).rows
    nll = [row.score.text.nll if row.score else None for row in rows]
    assert description(exported)["trial"] == 1
    code = run("export", folder.path, "--max-nll", nll[2] + 1e-9, "--config-only", "--to", tmp_path / "loss")
    assert code == 0
    assert (
        description(tmp_path / "loss")["trial"]
        == min(
            (row for row in rows if row.score and row.score.text.nll <= nll[2] + 1e-9),
            key=lambda row: row.budget_model,
        ).number
    )


def test_the_whole_front_gets_a_folder_each(
    folder: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = summarise(folder, folder.open_study())
    members = [n for n in summary.front if not summary.rows[n].allocation.is_dense]
    assert members
    assert run("export", folder.path, "--all-front", "--config-only", "--to", tmp_path / "all") == 0
    found = {path.name: description(path)["trial"] for path in (tmp_path / "all").iterdir()}
    assert found == {f"trial-{number:05d}-config": number for number in members}
    (tmp_path / "all" / f"trial-{members[0]:05d}-config" / "ranks.json").unlink()
    assert run("export", folder.path, "--all-front", "--config-only", "--to", tmp_path / "all") == 2
    assert f"trial-{members[0]:05d}-config exists already" in capsys.readouterr().err


def test_the_front_goes_on_where_it_was_stopped_or_has_grown(
    folder: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there stays as it is; what a killed process left half-way is gone."""
    arguments = ("export", folder.path, "--all-front", "--to", tmp_path)
    assert run(*arguments) == 0
    first, last = sorted(tmp_path.iterdir())
    before = {file.name: file.stat().st_ino for file in first.iterdir()}
    shutil.rmtree(last)
    partial = tmp_path / f".{last.name}.partial"
    partial.mkdir()
    (partial / "model-00002.safetensors").write_bytes(b"half")
    (tmp_path / f".{last.name}.lock").touch()
    capsys.readouterr()
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert f"Trial {int(first.name[-5:])}: there already, in {first}/" in said
    assert f"Trial {int(last.name[-5:])} (" in said
    assert sorted(tmp_path.iterdir()) == [first, last]
    assert "model-00002.safetensors" not in [file.name for file in last.iterdir()]
    assert {file.name: file.stat().st_ino for file in first.iterdir()} == before


@pytest.mark.parametrize("changed", ["form", "ranks", "factors", "variant"])
def test_a_folder_of_another_model_is_not_passed_over(
    changed: str, folder: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before any other member is written."""
    arguments = ("export", folder.path, "--all-front", "--to", tmp_path)
    assert run("export", folder.path, "--trial", "2", "--to", tmp_path / "trial-00002") == 0
    told = description(tmp_path / "trial-00002")
    if changed == "form":
        arguments += ("--format", "dense")
    elif changed == "ranks":
        told["ranks"] |= dict.fromkeys([*told["ranks"]][:1], 1)
    elif changed == "variant":
        told["variant"] = "refined-0a1b2c3d"
    else:
        told["fingerprints"]["factors"] = "0" * 64
    (tmp_path / "trial-00002" / "ranks.yaml").write_text(yaml.safe_dump(told))
    capsys.readouterr()
    assert run(*arguments) == 2
    assert "trial-00002 exists already; name another folder with --to" in capsys.readouterr().err
    assert [place.name for place in tmp_path.iterdir()] == ["trial-00002"]


def test_a_file_gives_no_permission_to_run_code(folder: StudyFolder, tmp_path: Path) -> None:
    """It may come from anyone: only who runs the command gives it."""
    assert run("export", folder.path, "--trial", "2", "--config-only", "--to", tmp_path / "out") == 0
    file = tmp_path / "out" / "ranks.yaml"
    told = description(file.parent)
    file.write_text(yaml.safe_dump({**told, "model": {**told["model"], "trust_remote_code": True}}))
    for given in (False, True):
        overrides = {"model.trust_remote_code": True} if given else {}
        found = read_configuration(file, told["model"]["source"], overrides)
        assert found.config.model.trust_remote_code == given


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--trial", "3"), "--trial 3: it is FAIL: the replica was struck by lightning"),
        (("--trial", "9"), "--trial 9: the study has trials 0..3"),
        (("--trial", "-1"), "--trial -1: the study has trials 0..3"),
        (("--max-nll", "0.5"), "the front reaches down to"),
    ],
)
def test_what_cannot_be_exported_is_said_and_leaves_nothing(
    arguments: tuple[str, ...],
    says: str,
    folder: StudyFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("export", folder.path, *arguments, "--to", tmp_path / "new") == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_card_tells_where_the_model_comes_from_and_what_it_scores(
    folder: StudyFolder, exported: Path
) -> None:
    card = (exported / "README.md").read_text()
    front_matter = yaml.safe_load(card.split("---")[1])
    assert front_matter["license"] == "openrail"
    assert (exported / "LICENSE.txt").read_text() == "All of it."
    row = summarise(folder, folder.open_study()).rows[1]
    test = summarise(folder, folder.open_study()).test_score(1)
    assert row.score is not None
    assert test is not None
    for score in (row.score, test):
        for name, value in score.metrics.items():
            assert f"{value:.4f} ± {score.stderrs[name]:.4f}" in card
    assert f"{folder.cost.model_bytes(row.allocation):,} of the dense model's" in card
    assert f"{folder.prepared.model_parameters:,} ({row.budget_model:.1%})" in card
    assert "curvature, bias mean, float32" in card
    assert f"{folder.prepared.tokens['calibration']:,} tokens of text" in card
    assert f"rankfront export {folder.path} --trial 1" in card
    assert "rankfront apply ranks.yaml" in card
    assert "not smaller" not in card


def test_a_folder_is_checked_against_its_own_record(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "--check", exported) == 0
    said = capsys.readouterr().out
    assert "is the model that was written" in said
    assert "reasoning.arc_easy.acc on the search split" in said
    recorded = description(exported)["scores"]["search"]["nll"]
    assert f"{recorded:.6f} recorded" in said
    remembered = json.loads((exported / "check.json").read_text())
    for name in ("searched", "exact"):
        remembered[name][3][5] += 0.5
    other = _copy(exported, tmp_path / "logits")
    (other / "check.json").write_text(json.dumps(remembered))
    assert run("export", "--check", other) == 2
    assert "the reloaded logits differ by 0.5" in capsys.readouterr().err
    other = _copy(exported, tmp_path / "scores")
    told = description(exported)
    told["scores"]["search"]["nll"] *= 1.01
    (other / "ranks.yaml").write_text(yaml.safe_dump(told))
    assert run("export", "--check", other) == 2
    assert "nats/token reloaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("reasoning.acc", 0.9, r"reasoning\.acc is 0\.\d{6} reloaded, 0\.900000 recorded"),
        ("nll.mine", 2.5, r"nll\.mine is 2\.500000 recorded, and not measured"),
    ],
)
def test_every_recorded_metric_is_held(
    name: str, value: float, says: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = description(exported)
    recorded = told["scores"]["search"]
    assert name == "nll.mine" or recorded[name] < 0.5
    recorded[name] = value
    other = _copy(exported, tmp_path / "other")
    (other / "ranks.yaml").write_text(yaml.safe_dump(told))
    assert run("export", "--check", other) == 2
    captured = capsys.readouterr()
    assert re.search(says, " ".join(captured.err.split()))
    assert "is the model that was written" not in captured.out


def _copy(folder: Path, to: Path) -> Path:
    """The same files, linked, with the two records free to change."""
    to.mkdir()
    for file in folder.iterdir():
        if file.name in ("ranks.yaml", "check.json"):
            (to / file.name).write_bytes(file.read_bytes())
        else:
            (to / file.name).symlink_to(file)
    return to


def test_a_configuration_alone_keeps_the_published_schema(
    folder: StudyFolder, exported: Path, tmp_path: Path
) -> None:
    published = json.loads((ROOT / "docs" / "allocation.schema.json").read_text())
    assert published == json.loads(json.dumps(schema()))
    assert run("export", folder.path, "--trial", "1", "--config-only", "--to", tmp_path / "alone") == 0
    assert sorted(file.name for file in (tmp_path / "alone").iterdir()) == ["ranks.json", "ranks.yaml"]
    alone = json.loads((tmp_path / "alone" / "ranks.json").read_text())
    assert alone == description(tmp_path / "alone") == description(exported)
    jsonschema.validate(alone, published)
    for wrong in ({"format": "other"}, {"ranks": {"x": 0}}, {"storage": "packed"}, {"extra": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**alone, **wrong}, published)


def test_a_configuration_makes_the_same_model_again(
    folder: StudyFolder, exported: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the file alone, by another cache; the weights are those of the study's export."""
    arguments = (exported / "ranks.yaml", root / "model", "--to", tmp_path / "made")
    assert run("apply", *arguments, "--runs", tmp_path / "runs") == 0
    said = capsys.readouterr().out
    assert "other weights" not in said
    made, was = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "made", exported))
    assert made.config.layers == was.config.layers
    parameters = dict(was.named_parameters())
    for name, parameter in made.named_parameters():
        difference = (parameter - parameters[name]).abs().max()
        assert difference <= 1e-4 * parameters[name].abs().max(), name
    told = description(tmp_path / "made")
    assert told["trial"] == 1
    ranks = {name: rank for name, rank in description(exported)["ranks"].items() if rank is not None}
    assert told["ranks"] == ranks
    nll = description(exported)["scores"]["search"]["nll"]
    assert told["scores"]["search"]["nll"] == pytest.approx(nll, rel=1e-5)
    assert "budgets" not in told, "they were those of the other model, and would be of an edited file too"


@pytest.mark.parametrize("command", ["export", "check", "apply"])
def test_a_device_that_is_not_there_is_refused_before_the_work(
    command: str,
    folder: StudyFolder,
    exported: Path,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = {
        "export": ("export", folder.path, "--trial", "1", "--to", tmp_path / "new"),
        "check": ("export", "--check", exported),
        "apply": ("apply", exported / "ranks.yaml", root / "model", "--to", tmp_path / "new",
                  "--runs", tmp_path / "runs"),
    }[command]  # fmt: skip
    assert run(*arguments, "--device", "meta") == 2
    assert "--device meta: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_a_configuration_are_listed_at_once(
    exported: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = description(exported)
    told |= {"format": "rankfront-allocation-9", "colour": "red", "storage": "packed"}
    told["ranks"] = {"model.layers.0.self_attn.q_proj": "many"}
    told["methods"] = {"model.layers.0.self_attn.q_proj": "feture"}
    del told["text"]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(told))
    assert run("apply", tmp_path / "bad.yaml", root / "model", "--to", tmp_path / "new") == 2
    said = " ".join(capsys.readouterr().err.split())
    for mistake in (
        "colour: unknown key",
        "format: 'rankfront-allocation-9'",
        "methods.model.layers.0.self_attn.q_proj: 'feture': input should be 'weight', 'feature' or 'curv",
        "ranks.model.layers.0.self_attn.q_proj: 'many': input should be a valid integer",
        "storage: 'packed'",
        "text: missing",
        "6 mistakes",
    ):
        assert mistake in said
    told = description(exported) | {"ranks": {"model.layers.0.self_attn.q_proj": 33, "model.layers.7.x": 2}}
    (tmp_path / "unfit.yaml").write_text(yaml.safe_dump(told))
    assert run("apply", tmp_path / "unfit.yaml", root / "model", "--to", tmp_path / "new") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "unfit.yaml.model.layers.0.self_attn.q_proj: rank 33 is not an integer in 1..32" in said
    assert "'model.layers.7.x' is no target of this model" in said
    assert not (tmp_path / "new").exists()


def test_a_dense_folder_is_marked_as_not_smaller(
    folder: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", folder.path, "--trial", "2", "--format", "dense", "--to", tmp_path / "d") == 0
    assert "not smaller than the base model" in capsys.readouterr().out
    assert "**This folder is not smaller than the base model.**" in (tmp_path / "d" / "README.md").read_text()
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["rankfront"] == {"format": "dense", "smaller": False}
    assert run("export", "--check", tmp_path / "d") == 0
