"""`benchmarks/front_quality.py` on a tiny model: scored once, interrupted anywhere, what the table says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import documents, tiny_llama, tiny_tasks

from actors.factors import FactorStore
from actors.preparation import prepare
from actors.samples import unpack_floats
from actors.scoring import Scorer
from actors.types import Allocation, Prepared, RankfrontError, ReplicaSpec

ROOT = Path(__file__).parents[1]
SURGICAL = ("surgical/ours", "surgical/paper")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The modules, and a small comparison played to its end in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import _front_calibration
        import _front_report
        import _front_runs
        import _front_setup
        import front_quality
        from _common import machine
        from _front_book import Book

        folder = tmp_path_factory.mktemp("front")
        tasks = tiny_tasks(folder / "tasks")
        made = _front_setup.tiny(tiny_llama(folder / "model"), {"arc_easy": tasks["arc_easy"]})
        setup = replace(made, seeds=(0,), trials=6, checkpoints=(6,))
        text = "\n".join(documents())
        texts = _front_setup.cut_texts(folder / "texts", text, "\n".join(reversed(documents(40))))
        place = folder / "book.jsonl"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        book = front_quality.run(setup, texts, place, folder, 60)
        yield SimpleNamespace(
            calibration=_front_calibration,
            report=_front_report,
            runs=_front_runs,
            script=front_quality,
            Book=Book,
            machine=machine,
            folder=folder,
            setup=setup,
            texts=texts,
            place=place,
            book=book,
        )
        torch.set_num_threads(threads)


def prepared(spec: Any) -> Prepared:
    return next(item for item in prepare(spec, 1) if isinstance(item, Prepared))


def test_texts_are_disjoint_and_cut_at_a_line(tmp_path: Path, bench: Any) -> None:
    validation = "\n".join(f"line {n} with <unk> in it" for n in range(100))
    texts = bench.script.cut_texts(tmp_path, validation, "the test file\n" * 400)
    (calibration,) = (json.loads(line)["text"] for line in texts.calibration.read_text().splitlines())
    (search, test), (choice, test_again) = (
        [json.loads(line)["text"] for line in scored.path.read_text().splitlines()]
        for scored in (texts.search, texts.choice)
    )
    assert calibration + search + choice == validation.replace(" <unk>", "")
    assert search.startswith("\n")
    assert choice.startswith("\n")
    assert test == test_again == "the test file\n" * 400


def test_an_interrupted_calibration_goes_on_to_the_same_factors(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench.calibration
    monkeypatch.setattr(module, "PART", 4)
    spec = bench.setup.config(bench.texts, tmp_path).preparation()
    write, written = module._write, []

    def interrupted(path: Path, parts: int, moments: Any) -> None:
        write(path, parts, moments)
        written.append(parts)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.prepared_in_parts(spec, float("inf"))
    ready = module.prepared_in_parts(spec, float("inf"))
    assert written == [1, 2, 3]  # of four: the last is decomposed at once
    whole = prepared(bench.setup.config(bench.texts, bench.folder).preparation())
    mine, theirs = FactorStore(ready.factor_store), FactorStore(whole.factor_store)
    for target in whole.targets:
        products = [
            left.T @ right for left, right, _ in (store.rank(target.name, 8) for store in (mine, theirs))
        ]
        torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4)


def test_nothing_is_scored_twice_and_picks_are_the_models_own_scores(bench: Any) -> None:
    records = [json.loads(line) for line in bench.place.read_text().splitlines()]
    scored = [record["of"] for record in records if record["kind"] == "score"]
    assert len(scored) == len(set(scored))
    config = bench.setup.config(bench.texts, bench.folder)
    ready = prepared(config.preparation())
    scorer = Scorer(ReplicaSpec("test", config.preparation(), ready, 1))
    dense = scorer.score(Allocation.dense(ready.targets), "test").text.nll
    folder = bench.runs.Bench(bench.setup, bench.texts, bench.book, bench.folder, float("inf")).folder()
    reading = bench.report.Reading(bench.setup, bench.book)
    losses = {
        allocation.key: (folder.cost.budgets(allocation)["budget.model"], allocation)
        for allocation in (bench.runs.uniform_at(folder.cost, budget) for budget in bench.setup.ladder)
    }
    under = [pair for pair in losses.values() if pair[0] <= 0.8]
    first, *others = sorted(under, key=lambda pair: scorer.score(pair[1]).text.nll)[: bench.setup.candidates]

    def as_good(allocation: Allocation) -> bool:
        mine, best = (
            np.array(unpack_floats(scorer.score(each).text.windows)) for each in (allocation, first[1])
        )
        gaps = mine - best
        return bool(abs(gaps.mean()) <= 2 * gaps.std(ddof=1) / np.sqrt(len(gaps)))

    near = [first, *(pair for pair in others if as_good(pair[1]))]
    assert len(near) > 1
    choosing = bench.setup.choice_config(bench.texts, bench.folder, "curvature", "auto").preparation()
    chooser = Scorer(ReplicaSpec("test", choosing, prepared(choosing), 1))
    budget, chosen = min(near, key=lambda pair: chooser.score(pair[1]).text.nll)
    found = reading.test("uniform", 0.8)
    assert found == pytest.approx((budget, scorer.score(chosen, "test").text.nll - dense), abs=1e-5)


def test_our_picks_are_refined_and_asked_as_a_replica_would_be(bench: Any) -> None:
    config = bench.setup.task_config(bench.texts, bench.folder, "curvature", "auto")
    ready = prepared(config.preparation())
    scorer = Scorer(ReplicaSpec("test", config.preparation(), ready, 1))
    dense = scorer.score(Allocation.dense(ready.targets), "test").tasks["arc_easy"]
    asked = bench.book.asked
    assert asked["dense"].acc == {"arc_easy": dense.acc}
    assert asked["dense"].stderr == {"arc_easy": dense.stderr}
    assert asked["dense"].examples == bench.setup.examples == dense.examples
    ours = {"exchange/0", "exchange/0 refined"}
    assert set(asked) == {"dense", "uniform", "seeds", "seeds refined", *ours, *SURGICAL}
    picks = bench.book.picks
    refined = [(name, f"{name} refined") for name in ("exchange/0", "seeds")]
    for name, found in (*refined, ("seeds", "seeds refit")):
        budgets = [{under: pick.budget for under, pick in picks[each].items()} for each in (name, found)]
        assert budgets[0] == budgets[1] != {}
    files = [*(bench.folder / "refined").glob("*.safetensors")]
    each = {pick.score for name, _ in refined for pick in picks[name].values()}
    assert len(files) == len(each) + len({pick.score for pick in picks["seeds"].values()})


@pytest.mark.parametrize("share", [0.4, 0.8, 0.95])
def test_what_is_left_of_a_book_goes_on_to_the_same_end(bench: Any, tmp_path: Path, share: float) -> None:
    lines = bench.place.read_text().splitlines(keepends=True)
    kept = lines[: int(share * len(lines))]
    place = tmp_path / "book.jsonl"
    place.write_text("".join(kept) + lines[len(kept)][:-9])
    bench.script.run(bench.setup, bench.texts, place, bench.folder, 60)
    again = bench.Book(place)
    assert again.runs == bench.book.runs
    assert again.picks == bench.book.picks
    assert place.read_text().startswith("".join(kept))


def test_a_run_that_proposes_otherwise_replaces_what_follows(bench: Any, tmp_path: Path) -> None:
    from _front_book import Trial

    place = tmp_path / "book.jsonl"
    book = bench.Book(place)
    for number, name in enumerate("abc"):
        assert not book.note("run", number, Trial(name, 0.5, 1))
    assert not book.note("run", 1, Trial("b", 0.5, 1))
    assert book.note("run", 1, Trial("z", 0.5, 1))
    for read in (book, bench.Book(place)):
        assert [trial.score for trial in read.runs["run"]] == ["a", "z"]


def test_runs_from_other_seeds_stay_as_they_are(bench: Any, tmp_path: Path) -> None:
    """Where this machine's factors give others than the book begins with, all else goes on."""
    lines = [json.loads(line) for line in bench.place.read_text().splitlines()]
    kept = [
        line for line in lines if not (line["kind"] == "end" and line["run"] in ("tpe/0", "nsga2 warm/0"))
    ]
    kept = [line for line in kept if line.get("run") != "tpe/0"]
    begun = next(line for line in kept if line.get("run") == "seeds" and line.get("number") == 1)
    score = next(line for line in kept if line.get("of") == begun["score"])
    begun["score"] = other = "0" * 16
    place = tmp_path / "book.jsonl"
    place.write_text(
        "".join(json.dumps(line) + "\n" for line in [kept[0], {**score, "of": other}, *kept[1:]])
    )
    before = bench.Book(place)
    assert "tpe/0" not in before.runs
    after = bench.script.run(bench.setup, bench.texts, place, bench.folder, 60)
    assert after.runs["tpe/0"] == bench.book.runs["tpe/0"]
    assert not after.reached("nsga2 warm/0", bench.setup.trials)
    assert {name: after.runs[name] for name in before.runs} == before.runs


