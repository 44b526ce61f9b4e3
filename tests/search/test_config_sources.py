"""What a config reads: corpora, tasks, bias sets, models and factors by URL, and objectives of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from raw_config import mistakes, put

from search.config import parse_config
from search.records import Objective

C4 = {"name": "c4", "source": "allenai/c4"}
OWN = {"name": "mine", "format": "choices", "source": "/tmp"}


def test_objectives_know_their_direction(raw: dict[str, Any]) -> None:
    names = ["budget.linear", "nll", "reasoning.arc_easy.acc_norm"]
    assert parse_config(put(raw, "objectives", names)).named_objectives == (
        Objective("budget.linear", minimize=True),
        Objective("nll", minimize=True),
        Objective("reasoning.arc_easy.acc_norm", minimize=False),
    )


def test_a_corpus_can_be_an_objective_and_has_the_caps_of_the_text_unless_its_own(
    raw: dict[str, Any],
) -> None:
    own = {"name": "mine", "source": "org/mine", "join": " ", "tokens": {"search": 64, "test": 96}}
    raw = put(put(raw, "scoring.corpora", [C4, own]), "objectives", ["budget.model", "nll.mine"])
    config = parse_config(raw)
    assert config.named_objectives[1] == Objective("nll.mine", minimize=True)
    c4, mine = config.preparation().scoring.corpora
    assert (c4.name, c4.text.source, c4.tokens) == ("c4", "allenai/c4", {"search": 8_192, "test": 32_768})
    assert (mine.text.join, mine.tokens) == (" ", {"search": 64, "test": 96})


@pytest.mark.parametrize("key", ["text", "calibration.text"])
def test_a_corpus_that_is_read_already_is_refused(raw: dict[str, Any], tmp_path: Path, key: str) -> None:
    """The factors are fitted on the calibration text; joined otherwise it is the same text."""
    (tmp_path / "own.txt").write_text("a text of its own, long enough for one window of tokens\n" * 9)
    raw = put(raw, "calibration.text", {"source": str(tmp_path / "own.txt")})
    source = raw["text"]["source"] if key == "text" else str(tmp_path / "own.txt")
    [line] = mistakes(put(raw, "scoring.corpora", [{"name": "it", "source": source, "join": " "}]))
    assert line.startswith(f"scoring.corpora[0]: is the text of {key};")


@pytest.mark.parametrize(
    ("text", "corpus"),
    [
        ({"source": "{here}/text.txt"}, {"source": "{here}/text.txt", "split": "train"}),
        ({"source": "{here}/text.txt"}, {"source": "{here}/link.txt", "deduplicate": True}),
        ({"source": "org/x"}, {"source": "hub:org/x@main", "split": "validation"}),
    ],
)
def test_a_corpus_that_is_read_already_under_another_name_is_refused(
    raw: dict[str, Any], tmp_path: Path, text: dict[str, Any], corpus: dict[str, Any]
) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "text.txt")
    text, corpus = ({**each, "source": each["source"].format(here=tmp_path)} for each in (text, corpus))
    [line] = mistakes(put(raw | {"text": text}, "scoring.corpora", [{"name": "it", **corpus}]))
    assert line.startswith("scoring.corpora[0]: is the text of text;")


@pytest.mark.parametrize("source", ["{here}/text.txt", "org/x"])
def test_one_text_with_and_without_repeats_is_refused(
    raw: dict[str, Any], tmp_path: Path, source: str
) -> None:
    """On the hub too, where nothing is read to check a config."""
    named = {"source": source.format(here=tmp_path)}
    raw = put(raw | {"text": {**named, "deduplicate": True}}, "calibration.text", named)
    [line] = mistakes(raw)
    assert line.startswith("calibration.text.deduplicate: false, but text.deduplicate is true")
    parse_config(put(raw, "calibration.text.deduplicate", True))


def test_a_corpus_too_short_or_without_its_column_is_named(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("few words\n" * 5)
    short = {"name": "short", "source": str(tmp_path / "short.txt")}
    [line] = mistakes(put(raw, "scoring.corpora", [short]))
    assert line.startswith("scoring.corpora[0]: text too short: its search part has 10 characters")
    [line] = mistakes(put(raw, "scoring.corpora", [C4, {**short, "column": "passage"}]))
    assert line.startswith("scoring.corpora[1]: ")
    assert "no column 'passage'; there are text" in line


def test_a_task_of_ones_own_can_be_an_objective(raw: dict[str, Any]) -> None:
    names = ["budget.model", "reasoning.mine.acc_norm", "reasoning.mine.margin"]
    config = parse_config(put(put(raw, "scoring.tasks", [OWN, "boolq"]), "objectives", names))
    [own, boolq] = config.preparation().scoring.tasks
    assert (own.name, own.source, own.split, own.format) == ("mine", "/tmp", None, "choices")
    assert boolq.format is None


def test_bias_sets_are_read_from_the_hub_or_from_elsewhere(raw: dict[str, Any], tmp_path: Path) -> None:
    own = {"name": "crows_pairs", "source": str(tmp_path / "text.txt")}
    crows, stereoset = parse_config(put(raw, "scoring.bias", [own, "stereoset"])).preparation().scoring.bias
    assert (crows.source, crows.subset, crows.split) == (own["source"], None, None)
    assert stereoset.source == "McGill-NLP/stereoset"
    assert (stereoset.subset, stereoset.split) == ("intrasentence", "validation")


def test_a_task_of_its_own_source_keeps_the_split_it_names(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    tasks = [{"name": "piqa", "source": str(tmp_path / "piqa")}, {"name": "arc_easy", "split": "test"}]
    own, hub = parse_config(put(raw, "scoring.tasks", tasks)).preparation().scoring.tasks
    assert (own.source, own.subset, own.split) == (str(tmp_path / "piqa"), None, None)
    assert (hub.source, hub.subset, hub.split) == ("allenai/ai2_arc", "ARC-Easy", "test")


def test_a_model_and_factors_may_be_named_by_url(raw: dict[str, Any]) -> None:
    cache = {"factors": "file:///mnt/factors", "node": "/scratch/rankfront"}
    config = parse_config(put(raw, "model.source", "file:///mnt/model") | {"cache": cache})
    spec = config.preparation()
    assert (spec.model.source, spec.shared) == ("file:///mnt/model", "file:///mnt/factors")
    assert spec.node_cache == "/scratch/rankfront"
    assert config.builders == 1, "several would write into one folder"
    assert parse_config(raw).builders == "auto"


def test_a_shared_folder_of_factors_is_used_in_place(raw: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_config(put(raw, "cache.factors", str(tmp_path / "shared"))).preparation()
    assert (spec.cache, spec.shared) == (str(tmp_path / "shared"), None)
    spec = parse_config(raw).preparation()
    assert (spec.cache, spec.shared) == (str(tmp_path / "runs" / "factors"), None)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "model.source",
            "nosuch://a/b",
            "model.source: 'nosuch://a/b' cannot be read here: Protocol not known",
        ),
        ("cache.factors", "nosuch://a/b", "cache.factors: 'nosuch://a/b' cannot be read here"),
        ("cache.factors", "ftp://me:secret@host/x", "cache.factors: 'ftp://host/x' came with a password"),
        ("text.source", "file:///x/text.txt", "text.source: 'file:///x/text.txt' is no source"),
        ("cache.node", "", "cache.node: '' is no absolute path"),
        ("cache.node", "./cache", "cache.node: './cache' is no absolute path"),
    ],
)
def test_urls_that_cannot_be_used_are_mistakes(raw: dict[str, Any], key: str, value: str, said: str) -> None:
    [found] = mistakes(put(raw, key, value))
    assert found.startswith(said)
    assert "secret" not in found


@pytest.mark.parametrize("key", ["model", "text", "calibration.text"])
@pytest.mark.parametrize(
    ("page", "write"),
    [
        ("https://huggingface.co/meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("http://hf.co/gpt2/", "gpt2"),
        ("https://huggingface.co/gpt2/tree/main", "gpt2"),
        ("https://huggingface.co/datasets/allenai/c4?row=1", "allenai/c4"),
        ("https://www.huggingface.co/org/name/tree/main", "org/name"),
        ("https://huggingface.co/org/name/tree/v1.0/inner", "org/name@v1.0"),
        ("https://huggingface.co/datasets/org/name/viewer/default/train", "org/name"),
        ("https://huggingface.co/org/name/blob/main/model.gguf", "org/name"),
    ],
)
def test_a_page_of_the_hub_is_refused_with_the_id_to_write(
    raw: dict[str, Any], key: str, page: str, write: str
) -> None:
    assert mistakes(put(raw, key, {"source": page})) == [
        f"{key}.source: {page!r} is a page of the hub: write {write}"
    ]


def test_a_file_on_the_hub_may_be_named_by_its_url(raw: dict[str, Any]) -> None:
    url = "https://huggingface.co/org/name/resolve/main/model.gguf"
    assert parse_config(put(raw, "model.source", url)).model.source == url


def test_several_builders_need_a_folder(raw: dict[str, Any]) -> None:
    raw = put(put(raw, "cache.factors", "file:///mnt/factors"), "calibration.builders", 4)
    assert mistakes(raw) == [
        "calibration.builders: 4 write into one folder, and cache.factors is a URL; 1 or auto, or a folder "
        "that all nodes share"
    ]
