"""A configuration that someone else found, applied to a model: decomposed here, scored, written, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from actors.sources import from_home
from actors.types import Score
from search.allocation_file import Configuration, metrics_of, read_configuration, sections
from search.card import CardFacts, model_card
from search.exporting import apply_command
from search.folder import factor_fact


def apply_configuration(
    file: Path,
    model: str,
    overrides: Mapping[str, Any],
    destination: Path,
    form: str,
    runs: Path,
    say: Callable[[str], None],
    device: str = "auto",
) -> list[str]:
    """Decompose a model as a configuration says, and write it, scored and checked on `device`; what was
    checked, in words.

    Raises:
        RankfrontError: mistakes in the file, ranks that do not fit the model, or what `export` raises.
    """
    found = read_configuration(file, model, overrides, runs)
    from actors.applying import applied
    from actors.export import export, refuse_existing
    from actors.licence import base_licence
    from actors.resident import local_source

    destination = from_home(destination, "--to").resolve()
    refuse_existing(destination)
    config = found.config
    scored = applied(config.preparation(), config.storage, found.ranks, found.methods, file.name, say, device)
    for line in _compared(found, scored.score, scored.prepared.fingerprints):
        say(line)
    described = {
        **{name: value for name, value in found.told.items() if name not in ("variant", "budgets")},
        "scores": {"search": metrics_of(scored.score)},
        "fingerprints": dict(scored.prepared.fingerprints),
        **sections(config),
    }
    ours = found.methods
    told = CardFacts(
        config=config,
        calibration_tokens=scored.prepared.tokens["calibration"],
        licence=base_licence(local_source(scored.preparation), scored.prepared.model_folder),
        factors=factor_fact(config.factor_spec),
        scores={"search": scored.score},
        commands=(apply_command(config.model.source, form),),
        smaller=form != "dense",
        study=found.told.get("study"),
        trial=found.told.get("trial"),
    )
    return export(
        scored,
        destination,
        described | ({"methods": dict(ours)} if ours else {}),
        lambda checked: model_card(told, checked),
        form,
        device,
    )


def _compared(found: Configuration, score: Score, prints: Mapping[str, str]) -> Iterator[str]:
    """What was recorded where the configuration was found, next to what is measured here."""
    theirs = found.told.get("fingerprints", {}).get("model")
    if theirs is not None and theirs != prints["model"]:
        yield "the configuration was found on other weights: its scores do not carry over"
    if "variant" in found.told:
        yield f"its scores are those of {found.told['variant']}: ranks alone do not make refined factors"
    for name, value in found.recorded.items():
        if name in score.metrics:
            here = score.metrics[name]
            yield f"{name} on the search split: {here:.6f} here, {value:.6f} where it was found"
