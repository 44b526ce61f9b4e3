"""Optuna's journal as a driver of a study uses it: fewer writes for what belongs together, opened fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal._storage import JournalStorageReplayResult

# Of a parameter's range there is one for all trials: reading each anew is most of the time an opening takes.
distribution_of = lru_cache(maxsize=4096)(json_to_distribution)


class StudyJournal(JournalStorage):
    """A journal that any Optuna program reads and writes; only the way it is read and written is another."""

    _group: list[dict[str, Any]] | None = None

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """What is written inside is appended in its order by one write and one fsync: durable at the end.

        A crash leaves the first records of a group, never later ones alone. Reading inside is of what was
        there before.

        Raises:
            UpdateFinishedTrialError: another program had ended a trial that is written to.
        """
        self._group = []
        try:
            yield
        finally:
            group, self._group = self._group, None
            with self._thread_lock:
                if group:
                    self._backend.append_logs(group)
                self._apply(len(group))

    def _apply(self, count: int) -> None:
        """Read what was written. Each of `count` records may be refused; the first refusal is the error."""
        try:
            self._sync_with_backend()
        except UpdateFinishedTrialError:
            for _ in range(count):
                with suppress(UpdateFinishedTrialError):
                    self._sync_with_backend()
            raise

    def _write_log(self, op_code: int, extra_fields: dict[str, Any]) -> None:
        if self._group is None:
            super()._write_log(op_code, extra_fields)
        else:
            worker = self._replay_result.worker_id
            self._group.append({"op_code": op_code, "worker_id": worker, **extra_fields})

    def _sync_with_backend(self) -> None:
        if self._group is not None:
            return
        if not isinstance(self._replay_result, _Replay):  # the base class has just made one of its own
            self._replay_result = _Replay(self._worker_id_prefix)
        super()._sync_with_backend()


class _Replay(JournalStorageReplayResult):
    """Optuna's, but for the trials that share their distributions."""

    def _apply_create_trial(self, log: dict[str, Any]) -> None:
        written, internal = log.pop("distributions", {}), log.pop("params", {})
        before = len(self._trials)
        super()._apply_create_trial(log)
        if len(self._trials) == before:  # of a study that was deleted
            return
        found: dict[str, BaseDistribution] = {name: distribution_of(text) for name, text in written.items()}
        trial = self._trials[before]
        trial.distributions = found
        trial.params = {name: found[name].to_external_repr(value) for name, value in internal.items()}
