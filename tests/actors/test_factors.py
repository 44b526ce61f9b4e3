"""The factor store: what it gives back, what it notices, what it leaves behind when it fails."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from actors.calibration import collect_moments
from actors.decompose import Moments, decompose
from actors.factors import FactorStore, build_store, store_fingerprint, store_problem
from actors.models import list_targets, load_model
from actors.types import FactorSpec, ModelSource, RankfrontError, TargetSpec

PARTS = {"model": "m", "tokenizer": "t", "calibration": "c", "search": "s", "test": "e"}
SPEC = FactorSpec()

Setting = tuple[nn.Module, tuple[TargetSpec, ...], dict[str, Moments]]


@pytest.fixture(scope="module")
def setting(biased_llama: Path, ids: torch.Tensor) -> Setting:
    model = load_model(biased_llama, ModelSource(str(biased_llama)))
    targets = list_targets(model)
    return model, targets, collect_moments(model, targets, ids)


def build(folder: Path, setting: Setting, spec: FactorSpec = SPEC, fingerprint: str = "print") -> FactorStore:
    model, targets, moments = setting
    build_store(folder, fingerprint, model, targets, moments, spec)
    return FactorStore(folder)


@pytest.mark.parametrize("method", ["feature", "weight"])
@pytest.mark.parametrize("bias", ["mean", "none"])
def test_what_is_stored_is_what_was_decomposed(
    method: str, bias: str, setting: Setting, tmp_path: Path
) -> None:
    model, targets, moments = setting
    store = build(tmp_path / "store", setting, FactorSpec(method, bias))
    assert store.targets == targets
    for target in targets:
        weight = model.get_submodule(target.name).weight.double()
        factors = decompose(target.name, weight, moments[target.name], method, bias)
        torch.testing.assert_close(store.energy(target.name), factors.energy, rtol=0, atol=0)
        for rank in (1, 5, target.full_rank):
            left, right, mean_bias = store.rank(target.name, rank)
            assert left.shape == (rank, target.rows)
            assert right.shape == (rank, target.cols)
            product = factors.left[:, :rank] @ factors.right[:rank]
            torch.testing.assert_close((left.T @ right).double(), product, rtol=0, atol=1e-5)
            if bias == "none":
                assert mean_bias is None
            else:
                expected = (weight - product) @ moments[target.name].input_mean
                assert mean_bias is not None
                torch.testing.assert_close(mean_bias.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close((left.T @ right).double(), weight, rtol=0, atol=1e-5)


def test_ranks_are_slices_of_one_another(setting: Setting, tmp_path: Path) -> None:
    store = build(tmp_path / "store", setting)
    for target in store.targets:
        left, right, _ = store.rank(target.name, target.full_rank)
        for rank in range(1, target.full_rank):
            left_r, right_r, _ = store.rank(target.name, rank)
            assert torch.equal(left_r, left[:rank])
            assert torch.equal(right_r, right[:rank])
            assert left_r.data_ptr() == left.data_ptr()  # a slice, not a copy


def test_energies_fall_and_are_kept_in_float64(setting: Setting, tmp_path: Path) -> None:
    store = build(tmp_path / "store", setting, FactorSpec(dtype="bfloat16"))
    for target in store.targets:
        energy = store.energy(target.name)
        assert energy.dtype == torch.float64
        assert energy.shape == (target.full_rank,)
        assert (energy.diff() <= 0).all()


def test_half_precision_halves_the_factors_and_stays_close(setting: Setting, tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", setting)
    half = build(tmp_path / "half", setting, FactorSpec(dtype="bfloat16"))
    for target in whole.targets:
        weight = setting[0].get_submodule(target.name).weight
        left, right, _ = half.rank(target.name, target.full_rank)
        assert left.dtype == right.dtype == torch.bfloat16
        difference = (left.T.float() @ right.float() - weight).norm() / weight.norm()
        assert difference < 2**-7  # two roundings of 2^-9 each, with room


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_whole_store_has_no_problem(setting: Setting, tmp_path: Path) -> None:
    build(tmp_path / "store", setting)
    assert store_problem(tmp_path / "store", "print") is None
    blocks = [f"block-{block:05d}.safetensors" for block in range(3)]
    assert files(tmp_path / "store") == [*blocks, "manifest.json"]
    assert files(tmp_path) == ["store"]


def flip_a_byte(folder: Path) -> None:
    file = folder / "block-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_a_byte(folder: Path) -> None:
    file = folder / "block-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def other_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": -1}))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_a_byte, "block-00001.safetensors fails its checksum"),
        (cut_a_byte, "block-00002.safetensors fails its checksum"),
        (lambda folder: (folder / "block-00000.safetensors").unlink(), "block-00000.safetensors is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "there is none"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\0" * 99), "its manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1, "fin'), "cannot be read"),
        (other_format, "its fingerprint is another's"),
    ],
)
def test_damage_is_noticed_and_built_over(
    damage: Callable[[Path], None], problem: str, setting: Setting, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    build(folder, setting)
    damage(folder)
    assert problem in (store_problem(folder, "print") or "")
    build(folder, setting)
    assert store_problem(folder, "print") is None


def test_another_fingerprint_and_no_store_at_all(setting: Setting, tmp_path: Path) -> None:
    build(tmp_path / "store", setting)
    assert store_problem(tmp_path / "store", "other") == "its fingerprint is another's"
    assert store_problem(tmp_path / "nowhere", "print") == "there is none"


def test_a_weight_that_is_no_number_leaves_nothing_behind(
    biased_llama: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load_model(biased_llama, ModelSource(str(biased_llama)))
    targets = list_targets(model)
    moments = collect_moments(model, targets, ids[:1])
    model.get_submodule("model.layers.2.mlp.up_proj").weight[3, 4] = torch.nan
    with pytest.raises(RankfrontError, match=r"model\.layers\.2\.mlp\.up_proj: 1 non-finite values"):
        build_store(tmp_path / "store", "print", model, targets, moments, SPEC)
    assert files(tmp_path) == []


def test_a_full_disk_is_said_and_leaves_nothing_behind(setting: Setting, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the same failing write, from the same libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RankfrontError, match=r"factor store .*/store: .*File too large"):
            build(tmp_path / "store", setting)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == []


def test_fingerprint_is_of_all_that_decides_the_factors(setting: Setting) -> None:
    targets = setting[1]
    base = store_fingerprint(PARTS, SPEC, targets)
    assert base == store_fingerprint({**PARTS, "search": "other", "test": "other"}, SPEC, targets)
    others = {
        **{part: store_fingerprint({**PARTS, part: "other"}, SPEC, targets) for part in [*PARTS][:3]},
        "method": store_fingerprint(PARTS, replace(SPEC, method="weight"), targets),
        "bias": store_fingerprint(PARTS, replace(SPEC, bias="none"), targets),
        "dtype": store_fingerprint(PARTS, replace(SPEC, dtype="bfloat16"), targets),
        "targets": store_fingerprint(PARTS, SPEC, targets[1:]),
    }
    assert len({base, *others.values()}) == 1 + len(others)
