"""A driver on real replicas of a tiny Llama, cheap enough to be killed a hundred times.

What a life of a driver costs is mostly what it starts: Ray, and replicas that import torch. So Ray runs in
a process that outlives the drivers, which join it by RAY_ADDRESS; the preparation is made once; and the next
driver takes the replicas over, loaded. All else is as in a search too: config, sampler, deterministic mode,
journal or database, and the pool. A twentieth of the allocations run out of memory, another twentieth score
NaN.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray
from _reporting import DISPATCHED, NAME, REPORTED, Drive, Opener, Reporting, appended, write

import search.pool
from actors.types import Prepared, ReplicaSpec
from search.config import Config, parse_config
from search.folder import StudyFolder
from search.pool import OBJECT_STORE_BYTES, Job, Pool, connect
from search.references import reference_allocations
from search.runner import Runner, Stop
from search.samplers import make_sampler
from search.sections import StopSection
from search.stored import open_storage_study
from search.tenure import Tenure, study_key

ROOT = Path(__file__).resolve().parents[1]
REPLICAS = 2
# The next driver begins at once after a kill: it need not wait for as long as one that may yet be alive.
SILENT_SECONDS = 0.2
ALONE_SECONDS = 60.0
LOADED = "replicas.jsonl"  # the process of every replica that answered
OUT_OF_MEMORY, NAN = 0.05, 0.1  # shares of the allocations, as bounds of what their keys begin with


class TracedPool(Pool):
    """The pool of a search, which writes down what it dispatches and the processes of its replicas."""

    def __init__(self, specs: list[ReplicaSpec], folder: Path) -> None:
        self._dispatched, self._loaded = appended(folder / DISPATCHED), appended(folder / LOADED)
        tenure = Tenure(study_key(str(folder), NAME), ALONE_SECONDS, SILENT_SECONDS)
        super().__init__(specs, gpus_each=0, attempts=2, note=self._note_process, tenure=tenure)

    def _note_process(self, event: str, **facts: Any) -> None:
        if event == "replica started":
            write(self._loaded, [facts["replica"], facts["pid"]])

    def submit(self, job: Job) -> None:
        write(self._dispatched, job.key)
        super().submit(job)


def _faulty_replica() -> type:
    """A replica with faults that are functions of the allocation. Made here, it travels by value."""
    from actors.replica import Replica

    class FaultyReplica(Replica):
        def __init__(self, spec: ReplicaSpec) -> None:
            super().__init__(spec)
            scorer = self._scorer

            class FaultyScorer:
                def score(self, allocation: Any, split: str, rivals: Any) -> Any:
                    from dataclasses import replace

                    import torch

                    chance = int(allocation.key[:8], 16) / 2**32
                    if chance < OUT_OF_MEMORY:
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                    score = scorer.score(allocation, split, rivals)
                    if chance < NAN:
                        return replace(score, text=replace(score.text, nats=float("nan")))
                    return score

            self._scorer = FaultyScorer()  # type: ignore[assignment]

    return FaultyReplica


def last_processes(folder: Path) -> list[int]:
    """The processes of the replicas, as the last driver that saw them load knew them."""
    path = folder / LOADED
    lines = path.read_text().splitlines() if path.exists() else []
    return list(dict(map(json.loads, lines)).values())


def _prepare(home: Path, saved: dict[str, Any]) -> None:
    from _common import prepared

    config = parse_config(saved)
    (home / "prepared.json").write_text(json.dumps(prepared(config.preparation()).to_dict()))


def _tiny_config(home: Path) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    return tiny.tiny_config(
        home,
        study=NAME,
        scoring={"tasks": []},
        sampler={"name": "exchange"},
        space={"group": "target", "levels": 20},
        run={"deterministic": True, "lag": 2 * REPLICAS},
        replicas={"count": REPLICAS, "threads": 1},
    )


def _hold(home: Path, pipe: Connection) -> None:
    """Keep a cluster of this process's own, until the other end of the pipe is closed."""
    raw = _tiny_config(home)
    _prepare(home, raw)
    context = ray.init(
        address="local",  # whatever cluster may run here, or be named by the environment
        num_cpus=REPLICAS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=OBJECT_STORE_BYTES,
    )
    pipe.send((context.address_info["gcs_address"], raw))
    with contextlib.suppress(EOFError):
        pipe.recv()
    ray.shutdown()


@contextlib.contextmanager
def driven(home: Path) -> Iterator[Drive]:
    """What a driver does, on a prepared study and a cluster that is gone at the end.

    In a process of their own: those that are forked from this one must find it without threads.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = str(ROOT)
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(home, theirs))
    holder.start()
    theirs.close()
    try:
        address, raw = ours.recv()
        os.environ["RAY_ADDRESS"] = address
        config = parse_config(raw)
        prepared = Prepared.from_dict(json.loads((home / "prepared.json").read_text()))
        yield lambda open_it, folder, trials: _drive(config, prepared, open_it, folder, trials)
    finally:
        ours.close()
        holder.join()


def _drive(config: Config, prepared: Prepared, open_it: Opener, folder: Path, trials: int) -> None:
    with open_it() as storage:
        connect()
        known = StudyFolder(folder, config, prepared, storage)
        objectives, section = config.named_objectives, config.sampler
        study = Reporting(
            open_storage_study(storage, NAME, objectives),
            make_sampler(section, known.landscape),
            section.seed,
            known.space,
            known.cost,
            objectives,
            lag=config.run.lag,
        )
        study.reported = appended(folder / REPORTED)
        study.enqueue(reference_allocations(config.references, known.cost))
        specs = [
            ReplicaSpec(f"{folder.name}-{index}", config.preparation(), prepared, threads=1)
            for index in range(REPLICAS)
        ]
        search.pool.Replica = _faulty_replica()  # type: ignore[misc]
        pool = TracedPool(specs, folder)
        Runner(study, pool, StopSection(trials=trials), section.name, Stop()).run()
        pool.close()  # room for those of the other study
