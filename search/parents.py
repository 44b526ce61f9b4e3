"""The parents of each generation, kept with the trial for which they were chosen.

Optuna's genetic samplers choose a generation's parents once, when its first trial is proposed, and keep
their trial ids as an attribute of the study. Here that is the mirror, which a restart begins anew: the
sampler would choose again, from more trials. So that trial has them as an attribute of its own, by their
numbers, which are the same in mirror and storage. It is written with the trial, in one write: a driver that
dies before it chooses again as it did.
"""

from __future__ import annotations

import optuna

ATTRIBUTE = "rankfront.parents"
MARK = ":parent:"
"""In the key of the study's attributes, `<sampler>:parent:<generation>`; Optuna's, without a public name."""


class Parents:
    """The parents on one mirror of a study, in step with those of its trials."""

    def __init__(self, mirror: optuna.Study) -> None:
        self._mirror = mirror
        self._known: set[str] | None = None  # keys that trials have; None before the first look

    def restore(self) -> None:
        """Give the mirror the parents that were chosen before, once its trials are there."""
        if self._known is not None:
            return
        memory, study = self._mirror._storage, self._mirror._study_id
        self._known = set()
        for trial in self._mirror.get_trials(deepcopy=False):
            for key, numbers in trial.system_attrs.get(ATTRIBUTE, {}).items():
                ids = [memory.get_trial_id_from_study_id_trial_number(study, number) for number in numbers]
                memory.set_study_system_attr(study, key, ids)
                self._known.add(key)

    def keep(self, trial_id: int) -> None:
        """Note parents that were chosen since with the trial of the mirror that was just asked for."""
        assert self._known is not None, "restore comes first"
        memory = self._mirror._storage
        attributes = memory.get_study_system_attrs(self._mirror._study_id)
        chosen = {
            key: [memory.get_trial(parent).number for parent in parents]
            for key, parents in attributes.items()
            if MARK in key and key not in self._known
        }
        if chosen:
            memory.set_trial_system_attr(trial_id, ATTRIBUTE, chosen)
            self._known |= chosen.keys()
