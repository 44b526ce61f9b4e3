"""Spectra of the targets, read from the factor store without torch: what each rank holds.

A store has one safetensors file for each target and method; `manifest.json` names them. Of its tensors
only two vectors (k,) float64 are read here, k = min(m, n): `energy`, what each rank adds, and `loss`, where
the method predicts one: the loss increase of leaving out that one rank, in nats/token.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from actors.node_cache import MANIFEST
from actors.shared_folder import no_store
from actors.types import RankfrontError

Spectra = dict[str, dict[str, np.ndarray]]


def energies(store: Path) -> Spectra:
    """The energy (k,) of every target by every method it was decomposed by.

    Raises:
        RankfrontError: the store cannot be read from this machine.
    """
    return _read(store, "energy")


def losses(store: Path) -> Spectra:
    """The predicted loss of each rank (k,), nats/token, of the targets and methods that have one.

    Raises:
        RankfrontError: the store cannot be read from this machine.
    """
    return _read(store, "loss")


def _read(store: Path, tensor: str) -> Spectra:
    found: Spectra = {}
    try:
        if not (store / MANIFEST).exists():
            raise RankfrontError(no_store(store))
        manifest = json.loads((store / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            with safe_open(store / name, framework="np") as file:
                if tensor in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    found.setdefault(entry["target"], {})[entry["method"]] = file.get_tensor(tensor)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RankfrontError(f"factor store {store}: its spectra cannot be read: {error!r}") from error
    return found


def energy_kept(energy: np.ndarray, rank: int | None) -> float:
    """Share of the energy (k,) in the first `rank` ranks; 1 where all are kept or there is none at all."""
    total = energy.sum()
    return float(energy[:rank].sum() / total) if total > 0 else 1.0


def rank_of_energy(energy: np.ndarray, share: float) -> int:
    """The smallest rank that keeps `share` of the energy (k,), at least 1."""
    kept = np.cumsum(energy)
    # Not beyond k: rounding may leave the last sum a hair below `share` of the total at share 1.
    return min(int(np.searchsorted(kept, share * kept[-1])) + 1, len(energy))


def truncation_loss(loss: np.ndarray, rank: int | None) -> float:
    """Predicted loss increase, nats/token, of keeping the first `rank` ranks; 0 for dense."""
    return 0.0 if rank is None else float(loss[rank:].sum())
