"""The factor store: what it gives back, and what its fingerprint is of."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stores import MIXED, SPEC, Setting, build, names, one_block, setting_of, weight

from actors.decompose import decompose
from actors.factors import (
    FactorStore,
    needing_gradients,
    needing_spreads,
    refuse_idle_patterns,
    store_fingerprint,
    store_problem,
)
from actors.types import FactorSpec, RankfrontError, TargetSpec

PARTS = {"model": "m", "tokenizer": "t", "calibration": "c", "search": "s", "test": "e"}
MANY = [
    TargetSpec(f"layers.{block}.{module}", 8, 8, False, block, module)
    for block in range(4)
    for module in ("q_proj", "up_proj", "down_proj")
]


@pytest.fixture(scope="module")
def setting(biased_llama: Path, ids: torch.Tensor) -> Setting:
    return setting_of(biased_llama, ids)


@pytest.fixture(scope="module")
def few(setting: Setting) -> Setting:
    return one_block(setting)


def test_a_store_that_a_node_does_not_see_is_said(tmp_path: Path) -> None:
    """By a replica, on whichever node it is: it would end at the manifest."""
    here = re.escape(f"factor store {tmp_path}/elsewhere: node {platform.node()} sees no manifest.json")
    with pytest.raises(RankfrontError, match=f"^{here} there.* set runs or cache.factors to a folder that"):
        FactorStore(tmp_path / "elsewhere")


@pytest.mark.parametrize("method", ["feature", "weight", "curvature"])
@pytest.mark.parametrize("bias", ["mean", "none"])
def test_what_is_stored_is_what_was_decomposed(
    method: str, bias: str, setting: Setting, tmp_path: Path
) -> None:
    _, targets, moments = setting
    store = build(tmp_path / "store", setting, FactorSpec(method, bias=bias))
    assert store.targets == targets
    for target in targets:
        matrix = weight(setting, target).double()
        factors = decompose(target.name, matrix, moments[target.name], method, bias)
        assert torch.equal(store.energy(target.name), factors.energy)
        losses = store.loss(target.name)
        assert losses is not None
        assert factors.loss is not None
        assert torch.equal(losses, factors.loss)
        for rank in (1, 5, target.full_rank):
            left, right, mean_bias = store.rank(target.name, rank)
            assert left.shape == (rank, target.rows)
            assert right.shape == (rank, target.cols)
            assert left.is_contiguous()
            assert right.is_contiguous()
            product = factors.left[:, :rank] @ factors.right[:rank]
            torch.testing.assert_close((left.T @ right).double(), product, rtol=0, atol=1e-5)
            if bias == "none":
                assert mean_bias is None
            else:
                expected = (matrix - product) @ moments[target.name].input_mean
                assert mean_bias is not None
                torch.testing.assert_close(mean_bias.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close((left.T @ right).double(), matrix, rtol=0, atol=1e-5)


def test_ranks_are_slices_of_one_another(few: Setting, tmp_path: Path) -> None:
    store = build(tmp_path / "store", few)
    for target in store.targets:
        left, right, _ = store.rank(target.name, target.full_rank)
        for rank in range(1, target.full_rank):
            left_r, right_r, _ = store.rank(target.name, rank)
            assert torch.equal(left_r, left[:rank])
            assert torch.equal(right_r, right[:rank])
            assert left_r.data_ptr() == left.data_ptr()  # a slice, not a copy


@pytest.mark.parametrize("method", ["feature", "weight"])
def test_energies_fall_and_are_kept_in_float64(method: str, few: Setting, tmp_path: Path) -> None:
    store = build(tmp_path / "store", few, FactorSpec(method, dtype="bfloat16"))
    for target in store.targets:
        energy, losses = store.energy(target.name), store.loss(target.name)
        assert losses is not None
        assert energy.dtype == losses.dtype == torch.float64
        assert energy.shape == losses.shape == (target.full_rank,)
        assert (energy.diff() <= 0).all()


def test_half_precision_halves_the_factors_and_stays_close(few: Setting, tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", few)
    half = build(tmp_path / "half", few, FactorSpec("feature", dtype="bfloat16"))
    for target in whole.targets:
        matrix = weight(few, target)
        left, right, _ = half.rank(target.name, target.full_rank)
        assert left.dtype == right.dtype == torch.bfloat16
        difference = (left.T.float() @ right.float() - matrix).norm() / matrix.norm()
        assert difference < 2**-7  # two roundings of 2^-9 each, with room


def test_without_gradients_no_loss_is_stored(few: Setting, tmp_path: Path) -> None:
    model, targets, moments = few
    plain = {name: replace(found, gradient=None) for name, found in moments.items()}
    store = build(tmp_path / "store", (model, targets, plain))
    assert all(store.loss(target.name) is None for target in targets)


def test_every_target_has_a_file_for_each_of_its_methods(setting: Setting, tmp_path: Path) -> None:
    """The first pattern that fits names the method, the choices come on top, none of them twice."""
    store = build(tmp_path / "store", setting, MIXED)
    expected = {"manifest.json"}
    for target in setting[1]:
        name = target.name
        methods = {"feature", "weight"}
        if ".mlp." in name:
            methods = {"weight"} if name.endswith("up_proj") else {"curvature", "weight"}
        assert {*store.methods[name]} == methods
        expected |= {f"{name}.{method}.safetensors" for method in methods}
        configured = "weight" if name.endswith("up_proj") else "curvature" if ".mlp." in name else "feature"
        for method in (None, *methods):
            factors = decompose(
                name, weight(setting, target), setting[2][name], method or configured, MIXED.bias
            )
            left, right, _ = store.rank(name, 3, method)
            found = (left.T @ right).double()
            torch.testing.assert_close(found, factors.left[:, :3] @ factors.right[:3], rtol=0, atol=1e-5)
            assert torch.equal(store.energy(name, method), factors.energy)
            losses = store.loss(name, method)
            assert losses is not None
            assert torch.equal(losses, factors.loss)
    assert {*names(tmp_path / "store")} == expected


def test_a_method_that_is_not_held_is_refused_by_name(setting: Setting, tmp_path: Path) -> None:
    store = build(tmp_path / "store", setting, MIXED)
    query = "model.layers.0.self_attn.q_proj"
    with pytest.raises(RankfrontError, match=rf"{query} has factors by feature, weight, not curvature"):
        store.rank(query, 2, "curvature")


def test_gradients_of_all_are_measured_where_some_method_is_curvature(setting: Setting) -> None:
    """Then every loss is predicted: seeds and sampler need those of targets that are cut by others too."""
    targets = setting[1]
    everywhere = {target.name for target in targets}
    assert {MIXED.method_of(name) for name in everywhere} > {"curvature"}
    assert {*needing_gradients(MIXED, targets)} == everywhere
    assert needing_gradients(SPEC, targets) == ()
    assert {*needing_gradients(replace(SPEC, choices=("curvature",)), targets)} == everywhere


def test_spreads_are_needed_where_some_method_is_feature(setting: Setting) -> None:
    targets = setting[1]
    everywhere = {target.name for target in targets}
    assert {*needing_spreads(SPEC, targets)} == everywhere
    assert needing_spreads(replace(SPEC, method="curvature"), targets) == ()
    assert {*needing_spreads(replace(SPEC, method="weight", choices=("feature",)), targets)} == everywhere
    assert {*needing_spreads(MIXED, targets)} < everywhere


def test_the_manifest_says_what_is_there(setting: Setting, tmp_path: Path) -> None:
    build(tmp_path / "store", setting, replace(MIXED, bias="none", dtype="bfloat16"))
    assert store_problem(tmp_path / "store", "print") is None
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert (manifest["fingerprint"], manifest["bias"], manifest["dtype"]) == ("print", "none", "bfloat16")
    assert [target["name"] for target in manifest["targets"]] == [target.name for target in setting[1]]
    for name, entry in manifest["files"].items():
        assert name == f"{entry['target']}.{entry['method']}.safetensors"
        assert entry["bytes"] == (tmp_path / "store" / name).stat().st_size
    assert names(tmp_path) == ["store", "store.lock"]


def test_fingerprint_is_of_all_that_decides_the_factors(setting: Setting) -> None:
    targets, spec = setting[1], FactorSpec("curvature")
    base = store_fingerprint(PARTS, spec, "sampled", targets)
    one = targets[5].name
    others = {
        **{
            part: store_fingerprint({**PARTS, part: "other"}, spec, "sampled", targets)
            for part in [*PARTS][:3]
        },
        "labels": store_fingerprint(PARTS, spec, "data", targets),
        "method": store_fingerprint(PARTS, replace(spec, method="weight"), "sampled", targets),
        "one": store_fingerprint(PARTS, replace(spec, methods=((one, "weight"),)), "sampled", targets),
        "choices": store_fingerprint(PARTS, replace(spec, choices=("weight",)), "sampled", targets),
        "bias": store_fingerprint(PARTS, replace(spec, bias="none"), "sampled", targets),
        "dtype": store_fingerprint(PARTS, replace(spec, dtype="bfloat16"), "sampled", targets),
        "targets": store_fingerprint(PARTS, spec, "sampled", targets[1:]),
    }
    assert len({base, *others.values()}) == 1 + len(others)


def test_fingerprint_is_of_nothing_else(setting: Setting) -> None:
    targets, spec = setting[1], FactorSpec("curvature")
    base = store_fingerprint(PARTS, spec, "sampled", targets)
    same = [
        store_fingerprint({**PARTS, "search": "other", "test": "other"}, spec, "sampled", targets),
        # other words for the same methods
        store_fingerprint(PARTS, replace(spec, choices=("curvature",)), "sampled", targets),
        store_fingerprint(PARTS, FactorSpec("weight", methods=(("*", "curvature"),)), "sampled", targets),
        store_fingerprint(PARTS, replace(spec, methods=(("*.no_such", "weight"),)), "sampled", targets),
    ]
    assert {*same} == {base}
    # labels decide nothing where no gradient is used
    plain = [store_fingerprint(PARTS, SPEC, labels, targets) for labels in ("sampled", "data")]
    assert plain[0] == plain[1]


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ([], []),
        (["*.q_proj", "layers.0.*", "*"], []),
        (["*.q_porj"], ["'*.q_porj' fits no target of this model (layers.0.q_proj, "]),
        (["*.q_proj", "*.K_PROJ", "k_proj"], ["'*.K_PROJ' fits no target", "'k_proj' fits no target"]),
        (["*", "*.q_proj"], ["patterns before '*.q_proj' fit all of its targets"]),
        (["layers.0.*", "layers.[1-3].*", "*.up_proj"], ["patterns before '*.up_proj' fit"]),
        (["layers.0.*", "layers.[12].*", "*.up_proj"], []),  # layers.3.up_proj is left to it
        (["*.x", "*", "*.y", "*.q_proj"], ["'*.x'", "'*.y'", "'*.q_proj'"]),
    ],
)
def test_patterns_that_decide_nothing_are_refused(patterns: list[str], says: list[str]) -> None:
    if not says:
        refuse_idle_patterns(patterns, MANY)
        return
    with pytest.raises(RankfrontError) as caught:
        refuse_idle_patterns(patterns, MANY)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(says)
    assert all(word in line for word, line in zip(says, lines, strict=True)), lines