def test_a_book_of_other_factors_is_refused(bench: Any) -> None:
    with pytest.raises(RankfrontError, match="another model, texts, calibration or space"):
        bench.Book(bench.place).begin("other")


def test_time_that_is_over_is_an_end_and_the_table_says_what_is_missing(bench: Any, tmp_path: Path) -> None:
    book = bench.script.run(bench.setup, bench.texts, tmp_path / "book.jsonl", bench.folder, -1)
    text = "\n".join(bench.report.report(bench.setup, book, tmp_path / "picture.png", "book.jsonl"))
    assert "| exchange/0 | 0 of 6 | no |  |" in text
    assert not book.scores
    text = "\n".join(bench.report.report(bench.setup, bench.book, tmp_path / "picture.png", "book.jsonl"))
    [played] = (line for line in text.splitlines() if line.startswith("| exchange/0 | 6 of 6 | yes |"))
    assert played.split("|")[4].strip() == bench.machine().partition(",")[0] != ""
    assert "not yet" not in text
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_hypervolume_is_the_area_between_the_lowest_budget_and_dense(bench: Any) -> None:
    setup, reading = bench.setup, bench.report.Reading(bench.setup, bench.book)
    for run in reading.runs:
        points = reading.points(run)
        grid = setup.lowest + (1 - setup.lowest) * (np.arange(20_000) + 0.5) / 20_000
        least = [points[points[:, 0] <= budget, 1].min(initial=setup.room) for budget in grid]
        area = np.mean(setup.room - np.minimum(least, setup.room)) / setup.room
        assert reading.history(run)[-1] == pytest.approx(area, abs=1e-3)
