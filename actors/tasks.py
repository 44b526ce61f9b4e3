"""The reasoning tasks: rows of a public data set -> zero-shot multiple choice, as the field asks it.

Prompts, choices and metrics are those of lm-evaluation-harness 0.4 (names and versions as there). A task of
one's own is a table of the format `choices`:

    field       what
    question    asked as ARC's are: "Question: ...\nAnswer:", a choice follows after a space
    context     before the question, on lines of its own; alone, the text that a choice continues
    choices     two or more texts
    answer      the index of the right one, 0 the first

A row has a question, a context or both; other fields are left alone. `acc_norm` is defined for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from actors.rows import Row, load_rows
from actors.types import RankfrontError, TaskSource

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One question: choice i is scored as log p(continuations[i] | contexts[i]).

    `lengths` are the characters of each choice, by which `acc_norm` divides; `origin` says, for errors,
    where the question is from.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Task:
    """How a task asks, whether the harness defines `acc_norm` for it, and where the hub keeps it."""

    ask: Callable[[Row], Example]
    normalised: bool
    hub: str
    subset: str | None = None


def _choices(context: str, choices: list[str], gold: int) -> Example:
    """The same context for every choice, a space before each."""
    return Example(
        contexts=(context,) * len(choices),
        continuations=tuple(f" {choice}" for choice in choices),
        lengths=tuple(map(len, choices)),
        gold=gold,
    )


def _arc(row: Row) -> Example:
    gold = row["choices"]["label"].index(row["answerKey"])
    return _choices(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold)


def _boolq(row: Row) -> Example:
    answer = row["label"] if "label" in row else row["answer"]
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return _choices(context, ["no", "yes"], int(answer))


def _hellaswag(row: Row) -> Example:
    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return _choices(context, [clean(ending) for ending in row["endings"]], int(row["label"]))


def _piqa(row: Row) -> Example:
    return _choices(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _winogrande(row: Row) -> Example:
    """Partial scoring: the text after the blank, given the sentence with either option filled in."""
    before, after = row["sentence"].split("_", 1)
    contexts = tuple(before + row[option] for option in ("option1", "option2"))
    rest = f" {after.strip()}"
    return Example(contexts, (rest, rest), (len(contexts[0]), len(contexts[1])), int(row["answer"]) - 1)


def _openbookqa(row: Row) -> Example:
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return _choices(row["question_stem"], row["choices"]["text"], gold)


def _social_iqa(row: Row) -> Example:
    answers = [row[key] for key in ("answerA", "answerB", "answerC")]
    return _choices(f"Q: {row['context']} {row['question']}\nA:", answers, int(row["label"]) - 1)


def _sciq(row: Row) -> Example:
    answers = [row[key] for key in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return _choices(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", answers, 3)


TASKS: dict[str, Task] = {
    "arc_challenge": Task(_arc, True, "allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": Task(_arc, True, "allenai/ai2_arc", "ARC-Easy"),
    "boolq": Task(_boolq, False, "aps/super_glue", "boolq"),
    "hellaswag": Task(_hellaswag, True, "Rowan/hellaswag"),
    "openbookqa": Task(_openbookqa, True, "allenai/openbookqa", "main"),
    "piqa": Task(_piqa, True, "baber/piqa"),
    "sciq": Task(_sciq, True, "allenai/sciq"),
    "social_iqa": Task(_social_iqa, False, "lighteval/siqa"),
    "winogrande": Task(_winogrande, False, "allenai/winogrande", "winogrande_xl"),
}


def _own(row: Row) -> Example:
    """A row of the format `choices`."""
    choices, gold = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"choices must be a list of two or more texts, not {choices!r}")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"choices must be texts, none of them empty, not {choices!r}")
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise ValueError(f"answer must be the index of a choice, 0 the first, not {gold!r}")
    said = {key: row[key] for key in ("context", "question") if key in row}
    for key, text in said.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{key} must be text, not {text!r}")
    if not said:
        raise ValueError("a row needs a question, a context or both")
    if "question" in said:
        before = f"{said['context']}\n" if "context" in said else ""
        return _choices(f"{before}Question: {said['question']}\nAnswer:", choices, gold)
    return _choices(said["context"], choices, gold)


FORMATS = {"choices": Task(_own, True, hub="")}
"""How tasks of one's own may be written."""


def task_of(name: str, form: str | None) -> Task:
    """How a task asks, by its name or by the format that it is written in."""
    return TASKS[name] if form is None else FORMATS[form]


class _Fields(Mapping[str, Any]):
    """A row in which null is a mistake, as it would end up in a prompt as `None`."""

    def __init__(self, row: Row) -> None:
        self._row = row

    def __getitem__(self, key: str) -> Any:
        value = self._row[key]
        if value is None:
            raise ValueError(f"the field {key!r} is null")
        return value

    def __contains__(self, key: object) -> bool:
        return self._row.get(str(key)) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def load_examples(source: TaskSource) -> list[Example]:
    """Every example of a task, in the data set's order.

    Raises:
        RankfrontError: an empty table, or a row that is no question: the source, the row, the rule.
    """
    task = task_of(source.name, source.format)
    rows = load_rows(source.source, source.subset, source.split)
    return [_checked(source, task, number, row) for number, row in enumerate(rows)]


def read_row(row: Row, read: Callable[[Row], T], where: str) -> T:
    """What `read` makes of a row.

    Raises:
        RankfrontError: a missing field, a null, or another value than `read` takes; `where` begins it.
    """
    try:
        return read(_Fields(row))
    except KeyError as error:
        raise RankfrontError(f"{where} has no field {error}; there are {', '.join(row)}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise RankfrontError(f"{where} cannot be read: {error}") from error


def _checked(source: TaskSource, task: Task, number: int, row: Row) -> Example:
    where = f"{source.source}: row {number} of {source.name}"
    example = replace(read_row(row, task.ask, where), origin=where)
    if not 0 <= example.gold < len(example.continuations):
        raise RankfrontError(f"{where}: answer {example.gold} of {len(example.continuations)} choices")
    if len(example.continuations) < 2:  # no margin to a wrong one, and always right
        raise RankfrontError(f"{where}: one choice; a question needs two or more")
    if not all(context.strip() for context in example.contexts):
        raise RankfrontError(f"{where} has an empty context")
    return example
