"""Numbers in a config: what is one, in YAML and to each key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import ValidationError
from raw_config import mistakes, put

from actors.plain import to_yaml
from search.config import Config, ConfigError, adapter_of, load_config
from search.plain import from_yaml
from search.section import Section
from search.terminal import override


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


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e8", 2e8),
        ("1e-4", 1e-4),
        ("1.5e3", 1500.0),
        ("-1E+5", -1e5),
        ("+.5e1", 5.0),
        ("3.e2", 300.0),
        ("7", 7),
        ("0.25", 0.25),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1e5x", "1e5x"),
        ("'2e8'", "2e8"),
    ],
)
def test_exponents_are_written_as_in_yaml_1_2(written: str, value: Any) -> None:
    found = from_yaml(f"[{written}]")
    assert found == [value]
    assert type(found[0]) is type(value)
    assert from_yaml(to_yaml(found)) == found


def test_a_number_with_an_exponent_is_one_to_every_key(raw: dict[str, Any], tmp_path: Path) -> None:
    """A whole one is a count; a text that looks like one stays a text in the saved config."""
    path = tmp_path / "config.yaml"
    raw["study"] = "1e5"
    sections = "constraints: {bytes: 2e8}\nstop: {trials: 1e3}\nrefine: {learning_rate: 1e-4}\n"
    path.write_text(to_yaml(raw) + sections)
    config = load_config(path, dict([override("seeds.spectra=[9e-1]"), override("cost.length=1e3")]))
    assert config.constraints == {"bytes": 2e8}
    assert (config.stop.trials, config.cost.length, config.study) == (1000, 1000, "1e5")
    assert (config.refine.learning_rate, config.seeds.spectra) == (1e-4, (0.9,))
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    with pytest.raises(ConfigError, match=r"stop.trials: 1.5: .* fractional part"):
        load_config(path, dict([override("stop.trials=15e-1")]))
