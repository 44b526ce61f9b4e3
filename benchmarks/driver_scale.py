"""How busy one driver keeps its replicas: 64 real Ray actors, and simulated ones up to 1,500.

    python benchmarks/driver_scale.py [--simulated 250 500 1000 1500] [--actors 64] [--seconds 60]

The real ones hold no model: a score is five seconds of sleep. Of the simulated ones a score takes 60 seconds
of a clock that goes on while the driver works, at the speed of the driver's own core, and skips what it would
wait. Both run the whole loop (NSGA-II, 224 parameters, a journal with its fsyncs, log and screen) for a
stated time after every replica has got its first trials; how long each replica scored in it is summed.
"""

from __future__ import annotations

import argparse
import heapq
import io
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from _common import machine, table
from driver_overhead import COST, NAME, OBJECTIVES, SPACE, score_of
from rich.console import Console

import search.pool
from actors.types import ReplicaSpec
from search.event_log import event_log
from search.journal import open_journal
from search.pool import DEPTH, OBJECT_STORE_BYTES, Job, Outcome, Pool
from search.runner import Progress, Runner, Stop
from search.samplers import make_sampler
from search.screen import Screen
from search.sections import SamplerSection, StopSection
from search.study import SearchStudy, open_storage_study

SAMPLER = SamplerSection(name="nsga2", population=50)
REAL_SCORE_SECONDS, SIMULATED_SCORE_SECONDS = 5.0, 60.0
PICTURE = Path(__file__).parent / "results" / "driver_scale.png"
LEAST = 0.95

Span = tuple[float, float]


def run(folder: Path, pool: Any, stop: Stop, origin: str = "nsga2") -> int:
    """Search on a pool until `stop`; returns the trials that were begun."""
    study = open_storage_study(open_journal(folder), NAME, OBJECTIVES)
    driven = SearchStudy(study, make_sampler(SAMPLER), 0, SPACE, COST, OBJECTIVES)
    console = Console(file=io.StringIO())
    with Screen(console, driven, None, 0) as screen, event_log(folder, [], print) as note:

        def redraw(progress: Progress) -> None:
            screen.redraw(progress)
            pool.look(stop)

        Runner(driven, pool, StopSection(trials=None), origin, stop, redraw, note=note).run()
    return driven.started


def busy(spans: list[Span], window: Span, replicas: int) -> float:
    """The share of `window` that replicas spent in `spans`."""
    inside = sum(max(0.0, min(end, window[1]) - max(begin, window[0])) for begin, end in spans)
    return inside / (replicas * (window[1] - window[0]))


# -- simulated --------------------------------------------------------------------------------


class SimulatedPool:
    """Has the interface of `Pool`: so many replicas, a trial behind each, on the clock that skips waiting."""

    def __init__(self, size: int, seconds: float) -> None:
        self.size, self._seconds = size, seconds
        self._skipped = -time.perf_counter()
        self._ends: list[tuple[float, int]] = []  # a heap: when a replica is done with its trial
        self._queues: list[deque[Job]] = [deque() for _ in range(size)]
        self._room = deque(list(range(size)) * DEPTH)  # replicas, once for each trial that they may take
        self._submitted = 0
        self.spans: list[Span] = []
        self.window: Span | None = None
        self.worked = 0.0

    @property
    def now(self) -> float:
        """Seconds on the simulated clock."""
        return time.perf_counter() + self._skipped

    @property
    def outstanding(self) -> int:
        return DEPTH * self.size - len(self._room)

    @property
    def free(self) -> int:
        return len(self._room)

    def submit(self, job: Job) -> None:
        replica = self._room.popleft()
        self._submitted += 1
        queue = self._queues[replica]
        queue.append(job)
        if len(queue) == 1:
            self._begin(replica, self.now)

    def _begin(self, replica: int, at: float) -> None:
        self.spans.append((at, at + SIMULATED_SCORE_SECONDS))
        heapq.heappush(self._ends, (at + SIMULATED_SCORE_SECONDS, replica))

    def wait(self, seconds: float) -> Iterator[Outcome]:
        now = self.now
        if self._ends and self._ends[0][0] > now:
            self._skipped += min(self._ends[0][0] - now, seconds)
        while self._ends and self._ends[0][0] <= self.now:
            end, replica = heapq.heappop(self._ends)
            job = self._queues[replica].popleft()
            if self._queues[replica]:
                self._begin(replica, end)
            self._room.append(replica)
            yield Outcome(job, score_of(job.allocation))

    def look(self, stop: Stop) -> None:
        """Begin the window when every replica has its trials, and end with it."""
        if self.window is None and self._submitted >= DEPTH * self.size:
            begin = self.now
            self.window = (begin, begin + self._seconds)
            self._cpu = time.process_time()
        if self.window is not None and self.now >= self.window[1] and stop.reason is None:
            self.worked = (time.process_time() - self._cpu) / self._seconds
            stop.reason = "measured"


