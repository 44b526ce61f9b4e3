"""Model and factors where this node has them: what another node prepared, found here or brought here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actors.models import fingerprint, materialise
from actors.node_cache import is_url, local_store, model_copy, node_folder, store_folder
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

    A node that lacks the folder which the model was prepared in gets the model by its name, as the
    builder did, and its weights are held against the fingerprint of the study.

    Raises:
        RankfrontError: model or factors cannot be brought here, or the model is another one by now.
    """
    folder = Path(prepared.model_folder)
    if not folder.is_dir():
        model = local_source(preparation)
        folder = materialise(model, store_folder(preparation))
        if fingerprint(model) != prepared.fingerprints["model"]:
            raise RankfrontError(
                f"{preparation.model.source}: no longer the model that the study was prepared with"
            )
    store = local_store(prepared.factor_store, node_folder(preparation))
    return replace(prepared, model_folder=str(folder), factor_store=str(store))
