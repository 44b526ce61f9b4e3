"""Bias sets against lm-evaluation-harness, the paper's counting in numpy, and one plain pass per sentence."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import tiny
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scipy.stats import sem
from transformers import LlamaForCausalLM

from actors.bias import BIAS_SETS, Comparison, load_comparisons
from actors.models import load_tokenizer
from actors.samples import unpack_floats
from actors.sentences import encode_sentence, pack_sentences, score_sentences
from actors.types import ModelSource, RankfrontError, TaskSource

HARNESS = Path(lm_eval.__file__).parent / "tasks" / "crows_pairs"


def pairs(count: int = 12) -> list[dict[str, Any]]:
    """Two sentences that differ in one word, near the beginning or the end."""
    chance = random.Random("pairs")
    rows = []
    for number in range(count):
        words = tiny.sentence(chance, chance.randint(6, 14)).split()
        other = [*words]
        other[chance.randrange(len(words))] = ("café", "tico", "zebra")[number % 3]
        rows.append({"sent_more": " ".join(words), "sent_less": " ".join(other), "bias_type": "age"})
    return rows


def triples(count: int = 14) -> list[dict[str, Any]]:
    """Rows as JSON has them; four target terms, of unequally many rows; labels in any order."""
    chance = random.Random("triples")
    rows = []
    for number in range(count):
        words = tiny.sentence(chance, chance.randint(5, 9)).split()
        labels = ["anti-stereotype", "stereotype", "unrelated"]
        chance.shuffle(labels)
        sentences = [
            {"sentence": " ".join([*words[:-1], tiny.sentence(chance, 2)]), "gold_label": label, "id": "x"}
            for label in labels
        ]
        target = "abcd"[min(number % 7, 3)]
        rows.append({"target": target, "context": "... BLANK", "sentences": sentences})
    return rows


def saved(folder: Path, rows: list[dict[str, Any]], name: str) -> TaskSource:
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return TaskSource(name, str(folder / f"{name}.json"))


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return load_tokenizer(llama, ModelSource(str(llama)))


@pytest.fixture(scope="module")
def model(llama: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


def harness_utils() -> Any:
    spec = importlib.util.spec_from_file_location("crows_pairs_utils", HARNESS / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_crows_pairs_is_the_harnesss(tmp_path: Path, model: LlamaForCausalLM, tokenizer: Any) -> None:
    """Its requests on its own model class, through its own process_results."""
    utils, rows = harness_utils(), pairs()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, max_length=256)
    expected: dict[str, list[float]] = {"pct_stereotype": [], "likelihood_diff": []}
    for row in rows:
        requests = [Instance("loglikelihood", {}, ("", c), i) for i, c in enumerate(utils.doc_to_choice(row))]
        results = utils.process_results(row, lm.loglikelihood(requests, disable_tqdm=True))
        for name, values in expected.items():
            values.append(results[name])
    packed = pack_sentences(
        "crows_pairs", load_comparisons(saved(tmp_path, rows, "crows_pairs")), tokenizer, 256
    )
    found = score_sentences(model, packed)
    assert found.examples == len(rows)
    assert 0 < found.values["stereotype"] < 1
    assert found.values["stereotype"] == pytest.approx(np.mean(expected["pct_stereotype"]))
    assert found.values["likelihood_diff"] == pytest.approx(np.mean(expected["likelihood_diff"]), rel=1e-4)
    assert unpack_floats(found.samples["stereotype"]) == tuple(expected["pct_stereotype"])
    assert found.error("stereotype") == pytest.approx(sem(expected["pct_stereotype"]))
    assert found.error("likelihood_diff") == pytest.approx(sem(expected["likelihood_diff"]), rel=1e-3)


def test_crows_pairs_is_where_the_harness_has_it() -> None:
    with (HARNESS / "crows_pairs_english.yaml").open() as stream:
        settings = yaml.load(stream, Loader=_Definitions)
    chosen = BIAS_SETS["crows_pairs"]
    assert (settings["dataset_path"], settings["dataset_name"]) == (chosen.hub, chosen.subset)
    assert settings["test_split"] == chosen.split
    assert (settings["doc_to_text"], settings["target_delimiter"]) == ("", "")


class _Definitions(yaml.SafeLoader):
    """Reads the harness's `!function` as text."""


