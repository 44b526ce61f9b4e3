"""Kill the driver with SIGKILL at random instants, and hold what is stored against what it reported.

    python benchmarks/kill.py [--kills 300] [--storage journal|postgres] [--pool fake|real]

Drivers are forked from this process, which has imported everything: a life takes a fraction of a second and
the kill may hit any instant of it, the opening too. The fake pool answers out of order, fails some trials and
returns NaN for others; the real one is in `_real_replicas.py`, and every tenth kill takes a replica along.
After every kill and at the end:

- every end that a driver reported is stored, with the same values; at most one more was stored unreported;
- what has ended never changes, nor do the parameters of any trial; numbers are 0, 1, 2, ...;
- no trial whose result was stored is dispatched again, and none is reported twice.

At the end the study equals that of a driver nobody killed (fake: `random` sampler, trial n is a function of
n; real: `exchange` in deterministic mode).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Ray reads these when it is imported, and a driver that joins a cluster needs what the cluster began with.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import optuna
from _faulty_pool import drive_fake
from _kill_checks import Checker, Trial, lines_of, stored
from _reporting import DISPATCHED, NAME, REPORTED, Drive, Opener
from optuna.storages import BaseStorage, RDBStorage

import search.journal
from actors.types import RankfrontError
from search.database import leased, resolve
from search.journal import driver_lock, open_journal, repair_journal

# So many of the kills hit the opening; the others come up to so long after the first dispatch. On a journal
# most lives must outlast the lock file of a killed one, or none after it writes anything.
OPENING_SHARE = 0.2
FAKE_SECONDS, REAL_SECONDS = 0.6, 1.5
# So many of the kills hit a replica as well, where there are real ones.
REPLICA_SHARE = 0.1
# Trials that are left when the killing is over.
REST = 10
# Nobody but the driver writes here: a lock file of a killed one may be broken sooner than beside others.
STALE_LOCK_SECONDS = 0.2


def journal(folder: Path) -> Opener:
    """Opens the study of a folder as a driver does."""

    @contextlib.contextmanager
    def opened() -> Iterator[BaseStorage]:
        with driver_lock(folder):
            repair_journal(folder)
            yield open_journal(folder)

    return opened


def postgres(url: str) -> Opener:
    """Opens the study of a database; waits while the server has not noticed that the last driver is gone."""

    @contextlib.contextmanager
    def opened() -> Iterator[BaseStorage]:
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    storage = stack.enter_context(leased(url, NAME))
                    break
                except RankfrontError as error:
                    if "has a driver already" not in str(error):
                        raise
                    time.sleep(0.01)
            yield storage

    return opened


def _fork(drive: Drive, open_it: Opener, folder: Path, trials: int) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            drive(open_it, folder, trials)
            status = 0
        finally:
            if status:
                import traceback

                traceback.print_exc()
            os._exit(status)  # past the clean-up of the process it was forked from
    return child


def _whole_life(drive: Drive, open_it: Opener, folder: Path, trials: int) -> None:
    _, status = os.waitpid(_fork(drive, open_it, folder, trials), 0)
    assert status == 0, f"the driver ended with {status}"


def _until_line(path: Path, child: int) -> float:
    """Wait for a driver's first line in a file; returns the seconds it took."""
    begun = time.monotonic()
    before = path.stat().st_size if path.exists() else 0
    while not path.exists() or path.stat().st_size == before:
        time.sleep(0.001)
        assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "the driver ended"
    return time.monotonic() - begun


@dataclass(frozen=True)
class Found:
    """What a run of kills came to."""

    kills: int
    trials: int
    failed: int
    rescored: int
    unreported: int
    replayed: int
    replicas: int  # kills that hit a replica too
    each: float  # seconds of a life, its kill and its check
    seconds: float


@dataclass(frozen=True)
class Pooled:
    """A pool to be driven: what a driver does with it, how long one lives after its first dispatch at most,
    and which processes of its replicas may be killed along with it."""

    drive: Drive
    life: float
    processes: Callable[[Path], Sequence[int]] = lambda folder: ()


