"""Numbers in a config: what is one, in YAML and to each key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
from pydantic import ValidationError
from raw_config import mistakes, put

from search.config import Config, adapter_of
from search.section import Section


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from parts(part)


def sections(model: type[Section]) -> Iterator[type[Section]]:
    """A section and every one below it."""
    yield model
    for field in model.model_fields.values():
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, Section):
                yield from sections(part)


NUMBERS = {
    f"{model.__name__}.{name}": field
    for model in sections(Config)
    for name, field in model.model_fields.items()
    if {int, float} & set(parts(field.annotation))
}


def test_the_walk_finds_the_numbers() -> None:
    assert {"ScoringSection.kl_top_k", "SeedSection.spectra", "PerSplit.test"} <= set(NUMBERS)
    assert {"PlateauSection.tolerance", "Config.constraints", "ReplicaSection.gpus"} <= set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("flag", [True, False])
def test_true_is_no_number(name: str, flag: bool) -> None:
    """To Python it is 1, and false is 0."""
    field = NUMBERS[name]
    origin = get_origin(field.annotation)
    value: Any = [flag] if origin is tuple else {"nll": flag} if origin is dict else flag
    with pytest.raises(ValidationError) as refused:
        adapter_of(field).validate_python(value)
    error, *_ = refused.value.errors()
    assert any(word in error["msg"] for word in ("number", "integer"))


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("stop.trials", True, "stop.trials"),
        ("seeds.spectra", [0.9, True], "seeds.spectra[1]"),
        ("scoring.tokens", {"search": 64, "test": True}, "scoring.tokens.test"),
    ],
)
def test_a_flag_is_named_where_it_stands(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    assert mistakes(put(raw, key, value)) == [f"{where}: True: input should be a number, not true or false"]