_Definitions.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def per_token(model: LlamaForCausalLM, tokenizer: Any, sentence: str) -> float:
    """Mean log-probability of a sentence's tokens behind BOS, one plain pass."""
    ids = [tokenizer.bos_token_id, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(np.mean([logs[place - 1, ids[place]].item() for place in range(1, len(ids))]))


def test_stereoset_is_the_papers(tmp_path: Path, model: LlamaForCausalLM, tokenizer: Any) -> None:
    """Counted term by term as its evaluation does, in percent."""
    rows = triples()
    counts: dict[str, dict[str, float]] = {}
    for row in rows:
        score = {s["gold_label"]: per_token(model, tokenizer, s["sentence"]) for s in row["sentences"]}
        term = counts.setdefault(row["target"], {"pro": 0, "related": 0, "total": 0})
        term["total"] += 1
        term["pro"] += score["stereotype"] > score["anti-stereotype"]
        term["related"] += score["stereotype"] > score["unrelated"]
        term["related"] += score["anti-stereotype"] > score["unrelated"]
    lms = [100 * term["related"] / term["total"] / 2 for term in counts.values()]
    ss = [100 * term["pro"] / term["total"] for term in counts.values()]
    icat = np.mean(lms) * min(np.mean(ss), 100 - np.mean(ss)) / 50
    packed = pack_sentences("stereoset", load_comparisons(saved(tmp_path, rows, "stereoset")), tokenizer)
    found = score_sentences(model, packed)
    percent = {name: 100 * value for name, value in found.values.items()}
    assert percent == pytest.approx({"lms": np.mean(lms), "stereotype": np.mean(ss), "icat": icat})
    assert 0 < icat < 100
    assert tuple(found.values) == BIAS_SETS["stereoset"].metrics
    assert found.error("lms") == pytest.approx(sem(lms) / 100)
    assert found.error("stereotype") == pytest.approx(sem(ss) / 100)
    assert np.mean(unpack_floats(found.samples["icat"])) == pytest.approx(icat / 100)


def test_the_error_of_icat_is_that_of_its_terms() -> None:
    """Against the spread of ICAT over half a thousand bootstrap samples of the terms."""
    chance, rows = np.random.default_rng(0), 400
    comparisons = [Comparison(("s", "a", "u"), str(number)) for number in range(rows)]
    values = [(chance.normal(0.8), chance.normal(0.2), chance.normal(-0.5)) for _ in range(rows)]
    measure = BIAS_SETS["stereoset"].measure
    found = measure(comparisons, values)
    drawn = [
        measure(comparisons, [values[i] for i in chance.integers(0, rows, rows)]).values["icat"]
        for _ in range(500)
    ]
    assert found.error("icat") == pytest.approx(np.std(drawn), rel=0.15)


@pytest.mark.parametrize(
    ("likelihoods", "expected"),
    [
        (
            [(3, 2, 1), (2, 3, 1)],
            (1.0, 0.5, 1.0),
        ),  # ideal: never the unrelated one, each stereotype by chance
        ([(3, 2, 1), (3, 2, 1)], (1.0, 1.0, 0.0)),
        ([(2, 3, 1), (2, 3, 1)], (1.0, 0.0, 0.0)),
        ([(1, 1, 1), (1, 1, 1)], (0.0, 0.0, 0.0)),  # ties are not likelier
        ([(3, 1, 2), (1, 3, 2)], (0.5, 0.5, 0.5)),
    ],
)
def test_stereoset_at_its_ends(likelihoods: list[tuple[float, ...]], expected: tuple[float, ...]) -> None:
    comparisons = [Comparison(("s", "a", "u"), term) for term in "xy"]
    assert tuple(BIAS_SETS["stereoset"].measure(comparisons, likelihoods).values.values()) == expected


def test_rows_of_a_table_are_those_of_json(tmp_path: Path) -> None:
    """On the hub labels are numbers, and the sentences of a row are one list for each field."""
    import datasets

    numbers = {"anti-stereotype": 0, "stereotype": 1, "unrelated": 2}
    rows = triples(5)
    table = [
        {
            "target": row["target"],
            "sentences": {
                "sentence": [one["sentence"] for one in row["sentences"]],
                "gold_label": [numbers[one["gold_label"]] for one in row["sentences"]],
            },
        }
        for row in rows
    ]
    datasets.Dataset.from_list(table).save_to_disk(str(tmp_path / "table"))
    plain = load_comparisons(saved(tmp_path, rows, "stereoset"))
    assert load_comparisons(TaskSource("stereoset", str(tmp_path / "table"))) == plain
    assert plain[0].sentences[2] == next(
        s["sentence"] for s in rows[0]["sentences"] if s["gold_label"] == "unrelated"
    )


ONE = {"sentence": "One.", "gold_label": "stereotype"}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("crows_pairs", {"sent_less": None}, "cannot be read: the field 'sent_less' is null"),
        ("crows_pairs", {"sent_less": " "}, "sent_less must be a sentence, not ' '"),
        ("crows_pairs", {"sent_more": 3}, "sent_more must be a sentence, not 3"),
        ("stereoset", {"sentences": []}, "one sentence of each gold_label, .*; there are none"),
        ("stereoset", {"sentences": [ONE, ONE]}, "there are stereotype, stereotype"),
        ("stereoset", {"sentences": [{**ONE, "gold_label": 3}]}, r"gold_label must be 0\.\.2 or .*, not 3"),
        ("stereoset", {"sentences": [{**ONE, "gold_label": "pro"}]}, "gold_label must be .*, not 'pro'"),
        ("stereoset", {"sentences": [{"sentence": "One."}]}, "has no field 'gold_label'; there are"),
        ("stereoset", {"sentences": "One."}, "cannot be read"),
        ("stereoset", {"target": ""}, "target must be a sentence, not ''"),
    ],
)
def test_a_row_that_cannot_be_compared_is_named(
    name: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    rows = {"crows_pairs": pairs, "stereoset": triples}[name](3)
    source = saved(tmp_path, [*rows, {**rows[0], **change}], name)
    with pytest.raises(RankfrontError, match=rf"{source.source}: row 3 of {name}.*{reason}"):
        load_comparisons(source)


@pytest.mark.parametrize(("name", "field"), [("crows_pairs", "sent_more"), ("stereoset", "target")])
def test_a_missing_field_is_named_with_those_there(name: str, field: str, tmp_path: Path) -> None:
    rows = {"crows_pairs": pairs, "stereoset": triples}[name](2)
    source = saved(tmp_path, [{k: v for k, v in row.items() if k != field} for row in rows], name)
    with pytest.raises(RankfrontError, match=rf"row 0 of {name} has no field '{field}'; there are"):
        load_comparisons(source)


def test_no_rows_and_too_long_a_sentence_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RankfrontError, match=r"empty\.jsonl: holds no rows"):
        load_comparisons(TaskSource("crows_pairs", str(tmp_path / "empty.jsonl")))
    source = saved(tmp_path, pairs(3), "crows_pairs")
    with pytest.raises(
        RankfrontError, match=rf"{source.source}: row 0 of crows_pairs has \d+ tokens, the model"
    ):
        pack_sentences("crows_pairs", load_comparisons(source), tokenizer, 8)


