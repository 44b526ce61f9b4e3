"""The parents of each generation, kept with the study.

Optuna's genetic samplers choose a generation's parents once, when its first trial is proposed, and keep
their trial ids as an attribute of the study. Here that is the mirror, which a restart begins anew: the
sampler would choose again, from more trials. So they are copied to the storage and back; ids differ between
the two, and are translated by the trials' numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna

MARK = ":parent:"
"""In the key of every such attribute, `<sampler>:parent:<generation>`; Optuna's, without a public name."""


class Parents:
    """The parents on one mirror of a study, in step with those in its storage.

    The caller gives the storage ids of the trials by number, as far as the mirror has them.
    """

    def __init__(self, mirror: optuna.Study, study: optuna.Study) -> None:
        self._mirror, self._study = mirror, study
        self._known: set[str] | None = None  # keys that both have; None before the first look

    def restore(self, ids: Sequence[int]) -> None:
        """Give the mirror the parents that were chosen before, once its trials are there."""
        if self._known is not None:
            return
        numbers = {stored: number for number, stored in enumerate(ids)}
        memory, mirrored = self._mirror._storage, self._mirror._study_id
        chosen = _parents(self._study)
        for key, parents in chosen.items():
            known = [
                memory.get_trial_id_from_study_id_trial_number(mirrored, numbers[parent])
                for parent in parents
            ]
            memory.set_study_system_attr(mirrored, key, known)
        self._known = set(chosen)

    def keep(self, ids: Sequence[int]) -> None:
        """Write parents that were chosen on the mirror since."""
        assert self._known is not None, "restore comes first"
        memory = self._mirror._storage
        for key, parents in _parents(self._mirror).items():
            if key not in self._known:
                kept = [ids[memory.get_trial(parent).number] for parent in parents]
                self._study._storage.set_study_system_attr(self._study._study_id, key, kept)
                self._known.add(key)


def _parents(study: optuna.Study) -> dict[str, list[int]]:
    attributes = study._storage.get_study_system_attrs(study._study_id)
    return {key: value for key, value in attributes.items() if MARK in key}
