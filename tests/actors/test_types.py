"""Wire types: what an allocation refuses, what a score may be, and that both survive JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from scipy.stats import sem

from actors.samples import Difference, pack_bits, pack_floats
from actors.types import (
    Allocation,
    BiasScore,
    KlScore,
    Operations,
    Prepared,
    RankfrontError,
    Score,
    ScoringError,
    TargetSpec,
    TaskScore,
    TextScore,
    digest,
)

TARGETS = (
    TargetSpec("b.0.up", rows=8, cols=4, bias=True, block=0, module="up"),
    TargetSpec("b.0.down", rows=4, cols=8, bias=False, block=0, module="down"),
    TargetSpec("b.1.up", rows=8, cols=4, bias=True, block=1, module="up"),
)
SCORE = Score(
    split="search",
    text=TextScore("text@32", nats=620.0, tokens=310, stderr=0.1),
    tasks={
        "arc_easy": TaskScore(examples=20, acc=0.75, acc_norm=0.5, margin=-0.25),
        "boolq": TaskScore(examples=10, acc=0.5, acc_norm=None, margin=0.75),
    },
    forward_tokens=1_000,
    seconds=1.5,
    replica="r0",
)


def test_target_counts_its_bias() -> None:
    assert [target.full_rank for target in TARGETS] == [4, 4, 4]
    assert [target.parameters for target in TARGETS] == [40, 32, 40]


def test_allocation_follows_the_targets_and_leaves_the_rest_dense() -> None:
    allocation = Allocation.of({"b.1.up": 3, "b.0.up": None}, TARGETS)
    assert list(allocation) == [("b.0.up", None), ("b.0.down", None), ("b.1.up", 3)]
    assert not allocation.is_dense
    assert Allocation.of({}, TARGETS) == Allocation.dense(TARGETS)
    assert Allocation.dense(TARGETS).is_dense


def test_allocation_lists_every_mistake_at_once() -> None:
    ranks = {"b.0.up": 0, "b.0.down": 5, "b.1.up": True, "b.9.up": 2, "nonsense": None}
    with pytest.raises(RankfrontError) as caught:
        Allocation.of(ranks, TARGETS, where="ranks.yaml")
    lines = str(caught.value).splitlines()
    assert sorted(lines) == [
        "ranks.yaml.b.0.down: rank 5 is not an integer in 1..4 (null keeps it dense)",
        "ranks.yaml.b.0.up: rank 0 is not an integer in 1..4 (null keeps it dense)",
        "ranks.yaml.b.1.up: rank True is not an integer in 1..4 (null keeps it dense)",
        "ranks.yaml: 'b.9.up' is no target of this model",
        "ranks.yaml: 'nonsense' is no target of this model",
    ]


@pytest.mark.parametrize("rank", [2.0, "2", -1, float("nan")])
def test_allocation_refuses_what_is_no_rank(rank: object) -> None:
    with pytest.raises(RankfrontError, match=r"b\.0\.up: rank .* is not an integer in 1\.\.4"):
        Allocation.of({"b.0.up": rank}, TARGETS)  # type: ignore[dict-item]


def test_allocation_key_is_of_ranks_and_names_and_survives_json() -> None:
    one = Allocation.of({"b.0.up": 2, "b.1.up": 4}, TARGETS)
    same = Allocation.of(json.loads(json.dumps(one.to_dict())), TARGETS)
    assert (one, one.key, hash(one)) == (same, same.key, hash(same))
    others = [Allocation.of(ranks, TARGETS) for ranks in ({}, {"b.0.up": 4, "b.1.up": 2}, {"b.0.up": 2})]
    assert len({one.key, *(other.key for other in others)}) == 4


def test_digest_is_of_the_value_not_of_its_order_or_spelling() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": (1, 2), "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
    # sha256 of the ten characters ["\u20ac"], by sha256sum
    assert digest(["€"]) == "4da17663adcf5ff8f3209973f3d5b64b63545365eaf428bf40e938381995fea1"


def test_score_survives_json_with_every_bit() -> None:
    odd = replace(SCORE, text=replace(SCORE.text, nats=0.1 + 0.2, stderr=1e-300))
    assert Score.from_dict(json.loads(json.dumps(odd.to_dict()))) == odd


PREPARED = Prepared(
    model_folder="/m",
    factor_store="/f",
    targets=TARGETS,
    model_parameters=7,
    fingerprints={"model": "x"},
    tokens={"search": 3},
    examples={"search": {"arc_easy": 2}},
    seconds={"load": 0.25},
    reused=False,
    operations=Operations(5, ((64, None), (64, 8))),
)


def test_prepared_survives_json() -> None:
    assert Prepared.from_dict(json.loads(json.dumps(PREPARED.to_dict()))) == PREPARED


def test_operations_grow_with_the_length_as_far_as_a_token_attends() -> None:
    found = Operations(5, ((64, None), (32, 8)))
    assert [found.at(length) for length in (1, 8, 9, 100)] == [101, 773, 837, 6661]


def test_a_record_from_before_operations_were_counted_is_read() -> None:
    old = {key: value for key, value in PREPARED.to_dict().items() if key != "operations"}
    assert Prepared.from_dict(old).operations is None


def test_metrics_are_equal_means_over_the_tasks_that_define_them() -> None:
    assert SCORE.metrics == {
        "nll": 2.0,
        "reasoning.arc_easy.acc": 0.75,
        "reasoning.boolq.acc": 0.5,
        "reasoning.acc": 0.625,
        "reasoning.arc_easy.acc_norm": 0.5,
        "reasoning.acc_norm": 0.5,
        "reasoning.arc_easy.margin": -0.25,
        "reasoning.boolq.margin": 0.75,
        "reasoning.margin": 0.25,
    }
    assert SCORE.text.perplexity == pytest.approx(math.e**2, rel=1e-15)
    assert replace(SCORE, tasks={}).metrics == {"nll": 2.0}


def test_standard_errors_are_of_means() -> None:
    def of_hits(hits: int, examples: int) -> float:
        mean = hits / examples
        squares = hits * (1 - mean) ** 2 + (examples - hits) * mean**2
        return math.sqrt(squares / (examples - 1) / examples)

    arc, boolq = of_hits(15, 20), of_hits(5, 10)
    assert SCORE.tasks["arc_easy"].stderr == pytest.approx(arc, rel=1e-12)
    assert SCORE.reasoning_stderr == pytest.approx(math.hypot(arc, boolq) / 2, rel=1e-12)
    assert math.isnan(TaskScore(examples=1, acc=1.0, acc_norm=None, margin=0.0).stderr)
    assert math.isnan(replace(SCORE, tasks={}).reasoning_stderr)


PAIRED = replace(
    SCORE,
    text=TextScore("text@32", nats=6.0, tokens=3, stderr=0.5, windows=pack_floats([1.0, 2.0, 3.0])),
    tasks={
        "arc_easy": TaskScore(
            examples=4,
            acc=0.75,
            acc_norm=0.5,
            margin=0.5,
            hits=pack_bits([True, True, True, False]),
            hits_norm=pack_bits([True, False, True, False]),
            margins=pack_floats([1.0, 0.5, 2.0, -1.5]),
        ),
        "boolq": TaskScore(2, 0.5, None, 0.25, pack_bits([True, False]), "", pack_floats([1.0, -0.5])),
    },
    kl=KlScore(8, nats=1.5, tokens=3, stderr=0.25, windows=pack_floats([0.25, 0.5, 0.75])),
)


def test_every_metric_has_its_standard_error() -> None:
    """From the values of each window and example, by scipy; accuracies are values too, of 0 and 1."""
    arc, boolq = PAIRED.tasks["arc_easy"], PAIRED.tasks["boolq"]
    assert PAIRED.stderrs.keys() == PAIRED.metrics.keys()
    wanted = {
        "nll": 0.5,
        "kl": 0.25,
        "reasoning.arc_easy.acc": sem([1, 1, 1, 0]),
        "reasoning.boolq.acc": sem([1, 0]),
        "reasoning.arc_easy.acc_norm": sem([1, 0, 1, 0]),
        "reasoning.acc_norm": sem([1, 0, 1, 0]),
        "reasoning.arc_easy.margin": sem([1, 0.5, 2, -1.5]),
        "reasoning.boolq.margin": sem([1, -0.5]),
    }
    wanted["reasoning.acc"] = math.hypot(sem([1, 1, 1, 0]), sem([1, 0])) / 2
    wanted["reasoning.margin"] = math.hypot(sem([1, 0.5, 2, -1.5]), sem([1, -0.5])) / 2
    assert PAIRED.stderrs == pytest.approx(wanted)
    assert (arc.samples("acc"), boolq.samples("acc_norm")) == ((1, 1, 1, 0), ())
    assert all(math.isnan(SCORE.stderrs[f"reasoning.{name}.margin"]) for name in SCORE.tasks)


CORPORA = {"c4": TextScore("c4@32", nats=9.0, tokens=3, stderr=0.25, windows=pack_floats([2.0, 3.0, 4.0]))}


def test_corpora_are_metrics_of_their_own() -> None:
    score = replace(PAIRED, corpora=CORPORA)
    assert score.metrics == {**PAIRED.metrics, "nll.c4": 3.0}
    assert score.stderrs == {**PAIRED.stderrs, "nll.c4": 0.25}
    assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score
    lower = replace(CORPORA["c4"], windows=pack_floats([2.0, 2.5, 3.0]))
    other = replace(score, text=replace(PAIRED.text, name="another@32"), corpora={"c4": lower})
    assert score.minus(other, "nll.c4") == Difference(0.5, pytest.approx(sem([0, 0.5, 1])), 3)
    renamed = replace(score, corpora={"c4": replace(CORPORA["c4"], name="c4@64")})
    for unlike in (PAIRED, renamed):
        with pytest.raises(RankfrontError, match=r"nll\.c4 cannot be paired: .* of c4@32"):
            score.minus(unlike, "nll.c4")
    for nats, reason in ((math.nan, r"nll\.c4 is nan"), (-1.0, r"nll\.c4 is .* nats/token, below 0")):
        with pytest.raises(ScoringError, match=reason):
            replace(score, corpora={"c4": replace(CORPORA["c4"], nats=nats)}).check()
    replace(score, corpora={"acc": CORPORA["c4"]}).check()  # a loss, whatever its name


def test_bias_values_are_metrics_with_errors_and_pairs() -> None:
    hits, gaps = [1.0, 0.0, 1.0, 1.0], [0.5, 0.25, 1.0, 0.25]
    crows = BiasScore(
        4,
        {"stereotype": 0.75, "likelihood_diff": 0.5},
        {"stereotype": pack_floats(hits), "likelihood_diff": pack_floats(gaps)},
    )
    score = replace(PAIRED, bias={"crows_pairs": crows})
    found = {"bias.crows_pairs.stereotype": 0.75, "bias.crows_pairs.likelihood_diff": 0.5}
    assert score.metrics == {**PAIRED.metrics, **found}
    assert score.stderrs["bias.crows_pairs.stereotype"] == pytest.approx(sem(hits))
    assert score.stderrs["bias.crows_pairs.likelihood_diff"] == pytest.approx(sem(gaps))
    assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score
    fewer = replace(crows, samples={**crows.samples, "stereotype": pack_floats([0.0, 0.0, 1.0, 1.0])})
    other = replace(score, bias={"crows_pairs": fewer})
    gap = score.minus(other, "bias.crows_pairs.stereotype")
    assert gap == Difference(0.25, pytest.approx(sem([1, 0, 0, 0])), 4)
    for metric in ("bias.stereoset.icat", "bias.crows_pairs.icat"):
        with pytest.raises(RankfrontError, match="cannot be paired"):
            score.minus(other, metric)
    beyond = replace(crows, values={**crows.values, "stereotype": 1.5})
    with pytest.raises(ScoringError, match=r"bias\.crows_pairs\.stereotype is 1\.5 .*, outside 0\.\.1"):
        replace(score, bias={"crows_pairs": beyond}).check()


def other_than_paired() -> Score:
    """Easier on the second window, wrong where the first was right on the first example of each task."""
    arc = replace(PAIRED.tasks["arc_easy"], hits=pack_bits([False, True, True, False]))
    boolq = replace(PAIRED.tasks["boolq"], hits=pack_bits([False, False]))
    text = replace(PAIRED.text, windows=pack_floats([1.0, 1.0, 3.5]))
    return replace(PAIRED, text=text, tasks={"arc_easy": arc, "boolq": boolq})


def test_two_scores_are_compared_pair_by_pair() -> None:
    other = other_than_paired()
    assert PAIRED.minus(other, "nll") == Difference(
        pytest.approx(0.5 / 3), pytest.approx(sem([0, 1, -0.5])), 3
    )
    assert PAIRED.minus(other, "reasoning.boolq.acc") == Difference(0.5, pytest.approx(sem([1, 0])), 2)
    both = math.hypot(sem([1, 0, 0, 0]), sem([1, 0])) / 2
    mean = (0.25 + 0.5) / 2
    assert PAIRED.minus(other, "reasoning.acc") == Difference(mean, pytest.approx(both), 6)
    for metric in ("kl", "reasoning.acc_norm", "reasoning.margin"):
        assert PAIRED.minus(other, metric).mean == PAIRED.minus(other, metric).stderr == 0
    assert Score.from_dict(json.loads(json.dumps(PAIRED.to_dict()))) == PAIRED


@pytest.mark.parametrize(
    ("other", "metric"),
    [
        (SCORE, "nll"),  # kept no windows
        (replace(PAIRED, split="test"), "nll"),
        (replace(PAIRED, text=replace(PAIRED.text, name="other@32")), "nll"),
        (replace(PAIRED, kl=None), "kl"),
        (replace(PAIRED, tasks={"boolq": PAIRED.tasks["boolq"]}), "reasoning.acc"),
        (PAIRED, "reasoning.boolq.acc_norm"),
        (PAIRED, "reasoning.piqa.acc"),
        (PAIRED, "budget.model"),
    ],
)
def test_what_is_of_other_text_or_tasks_is_not_paired(other: Score, metric: str) -> None:
    with pytest.raises(RankfrontError, match=f"{metric} cannot be paired"):
        PAIRED.minus(other, metric)


def test_check_lets_a_score_pass() -> None:
    SCORE.check()
    replace(SCORE, text=replace(SCORE.text, nats=0.0), tasks={}).check()


@pytest.mark.parametrize(("nats", "reason"), [(math.nan, "kl is nan on the"), (-1.0, "kl is .*, below 0")])
def test_check_names_a_divergence_that_is_none(nats: float, reason: str) -> None:
    with pytest.raises(ScoringError, match=reason):
        replace(SCORE, kl=KlScore(8, nats=nats, tokens=10, stderr=0.1)).check()


@pytest.mark.parametrize(
    ("text", "task", "reason"),
    [
        ({"nats": math.nan}, {}, "nll is nan on the search split"),
        ({"nats": math.inf}, {}, "nll is inf on the search split"),
        ({"nats": -1.0}, {}, "nll is .* nats/token, below 0"),
        ({"tokens": 0}, {}, "text@32: no token was scored"),
        ({}, {"acc": 1.25}, r"reasoning\.arc_easy\.acc is 1\.25 on the search split, outside 0\.\.1"),
        ({}, {"acc": -0.01}, r"reasoning\.arc_easy\.acc is -0\.01 on the search split, outside 0\.\.1"),
        ({}, {"acc_norm": 1.01}, r"reasoning\.arc_easy\.acc_norm is 1\.01 .*, outside 0\.\.1"),
        ({}, {"acc": math.nan}, r"reasoning\.arc_easy\.acc is nan on the search split"),
        ({}, {"margin": -math.inf}, r"reasoning\.arc_easy\.margin is -inf on the search split"),
    ],
)
def test_check_names_what_cannot_be_a_score(text: dict, task: dict, reason: str) -> None:
    tasks = {**SCORE.tasks, "arc_easy": replace(SCORE.tasks["arc_easy"], **task)}
    with pytest.raises(ScoringError, match=reason):
        replace(SCORE, text=replace(SCORE.text, **text), tasks=tasks).check()
