"""The log of a study: what is in it, what never is, and what does not end a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import MadeUpPool, open_study, score_of

import search.event_log
from search.event_log import LOG, event_log
from search.events import EVENTS, told
from search.pool import Job, Outcome
from search.runner import Runner, Stop
from search.sections import StopSection


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_each_event_of_a_search_is_a_line(tmp_path: Path) -> None:
    def answer(job: Job) -> Outcome:
        return Outcome(job, None, "broken") if job.key == 1 else Outcome(job, score_of(job.allocation))

    heard: list[str] = []
    with event_log(tmp_path, [], print) as log:
        note = told(log, lambda event, **facts: heard.append(event))
        section = StopSection(trials=3)
        study, pool = open_study(tmp_path, levels=40), MadeUpPool(answer, size=1)
        Runner(study, pool, section, "random", Stop(), note=note).run()  # type: ignore[arg-type]
    found = lines(tmp_path)
    assert [line["event"] for line in found] == heard
    assert set(heard) <= set(EVENTS)
    ends = {line["trial"]: line for line in found if line["event"] in ("finished", "failed")}
    assert {number: line["event"] for number, line in ends.items()} == {
        0: "finished",
        1: "failed",
        2: "finished",
    }
    assert ends[1]["reason"] == "broken"
    assert ends[2]["values"]["nll"] == study.rows()[2].values[1]  # type: ignore[index]
    assert ends[2]["tokens"] == 100
    proposed = [line for line in found if line["event"] == "proposed"]
    assert [(line["trial"], line["origin"]) for line in proposed] == [(n, "random") for n in range(3)]
    times = [line["time"] for line in found]
    assert times == sorted(times)
    assert times[0].endswith("+00:00")


def test_a_secret_is_never_in_it(tmp_path: Path) -> None:
    with event_log(tmp_path, ["hunter2", "a/b", ""], print) as note:
        note("failed", trial=1, reason='could not reach "postgresql://me:hunter2@host/a/b"')
    assert lines(tmp_path)[0]["reason"] == 'could not reach "postgresql://me:***@host/***"'
    assert "hunter2" not in (tmp_path / LOG).read_text()


def test_it_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.event_log, "BYTES", 2_000)
    with event_log(tmp_path, [], print) as note:
        for trial in range(400):
            note("proposed", trial=trial, origin="random")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [LOG, *(f"{LOG}.{number}" for number in range(1, search.event_log.OLD_FILES + 1))]
    assert all((tmp_path / name).stat().st_size <= 2_000 for name in files)
    assert lines(tmp_path)[-1]["trial"] == 399


def test_a_disk_that_is_full_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / LOG).symlink_to("/dev/full")
    said: list[str] = []
    with event_log(tmp_path, [], said.append) as note:
        for trial in range(3):
            note("proposed", trial=trial, origin="random")
    [line] = said
    assert "No space left on device" in line
    assert str(tmp_path / LOG) in line


def test_a_mistake_in_the_code_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with event_log(tmp_path, [], print) as note, pytest.raises(TypeError):
        note("failed", trial=object())


def test_a_resumed_search_appends(tmp_path: Path) -> None:
    for event in ("started", "resumed"):
        with event_log(tmp_path, [], print) as note:
            note(event, study="s", trials=0)
    assert [line["event"] for line in lines(tmp_path)] == ["started", "resumed"]
