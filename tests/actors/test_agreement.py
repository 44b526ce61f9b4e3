"""How far a reloaded model's metrics may be off the recorded ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.agreement import hold
from actors.samples import pack_floats
from actors.types import BiasScore, RankfrontError, Score, TaskScore, TextScore

SCORE = Score(
    split="search",
    text=TextScore("text@32", nats=620.0, tokens=310, stderr=0.1),
    tasks={
        "arc_easy": TaskScore(
            examples=100, acc=0.5, acc_norm=0.4, margin=-0.25, margins=pack_floats([-0.35, -0.15] * 50)
        ),
        "boolq": TaskScore(examples=50, acc=0.6, acc_norm=None, margin=0.75),
    },
    forward_tokens=1_000,
    seconds=1.5,
    replica="r0",
    corpora={"mine": TextScore("mine@32", nats=300.0, tokens=100, stderr=0.1)},
    bias={
        "stereoset": BiasScore(
            20, {"icat": 0.5, "lms": 0.75}, dict.fromkeys(("icat", "lms"), pack_floats([0.0, 1.0] * 5))
        )
    },
)


@pytest.mark.parametrize(
    ("name", "exact", "half"),
    [
        ("nll", 1e-3 * 2.0, 0.05 * 2.0),
        ("nll.mine", 1e-3 * 3.0, 0.05 * 3.0),
        ("reasoning.arc_easy.acc", 1 / 100, (0.25 / 99) ** 0.5),
        ("reasoning.arc_easy.acc_norm", 1 / 100, (0.24 / 99) ** 0.5),
        ("reasoning.acc", (1 / 100 + 1 / 50) / 2, (0.25 / 99 + 0.24 / 49) ** 0.5 / 2),
        ("reasoning.arc_easy.margin", 1e-3, 0.05),
        ("bias.stereoset.lms", 1 / 10, (0.25 / 9) ** 0.5),
        ("bias.stereoset.icat", 3 / 10, 3 / 10),
    ],
)
def test_a_metric_may_be_off_by_rounding_and_no_more(name: str, exact: float, half: float) -> None:
    found = SCORE.metrics[name]
    for dtype, allowed in (("float32", exact), ("bfloat16", half), ("float16", half)):
        for recorded in (found + 0.95 * allowed, found - 0.95 * allowed):
            [line] = hold(SCORE, {name: recorded}, dtype)
            assert line == f"{name} on the search split: {found:.6f} reloaded, {recorded:.6f} recorded"
        for recorded in (found + 1.1 * allowed, found - 1.1 * allowed):
            with pytest.raises(RankfrontError, match=rf"^{name} is {found:.6f}.* reloaded, {recorded:.6f} "):
                hold(SCORE, {name: recorded}, dtype)
    with pytest.raises(RankfrontError, match=f"{name} is .* nan recorded"):
        hold(SCORE, {name: float("nan")}, "bfloat16")


def test_one_answer_is_counted_as_it_is() -> None:
    """A tenth is no binary fraction: 0.4 and 0.3 are one answer of ten apart, and a little more in floats."""
    score = replace(SCORE, tasks={"t": TaskScore(examples=10, acc=0.4, acc_norm=None, margin=0.0)})
    assert abs(0.4 - 0.3) > 1 / 10
    assert hold(score, {"reasoning.t.acc": 0.3, "reasoning.acc": 0.3}, "float32")


def test_every_mistake_is_listed() -> None:
    recorded = {"nll": 3.0, "reasoning.piqa.acc": 0.5, "reasoning.acc": 0.9, "kl": 0.1}
    with pytest.raises(RankfrontError) as raised:
        hold(SCORE, recorded, "float32")
    nll, missing, acc = str(raised.value).splitlines()
    assert nll == "nll is 2.000000 nats/token reloaded, 3.000000 recorded"
    assert missing.startswith("reasoning.piqa.acc is 0.500000 recorded, and not measured")
    assert acc == "reasoning.acc is 0.550000 reloaded, 0.900000 recorded"


def test_a_divergence_is_said_and_not_held() -> None:
    [line] = hold(SCORE, {"kl": 0.25}, "float32")
    assert line == "kl: 0.250000 recorded; not held, as it takes the dense model"