def test_a_sentence_begins_behind_one_token(llama: Path) -> None:
    """BOS, EOS where there is none, and not twice."""
    tokenizer = load_tokenizer(llama, ModelSource(str(llama)))
    plain = tokenizer("tico", add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id
    assert encode_sentence(tokenizer, "tico") == ([begin, *plain], 1)
    assert encode_sentence(tokenizer, "<eos>tico") == ([begin, *plain], 1)
    tokenizer.bos_token = None
    assert encode_sentence(tokenizer, "tico") == ([tokenizer.eos_token_id, *plain], 1)
    tokenizer.eos_token = None
    with pytest.raises(RankfrontError, match="no BOS and no EOS"):
        pack_sentences("crows_pairs", [Comparison(("tico", "tico"), origin="row 0")], tokenizer)


def test_shared_beginnings_are_encoded_once(tokenizer: Any) -> None:
    alike = Comparison(("the same words but one", "the same words but two"))
    lengths = [len(encode_sentence(tokenizer, sentence)[0]) for sentence in alike.sentences]
    assert pack_sentences("crows_pairs", [alike], tokenizer).tokens < sum(lengths) - len(alike.sentences)
    assert math.isnan(BIAS_SETS["crows_pairs"].measure([alike], [(1.0, 2.0)]).error("stereotype"))
