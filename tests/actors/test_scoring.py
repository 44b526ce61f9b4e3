"""A scorer whose answers are those of the installed model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaForCausalLM

from actors.models import load_tokenizer
from actors.perplexity import window_losses
from actors.preparation import prepare
from actors.samples import pack_floats, unpack_floats
from actors.scoring import Scorer, score_split
from actors.splits import load_split
from actors.types import (
    CHOICE,
    SPLITS,
    Allocation,
    CorpusSource,
    PreparationSpec,
    Prepared,
    RankfrontError,
    ReplicaSpec,
    Rival,
    Score,
    ScoringError,
    TaskSource,
    TextSource,
)
from search.config import Config, parse_config
from search.cost import CostModel


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    scoring = {"examples": {"search": 100, "test": 100}, "tokens": {"search": 10**6, "test": 10**6}}
    return parse_config(tiny.tiny_config(tmp_path_factory.mktemp("scoring"), scoring=scoring))


@pytest.fixture(scope="module")
def prepared(config: Config) -> Prepared:
    *_, prepared = prepare(config.preparation())
    assert isinstance(prepared, Prepared)
    return prepared


@pytest.fixture
def replica(config: Config, prepared: Prepared) -> ReplicaSpec:
    return ReplicaSpec("r7", config.preparation(), prepared, threads=1, device="cpu")


def plain_nll(spec: PreparationSpec, windows: torch.Tensor) -> float:
    model = LlamaForCausalLM.from_pretrained(spec.model.source, dtype=torch.float32).eval()
    with torch.no_grad():
        return sum(model(row[None], labels=row[None]).loss.item() for row in windows) / len(windows)


def test_the_dense_allocation_scores_as_the_plain_model(replica: ReplicaSpec) -> None:
    scorer = Scorer(replica)
    score = scorer.score(Allocation.dense(replica.prepared.targets))
    assert score.text.nll == pytest.approx(
        plain_nll(replica.preparation, scorer.split("search").windows), rel=1e-5
    )
    assert (score.split, score.replica) == ("search", "r7")
    assert score.forward_tokens == replica.prepared.tokens["search.forward"]
    assert {name: task.examples for name, task in score.tasks.items()} == {"arc_easy": 6, "piqa": 6}
    assert score.text.name == "text@32"


def test_a_score_depends_on_its_allocation_only(replica: ReplicaSpec) -> None:
    """Whatever was scored before, on whichever split, in a scorer new or old: equal to the bit."""
    targets = replica.prepared.targets
    cost = CostModel(targets, replica.prepared.model_parameters, "pivoted", "mean")
    half, most = cost.uniform(0.5), cost.uniform(0.9)

    def values(scorer: Scorer, allocation: Allocation, split: str = "search") -> dict[str, float]:
        return scorer.score(allocation, split).metrics

    used = Scorer(replica)
    first = values(used, half)
    assert values(used, most) != first
    values(used, Allocation.dense(targets))
    values(used, most, "test")
    assert values(used, half) == first
    assert values(Scorer(replica), half) == first


def test_less_is_kept_more_is_lost(replica: ReplicaSpec) -> None:
    """At full rank nothing is lost; at rank one of everything the loss is far above dense."""
    targets = replica.prepared.targets
    scorer = Scorer(replica)
    dense = scorer.score(Allocation.dense(targets)).text.nll
    full = scorer.score(Allocation(tuple((t.name, t.full_rank) for t in targets))).text.nll
    assert full == pytest.approx(dense, rel=1e-4)
    one = scorer.score(Allocation(tuple((t.name, 1) for t in targets))).text
    assert abs(one.nll - dense) > 0.05
    assert math.isfinite(one.nll)


def test_a_broken_model_fails_and_the_scorer_lives_on(replica: ReplicaSpec) -> None:
    dense = Allocation.dense(replica.prepared.targets)
    scorer = Scorer(replica)
    before = scorer.score(dense).metrics
    norm = scorer.model.get_submodule("model.norm").weight
    kept = norm.clone()
    norm.fill_(torch.nan)
    with pytest.raises(ScoringError, match="text@32: non-finite loss"):
        scorer.score(dense)
    norm.copy_(kept)
    assert scorer.score(dense).metrics == before


def test_a_task_of_ones_own_is_scored(config: Config, tmp_path: Path) -> None:
    rows = [
        {"question": f"Which is {number}?", "choices": ["this", "that one"], "answer": number % 2}
        for number in range(20)
    ]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    task = TaskSource("mine", str(tmp_path / "mine.json"), format="choices")
    spec = config.preparation()
    spec = replace(spec, scoring=replace(spec.scoring, tasks=(task,)))
    tokenizer = load_tokenizer(spec.model.source, spec.model)
    model = LlamaForCausalLM.from_pretrained(spec.model.source, dtype=torch.float32).eval()
    splits = [load_split(spec, split, tokenizer, 256) for split in ("search", "test")]
    scores = [score_split(model, data, 1024, "r").tasks["mine"] for data in splits]
    assert [score.examples for score in scores] == [4, 16]
    assert all(score.acc_norm is not None for score in scores)
    (tmp_path / "mine.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(RankfrontError, match="mine leaves no example for the test split"):
        load_split(spec, "test", tokenizer, 256)


def test_a_stride_changes_the_name_and_the_split(replica: ReplicaSpec) -> None:
    """And a divergence is over the same tokens as the loss."""
    sizes = {"tokens": {"search": 96, "test": 96}, "kl_top_k": 16, "tasks": ()}
    apart, over = (asking_for_kl(replica, stride=stride, **sizes) for stride in (None, 16))
    targets = replica.prepared.targets
    one, other = (
        Scorer(spec).score(Allocation(tuple((t.name, 4) for t in targets))) for spec in (apart, over)
    )
    assert (one.text.name, other.text.name) == ("text@32", "text@32/16")
    assert (one.text.tokens, other.text.tokens) == (3 * 31, 31 + 4 * 16)
    assert (one.kl.tokens, other.kl.tokens) == (one.text.tokens, other.text.tokens)
    assert (one.forward_tokens, other.forward_tokens) == (96, 5 * 32)
    tokenizer = load_tokenizer(replica.preparation.model.source, replica.preparation.model)
    prints = [load_split(spec.preparation, "search", tokenizer, 256).fingerprint for spec in (apart, over)]
    assert prints[0] != prints[1]


def test_corpora_are_scored_beside_the_text(replica: ReplicaSpec, tmp_path: Path) -> None:
    """By contiguous region, with caps of their own, and without a change to any other score."""
    lines = [f"{document}" for document in reversed(tiny.documents(40))]
    (tmp_path / "back.jsonl").write_text("\n".join(json.dumps({"said": line}) for line in lines))
    source = TextSource(str(tmp_path / "back.jsonl"), column="said", join=" ")
    corpus = CorpusSource("back", source, {"search": 96, "test": 10**6})
    asked = asking_for_kl(replica, corpora=(corpus,), kl_top_k=8)
    half = CostModel(asked.prepared.targets, asked.prepared.model_parameters, "pivoted", "mean").uniform(0.5)
    scorer, plain = Scorer(asked), Scorer(asking_for_kl(replica, kl_top_k=8))
    found = scorer.score(half)
    assert found.metrics == {**plain.score(half).metrics, "nll.back": found.corpora["back"].nll}
    assert found.corpora["back"].name == 'back@32 joined by " "'
    assert found.corpora["back"].tokens == 3 * 31
    dense = scorer.score(Allocation.dense(asked.prepared.targets))
    windows = scorer.split("search").corpora["back"].windows
    assert dense.corpora["back"].nll == pytest.approx(plain_nll(replica.preparation, windows), rel=1e-5)
    assert found.forward_tokens == plain.score(half).forward_tokens + 96
    texts = [
        scorer.tokenizer.decode(scorer.split(split).corpora["back"].windows.flatten())
        for split in ("search", "test")
    ]
    places = [{i for i, line in enumerate(lines) if line[40:90] in text} for text in texts]
    assert places[0]
    assert max(places[0]) < min(places[1])
    assert scorer.split("search").fingerprint != plain.split("search").fingerprint


def test_bias_sets_are_split_and_scored_like_tasks(replica: ReplicaSpec, tmp_path: Path) -> None:
    rows = [
        {"sent_more": f"{line[:40]} tico.", "sent_less": f"{line[:40]} café.", "id": number}
        for number, line in enumerate(tiny.documents(20))
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    source = TaskSource("crows_pairs", str(tmp_path / "pairs.json"))
    asked = asking_for_kl(replica, bias=(source,), tokens={"search": 96, "test": 96})
    scorer, plain = Scorer(asked), Scorer(asking_for_kl(replica, tokens={"search": 96, "test": 96}))
    half = CostModel(asked.prepared.targets, asked.prepared.model_parameters, "pivoted", "mean").uniform(0.5)
    found, without = scorer.score(half), plain.score(half)
    assert found.bias["crows_pairs"].examples == 4  # a fifth
    names = ("bias.crows_pairs.stereotype", "bias.crows_pairs.likelihood_diff")
    values = dict(zip(names, found.bias["crows_pairs"].values.values(), strict=True))
    assert found.metrics == {**without.metrics, **values}
    assert found.forward_tokens == without.forward_tokens + scorer.split("search").bias[0].tokens
    compared = [
        {one.sentences for one in scorer.split(split).bias[0].comparisons} for split in ("search", "test")
    ]
    assert compared[0].isdisjoint(compared[1])
    assert compared[0] | compared[1] == {(row["sent_more"], row["sent_less"]) for row in rows}
    assert scorer.split("search").fingerprint != plain.split("search").fingerprint


@pytest.mark.parametrize("stride", [None, 8])
def test_the_text_that_chooses_is_scored_alone(replica: ReplicaSpec, stride: int | None) -> None:
    prepared = replica.prepared
    tokens = {"search": 70, "test": 64, "choice": 10**6}
    scorer = Scorer(asking_for_kl(replica, tokens=tokens, stride=stride, kl_top_k=4))
    score = scorer.score(Allocation.dense(prepared.targets), "choice")
    assert (score.split, score.tasks, score.kl) == ("choice", {}, None)
    text = scorer.split("choice").text
    model = LlamaForCausalLM.from_pretrained(prepared.model_folder)
    expected = window_losses(model, text.windows, 64, "text", scored=text.scored).nats
    assert score.text.nll == pytest.approx((expected.sum() / text.scored.sum()).item(), rel=1e-6)
    with pytest.raises(RankfrontError, match="no text is left to choose by"):
        Scorer(replica).split("choice")


def asking_for_kl(replica: ReplicaSpec, **changes: Any) -> ReplicaSpec:
    """As if the study had been prepared with other splits."""
    scoring = replace(replica.preparation.scoring, **changes)
    prints = {key: value for key, value in replica.prepared.fingerprints.items() if key not in SPLITS}
    return replace(
        replica,
        preparation=replace(replica.preparation, scoring=scoring),
        prepared=replace(replica.prepared, fingerprints=prints),
    )


@pytest.mark.parametrize("split", [*SPLITS, CHOICE])
def test_a_split_that_became_another_one_is_refused(replica: ReplicaSpec, split: str) -> None:
    """A replica that starts later, or on a node that has another file there."""
    asked = asking_for_kl(replica, tokens={"search": 70, "test": 64, "choice": 128})
    known = {"model": asked.prepared.fingerprints["model"], split: "another"}
    edited = replace(asked, prepared=replace(asked.prepared, fingerprints=known))
    with pytest.raises(RankfrontError, match=f"text, .*: no longer the {split} split that the study was"):
        Scorer(edited).split(split)


def test_divergence_is_recorded_when_asked(replica: ReplicaSpec) -> None:
    """Zero for dense, and for a trial the same whatever was scored before, on either split."""
    targets = replica.prepared.targets
    cost = CostModel(targets, replica.prepared.model_parameters, "pivoted", "mean")
    half, dense = cost.uniform(0.5), Allocation.dense(targets)
    plain = Scorer(replica)
    assert plain.score(half).kl is None
    asking = Scorer(asking_for_kl(replica, kl_top_k=16))
    found = asking.score(half)
    assert found.metrics == {**plain.score(half).metrics, "kl": found.kl.mean}
    assert found.kl.mean > 0.001
    assert found.kl.top_k == 16
    assert asking.score(dense).kl.nats == 0
    assert asking.score(half, "test").kl.mean > 0.001
    assert asking.score(half).kl == found.kl


def test_divergence_within_its_memory(replica: ReplicaSpec) -> None:
    """The two fingerprints differ: what was scored without a divergence does not answer for one."""
    spec = asking_for_kl(replica, kl_top_k=16, tokens={"search": 128, "test": 128}).preparation
    tokenizer = load_tokenizer(spec.model.source, spec.model)
    needed = 128 * (16 * 8 + 4) / 1e6
    with pytest.raises(RankfrontError) as caught:
        load_split(
            replace(spec, scoring=replace(spec.scoring, kl_memory_mb=needed * 0.99)), "search", tokenizer, 256
        )
    assert str(caught.value) == (
        f"scoring.kl_top_k: 16 over the 128 tokens of the search split takes 0.02 MB, "
        f"kl_memory_mb is {needed * 0.99:g}; at most 15 fits"
    )
    fitting = replace(spec, scoring=replace(spec.scoring, kl_memory_mb=needed))
    asked = load_split(fitting, "search", tokenizer, 256)
    plain = replace(fitting, scoring=replace(fitting.scoring, kl_top_k=None))
    assert load_split(plain, "search", tokenizer, 256).fingerprint != asked.fingerprint


def test_a_reused_prefix_changes_no_bit(replica: ReplicaSpec) -> None:
    """Whatever came before: a walk from the last block to the first, changed models, the test split."""
    targets = replica.prepared.targets
    cost = CostModel(targets, replica.prepared.model_parameters, "pivoted", "mean")
    plain = Scorer(asking_for_kl(replica, kl_top_k=8))
    reusing = Scorer(asking_for_kl(replica, kl_top_k=8, prefix_memory_mb=100.0))
    walk = [Allocation.of({t.name: 9 for t in targets if t.block >= block}, targets) for block in (2, 1, 0)]
    for allocation in (*walk, cost.uniform(0.7), *walk, Allocation.dense(targets)):
        for split in ("search", "test"):
            found, expected = (scorer.score(allocation, split) for scorer in (reusing, plain))
            assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)
    data = plain.split("search")
    assert reusing.prefix.bytes == data.tokens * 32 * 4 * 2, "two boundaries of the search split alone"
    assert plain.prefix.bytes == 0


def test_several_devices_score_as_one(replica: ReplicaSpec) -> None:
    """All of a score, and a stage's end with passes under way behind it; the caches are on the devices."""
    targets = replica.prepared.targets
    cost = CostModel(targets, replica.prepared.model_parameters, "pivoted", "mean")
    few = {"tokens": {"search": 256, "test": 128}, "examples": {"search": 6, "test": 4}}
    caches = {"kl_top_k": 8, "prefix_memory_mb": 100.0}
    asked = asking_for_kl(replica, **few, **caches, stages=(64,), batch_tokens=64)
    one, three = Scorer(asked), Scorer(replace(asked, gpus=3))
    walk = [Allocation.of({t.name: 9 for t in targets if t.block >= block}, targets) for block in (2, 1)]
    for allocation in (cost.uniform(0.6), *walk, Allocation.dense(targets)):
        for split in ("search", "test"):
            found, expected = (scorer.score(allocation, split) for scorer in (three, one))
            assert replace(found, seconds=0.0, busy=()) == replace(expected, seconds=0.0)
            assert len(found.busy) == 3
            assert 0 < sum(found.busy) <= found.seconds, "of one CPU the three devices have a share each"
            assert Score.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    rivals = (shifted(one.score(Allocation.dense(targets)), -9.0),)
    found, expected = (scorer.score(cost.uniform(0.6), rivals=rivals) for scorer in (three, one))
    assert (found.stopped_by, found.forward_tokens) == (5, 64)
    assert replace(found, seconds=0.0, busy=()) == replace(expected, seconds=0.0)
    assert three.prefix.bytes == one.prefix.bytes > 0
    three.model.get_submodule("model.norm").weight.fill_(torch.nan)
    with pytest.raises(ScoringError, match=r"non-finite loss in windows 0\.\.1, first in model\.norm"):
        three.score(cost.uniform(0.6))