def kill(
    pool: Pooled,
    folders: tuple[Path, Path],
    openers: tuple[Opener, Opener],
    read: Callable[[], list[Trial]],
    read_whole: Callable[[], list[Trial]],
    kills: int,
    seed: int = 0,
) -> Found:
    """Drive one study through `kills` kills, another one through none, and compare them.

    Raises:
        AssertionError: something that must hold does not.
    """
    started, chance = time.monotonic(), random.Random(seed)
    check = Checker(folders[0])
    done, opening, hit = 0, 0.1, set[int]()
    while done < kills:
        child = _fork(pool.drive, openers[0], folders[0], trials=1_000_000)
        if done == 0:  # replicas take longer to load than drivers live: see the first score
            _until_line(folders[0] / REPORTED, child)
        elif chance.random() < OPENING_SHARE:
            time.sleep(chance.uniform(0, opening))
        else:
            opening = _until_line(folders[0] / DISPATCHED, child)
            time.sleep(chance.uniform(0, pool.life))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the driver ended by itself with {status}"
        done += 1
        check(read())
        processes = sorted({*pool.processes(folders[0])} - hit)
        if processes and chance.random() < REPLICA_SHARE:
            process = chance.choice(processes)
            os.kill(process, signal.SIGKILL)
            hit.add(process)
    trials = len(read()) + REST
    seconds = time.monotonic() - started
    _whole_life(pool.drive, openers[0], folders[0], trials)
    check(read())
    _whole_life(pool.drive, openers[1], folders[1], trials)
    ended, whole = read(), read_whole()
    assert all(trial.ended for trial in ended)
    assert ended == whole, "not the study of a driver that nobody killed"
    dispatched = lines_of(folders[0] / DISPATCHED, 0)
    return Found(
        kills=done,
        trials=trials,
        failed=sum(trial.state == "FAIL" for trial in ended),
        rescored=len(dispatched) - len(set(dispatched)),
        unreported=check.unreported,
        replayed=check.replayed,
        replicas=len(hit),
        each=seconds / kills,
        seconds=time.monotonic() - started,
    )


def kill_journal(home: Path, pool: Pooled, kills: int) -> Found:
    """On journals in two folders of `home`."""
    folders = _folders(home)
    warnings.simplefilter("ignore", UserWarning)  # of that short a time
    optuna.logging.set_verbosity(
        optuna.logging.ERROR
    )  # "Forcibly releasing the lock file", at every tenth kill
    search.journal.LOCK_SECONDS = STALE_LOCK_SECONDS  # type: ignore[assignment]

    def reader(folder: Path) -> Callable[[], list[Trial]]:
        return lambda: stored(open_journal(folder))

    openers = (journal(folders[0]), journal(folders[1]))
    return kill(pool, folders, openers, reader(folders[0]), reader(folders[1]), kills)


def kill_postgres(home: Path, pool: Pooled, urls: tuple[str, str], kills: int) -> Found:
    """On two empty databases."""

    def reader(url: str) -> Callable[[], list[Trial]]:
        storage = RDBStorage(resolve(url).render_as_string(hide_password=False))  # caches nothing
        return lambda: stored(storage)

    openers = (postgres(urls[0]), postgres(urls[1]))
    return kill(pool, _folders(home), openers, reader(urls[0]), reader(urls[1]), kills)


def _folders(home: Path) -> tuple[Path, Path]:
    folders = (home / "killed", home / "whole")
    for folder in folders:
        folder.mkdir()
    return folders


@contextlib.contextmanager
def pooled(name: str, home: Path) -> Iterator[Pooled]:
    """The pool of that name."""
    if name == "fake":
        yield Pooled(drive_fake, FAKE_SECONDS)
        return
    from _real_replicas import driven, last_processes

    with driven(home) as drive:
        yield Pooled(drive, REAL_SECONDS, last_processes)


def run(home: Path, pool: str, storage: str, kills: int) -> Found:
    """The kills that were asked for."""
    if storage == "journal":
        with pooled(pool, home) as made:
            return kill_journal(home, made, kills)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "search"))
    from postgres import new_database, running_server

    with running_server() as server, pooled(pool, home) as made:
        urls = (new_database(server, "killed"), new_database(server, "whole"))
        return kill_postgres(home, made, urls, kills)


COLUMNS = (
    "pool",
    "storage",
    "kills",
    "of a replica too",
    "trials",
    "failed by the pool",
    "scored again",
    "stored unreported",
    "replayed",
    "s a life",
    "s",
)


def main() -> None:
    """Print a row of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--storage", choices=["journal", "postgres"], default="journal")
    parser.add_argument("--pool", choices=["fake", "real"], default="fake")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        found = run(Path(home), arguments.pool, arguments.storage, arguments.kills)
    cells = [
        *(arguments.pool, arguments.storage, found.kills, found.replicas, found.trials, found.failed),
        *(found.rescored, found.unreported, found.replayed, f"{found.each:.2f}", round(found.seconds)),
    ]
    for line in (COLUMNS, ["---"] * len(COLUMNS), cells):
        print("| " + " | ".join(map(str, line)) + " |")


if __name__ == "__main__":
    main()
