"""Allocations as files name them: `{target: rank}`, or `{ranks: {...}, methods: {...}}`, or a list of them.

Members of front.json and the ranks.yaml of an export are of the second kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.types import METHOD_NAMES, Allocation, FactorSpec, RankfrontError, TargetSpec
from search.plain import from_json, read_yaml
from search.rules import no_method

# What members of front.json and configurations alone (`search.allocation_file`) tell of a trial beside its
# ranks and methods: it is passed over.
TOLD = frozenset(
    {
        *("trial", "origin", "budget_linear", "budget_model", "budget_bytes", "macs"),
        *("values", "search", "test"),
        *("format", "study", "variant", "budgets", "scores", "fingerprints"),
        *("model", "text", "calibration", "factors", "targets", "storage", "scoring"),
    }
)

_KEYS = {"ranks", "methods"} | TOLD
_BESIDE = "beside ranks: methods, and what front.json and ranks.yaml tell of a trial"


def read_items(file: Path) -> list[Any]:
    """What a YAML or JSON file lists, or the one thing it is; of a `.jsonl` file each line.

    Raises:
        RankfrontError: the file cannot be read, and at which line.
    """
    try:
        if file.suffix == ".jsonl":
            lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
            return [_line(line, f"{file}:{number}") for number, line in lines if line.strip()]
        data = from_json(file.read_text(encoding="utf-8")) if file.suffix == ".json" else read_yaml(file)
    except (OSError, ValueError) as error:
        raise RankfrontError(f"{file}: cannot be read: {error}") from error
    return data if isinstance(data, list) else [data]


def _line(line: str, where: str) -> Any:
    try:
        return from_json(line)
    except ValueError as error:
        raise RankfrontError(f"{where}: cannot be read: {error}") from error


def read_allocations(file: Path, targets: Sequence[TargetSpec], factors: FactorSpec) -> list[Allocation]:
    """The allocations of a YAML, JSON or JSON lines file, in its order.

    Raises:
        RankfrontError: the file cannot be read, or every mistake of every allocation in it, at once.
    """
    allocations, mistakes = [], []
    for index, item in enumerate(read_items(file)):
        try:
            allocations.append(_allocation(item, targets, factors, f"{file.name}[{index}]"))
        except RankfrontError as error:
            mistakes.append(str(error))
    if mistakes:
        raise RankfrontError("\n".join(mistakes))
    return allocations


def _allocation(item: Any, targets: Sequence[TargetSpec], factors: FactorSpec, where: str) -> Allocation:
    ranks: Any = item
    methods: Any = {}
    told = None
    if isinstance(item, Mapping) and "ranks" in item:
        ranks, methods = item["ranks"], item.get("methods") or {}
        unknown = [f"{where}.{key}: unknown key; {_BESIDE}" for key in item if key not in _KEYS]
        if unknown:
            raise RankfrontError("\n".join(unknown))
        if "factors" in item:
            try:
                told = told_methods(item)
            except TypeError as error:
                raise RankfrontError(f"{where}: {error}") from error
    if not isinstance(ranks, Mapping):
        raise RankfrontError(f"{where}: is no mapping of targets to ranks")
    if not isinstance(methods, Mapping):
        raise RankfrontError(f"{where}.methods: is no mapping of targets to methods")
    mistakes = []
    if told is not None:
        cut = {t.name: told.method_of(t.name) for t in targets if ranks.get(t.name) is not None}
        lacking = [name for name in cut if name not in methods and cut[name] not in factors.methods_of(name)]
        if lacking:
            mistakes.append(_lacking(lacking, cut, factors, where))
        methods = {**{name: method for name, method in cut.items() if name not in lacking}, **methods}
    try:
        allocation = Allocation.of(ranks, targets, where, methods)
    except RankfrontError as error:
        mistakes.append(str(error))
    known = {target.name for target in targets} & methods.keys()
    for name in sorted(known):
        held = factors.methods_of(name)
        if methods[name] not in held:
            offered = ", ".join(held)
            mistakes.append(
                f"{where}.{name}: this study has no factors by {methods[name]!r}; one of {offered}"
            )
    if mistakes:
        raise RankfrontError("\n".join(mistakes))
    # A target's configured method goes without saying, so that equal models have equal keys.
    differing = tuple(pair for pair in allocation.methods if pair[1] != factors.method_of(pair[0]))
    return dataclasses.replace(allocation, methods=differing)


def _lacking(names: Sequence[str], cut: Mapping[str, str], factors: FactorSpec, where: str) -> str:
    name = names[0]
    more = f", nor those of {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{where}.factors: {name} was cut by {cut[name]!r}, and this study has no such factors of it{more}; "
        f"without `factors` the ranks are taken by {factors.method_of(name)!r}"
    )


def told_methods(raw: Mapping[str, Any]) -> FactorSpec:
    """How a config, as plain data, decomposes: its methods alone.

    Raises:
        TypeError: what it says of them is no mapping, or names no method.
    """
    factors = raw.get("factors", {})
    if not isinstance(factors, Mapping) or not isinstance(factors.get("methods") or {}, Mapping):
        raise TypeError("factors: no mapping, or its methods are none")
    found = FactorSpec(
        method=factors.get("method", FactorSpec.method),
        methods=tuple((factors.get("methods") or {}).items()),
    )
    for name in (found.method, *(method for _, method in found.methods)):
        check_method(name)
    return found


def check_method(method: object) -> None:
    """Raises TypeError where it names no method."""
    if method not in METHOD_NAMES:
        raise TypeError(no_method(method))


def method_list(allocation: Allocation) -> list[str | None]:
    """The method of each target, in the order of its ranks; None is the configured one."""
    chosen = dict(allocation.methods)
    return [chosen.get(name) for name, _ in allocation]
