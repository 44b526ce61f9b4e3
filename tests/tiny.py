"""Tiny models, texts, tasks and configs, made on the spot: deterministic, offline, saved as users' are.

tiny_model(folder, model_type)   a causal language model of random weights and a byte-level BPE tokenizer
tiny_llama(folder)   the Llama among them
tiny_store(folder, model, targets, moments, spec)   the factor store of a model
tiny_text(folder)    a saved data set with a `text` column
tiny_tasks(folder)   saved data sets in the schemas of arc_easy, piqa and boolq
tiny_harness_task(folder)   a task of one's own for lm-evaluation-harness
tiny_config(root)    a raw rankfront config that uses them by local path
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.types import FactorSpec, TargetSpec

VOCABULARY = 384
# Random weights of the usual deviation (0.02) give uniform logits, on which every mistake looks alike.
INITIALIZER_RANGE = 0.25


@cache
def _words() -> tuple[str, ...]:
    chance = random.Random("words")
    starts = [*"bcdfglmnprstv", "th", "st", "gr"]
    ends = [*"aeiou", "ai", "ou", "er", "an", "il"]
    return tuple(
        "".join(chance.choice(starts) + chance.choice(ends) for _ in range(chance.choice((1, 2, 2, 3))))
        for _ in range(240)
    )


def sentence(chance: random.Random, words: int) -> str:
    """`words` pseudo-random words, frequent ones more often, with a capital and a full stop."""
    vocabulary = _words()
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    return " ".join(chance.choices(vocabulary, weights, k=words)).capitalize() + "."


def documents(count: int = 60) -> list[str]:
    """Different documents of 50 to 150 words; some hold digits, line breaks and letters beyond ASCII."""
    chance = random.Random("documents")
    made = []
    for number in range(count):
        sentences = [sentence(chance, chance.randint(5, 15)) for _ in range(10)]
        if number % 3 == 0:
            sentences.insert(1, f"In {1900 + number} the café naïvely cost {number} €.")
        made.append(("\n" if number % 5 == 0 else " ").join(sentences))
    return made


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the tiny documents: it encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>")


def beginning_with_bos() -> Any:
    """The tiny tokenizer, but that it puts BOS before every text, as those of Llama 3 and Gemma do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    bos = [("<eos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=bos)
    return tokenizer


def tiny_model(folder: Path, model_type: str, seed: int = 0, **config_overrides: Any) -> Path:
    """Save a random causal language model (3 blocks, hidden 32, tied embeddings) and its tokenizer.

    Settings that a type does not know are left out; grouped heads are for those that have them. Where a type
    nests its text's config they are of that one, as are those in an override `text_config`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    default = AutoConfig.for_model(model_type)
    text = default.get_text_config()
    known = set(text.to_dict()) | set(text.attribute_map)
    usual = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    settings = {name: value for name, value in usual.items() if name in known}
    if text is not default:
        settings = {"text_config": settings | config_overrides.pop("text_config", {})}
    settings |= config_overrides
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # initialised to zero, where a forgotten bias would not show
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, seed: int = 0, **config_overrides: Any) -> Path:
    """The tiny model that most tests use."""
    return tiny_model(folder, "llama", seed, **config_overrides)


def tiny_store(
    folder: Path, model: Any, targets: Sequence[TargetSpec], moments: Any, spec: FactorSpec
) -> Any:
    """The `FactorStore` of a model's targets, built at `folder`."""
    from actors.factors import FactorStore, StoreBuilder
    from actors.linears import weight_of

    builder = StoreBuilder(folder, spec, targets)
    with builder.locked():
        for target in targets:
            builder.write(target, weight_of(model.get_submodule(target.name)), moments.get(target.name))
        builder.finish("print")
    return FactorStore(folder)


def refinement_texts(ids: Any) -> Any:
    """Windows (windows, window) to refine on and, the last quarter of them, to tell points apart by."""
    from actors.refinable import Texts
    from actors.text import ScoredText

    count, window = ids.shape
    return Texts(ids[: -(count // 4)], ScoredText(f"tiny@{window}", ids[-(count // 4) :], window))


def _save(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


def tiny_text(folder: Path, count: int = 60) -> Path:
    """Save the tiny documents as a data set with a `text` column."""
    return _save(folder, [{"text": document} for document in documents(count)])


def arc_rows(count: int = 30) -> list[dict[str, Any]]:
    """Rows of allenai/ai2_arc: three to five choices, labelled by letters or by digits."""
    chance = random.Random("arc")
    rows = []
    for number in range(count):
        choices = 3 + number % 3
        labels = list("ABCDE" if number % 4 else "12345")[:choices]
        rows.append(
            {
                "id": f"tiny-{number}",
                "question": sentence(chance, chance.randint(5, 20)).replace(".", "?"),
                "choices": {
                    "text": [sentence(chance, chance.randint(1, 5)) for _ in labels],
                    "label": labels,
                },
                "answerKey": chance.choice(labels),
            }
        )
    return rows


def piqa_rows(count: int = 30) -> list[dict[str, Any]]:
    """Rows of baber/piqa: two solutions that differ in few words, `label` 0 or 1."""
    chance = random.Random("piqa")
    rows = []
    for number in range(count):
        solution = sentence(chance, chance.randint(4, 14)).split()
        other = [*solution]
        other[chance.randrange(1, len(other) - 1)] = "crème" if number % 3 else "zebra"
        rows.append(
            {
                "goal": sentence(chance, chance.randint(4, 12)),
                "sol1": " ".join(solution),
                "sol2": " ".join(other),
                "label": chance.randrange(2),
            }
        )
    return rows


def boolq_rows(count: int = 30) -> list[dict[str, Any]]:
    """Rows of google/boolq: a passage, a question without its mark, a true or false `answer`."""
    chance = random.Random("boolq")
    return [
        {
            "question": sentence(chance, 7).lower().rstrip("."),
            "answer": chance.random() < 0.5,
            "passage": " ".join(sentence(chance, chance.randint(5, 12)) for _ in range(3)),
        }
        for _ in range(count)
    ]


def tiny_tasks(folder: Path, count: int = 30) -> dict[str, Path]:
    """Save `count` rows of each of arc_easy, piqa and boolq."""
    rows = {"arc_easy": arc_rows(count), "piqa": piqa_rows(count), "boolq": boolq_rows(count)}
    return {name: _save(folder / name, table) for name, table in rows.items()}


def tiny_harness_task(folder: Path, count: int) -> Path:
    """Write `tiny_piqa`, its questions beside it: `count` rows of piqa."""
    import yaml

    questions = folder / "questions.json"
    questions.write_text("\n".join(json.dumps(row) for row in piqa_rows(count)))
    task = {
        "task": "tiny_piqa",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(questions)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    (folder / "tiny_piqa.yaml").write_text(yaml.safe_dump(task))
    return folder


def tiny_config(root: Path, **overrides: Any) -> dict[str, Any]:
    """A raw config whose model, text and tasks are saved below `root`, those already there kept.

    A mapping among the overrides is merged into its section; anything else replaces it.
    """
    model, text, tasks = root / "model", root / "text", root / "tasks"
    if not model.exists():
        tiny_llama(model)
    if not text.exists():
        tiny_text(text)
    if not tasks.exists():
        tiny_tasks(tasks)
    raw: dict[str, Any] = {
        "study": "tiny",
        "runs": str(root / "runs"),
        "model": {"source": str(model)},
        "text": {"source": str(text)},
        "calibration": {"tokens": 512, "window": 32},
        "scoring": {
            "window": 32,
            "tokens": {"search": 128, "test": 128},
            "tasks": [{"name": name, "source": str(tasks / name)} for name in ("arc_easy", "piqa")],
            "examples": {"search": 6, "test": 10},
        },
        "objectives": ["budget.model", "nll"],
        "space": {"group": "module", "levels": 8, "floor": 0.4},
        "references": {"uniform": [0.8, 0.5]},
        "seeds": {"spectra": [], "sensitivity": []},
        "stop": {"trials": 8},
        "replicas": {"count": 1, "threads": 1},
    }
    return _merged(raw, overrides)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], over[key])
        for key in base.keys() & over.keys()
        if isinstance(base[key], Mapping) and isinstance(over[key], Mapping)
    }
    return {**base, **over, **both}
