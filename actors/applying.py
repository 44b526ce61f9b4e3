"""Make the model of a configuration that someone else found: decompose what it names, and score it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from actors.check import Scored
from actors.devices import device_here, room_on
from actors.models import list_targets, load_model, materialise
from actors.node_cache import store_folder
from actors.preparation import prepare
from actors.replica import quieten
from actors.resident import local_source, resident
from actors.scoring import Scorer
from actors.types import Allocation, PreparationSpec, Prepared, RankfrontError, ReplicaSpec


def applied(
    preparation: PreparationSpec,
    storage: str,
    ranks: Mapping[str, int | None],
    methods: Mapping[str, str],
    where: str,
    say: Callable[[str], None],
    device: str = "auto",
) -> Scored:
    """The scored model of `ranks`, in this process, scored on `device`.

    Only targets with a rank are decomposed, each by its method.
    `methods` names those whose method is not the one `preparation` has for them; `where` is the file the
    ranks are from, for errors.

    Raises:
        RankfrontError: the device is not there, or every rank that does not fit the model, before anything
            is decomposed; the device has no room.
    """
    quieten()
    device = device_here(device)
    folder = materialise(local_source(preparation), store_folder(preparation))
    model = load_model(folder, preparation.model)
    targets = list_targets(model, preparation.include, preparation.exclude)
    del model
    allocation = Allocation.of(ranks, targets, where, methods)
    if allocation.is_dense:
        raise RankfrontError(f"{where}: every target is dense: there is nothing to compress")
    names = tuple(name for name, rank in allocation if rank is not None)
    usual = preparation.factors.method_of
    chosen = tuple((name, allocation.method_of(name) or usual(name)) for name in names)
    preparation = replace(
        preparation,
        include=names,
        exclude=(),
        factors=replace(preparation.factors, methods=chosen, choices=()),
    )
    for item in prepare(preparation):
        if isinstance(item, str):
            say(item)
        if isinstance(item, Prepared):
            prepared = resident(preparation, item)
    kept = Allocation.of({name: rank for name, rank in allocation if rank is not None}, prepared.targets)
    replica = ReplicaSpec("apply", preparation, prepared, torch.get_num_threads(), device)
    with room_on(device):
        return Scored(preparation, prepared, kept, storage, Scorer(replica).score(kept))
