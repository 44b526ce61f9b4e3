"""What one node prepared, used on another that has none of it: the same model, factors and scores."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tiny
from counted import Counted

import actors.builder
import actors.resident
from actors.models import fingerprint
from actors.node_cache import is_published, local_store
from actors.preparation import prepare
from actors.resident import local_source, resident
from actors.scoring import Scorer
from actors.types import (
    Allocation,
    ModelSource,
    PreparationSpec,
    Prepared,
    Progress,
    RankfrontError,
    ReplicaSpec,
)
from search.config import Config, parse_config
from search.folder import StudyFolder
from search.spectra import losses


class Site:
    """A storage that all nodes reach by URL, and nodes that share nothing else."""

    def __init__(self, root: Path) -> None:
        self.root, self.remote = root, root / "remote"
        tiny.tiny_config(self.remote)

    def config(self, node: str) -> Config:
        """A study without tasks, as a node with a home of its own sees it."""
        raw = tiny.tiny_config(
            self.remote,
            runs=str(self.root / node / "runs"),
            model={"source": f"counted://{self.remote / 'model'}"},
            scoring={"tasks": []},
            cache={
                "factors": f"counted://{self.remote / 'factors'}",
                "node": str(self.root / node / "cache"),
            },
        )
        return parse_config(raw)

    def spec(self, node: str) -> PreparationSpec:
        return self.config(node).preparation()

    def fetched(self) -> list[str]:
        """Every transfer so far, `get` or `put` and the name of the file."""
        lines = (self.root / "log").read_text().splitlines()
        return [f"{kind} {Path(path).name}" for kind, path in (line.split(" ", 1) for line in lines)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("site")
    fsspec.register_implementation("counted", Counted, clobber=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(Counted.LOG, str(root / "log"))
        Counted.clear_instance_cache()
        yield Site(root)


@pytest.fixture(scope="module")
def prepared(site: Site) -> Prepared:
    *_, last = prepare(site.spec("first"))
    assert isinstance(last, Prepared)
    return last


def score(spec: PreparationSpec, prepared: Prepared) -> float:
    scorer = Scorer(ReplicaSpec("r", spec, prepared, threads=1, device="cpu"))
    ranks = {target.name: target.full_rank // 2 for target in prepared.targets}
    return scorer.score(Allocation.of(ranks, prepared.targets)).text.nll


def test_a_preparation_leaves_its_factors_at_the_url(site: Site, prepared: Prepared) -> None:
    assert prepared.factor_store == (
        f"counted://{site.remote / 'factors'}/{prepared.fingerprints['factors'][:16]}"
    )
    assert f"put {prepared.targets[0].name}.curvature.safetensors" in site.fetched()
    assert not (site.root / "first" / "runs").exists()
    plain = fingerprint(ModelSource(str(site.remote / "model")))
    assert prepared.fingerprints["model"] == plain, "the same model, whatever it is named by"


def test_another_node_scores_alike_from_copies_that_are_made_once(site: Site, prepared: Prepared) -> None:
    here = score(site.spec("first"), prepared)
    before = len(site.fetched())
    elsewhere = replace(prepared, model_folder="/a/folder/of/another/node")
    assert score(site.spec("second"), elsewhere) == here
    new = site.fetched()[before:]
    assert len(new) == len(set(new)) > len(prepared.targets)
    assert score(site.spec("second"), elsewhere) == here
    assert len(site.fetched()) == before + len(new)


def test_a_builder_on_another_node_takes_the_factors_that_are_there(site: Site, prepared: Prepared) -> None:
    steps = list(prepare(site.spec("third")))
    again = steps[-1]
    assert isinstance(again, Prepared)
    assert again.reused
    assert again.factor_store == prepared.factor_store
    assert f"factor store: copying {prepared.factor_store}" in steps
    assert not [step for step in steps if isinstance(step, Progress)]


def test_factors_that_are_gone_from_the_url_are_put_there_again(site: Site, prepared: Prepared) -> None:
    folder = Path(prepared.factor_store.removeprefix("counted://"))
    shutil.rmtree(folder)
    *_, again = prepare(site.spec("first"))
    assert isinstance(again, Prepared)
    assert again.reused
    assert local_store(prepared.factor_store, site.root / "fourth").is_dir()


def test_a_damaged_copy_is_made_again(site: Site, prepared: Prepared) -> None:
    spec = site.spec("fifth")
    file = local_store(prepared.factor_store, Path(spec.node_cache)) / (
        f"{prepared.targets[0].name}.curvature.safetensors"
    )
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    *_, again = prepare(spec)
    assert isinstance(again, Prepared)
    assert again.reused
    assert file.read_bytes() == whole


def test_a_copy_that_another_study_made_meanwhile_is_left_to_it(
    site: Site, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = site.spec("sixth")
    found: list[Path] = []

    def overtaken(place: str) -> bool:
        """The other finishes its copy while this one waits for the network."""
        if not found:
            found.append(local_store(place, Path(spec.node_cache)))
            (found[0] / "of the other").touch()
        return is_published(place)

    monkeypatch.setattr(actors.builder, "is_published", overtaken)
    *_, again = prepare(spec)
    assert isinstance(again, Prepared)
    assert again.reused
    assert (found[0] / "of the other").exists()


def test_the_driver_reads_predicted_losses_from_a_copy(site: Site, prepared: Prepared) -> None:
    config = site.config("head")
    folder = StudyFolder(config.folder, config, prepared)
    assert folder.factor_store.is_relative_to(site.root / "head" / "cache")
    assert losses(folder.factor_store).keys() == {target.name for target in prepared.targets}


def test_a_model_that_became_another_one_is_refused(site: Site, prepared: Prepared) -> None:
    known = {**prepared.fingerprints, "model": "another"}
    elsewhere = replace(prepared, model_folder="/a/folder/of/another/node", fingerprints=known)
    with pytest.raises(RankfrontError, match=r"^counted://.*: no longer the model that the study was"):
        resident(site.spec("sixth"), elsewhere)


def test_a_hub_model_is_brought_at_the_commit_it_was_prepared_with(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its folder is there: a download that was cut short left it."""
    asked = []

    def download(hub_id: str, revision: str) -> Path:
        asked.append((hub_id, revision))
        return tmp_path / "snapshots" / revision

    monkeypatch.setattr(actors.resident, "download", download)
    spec = replace(Site(tmp_path).spec("node"), model=ModelSource("org/model@main"), shared=None)
    cut = tmp_path / "snapshots" / "c0ffee"
    cut.mkdir(parents=True)
    here = replace(prepared, model_folder=str(cut), factor_store=str(tmp_path))
    assert resident(spec, here) == here
    assert asked == [("org/model", "c0ffee")]


def test_what_is_here_is_used_as_it_is(llama: Path, tmp_path: Path, prepared: Prepared) -> None:
    spec = replace(Site(tmp_path).spec("node"), model=ModelSource(str(llama)), shared=None)
    known = {**prepared.fingerprints, "model": fingerprint(spec.model)}
    here = replace(prepared, model_folder=str(llama), factor_store=str(tmp_path), fingerprints=known)
    assert resident(spec, here) == here
    assert local_source(spec) == spec.model


def test_another_model_in_the_same_place_on_a_node_is_refused(
    llama: Path, tmp_path: Path, prepared: Prepared
) -> None:
    """Its weights would be scored with the factors of the study's."""
    spec = replace(Site(tmp_path).spec("node"), model=ModelSource(str(llama)), shared=None)
    known = {**prepared.fingerprints, "model": "that of the other nodes"}
    here = replace(prepared, model_folder=str(llama), factor_store=str(tmp_path), fingerprints=known)
    with pytest.raises(RankfrontError, match="no longer the model that the study was prepared with"):
        resident(spec, here)
