"""Spectra read from a store on disk: by target and method, without torch."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import TARGETS, write_store

from actors.types import RankfrontError
from search.spectra import energies, energy_kept, losses, rank_of_energy, truncation_loss

ONE, TWO = TARGETS[0].name, TARGETS[1].name
FOUR = np.array([8.0, 1.0, 0.75, 0.25])


def test_every_method_of_every_target_is_read(tmp_path: Path) -> None:
    spectra = {ONE: {"feature": FOUR, "weight": 2 * FOUR}, TWO: {"feature": np.arange(3.0)}}
    write_store(tmp_path, spectra, {TWO: {"feature": np.array([0.5, 0.25, 0.125])}})
    read = energies(tmp_path)
    assert {name: set(methods) for name, methods in read.items()} == {
        ONE: {"feature", "weight"},
        TWO: {"feature"},
    }
    for name, methods in spectra.items():
        for method, energy in methods.items():
            np.testing.assert_array_equal(read[name][method], energy)
            assert read[name][method].dtype == np.float64
    assert list(losses(tmp_path)) == [TWO], "the others predict no loss"
    np.testing.assert_array_equal(losses(tmp_path)[TWO]["feature"], [0.5, 0.25, 0.125])


def test_spectra_are_read_without_torch(tmp_path: Path) -> None:
    write_store(tmp_path, {ONE: {"feature": FOUR}})
    code = (
        "import sys; from pathlib import Path; from search.spectra import energies;"
        "print(len(energies(Path(sys.argv[1]))), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.stdout.split() == ["1", "False"], done.stderr


@pytest.mark.parametrize("damage", ["no manifest", "no file", "half a file"])
def test_a_store_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    write_store(tmp_path, {ONE: {"feature": FOUR}})
    [file] = tmp_path.glob("*.safetensors")
    if damage == "no manifest":
        (tmp_path / "manifest.json").unlink()
    elif damage == "no file":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(RankfrontError, match=f"factor store {tmp_path}"):
        energies(tmp_path)


def test_a_store_that_this_machine_does_not_see_is_said(tmp_path: Path) -> None:
    """As where the driver's machine does not share the folder that the builders write in."""
    here = re.escape(f"node {platform.node()} sees no manifest.json there")
    with pytest.raises(RankfrontError, match=f"{here}.*set runs or cache.factors to a folder that all nodes"):
        losses(tmp_path / "elsewhere")


def test_energy_kept_is_the_share_of_the_first_ranks() -> None:
    assert [energy_kept(FOUR, rank) for rank in (1, 2, 3, 4, None)] == [0.8, 0.9, 0.975, 1.0, 1.0]
    assert energy_kept(np.zeros(3), 1) == 1.0, "nothing to lose"


@pytest.mark.parametrize(("share", "rank"), [(0.1, 1), (0.8, 1), (0.81, 2), (0.9, 2), (0.976, 4), (1.0, 4)])
def test_rank_of_energy_is_the_smallest_that_keeps_it(share: float, rank: int) -> None:
    assert rank_of_energy(FOUR, share) == rank


def test_rank_of_energy_stays_inside_the_spectrum() -> None:
    assert rank_of_energy(np.zeros(5), 0.99) == 1
    assert rank_of_energy(np.full(7, 0.1), 1.0) == 7


def test_truncation_loses_what_the_missing_ranks_lose() -> None:
    loss = np.array([0.5, 0.25, 0.125])
    assert [truncation_loss(loss, rank) for rank in (1, 2, 3, None)] == [0.375, 0.125, 0.0, 0.0]