def test_more_devices_than_blocks_are_refused(replica: ReplicaSpec) -> None:
    with pytest.raises(RankfrontError, match=r"replicas\.gpus: 4 GPUs share 3 decoder blocks; 3 at most"):
        Scorer(replace(replica, gpus=4))


def shifted(score: Score, by: float, trial: int = 5) -> Rival:
    """A rival whose every window differs by as much from a score's."""
    assert score.kl is not None
    packed = {"nll": score.text.windows, "kl": score.kl.windows}
    values = {name: [v + by for v in unpack_floats(windows)] for name, windows in packed.items()}
    return Rival(trial, {name: pack_floats(found) for name, found in values.items()})


def test_a_dominated_trial_stops_after_a_stage(replica: ReplicaSpec) -> None:
    """With the bits of the first windows; without rivals, on the test split, or undominated it goes on."""
    staged = asking_for_kl(replica, kl_top_k=8, stages=(64, 200), batch_tokens=96)
    scorer = Scorer(staged)
    allocation = CostModel(
        replica.prepared.targets, replica.prepared.model_parameters, "pivoted", "mean"
    ).uniform(0.6)
    whole = scorer.score(allocation)
    better, worse = shifted(whole, -0.1), shifted(whole, 0.1)
    part = scorer.score(allocation, rivals=(worse, better))
    assert part.kl is not None
    assert whole.kl is not None
    assert (part.stopped_by, part.tasks, part.forward_tokens) == (5, {}, 96)
    assert (part.text.tokens, part.kl.tokens) == (3 * 31, 3 * 31)
    for one, other in ((part.text, whole.text), (part.kl, whole.kl)):
        assert unpack_floats(one.windows) == unpack_floats(other.windows)[:3]
    for again in (scorer.score(allocation, rivals=(worse,)), scorer.score(allocation)):
        assert replace(again, seconds=0.0) == replace(whole, seconds=0.0)
    assert scorer.score(allocation, "test", rivals=(better,)).stopped_by is None
    assert Score.from_dict(json.loads(json.dumps(part.to_dict()))) == part


def test_a_trial_stops_after_a_later_stage(replica: ReplicaSpec) -> None:
    """Its first windows are no worse: the rival is known to be better only over more of them."""
    scorer = Scorer(asking_for_kl(replica, stages=(64, 320), batch_tokens=64))
    dense = Allocation.dense(replica.prepared.targets)
    first, second, *rest = unpack_floats(scorer.score(dense).text.windows)
    rival = Rival(9, {"nll": pack_floats([first, second, *(value - 0.5 for value in rest)])})
    part = scorer.score(dense, rivals=(rival,))
    assert (part.stopped_by, part.forward_tokens) == (9, 320)
