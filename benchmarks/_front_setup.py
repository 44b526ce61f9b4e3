"""The models, texts and spaces that strategies are compared on: SmolLM2-135M on WikiText-2, or tiny ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import CACHE, quick_start

from search.config import Config
from search.cost import CostModel
from search.files import write_atomic

# Of the validation file's characters: 83% are 386 whole windows of 512 tokens, just under 200,000.
CALIBRATED = 0.83


@dataclass(frozen=True)
class Setup:
    """What a comparison is measured on, and how large it is.

    `budgets` are of all parameters: where results are given, and `ladder` where seeds are worked out.
    `lowest` is the smallest budget that counts: what is below counts as if it were there. `room` is the
    loss above dense, nats/token, at which a model is of no use. Both bound the hypervolume.
    """

    name: str
    model: str | None
    window: int
    calibration_tokens: int
    search_tokens: int
    test_tokens: int
    levels: int = 20
    floor: float = 0.2
    budgets: tuple[float, ...] = (0.9, 0.8, 0.7)
    ladder: tuple[float, ...] = tuple(step / 40 for step in range(39, 23, -1))
    lowest: float = 0.6
    room: float = 2.302585092994046  # log 10: ten times the dense perplexity
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 120
    checkpoints: tuple[int, ...] = (25, 50, 100, 120)

    @property
    def identity(self) -> list[Any]:
        """What trials depend on beside the model and the texts."""
        return [self.levels, self.floor, self.ladder]

    def config(self, texts: Texts, cache: Path, method: str = "curvature", storage: str = "auto") -> Config:
        """The quick start's with these texts and sizes, every target its own level; factors below `cache`."""
        sections: dict[str, Any] = {
            "study": f"front-{self.name}",
            "runs": str(cache),
            "text": {"source": str(texts.scored)},
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
                "tokens": {"search": self.search_tokens, "test": self.test_tokens},
                "batch_tokens": 1024,
                "search_fraction": texts.search_fraction,
                "prefix_memory_mb": 256.0,
            },
            "space": {"group": "target", "levels": self.levels, "floor": self.floor},
            "surgical": {"skip_blocks": 0},
        }
        if self.model is not None:
            sections["model"] = {"source": self.model}
        return quick_start(**sections)


@dataclass(frozen=True)
class Texts:
    """Files of one document a line: `calibration` holds one, `scored` the search text and the test text.

    At `search_fraction` the first of those two is the search split and the second the test split.
    """

    calibration: Path
    scored: Path
    search_fraction: float


def cut_texts(folder: Path, validation: str, test: str) -> Texts:
    """Calibration and search text from the validation file, cut at an end of a line; the test file whole.

    `<unk>` is deleted from the validation file with the space before it; the raw test file has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cleaned = validation.replace(" <unk>", "")
    border = cleaned.index("\n", int(CALIBRATED * len(cleaned)))
    texts = {"calibration": [cleaned[:border]], "scored": [cleaned[border:], test]}
    for name, documents in texts.items():
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        write_atomic(folder / f"{name}.jsonl", lines)
    search, whole = len(texts["scored"][0]), len(texts["scored"][0]) + len(test)
    # A document belongs where its middle is: half of the search text before the border, half behind it.
    return Texts(folder / "calibration.jsonl", folder / "scored.jsonl", search / whole)


def linear_budget(cost: CostModel, budget: float) -> float:
    """The share of the targets' parameters at which the whole model is at `budget`."""
    kept_dense = cost.model_parameters - cost.linear_parameters
    return (budget * cost.model_parameters - kept_dense) / cost.linear_parameters


SMOLLM2 = Setup("smollm2", None, 512, 200_000, 2_048, 16_384)


def tiny(folder: Path) -> Setup:
    """The same in seconds, on random weights."""
    return Setup(
        "tiny",
        str(folder),
        32,
        512,
        128,
        256,
        levels=8,
        ladder=(0.95, 0.9, 0.8, 0.7),
        seeds=(0, 1),
        trials=12,
        checkpoints=(6, 12),
    )


WIKITEXT = CACHE / "wikitext2"
