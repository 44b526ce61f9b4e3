"""`rankfront status`: how a study stands, for people or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from search.cells import Cells, CellsTable, cells_table
from search.findings import percent, perplexity
from search.health import ReplicaHealth
from search.screen import clock
from search.status import Status, read_status
from search.terminal import Runs, console, tell

# What a row has room for; --json names them all.
SHOWN_TRIALS = 5


def status_command(
    study: Annotated[
        str,
        typer.Argument(metavar="STUDY", help="The study's folder, its name in --runs, or a database's URL."),
    ],
    runs: Runs = Path("runs"),
    name: Annotated[
        str | None, typer.Option("--study", help="Which study of the database, where it holds several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show how a study stands, from any machine that reaches it; writes nothing, and holds nobody up."""
    status = read_status(study, runs, name)
    if as_json:
        print(json.dumps(status.to_dict(), indent=1))
        return
    for line in _sentences(status):
        tell(f"  {line}")
    for table in _tables(status):
        console.print(table)


def _sentences(status: Status) -> Iterator[str]:
    yield f"{status.study} in {status.place}"
    yield _driver(status)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(status.trials.items()))
    yield f"trials: {counts or 'none yet'}" + (f"; {status.queue} wait for a replica" if status.queue else "")
    if status.trials_per_hour:
        rate = f"{status.trials_per_hour:,.1f} trials/hour, {status.tokens_per_second:,.0f} tokens/s"
        yield f"{rate} over the last hour{'' if status.driver else ' it ran'}"
    if status.hypervolume is not None:
        yield f"hypervolume {status.hypervolume:.4f}"
    for best in status.best:
        loss = f"{best.nll:.3f} nats/token (perplexity {perplexity(best.nll)})"
        yield f"at {percent(best.budget)} of the parameters: {loss}, trial {best.trial}"


def _driver(status: Status) -> str:
    if status.driver is not None:
        return f"driven by {status.driver}"
    if status.ended is not None:
        return f"no driver; the last one stopped: {status.ended}"
    if status.trials.get("RUNNING"):
        gone = "driver gone: it was killed, or lost its machine; the same command goes on"
        wait = f", and its replicas wait for that for {clock(status.waits)}" if status.waits else ""
        return gone + wait
    return "no driver"


def _tables(status: Status) -> Iterator[CellsTable]:
    if status.running:
        running = tuple(
            (
                str(each.trial),
                clock(status.seen - each.since) if each.since else "",
                each.replica or "",
                _place(each.node, each.pid),
            )
            for each in status.running
        )
        columns: tuple[str, ...] = ("trial", "for", "replica", "where")
        yield cells_table(Cells(columns, running, ""), "running", left=("replica", "where"))
    if status.replicas and status.health_seconds is not None:
        replicas = tuple(
            (each.name, _state(each), str(each.starts - 1), _place(each.node, each.pid), each.failure or "")
            for each in status.replicas
        )
        columns = ("replica", "state", "restarts", "where", "last failure")
        title = f"replicas, {clock(status.health_seconds)} ago"
        yield cells_table(Cells(columns, replicas, ""), title, left=columns, widths={"last failure": 60})
    if status.failures:
        failures = tuple((str(len(each.trials)), each.reason, _some(each.trials)) for each in status.failures)
        columns = ("failed", "reason", "trials")
        yield cells_table(Cells(columns, failures, ""), "failures", left=columns, widths={"reason": 70})


def _state(replica: ReplicaHealth) -> str:
    """And the share of the time that each of its GPUs works, where it has any."""
    shares = " ".join(f"{share:.0%}" for share in replica.gpus)
    return f"{replica.state}, GPU at work {shares}" if shares else replica.state


def _place(node: str | None, pid: int | None) -> str:
    return f"{node}, process {pid}" if node else ""


def _some(trials: tuple[int, ...]) -> str:
    listed = ", ".join(map(str, trials[:SHOWN_TRIALS]))
    return listed + (", ..." if len(trials) > SHOWN_TRIALS else "")
