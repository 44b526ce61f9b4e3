"""What a plan of the calibration counts, and that no plan changes the moments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from captured import Setting, close, setting_of, weight
from transformers import MambaConfig, MambaForCausalLM

from actors.calibration import collect, collect_moments, finished
from actors.models import list_targets
from actors.planning import plan
from actors.types import BuildPlan, RankfrontError, TargetSpec


@pytest.fixture
def tiny_setting(llama: Path) -> Setting:
    return setting_of(llama)


@pytest.fixture(scope="module")
def least(llama: Path, ids: torch.Tensor) -> dict[bool, int]:
    """The least bytes a plan fits into, without and with gradients."""
    setting = setting_of(llama)
    return {False: least_memory(setting, ids, ()), True: least_memory(setting, ids, setting.names)}


def least_memory(setting: Setting, ids: torch.Tensor, gradients: Sequence[str]) -> int:
    low, high = 0, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan(setting.model, setting.targets, ids, gradients, middle)
        except RankfrontError:
            low = middle
        else:
            high = middle
    return high


@pytest.mark.parametrize("gradients", [False, True])
def test_little_memory_takes_more_passes_to_the_same_moments(
    gradients: bool, least: dict[bool, int], tiny_setting: Setting, ids: torch.Tensor
) -> None:
    model, targets, ids = tiny_setting.model, tiny_setting.targets, ids[:4]
    names = tiny_setting.names if gradients else []
    made = plan(model, targets, ids, names, least[gradients])
    assert len(made.groups) > 3
    assert [name for group in made.groups for name in group] == tiny_setting.names
    assert made.rows == 1
    found = collect_moments(model, targets, ids, names, "sampled", least[gradients])
    expected = collect_moments(model, targets, ids, names, "sampled")
    for target in targets:
        one, other = found[target.name], expected[target.name]
        # Keys and values keep their outputs where no pass shares the queries' inputs: what counts is equal.
        matrix = torch.from_numpy(weight(model.get_submodule(target.name)))
        for bias in ("mean", "none"):
            close(one.second(matrix, bias), other.second(matrix, bias).numpy(), 1e-5)
            close(one.weighted_second(matrix, bias), other.weighted_second(matrix, bias).numpy(), 1e-5)
        close(one.input_mean, other.input_mean.numpy(), 1e-5)
        assert one.tokens == other.tokens
        assert (one.gradient is None) == (not gradients)
        if other.gradient is not None:
            close(one.gradient, other.gradient.numpy(), 1e-5)


@pytest.mark.parametrize("gradients", [False, True])
def test_more_memory_never_takes_more_passes(
    gradients: bool, least: dict[bool, int], tiny_setting: Setting, ids: torch.Tensor
) -> None:
    names = tiny_setting.names if gradients else []
    budgets = [least[gradients] * (1 + step / 20) for step in range(60)]
    made = [plan(tiny_setting.model, tiny_setting.targets, ids, names, memory) for memory in budgets]
    passes = [len(each.groups) for each in made]
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == 1
    assert plan(tiny_setting.model, tiny_setting.targets, ids, names, float("inf")).rows > 1


@pytest.mark.parametrize("gradients", [False, True])
def test_too_little_memory_says_how_much_is_enough(
    gradients: bool, least: dict[bool, int], tiny_setting: Setting, ids: torch.Tensor
) -> None:
    names = tiny_setting.names if gradients else []
    with pytest.raises(RankfrontError, match=r"calibration\.memory_gb: .* is too small") as caught:
        plan(tiny_setting.model, tiny_setting.targets, ids, names, least[gradients] - 1)
    [enough] = re.findall(r"need (\S+)", str(caught.value))
    assert least[gradients] <= float(enough) * 1e9 < 1.02 * least[gradients]
    plan(tiny_setting.model, tiny_setting.targets, ids, names, float(enough) * 1e9)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_a_plan_counts_the_moments_that_are_held(
    gradients: bool, share: float, least: dict[bool, int], tiny_setting: Setting, ids: torch.Tensor
) -> None:
    """Bytes of the distinct matrices of the largest group; vectors are not worth counting."""
    names = tiny_setting.names if gradients else []
    everything = plan(tiny_setting.model, tiny_setting.targets, ids, names, float("inf")).moments
    memory = least[gradients] + share * everything
    made = plan(tiny_setting.model, tiny_setting.targets, ids, names, memory)
    held = []
    for group in made.groups:
        chosen = [target for target in tiny_setting.targets if target.name in group]
        moments = finished(collect(tiny_setting.model, chosen, ids[:1], made, names, "data"))
        spreads = [s for each in moments.values() for s in (each.spread, each.weighted) if s is not None]
        matrices = [spread.covariance for spread in spreads]
        matrices += [each.gradient for each in moments.values() if each.gradient is not None]
        held.append(sum({tensor.data_ptr(): tensor.nbytes for tensor in matrices}.values()))
    assert made.moments == max(held)
    assert made.moments + made.activations <= memory


def test_layers_that_read_one_tensor_share_its_moments(tiny_setting: Setting, ids: torch.Tensor) -> None:
    made = plan(tiny_setting.model, tiny_setting.targets, ids, (), float("inf"))
    expected = {}
    for block in range(3):
        for leader, followers in {
            "self_attn.q_proj": ("q_proj", "k_proj", "v_proj"),
            "self_attn.o_proj": ("o_proj",),
            "mlp.gate_proj": ("gate_proj", "up_proj"),
            "mlp.down_proj": ("down_proj",),
        }.items():
            part = leader.split(".")[0]
            prefix = f"model.layers.{block}"
            expected |= {f"{prefix}.{part}.{follower}": f"{prefix}.{leader}" for follower in followers}
    assert made.leaders == expected
    moments = collect_moments(tiny_setting.model, tiny_setting.targets, ids[:2])
    for name, leader in expected.items():
        assert moments[name].spread is moments[leader].spread  # kept once, not three times


@pytest.mark.parametrize("gradients", [False, True])
def test_layers_that_are_never_called_are_named(gradients: bool, ids: torch.Tensor) -> None:
    """Mamba's own code multiplies by the weight of one: nothing that takes its place would run."""
    model = MambaForCausalLM(MambaConfig(num_hidden_layers=2, hidden_size=32, state_size=4, vocab_size=384))

    def planned(targets: tuple[TargetSpec, ...]) -> BuildPlan:
        return plan(model, targets, ids, [target.name for target in targets] if gradients else [], 1 << 30)

    says = r"MambaForCausalLM .* mixer.dt_proj .*targets: \{exclude: \['\*.mixer.dt_proj'\]\}"
    with pytest.raises(RankfrontError, match=says):
        planned(list_targets(model))
    others = list_targets(model, exclude=["*.mixer.dt_proj"])
    assert {name for group in planned(others).groups for name in group} == {t.name for t in others}
