"""Model and factors where this node has them: what another node prepared, found here or brought here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actors.models import download, fingerprint, materialise
from actors.node_cache import is_url, local_store, model_copy, node_folder, store_folder
from actors.sources import Source
from actors.types import ModelSource, PreparationSpec, Prepared, RankfrontError


def local_source(preparation: PreparationSpec) -> ModelSource:
    """The model by a name that is read without a URL: its copy on this node where it has one.

    Raises:
        RankfrontError: the copy cannot be made; names the URL.
    """
    model = preparation.model
    if not is_url(model.source):
        return model
    return replace(model, source=str(model_copy(model.source, node_folder(preparation)).resolve()))


def resident(preparation: PreparationSpec, prepared: Prepared) -> Prepared:
    """The same, with the model folder and the factor store of this node.

    A model of the hub is brought here at the commit that the study was prepared with; what is there already
    is not fetched again, but its folder is there from the first file on. Another model that is read where its
    source is, or whose folder this node lacks and brings by its name, as the builder did, is held against the
    fingerprint of the study.

    Raises:
        RankfrontError: model or factors cannot be brought here, or the model is another one by now.
    """
    folder, name = Path(prepared.model_folder), preparation.model.source
    source = None if is_url(name) else Source.parse(name)
    if source is not None and source.hub_id is not None:
        folder = download(source.hub_id, revision=folder.name)
    elif not folder.is_dir() or (source is not None and source.path == folder):
        model = local_source(preparation)
        folder = materialise(model, store_folder(preparation))
        if fingerprint(model) != prepared.fingerprints["model"]:
            raise RankfrontError(f"{name}: no longer the model that the study was prepared with")
    store = local_store(prepared.factor_store, node_folder(preparation))
    return replace(prepared, model_folder=str(folder), factor_store=str(store))
