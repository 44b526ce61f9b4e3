"""Every task against lm-evaluation-harness: the same rows, asked by its own task definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
import tiny
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from actors.tasks import TASKS, load_examples
from actors.types import RankfrontError, TaskSource

YAML = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
OPENBOOKQA = {"text": ["puppies learn", "a café", "water", "the sun is hot"], "label": ["A", "B", "C", "D"]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_challenge": tiny.arc_rows(8),
    "arc_easy": tiny.arc_rows(12),
    "boolq": [{**row, "label": int(row["answer"])} for row in tiny.boolq_rows(6)],
    "hellaswag": [
        {
            "activity_label": "Removing ice from car",
            "ctx_a": "Then, the man writes over the snow [substeps] covering the window.",
            "ctx_b": "then  He CONTINUES",
            "endings": [" adds wax [title] to it.", "[step] removes  the snow", "café. [title] Pour.", "x "],
            "label": "3",
        },
        {
            "activity_label": "Personal Care",
            "ctx_a": " [header] How to rest [title] Lie down.",
            "ctx_b": "",
            "endings": ["sleeps.", "a [b] c [d] e", "   ", "wakes  up   now"],
            "label": "0",
        },
    ],
    "openbookqa": [
        {"question_stem": "The sun is responsible for", "choices": OPENBOOKQA, "answerKey": "D"},
        {"question_stem": "When food is reduced ", "choices": OPENBOOKQA, "answerKey": " B"},
    ],
    "piqa": tiny.piqa_rows(6),
    "sciq": [
        {
            "question": "What moves the sea?",
            "distractor1": "wind, mostly",
            "distractor2": "ships",
            "distractor3": "fish",
            "correct_answer": "the moon",
            "support": support,
        }
        for support in (" \n  Tides rise twice a day. ", "")
    ],
    "social_iqa": [
        {
            "context": "Tracy didn't go home.",
            "question": "What does Tracy need?",
            "answerA": "a friend",
            "answerB": "to sit",
            "answerC": "a ride",
            "label": label,
        }
        for label in ("1", "3")
    ],
    "winogrande": [
        {
            "sentence": "Sarah was better than Maria so _ always got the easier cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
        {"sentence": "He chose the _", "option1": "longer rope", "option2": "rope", "answer": "1"},
        {"sentence": "_ left, as the _ said.", "option1": "Al", "option2": "The café", "answer": "1"},
    ],
}


def saved(folder: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return str(folder)


def definition(name: str) -> dict[str, Any]:
    return load_yaml(Path(lm_eval.tasks.__file__).parent / YAML[name])


def harness_task(name: str, rows: list[dict[str, Any]]) -> ConfigurableTask:
    """The harness's task on our rows, in the place of the download."""
    table = datasets.Dataset.from_list(rows)
    settings = definition(name)
    splits = {value: table for key, value in settings.items() if key.endswith("_split") and value}
    return ConfigurableTask(config={**settings, "custom_dataset": lambda **_: splits})


def test_every_task_is_compared() -> None:
    assert YAML.keys() == ROWS.keys() == TASKS.keys()


@pytest.mark.filterwarnings("ignore:divide by zero")  # lm-eval, on HellaSwag's choice of no characters
@pytest.mark.parametrize("name", TASKS)
def test_requests_and_answers_are_those_of_the_harness(name: str, tmp_path: Path) -> None:
    rows = ROWS[name]
    examples = load_examples(TaskSource(name, saved(tmp_path / name, rows)))
    task = harness_task(name, rows)
    task.build_all_requests()
    assert len(examples) == len(rows)
    for number, (example, doc) in enumerate(zip(examples, task.eval_docs, strict=True)):
        asked = [request.args for request in task.instances if request.doc_id == number]
        assert [*zip(example.contexts, example.continuations, strict=True)] == asked
        choices = task.doc_to_choice(doc)
        assert [*example.lengths] == [len(choice) for choice in choices]
        # a perfect model: only the gold choice is likely, and the harness grants it every point
        likely = [(0.0 if i == example.gold else -99.0, True) for i in range(len(choices))]
        assert task.process_results(doc, likely)["acc"] == 1.0


@pytest.mark.parametrize("name", TASKS)
def test_metrics_and_places_are_those_of_the_harness(name: str) -> None:
    settings = definition(name)
    metrics = {metric["metric"] for metric in settings["metric_list"]}
    assert TASKS[name].normalised == ("acc_norm" in metrics)
    assert (TASKS[name].hub, TASKS[name].subset) == (settings["dataset_path"], settings.get("dataset_name"))


def test_boolq_reads_either_schema(tmp_path: Path) -> None:
    """google/boolq has a boolean `answer`, SuperGLUE an integer `label`."""
    answers = [{k: v for k, v in row.items() if k != "label"} for row in ROWS["boolq"]]
    labels = [{k: v for k, v in row.items() if k != "answer"} for row in ROWS["boolq"]]
    one, other = (
        load_examples(TaskSource("boolq", saved(tmp_path / str(number), rows)))
        for number, rows in enumerate((answers, labels))
    )
    assert one == other
    assert {example.gold for example in one} == {0, 1}


def broken(name: str, **fields: Any) -> tuple[str, list[dict[str, Any]]]:
    """Two good rows, then one with `fields` changed (None removes nothing: it is the value)."""
    good = [ROWS[name][0], ROWS[name][1]]
    return name, [*good, {**good[0], **fields}]


