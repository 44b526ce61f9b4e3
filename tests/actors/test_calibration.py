"""Moments against numpy on inputs and gradients captured apart, by hooks and by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from captured import (
    Labels,
    Setting,
    all_groups,
    captured,
    close,
    drawn,
    of_the_data,
    same,
    setting_of,
    weight,
)
from scipy.stats import chisquare
from torch import nn

from actors.calibration import _draw, collect, collect_moments, finished
from actors.moments import merge
from actors.planning import plan
from actors.types import RankfrontError, TargetSpec


@pytest.fixture
def tiny_setting(llama: Path) -> Setting:
    return setting_of(llama)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its linear layers store W^T and have biases."""
    return tiny.tiny_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.mark.parametrize("which", ["llama", "biased_llama", "gpt2"])
@pytest.mark.parametrize(("labels", "reference"), [("data", of_the_data), ("sampled", drawn)])
def test_moments_are_those_of_what_flows_through(
    which: str, labels: str, reference: Labels, ids: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    setting = setting_of(request.getfixturevalue(which))
    moments = collect_moments(setting.model, setting.targets, ids, setting.names, labels)
    seen = captured(setting, ids, reference)
    assert [*moments] == setting.names
    sides = set()
    for target in setting.targets:
        found, matrix = moments[target.name], weight(setting.model.get_submodule(target.name))
        mean, covariance = seen[target.name].spread(found.side)
        gradient, weighted_mean, weighted = seen[target.name].curvature(matrix)
        sides.add((target.module, found.side))
        assert found.tokens == ids.numel()
        assert found.spread is not None
        assert found.weighted is not None
        close(found.spread.mean, mean, 1e-5)
        close(found.input_mean, seen[target.name].inputs.mean(0), 1e-5)
        close(found.spread.covariance, covariance, 1e-5)
        close(found.gradient, gradient, 1e-4)
        close(found.weighted.mean, weighted_mean, 1e-4)
        close(found.weighted.covariance, weighted, 1e-4)
    # only the way down is wider than tall and shares its input with no layer that is not
    down = {"mlp.c_proj"} if which == "gpt2" else {"mlp.down_proj"}
    assert {module for module, side in sides if side == "output"} == down


def test_gradients_are_measured_where_they_are_asked_for_only(
    tiny_setting: Setting, ids: torch.Tensor
) -> None:
    """A mixture of methods: some targets, from the second block on, two of three that read one input."""
    asked = [n for n in tiny_setting.names if ".0." not in n and n.endswith(("k_proj", "v_proj", "up_proj"))]
    everything = collect_moments(tiny_setting.model, tiny_setting.targets, ids, tiny_setting.names, "data")
    expected = {
        name: moments if name in asked else replace(moments, gradient=None, weighted=None)
        for name, moments in everything.items()
    }
    found = collect_moments(tiny_setting.model, tiny_setting.targets, ids, asked, "data")
    same(found, expected, 1e-6)


def test_spreads_are_measured_where_they_are_asked_for_only(tiny_setting: Setting, ids: torch.Tensor) -> None:
    """Curvature alone needs none; a method beside it, or beside none, may."""
    model, targets, names = tiny_setting.model, tiny_setting.targets, tiny_setting.names
    asked = [name for name in names if name.endswith(("k_proj", "down_proj"))]
    made = plan(model, targets, ids, names[3:], float("inf"), asked)
    found = finished(collect(model, targets, ids, made, names[3:], "data", spreads=asked))
    held = [spread for each in found.values() for spread in (each.spread, each.weighted, each.weighted)]
    assert made.moments == sum(spread.covariance.nbytes for spread in held if spread is not None)
    everything = collect_moments(model, targets, ids, names, "data")
    for name in names:
        one, whole = found[name], everything[name]
        close(one.input_mean, whole.input_mean.numpy(), 1e-6)
        assert (one.spread is None) == (name not in asked)
        assert (one.weighted is None) == (name not in names[3:])
        if one.spread is not None:
            matrix = torch.from_numpy(weight(model.get_submodule(name)))
            close(one.second(matrix, "none"), whole.second(matrix, "none").numpy(), 1e-5)
        if one.weighted is not None:
            close(one.weighted.covariance, whole.weighted.covariance.numpy(), 1e-6)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_how_batches_are_computed_does_not_show(
    gradients: bool, rows: int, checkpointed: bool, tiny_setting: Setting, ids: torch.Tensor
) -> None:
    """One window at a time, a remainder of two, all at once; activations kept or computed again."""
    ids = ids[:8]
    names = tiny_setting.names if gradients else []
    made = plan(tiny_setting.model, tiny_setting.targets, ids, names, float("inf"))
    assert not made.checkpointed or not gradients
    expected = all_groups(tiny_setting, ids, made, names, "sampled")
    found = all_groups(
        tiny_setting, ids, replace(made, rows=rows, checkpointed=checkpointed), names, "sampled"
    )
    same(found, expected, 1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("model_type", "settings"), [("falcon", {}), ("olmo", {"clip_qkv": 0.3})])
def test_outputs_that_a_model_changes_in_place_count_as_they_were(
    model_type: str, settings: dict[str, float], checkpointed: bool, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Falcon adds its attention to what leaves the MLP; OLMo clamps queries, keys and values."""
    setting = setting_of(tiny.tiny_model(tmp_path, model_type, **settings))
    made = plan(setting.model, setting.targets, ids, setting.names, float("inf"))
    found = all_groups(setting, ids, replace(made, checkpointed=checkpointed), setting.names, "data")
    seen = captured(setting, ids, of_the_data)
    for name in setting.names:
        moments = found[name].weighted
        assert moments is not None
        expected = seen[name].curvature(weight(setting.model.get_submodule(name)))
        close(moments.mean, expected[1], 1e-4)
        close(moments.covariance, expected[2], 1e-4)


def test_checkpointing_computes_the_blocks_again(tiny_setting: Setting, ids: torch.Tensor) -> None:
    made = plan(tiny_setting.model, tiny_setting.targets, ids, tiny_setting.names, float("inf"))
    for checkpointed, calls in ((False, 1), (True, 2)):
        counts = counting(tiny_setting.model.model.layers[1].mlp)
        all_groups(tiny_setting, ids, replace(made, rows=24, checkpointed=checkpointed), tiny_setting.names)
        assert counts() == calls


def counting(module: nn.Module) -> Callable[[], int]:
    """Calls of a module from now until the result is asked for."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))

    def count() -> int:
        handle.remove()
        return len(calls)

    return count


@pytest.mark.parametrize("cuts", [[8, 16], [1], [23], [5, 6, 7]], ids=str)
def test_shards_add_up_to_the_whole(cuts: list[int], tiny_setting: Setting, ids: torch.Tensor) -> None:
    """With labels drawn: those of a window depend on its place in the text, not on who draws them."""
    model, targets, names = tiny_setting.model, tiny_setting.targets, tiny_setting.names
    made = replace(plan(model, targets, ids, names, float("inf")), rows=3)
    parts, first = [], 0
    for shard in torch.tensor_split(ids, cuts):
        parts.append(finished(collect(model, targets, shard, made, names, "sampled", first)))
        first += len(shard)
    found = {name: merge([part[name] for part in parts]) for name in tiny_setting.names}
    same(found, collect_moments(model, targets, ids, names, "sampled"), 1e-5)


def test_sampled_labels_are_the_same_each_time_and_not_the_datas(
    tiny_setting: Setting, ids: torch.Tensor
) -> None:
    model, targets, names = tiny_setting.model, tiny_setting.targets, tiny_setting.names
    first = collect_moments(model, targets, ids, names, "sampled")
    torch.manual_seed(7)  # nobody else's randomness matters
    again = collect_moments(model, targets, ids, names, "sampled")
    for name in names:
        assert torch.equal(first[name].gradient, again[name].gradient)
    data = collect_moments(model, targets, ids, names, "data")
    for name in names:
        assert (first[name].gradient - data[name].gradient).norm() > 0.1 * data[name].gradient.norm()


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    likely = torch.tensor([0.5, 0.0, 0.25, 0.2, 0.05, 0.0])
    tokens = torch.cat([_draw(likely.expand(500, -1), seed) for seed in range(40)])
    counts = np.bincount(tokens.numpy(), minlength=6)
    assert counts[1] == counts[5] == 0
    kept = likely.numpy() > 0
    assert chisquare(counts[kept], likely.double().numpy()[kept] * len(tokens)).pvalue > 1e-3


def test_each_token_is_drawn_from_its_own_row_and_each_window_anew() -> None:
    rows = torch.eye(100)[torch.randperm(100)]
    assert torch.equal(_draw(rows, 3), rows.argmax(1))
    flat = torch.full((200, 50), 1 / 50)
    assert (_draw(flat, 0) != _draw(flat, 1)).float().mean() > 0.9
    assert torch.equal(_draw(flat, 1), _draw(flat, 1))


def test_layers_whose_outputs_are_all_smaller_keep_those(tiny_setting: Setting, ids: torch.Tensor) -> None:
    """Keys and values without the queries: 16 outputs of 32 inputs, whoever of them leads."""
    for chosen in (tiny_setting.called("k_proj", "v_proj"), tiny_setting.called("v_proj")):
        alone = Setting(tiny_setting.model, chosen)
        moments, seen = collect_moments(alone.model, chosen, ids), captured(alone, ids)
        for target in chosen:
            found = moments[target.name]
            mean, covariance = seen[target.name].spread("output")
            assert found.side == "output"
            assert found.spread is not None
            close(found.spread.mean, mean, 1e-5)
            close(found.spread.covariance, covariance, 1e-5)
            close(found.input_mean, seen[target.name].inputs.mean(0), 1e-5)


def test_a_pass_without_gradients_ends_at_its_last_target(tiny_setting: Setting, ids: torch.Tensor) -> None:
    blocks = tiny_setting.model.model.layers
    chosen = [target for target in tiny_setting.targets if target.block < 2][:-1]
    made = plan(tiny_setting.model, chosen, ids, (), float("inf"))
    counts = [counting(module) for module in (blocks[1], blocks[1].mlp.down_proj, blocks[2])]
    finished(collect(tiny_setting.model, chosen, ids, replace(made, rows=24)))
    assert [count() for count in counts] == [1, 0, 0]


def untouched(model: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(
        "forward" in vars(module) or any(getattr(module, kind) for kind in kinds)
        for module in model.modules()
    )


@pytest.mark.parametrize("gradients", [False, True])
def test_the_model_is_left_as_it_was(gradients: bool, tiny_setting: Setting, ids: torch.Tensor) -> None:
    model, targets = tiny_setting.model, tiny_setting.targets
    with torch.no_grad():
        before = model(ids[:2]).logits
    names = tiny_setting.names if gradients else []
    made = replace(plan(model, targets, ids, names, float("inf")), rows=1, checkpointed=True)
    assert untouched(model)
    finished(collect(model, targets, ids[:1], made, names))
    assert untouched(model)
    steps = collect(model, targets, ids, made, names)
    next(steps)
    assert not untouched(model)  # the check is worth something
    steps.close()
    assert untouched(model)
    with torch.no_grad():
        assert torch.equal(model(ids[:2]).logits, before)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("module", ["self_attn.v_proj", "mlp.down_proj"])
@pytest.mark.parametrize("several", [False, True])
def test_a_weight_that_is_no_number_is_named_and_nothing_stays_behind(
    module: str, several: bool, tiny_setting: Setting, ids: torch.Tensor
) -> None:
    """Also while the moments of an earlier group are measured: every pass needs the whole model."""
    model, targets, names = tiny_setting.model, tiny_setting.targets, tiny_setting.names
    made = replace(plan(model, targets, ids, names, float("inf")), checkpointed=True)
    chosen = targets[:3] if several else targets
    model.get_submodule(f"model.layers.1.{module}").weight[3, 4] = torch.nan
    for labels in ("data", "sampled"):
        with pytest.raises(RankfrontError, match=rf"model\.layers\.1\.{module}: 1 non-finite .* weight"):
            finished(collect(model, chosen, ids, made, names, labels))
        assert untouched(model)


def test_other_weights_that_are_no_numbers_name_the_first_target_that_reads_them(
    tiny_setting: Setting, ids: torch.Tensor
) -> None:
    model = tiny_setting.model
    model.model.layers[1].post_attention_layernorm.weight[0] = torch.inf
    with pytest.raises(RankfrontError, match=r"model\.layers\.1\.mlp\.gate_proj: .* in its input on the cal"):
        collect_moments(model, tiny_setting.targets, ids, tiny_setting.names)
    model.model.layers[1].post_attention_layernorm.weight[0] = 1
    model.model.norm.weight[0] = torch.nan
    with pytest.raises(RankfrontError, match="the logits are not finite"):
        collect_moments(model, tiny_setting.targets, ids, tiny_setting.names)


class Embedded(nn.Module):
    """One decoder block that is a linear layer on a table of given inputs."""

    def __init__(self, table: torch.Tensor, out: int) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList([nn.Linear(table.shape[1], out, bias=False)])

    def forward(self, ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.layers[0](self.table(ids)))


def test_means_far_beyond_the_deviation_do_not_cancel() -> None:
    """A few activations of real models are hundreds of times their deviation."""
    chance = np.random.default_rng(0)
    table = chance.normal(size=(64, 6)) * [1e-2, 1, 1, 1, 1, 5] + [3e3, -2e3, 500, 0, 0, 0]
    model = Embedded(torch.tensor(table, dtype=torch.float32), 8).requires_grad_(False)
    ids = torch.from_numpy(chance.integers(0, 64, size=(32, 16)))
    target = TargetSpec("layers.0", rows=8, cols=6, bias=False, block=0, module="")
    found = collect_moments(model, [target], ids)["layers.0"]
    rows = model.table.weight.double().numpy()[ids.flatten().numpy()]
    expected = np.cov(rows.T, bias=True)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    # float32 leaves 3000 in steps of 2.4e-4 and the mean is taken off in float32: a step, squared away
    assert (np.abs(found.spread.covariance.numpy() - expected) / scale).max() < 1e-4
    np.testing.assert_allclose(found.spread.mean.numpy(), rows.mean(0), rtol=1e-7, atol=1e-6)


def test_a_model_that_cannot_keep_its_last_logits_alone_is_not_asked_to(
    tiny_setting: Setting, ids: torch.Tensor
) -> None:
    """As code that came with a model before transformers had a name for it."""
    model, targets = tiny_setting.model, tiny_setting.targets
    expected = collect_moments(model, targets, ids)
    known = model.forward
    model.forward = lambda input_ids, use_cache: known(input_ids, use_cache=use_cache)
    same(collect_moments(model, targets, ids), expected, 0.0)