def simulated(home: Path, size: int, seconds: float) -> list[object]:
    """A row of the table."""
    folder = home / f"simulated-{size}"
    folder.mkdir()
    pool, stop = SimulatedPool(size, seconds), Stop()
    trials = run(folder, pool, stop)
    assert pool.window is not None
    share = busy(pool.spans, pool.window, size)
    return ["simulated", size, f"{SIMULATED_SCORE_SECONDS:.0f}", trials, share, pool.worked]


# -- real -------------------------------------------------------------------------------------


def sleeping_replica(seconds: float) -> type:
    """A replica without a model, whose class travels to the workers by value."""

    class SleepingReplica:
        def __init__(self, spec: Any) -> None:
            self._name = spec.name

        def ready(self) -> Any:
            import os
            import socket

            from actors.types import Place

            return Place(socket.gethostname(), os.getpid())

        def score(self, allocation: Any, split: str, rivals: Any) -> Any:
            import time

            from actors.types import Score, TextScore

            begun = time.time()
            time.sleep(seconds)
            # The name of the text says when it was scored.
            text = TextScore(f"{begun} {time.time()}", nats=2.0, tokens=1, stderr=0.0)
            return Score(split, text, {}, forward_tokens=1, seconds=seconds, replica=self._name)

    return SleepingReplica


class WatchedPool:
    """A `Pool` and the spans in which its replicas scored."""

    def __init__(self, pool: Pool, seconds: float) -> None:
        self._pool, self._seconds, self._submitted = pool, seconds, 0
        self.spans: list[Span] = []
        self.window: Span | None = None
        self.worked = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def submit(self, job: Job) -> None:
        self._submitted += 1
        self._pool.submit(job)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        for outcome in self._pool.wait(seconds):
            assert outcome.score is not None, outcome.reason
            begin, end = map(float, outcome.score.text.name.split())
            self.spans.append((begin, end))
            yield outcome

    def look(self, stop: Stop) -> None:
        """Begin the window when every replica has its trials; end when what it holds has been answered."""
        begun = self._submitted >= DEPTH * self._pool.size
        if self.window is None and begun and all(each.state == "busy" for each in self._pool.health()):
            begin = time.time()
            self.window = (begin, begin + self._seconds)
            self._cpu = time.process_time()
        if self.window is None or stop.reason is not None:
            return
        if not self.worked and time.time() >= self.window[1]:
            self.worked = (time.process_time() - self._cpu) / self._seconds
        if time.time() >= self.window[1] + 2 * REAL_SCORE_SECONDS:
            stop.reason = "measured"


def real(home: Path, size: int, seconds: float) -> list[object]:
    """A row of the table; starts `size` processes."""
    ray.init(
        address="local",
        num_cpus=size,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=OBJECT_STORE_BYTES,
    )
    search.pool.Replica = sleeping_replica(REAL_SCORE_SECONDS)  # type: ignore[misc]
    specs = [ReplicaSpec(f"replica-{index}", None, None, 1) for index in range(size)]  # type: ignore[arg-type]
    folder = home / "real"
    folder.mkdir()
    pool, stop = Pool(specs, 0, attempts=1), Stop()
    try:
        watched = WatchedPool(pool, seconds)
        trials = run(folder, watched, stop)
    finally:
        pool.close()
        ray.shutdown()
    assert watched.window is not None
    share = busy(watched.spans, watched.window, size)
    return ["Ray actors", size, f"{REAL_SCORE_SECONDS:.0f}", trials, share, watched.worked]


# -- the table and its picture ----------------------------------------------------------------


def draw(rows: list[list[Any]]) -> None:
    """Busy share against replicas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for kind, marker, color in (("simulated", "o", "#2563eb"), ("Ray actors", "D", "#d97706")):
        chosen = [row for row in rows if row[0] == kind]
        if chosen:
            label = f"{kind}, {chosen[0][2]} s a score"
            axis.plot(
                [r[1] for r in chosen], [100 * r[4] for r in chosen], marker=marker, color=color, label=label
            )
    axis.axhline(100 * LEAST, color="#5b6675", linewidth=0.8, linestyle=(0, (4, 4)))
    axis.set_xlabel("replicas of one driver")
    axis.set_ylabel("time they spend scoring, %")
    axis.set_ylim(0, 102)
    axis.set_xlim(left=0)
    axis.grid(color="#e5e9f0", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulated", type=int, nargs="*", default=[250, 500, 1000, 1500])
    parser.add_argument("--actors", type=int, default=64, help="0 for none")
    parser.add_argument("--seconds", type=float, default=60.0, help="that are measured, on either clock")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        if arguments.actors:
            rows.append(real(Path(home), arguments.actors, arguments.seconds))
        for size in arguments.simulated:
            rows.append(simulated(Path(home), size, 2 * arguments.seconds))
    draw(rows)
    columns = ["replicas", "how many", "s a score", "trials", "busy", "of a core, driver and sampler"]
    print(table(columns, [[*row[:4], f"{row[4]:.1%}", f"{row[5]:.0%}"] for row in rows]))
    print(f"\n{len(SPACE.distributions)} parameters, {SAMPLER.name}, journal; {machine()}")


if __name__ == "__main__":
    main()