ALONE = {"text": ["the sun"], "label": ["A"]}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (broken("piqa", label=-1), r"answer -1 of 2 choices"),
        (broken("piqa", label=2), r"answer 2 of 2 choices"),
        (broken("winogrande", answer=""), r"cannot be read: invalid literal for int\(\)"),
        (broken("winogrande", answer="3"), r"answer 2 of 2 choices"),
        (broken("winogrande", sentence="no blank"), r"cannot be read"),
        (broken("hellaswag", label=""), r"cannot be read: invalid literal for int\(\)"),
        (broken("hellaswag", ctx_b=None), r"cannot be read"),
        (broken("arc_easy", answerKey="Z"), r"cannot be read: 'Z' is not in list"),
        (broken("arc_easy", choices=ALONE, answerKey="A"), r": one choice; a question needs two or more$"),
        (broken("openbookqa", choices=ALONE, answerKey="A"), r": one choice; a question needs two or more$"),
        (broken("hellaswag", endings=["sleeps."], label="0"), r": one choice; a question needs two or more$"),
        (broken("openbookqa", question_stem=""), r"empty context"),
        (broken("openbookqa", question_stem=" \n"), r"empty context"),
        (broken("social_iqa", label="0"), r"answer -1 of 3 choices"),
    ],
)
def test_a_row_that_is_no_question_is_named(
    case: tuple[str, list[dict[str, Any]]], reason: str, tmp_path: Path
) -> None:
    name, rows = case
    source = saved(tmp_path / "table", rows)
    with pytest.raises(RankfrontError, match=rf"{source}: row 2 of {name}.*{reason}"):
        load_examples(TaskSource(name, source))


@pytest.mark.parametrize(
    ("name", "field"),
    [("piqa", "goal"), ("boolq", "passage"), ("arc_easy", "answerKey"), ("sciq", "support")],
)
def test_a_missing_field_is_named_with_those_there(name: str, field: str, tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != field} for row in ROWS[name]]
    source = saved(tmp_path / "table", rows)
    with pytest.raises(RankfrontError) as caught:
        load_examples(TaskSource(name, source))
    there = ", ".join(rows[0])
    assert str(caught.value) == f"{source}: row 0 of {name} has no field '{field}'; there are {there}"


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").write_text("\n")
    with pytest.raises(RankfrontError, match=r"table\.jsonl: holds no rows"):
        load_examples(TaskSource("piqa", str(tmp_path / "table.jsonl")))


OWN = [
    {"question": "Which is wet?", "choices": ["sand", "water", "air"], "answer": 1, "id": "ignored"},
    {"context": "It rains. ", "question": "Where?", "choices": ["here", "there"], "answer": 0},
    {"context": "The sky is", "choices": ["blue", "green"], "answer": 0},
]


def own(folder: Path, rows: list[dict[str, Any]]) -> TaskSource:
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TaskSource("mine", str(folder / "mine.jsonl"), format="choices")


def test_a_task_of_ones_own_is_asked_as_arc_is_or_continued(tmp_path: Path) -> None:
    found = load_examples(own(tmp_path, OWN))
    arc = {"question": "Which is wet?", "choices": {"text": OWN[0]["choices"], "label": ["a", "b", "c"]}}
    assert found[0] == TASKS["arc_easy"].ask({**arc, "answerKey": "b"})
    assert found[1].contexts[0] == "It rains. \nQuestion: Where?\nAnswer:"
    assert found[2].contexts == ("The sky is",) * 2
    assert found[2].continuations == (" blue", " green")
    assert [example.gold for example in found] == [1, 0, 0]
    assert [example.lengths for example in found] == [(4, 5, 3), (4, 5), (4, 5)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"answer": 3}, "answer 3 of 3 choices"),
        ({"answer": -1}, "answer -1 of 3 choices"),
        ({"answer": "1"}, "answer must be the index of a choice, 0 the first, not '1'"),
        ({"answer": True}, "answer must be the index of a choice, 0 the first, not True"),
        ({"answer": None}, "the field 'answer' is null"),
        ({"choices": ["sand"]}, r"choices must be a list of two or more texts, not \['sand'\]"),
        ({"choices": "sand"}, "choices must be a list of two or more texts, not 'sand'"),
        ({"choices": ["sand", " "]}, "choices must be texts, none of them empty"),
        ({"choices": ["sand", 2]}, "choices must be texts, none of them empty"),
        ({"question": "  "}, "question must be text, not '  '"),
        ({"question": 5}, "question must be text, not 5"),
    ],
)
def test_a_row_of_ones_own_that_is_no_question_is_named(
    fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = own(tmp_path, [OWN[1], {**OWN[0], **fields}])
    with pytest.raises(RankfrontError, match=rf"{source.source}: row 1 of mine.*{reason}"):
        load_examples(source)


@pytest.mark.parametrize("field", ["choices", "answer", "question"])
def test_a_field_of_ones_own_that_is_missing_is_named(field: str, tmp_path: Path) -> None:
    source = own(tmp_path, [OWN[1], {key: value for key, value in OWN[0].items() if key != field}])
    rule = (
        "needs a question, a context or both" if field == "question" else f"has no field '{field}'; there are"
    )
    with pytest.raises(RankfrontError, match=rf"{source.source}: row 1 of mine.*{rule}"):
        load_examples(source)


def test_a_field_that_only_some_rows_have_is_missing_in_the_others(tmp_path: Path) -> None:
    """A table would fill it with null, which a prompt would spell out."""
    rows = [ROWS["piqa"][0], {key: value for key, value in ROWS["piqa"][1].items() if key != "goal"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RankfrontError, match=r"row 1 of piqa has no field 'goal'"):
        load_examples(TaskSource("piqa", str(tmp_path / "t.jsonl")))
    with pytest.raises(RankfrontError, match=r"row 1 of piqa cannot be read: the field 'goal' is null"):
        load_examples(TaskSource("piqa", saved(tmp_path / "table", [rows[0], {**rows[1], "goal": None}])))
