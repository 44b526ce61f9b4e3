"""Blocks over devices: balanced, complete, and with several passes at work.

That bits agree is in the contract of the families, and of whole scores in `test_scoring`.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
import stores
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.cache_utils import KVSharingDict

from actors.busy import Busy
from actors.factors import FactorStore
from actors.models import count_parameters, decoder_blocks, load_model
from actors.perplexity import window_losses
from actors.relay import Relay
from actors.spans import Sizes, _Hooks, sizes_of, split, spread
from actors.types import ModelSource, RankfrontError

Step = tuple[str, int]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=7),
    st.integers(0, 80),
    st.integers(0, 80),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_no_other_runs_have_a_smaller_largest_one(
    blocks: list[int], before: int, behind: int, parts: int
) -> None:
    """Of all ways to cut, by trying them out."""
    sizes = Sizes(tuple(blocks), before, behind)
    if parts > len(blocks):
        with pytest.raises(RankfrontError, match=f"{parts} GPUs share {len(blocks)} decoder blocks"):
            split(sizes, parts)
        return
    found = split(sizes, parts)
    assert [block for span in found for block in span] == list(range(len(blocks)))
    assert len(found) == parts
    assert all(found)

    def largest(cuts: tuple[int, ...]) -> int:
        held = [sum(blocks[a:b]) for a, b in pairwise((0, *cuts, len(blocks)))]
        held[0] += before
        held[-1] += behind
        return max(held)

    cuts = combinations(range(1, len(blocks)), parts - 1)
    assert largest(tuple(span.start for span in found[1:])) == min(map(largest, cuts))


@pytest.fixture(scope="module", params=["llama", "biased_llama"], ids=["tied", "own head"])
def setting(
    request: pytest.FixtureRequest, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FactorStore]:
    """A model and the factors of one of its blocks."""
    folder: Path = request.getfixturevalue(request.param)
    made = stores.one_block(stores.setting_of(folder, ids[:4]))
    return folder, stores.build(tmp_path_factory.mktemp("spans") / "store", made)


def test_sizes_are_all_there_is(setting: tuple[Path, FactorStore]) -> None:
    """Weights once, tied ones too; of targets the factors as their files hold them, and a second weight."""
    folder, store = setting
    model, targets = load_model(folder, ModelSource(str(folder))), store.targets
    found = sizes_of(model, targets, store)
    files = sum(store.bytes_of(target.name) for target in targets)
    assert files == sum(file.stat().st_size for file in store.folder.glob("*.safetensors"))
    second = sum(4 * target.rows * target.cols for target in targets)
    assert sum(found.blocks) + found.before + found.behind == 4 * count_parameters(model) + files + second
    assert found.blocks[1] == found.blocks[0] + files + second
    embedding = model.get_input_embeddings().weight.nbytes
    head = embedding if folder.name.startswith("biased") else 0
    assert (found.before, found.behind) == (embedding, head + 4 * 32)


def places(model: nn.Module) -> list[Step]:
    """Notes every block and head that runs, and which run of it that is."""
    record: list[Step] = []

    def note(name: str) -> None:
        record.append((name, len([step for step, _ in record if step == name])))

    for number, block in enumerate(decoder_blocks(model)[1]):
        block.register_forward_pre_hook(lambda *_, name=f"block {number}": note(name))
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: note("head"))
    return record


def test_a_pass_is_on_one_device_while_the_next_is_on_the_one_before_it(
    setting: tuple[Path, FactorStore], ids: torch.Tensor
) -> None:
    """The record is the order in which work is queued; devices then work side by side."""
    folder, store = setting
    model = load_model(folder, ModelSource(str(folder)))
    spans = spread(model, store.targets, FactorStore(store.folder), ["cpu", "cpu"], Busy(["cpu", "cpu"]))
    record = places(model)
    window_losses(model, ids[:3], ids.shape[1], "text")
    first, second = ([f"block {block}" for block in span] for span in spans)
    assert first + second == ["block 0", "block 1", "block 2"]
    tied = not folder.name.startswith("biased")

    def steps(names: list[str], number: int) -> list[Step]:
        return [(name, number) for name in names]

    if tied:  # the head is with the embedding: a third step
        order = [
            *steps(first, 0),
            *steps(second, 0), *steps(first, 1),
            ("head", 0), *steps(second, 1), *steps(first, 2),
            ("head", 1), *steps(second, 2),
            ("head", 2),
        ]  # fmt: skip
    else:
        second = [*second, "head"]
        order = [
            *steps(first, 0),
            *steps(second, 0), *steps(first, 1),
            *steps(second, 1), *steps(first, 2),
            *steps(second, 2),
        ]  # fmt: skip
    assert record == order


def test_weights_factors_and_states_are_where_they_are_used(
    setting: tuple[Path, FactorStore], ids: torch.Tensor
) -> None:
    """The second device is `meta`, whose tensors take part in nothing that one of the first does."""
    folder, store = setting
    model = load_model(folder, ModelSource(str(folder)))
    store = FactorStore(store.folder)
    spans = spread(model, store.targets, store, ["cpu", "meta"], Busy(["cpu", "cpu"]))
    for device, span in zip(("cpu", "meta"), spans, strict=True):
        for block in span:
            held = {tensor.device.type for tensor in decoder_blocks(model)[1][block].parameters()}
            assert held == {device}
    for target in store.targets:
        device = "meta" if target.block in spans[1] else "cpu"
        assert store.rank(target.name, 3)[0].device.type == device
    assert model.get_input_embeddings().weight.device.type == "cpu"
    assert model.get_submodule("model.norm").weight.device.type == "meta"
    with torch.inference_mode():
        if folder.name.startswith("biased"):
            assert model(ids[:2]).logits.device.type == "meta"
        else:
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
            with pytest.raises(NotImplementedError, match="out of meta tensor"):  # torch's own words
                model(ids[:2])  # back at the embedding's device, to which meta has nothing to copy


def test_what_blocks_share_goes_along_and_stays_one_object() -> None:
    """K/V that blocks leave for those behind them, as in Gemma 3n and 4: what is written stays written."""
    hooks = _Hooks(Relay(Busy(["cpu", "cpu"])))
    states = KVSharingDict({"sliding_attention": (torch.ones(2), torch.ones(2))})
    hook = hooks.onto(1, "meta")
    hooks.begin(nn.Identity(), ())
    for _ in range(2):  # the blocks of a span
        _, keywords = hook(nn.Identity(), (), {"shared_kv_states": states})
        assert keywords["shared_kv_states"] is states
    states["full_attention"] = (torch.ones(2, device="meta"),) * 2
    hook(nn.Identity(), (), {"shared_kv_states": states})
    assert {tensor.device.type for pair in states.values() for tensor in pair} == {"meta"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: a model spread over them")
def test_two_gpus_give_the_bits_of_one(setting: tuple[Path, FactorStore], ids: torch.Tensor) -> None:
    """Its twins without GPUs are the two tests above and the contract of the families."""
    folder, store = setting
    one, two = (load_model(folder, ModelSource(str(folder))) for _ in range(2))
    spread(two, store.targets, FactorStore(store.folder), ["cuda:0", "cuda:1"], Busy(["cuda:0", "cuda:1"]))
    losses = [window_losses(model, ids, 64, "text").nats for model in (one.to("cuda"), two)]
    assert torch.equal(*losses)
