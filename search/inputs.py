"""The sections that name what is read and how it is scored: model, texts, tasks, sets of sentences."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator

from actors.bias import BIAS_SETS
from actors.node_cache import is_url
from actors.sources import Source
from actors.tasks import TASKS
from actors.types import RankfrontError, TaskSource
from search.section import NUMBER, Positive, Section, is_saved, readable_url

HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


def _no_page(name: str) -> None:
    """Raises ValueError where a name is the address of a page of the hub, as a browser shows it: there is
    nothing to read. With `/resolve/` it is that of a file."""
    url = urlsplit(name) if name.startswith(("http://", "https://")) else None
    if url is None or url.netloc not in HUB_HOSTS:
        return
    named, _, view = url.path.strip("/").removeprefix("datasets/").partition("/tree/")
    steps = [*filter(None, named.split("/"))]
    if steps and "resolve" not in steps:
        revision = view.partition("/")[0]
        hub_id = "/".join(steps[:2]) + (f"@{revision}" if revision not in ("", "main") else "")
        raise ValueError(f"{name!r} is a page of the hub: write {hub_id}")


def _known_source(name: str, info: ValidationInfo) -> str:
    if is_saved(info):
        return name
    _no_page(name)
    try:
        return Source.parse(name).name
    except RankfrontError as error:
        raise ValueError(str(error)) from error


def _known_model(name: str, info: ValidationInfo) -> str:
    if not is_saved(info):
        _no_page(name)
    return name if is_url(readable_url(name, info)) else _known_source(name, info)


class ModelSection(Section):
    """The pretrained model. Its `source` is a hub id (`org/name`, `org/name@revision`), a local path
    (`./...`, `/...`, `~/...`), a file of an installed package (`package:NAME/PATH`), or a URL that fsspec
    reads (`s3://...`). `dtype` is the type its weights are held in.

    `trust_remote_code` runs code that comes with it: only for models you trust.
    """

    source: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False

    _source = field_validator("source")(_known_model)


class TextSection(Section):
    """Documents: a `column` of a data set, joined by `join` into one text; or the lines of a .txt file, as
    they are.

    The data set's `source` is a hub id, with its `subset` and `split` (`validation` where none is named), a
    local path, or a file of an installed package, named as a model's.

    With `deduplicate`, of those that differ in case and white space alone only the first is kept.
    """

    source: str
    subset: str | None = None
    split: str | None = None
    column: str = "text"
    join: str = "\n\n"
    deduplicate: bool = False

    _source = field_validator("source")(_known_source)


class TaskSection(Section):
    """A reasoning task by its lm-evaluation-harness `name`, which may stand alone: `tasks: [arc_easy]`.

    It is from the hub, or the data set of that `source`, `subset` and `split`, in the same columns. With a
    `format` it is one's own, of any other name, and needs a source (see `actors.tasks`).
    """

    format: Literal["choices"] | None = None  # first, as what a name may be depends on it
    name: str
    source: str | None = None
    subset: str | None = None
    split: str | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        if info.data.get("format") is None:
            if name not in TASKS:
                own = "; your own needs format: choices"
                raise ValueError(f"{name!r} is no task; one of {', '.join(TASKS)}{own}")
        elif name in TASKS:
            raise ValueError(f"{name!r} is lm-evaluation-harness's; give your own another name")
        elif not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"{name!r}: a name is letters, digits and _, and begins with a letter")
        return name

    @field_validator("source")
    @classmethod
    def _source(cls, name: str | None, info: ValidationInfo) -> str | None:
        return None if name is None else _known_source(name, info)

    def resolved(self) -> TaskSource:
        if self.format is not None:
            assert self.source is not None, "see search.rules"
            return TaskSource(self.name, self.source, self.subset, self.split, self.format)
        task = TASKS[self.name]
        if self.source is None:
            return TaskSource(self.name, task.hub, task.subset, self.split or "validation")
        return TaskSource(self.name, self.source, self.subset, self.split)


class BiasSection(Section):
    """A set of sentences by its `name` (see `actors.bias`), which may stand alone: `bias: [stereoset]`. It is
    from the hub, or the data set of that `source`, `subset` and `split`, in the same columns."""

    name: Literal["crows_pairs", "stereoset"]
    source: str | None = None
    subset: str | None = None
    split: str | None = None

    @field_validator("source")
    @classmethod
    def _source(cls, name: str | None, info: ValidationInfo) -> str | None:
        return None if name is None else _known_source(name, info)

    def resolved(self) -> TaskSource:
        if self.source is not None:
            return TaskSource(self.name, self.source, self.subset, self.split)
        chosen = BIAS_SETS[self.name]
        return TaskSource(self.name, chosen.hub, chosen.subset, self.split or chosen.split)


class PerSplit(Section):
    """A cap for each split: `search`, which trials are scored on, and `test`, for final scores alone."""

    search: Positive
    test: Positive


class TextTokens(PerSplit):
    """Caps for the text, in tokens, by split: `search`, which trials are scored on, and `test`, for final
    scores alone. `choice` is for what is behind the search split's in its part of the text, and chooses among
    trials that the search split cannot tell apart: see `search.choosing`."""

    choice: Positive = 16_384


class CorpusSection(TextSection):
    """A text scored beside the main one, as `nll.<name>`; `name` begins with a letter. `tokens` are its caps
    where they are others. `source`, `subset`, `split`, `column`, `join` and `deduplicate` are those of
    `text`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
    tokens: PerSplit | None = None


class ScoringSection(Section):
    """What a score is made of: the loss over the text, further texts (`corpora`), reasoning `tasks` and sets
    of sentences that measure `bias`.

    Texts are read in windows of `window` tokens, each of which begins `stride` tokens behind the one before
    it; null is a whole window, so that none overlap. `search_fraction` of every text, task and set is its
    search split, the rest its test split; `seed` shuffles tasks and sets before. `tokens` caps the text,
    `examples` each task and set.

    `kl_top_k` asks for the divergence from the dense model as well, over that many of its most likely tokens
    and all others together; what is kept of it takes at most `kl_memory_mb` (10^6 bytes) a split and replica.
    `stages` are rising numbers of tokens of the search split after which a dominated trial stops.

    What follows is speed alone. `batch_tokens` are those of one pass through the model. With
    `prefix_memory_mb` (10^6 bytes a replica, 0 for none) hidden states of the dense model are kept at every
    `prefix_stride`-th block, or at fewer, so that a trial starts at its first changed block.
    """

    window: Annotated[int, Field(ge=2), NUMBER] = 512
    stride: Positive | None = None
    tokens: TextTokens = TextTokens(search=8_192, test=32_768)
    corpora: tuple[CorpusSection, ...] = ()
    tasks: tuple[TaskSection, ...] = ()
    bias: tuple[BiasSection, ...] = ()
    examples: PerSplit = PerSplit(search=100, test=400)
    search_fraction: Annotated[float, Field(gt=0, lt=1), NUMBER] = 0.2
    seed: Annotated[int, NUMBER] = 0
    batch_tokens: Positive = 1_024
    kl_top_k: Positive | None = None
    kl_memory_mb: Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER] = 512.0
    prefix_memory_mb: Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER] = 0.0
    prefix_stride: Positive = 1
    stages: tuple[Positive, ...] = ()

    @field_validator("tasks", "bias", mode="before")
    @classmethod
    def _names(cls, tasks: Any) -> Any:
        if isinstance(tasks, list | tuple):
            return [{"name": task} if isinstance(task, str) else task for task in tasks]
        return tasks
