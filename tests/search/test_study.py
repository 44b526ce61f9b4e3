"""The study on a real journal: what is on disk at every step, and what comes back from it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from fakes import (
    TARGETS,
    cost_model,
    dies_before_the_state,
    loss,
    open_study,
    plain,
    propose_and_complete,
    score_of,
    space_of,
    stored,
)
from optuna.trial import FrozenTrial, TrialState

from actors.types import Allocation, RankfrontError, Score
from search.packing import PLAN, RESULT
from search.records import Objective
from search.study import TakenError
from search.view import Planned

SAMPLERS = ("nsga2", "nsga3", "tpe", "random")
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def some_allocation(rank: int) -> Allocation:
    return Allocation.of({"layers.1.up_proj": rank, "layers.2.q_proj": rank}, TARGETS)


# -- writing ----------------------------------------------------------------------------------


def test_a_proposal_is_running_on_disk_when_it_is_known(tmp_path: Path) -> None:
    planned = open_study(tmp_path).propose("random")
    [trial] = stored(tmp_path)
    assert (trial.number, trial.state) == (planned.number, TrialState.RUNNING) == (0, TrialState.RUNNING)
    assert space_of(cost_model()).allocation(trial.params) == planned.allocation
    assert trial.user_attrs[PLAN] == {"origin": "random", "ranks": [rank for _, rank in planned.allocation]}


def test_a_result_is_on_disk_when_complete_returns(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    score = score_of(planned.allocation)
    values = study.complete(planned, score)
    budget = cost_model().budgets(planned.allocation)["budget.model"]
    assert values == (budget, score.text.nll)
    [trial] = stored(tmp_path)
    assert trial.state == TrialState.COMPLETE
    assert trial.values == [budget, score.text.nll]
    assert trial.user_attrs[RESULT] == {"score": json.loads(json.dumps(score.to_dict()))}


def test_the_result_is_written_before_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished trial without its score could not be mended: finished trials are immutable."""
    study = open_study(tmp_path)
    planned = study.propose("random")
    with dies_before_the_state(study, monkeypatch):
        study.complete(planned, score_of(planned.allocation))
    [trial] = stored(tmp_path)
    assert trial.state == TrialState.RUNNING
    assert RESULT in trial.user_attrs


@pytest.mark.parametrize("end", ["complete", "copy", "fail", "add"])
def test_a_result_without_its_state_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The driver died between the two writes: the trial ends as it would have, and is not scored again."""

    def driver(folder: Path, crash: bool) -> None:
        folder.mkdir()
        study = open_study(folder)
        propose_and_complete(study, 1)
        if crash:
            monkeypatch.setattr(study._storage, "set_trial_state_values", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            if end == "add":
                study.add(some_allocation(7), "surgical", score_of(some_allocation(7)))
                return
            planned = study.propose("random")
            if end == "complete":
                study.complete(planned, score_of(planned.allocation))
            elif end == "copy":
                study.copy_score(planned, 0)
            else:
                study.fail(planned.number, "broken")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    driver(tmp_path / "whole", crash=False)
    driver(tmp_path / "crashed", crash=True)
    assert stored(tmp_path / "crashed")[1].state == TrialState.RUNNING
    again = open_study(tmp_path / "crashed")
    assert again.in_flight() == []
    assert again.replay() == [1]
    assert again.replay() == []
    whole = open_study(tmp_path / "whole")
    assert again.rows() == whole.rows() == open_study(tmp_path / "crashed").rows()
    ends = [stored(tmp_path / name)[1] for name in ("whole", "crashed")]
    assert ends[0].values == ends[1].values
    assert ends[0].user_attrs == ends[1].user_attrs
    assert again.propose("random") == whole.propose("random")


def test_a_failure_has_a_reason_and_no_values(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    study.fail(planned.number, "nll is nan on the search split")
    [trial] = stored(tmp_path)
    assert trial.state == TrialState.FAIL
    assert trial.values is None
    [row] = study.rows()
    assert (row.state, row.values, row.score) == ("FAIL", None, None)
    assert row.reason == "nll is nan on the search split"
    assert study.propose("random").number == 1, "the search goes on"


@pytest.mark.parametrize("name", ["budget.model", "budget.linear", "budget.bytes"])
def test_objectives_are_told_in_their_order_and_direction(name: str, tmp_path: Path) -> None:
    objectives = (Objective("reasoning.acc", False), Objective("nll", True), Objective(name, True))
    study = open_study(tmp_path, objectives=objectives)
    planned = study.propose("random")
    score = score_of(planned.allocation)
    budgets = cost_model().budgets(planned.allocation)
    assert len({*budgets.values()}) == 3
    assert study.complete(planned, score) == (0.6, score.text.nll, budgets[name])
    [row] = study.rows()
    recorded = (row.budget_model, row.budget_linear, row.budget_bytes)
    assert recorded == (budgets["budget.model"], budgets["budget.linear"], budgets["budget.bytes"])
    assert [direction.name for direction in plain(tmp_path).directions] == [
        "MAXIMIZE",
        "MINIMIZE",
        "MINIMIZE",
    ]


def test_optuna_alone_reads_the_study(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    done = propose_and_complete(study, 4)
    study.fail(study.propose("random").number, "broken")
    seen = plain(tmp_path)
    assert seen.metric_names == ["budget.model", "nll"]
    assert [trial.state.name for trial in seen.trials] == ["COMPLETE"] * 4 + ["FAIL"]
    assert [trial.values[1] for trial in seen.trials[:4]] == [score_of(p.allocation).text.nll for p in done]
    assert all(set(trial.params) == set(space_of(cost_model()).distributions) for trial in seen.trials)
    assert {trial.number for trial in seen.best_trials} <= {0, 1, 2, 3}


# -- reopening --------------------------------------------------------------------------------


@every_sampler
def test_a_reopened_study_is_the_study(tmp_path: Path, sampler: str) -> None:
    study = open_study(tmp_path, sampler)
    propose_and_complete(study, 9)
    study.fail(study.propose(sampler).number, "broken")
    flying = [study.propose(sampler), study.propose(sampler)]
    before = stored(tmp_path)
    again = open_study(tmp_path, sampler)
    assert again.rows() == study.rows()
    assert again.in_flight() == flying
    assert stored(tmp_path) == before, "opening writes nothing"
    for planned in flying:
        again.complete(planned, score_of(planned.allocation))
    after = stored(tmp_path)
    assert after[:10] == before[:10]
    assert [trial.number for trial in after] == list(range(12))
    assert [trial.params for trial in after] == [trial.params for trial in before]
    assert {trial.state.name for trial in after[10:]} == {"COMPLETE"}
    assert again.propose(sampler).number == 12


def test_an_enqueued_trial_in_flight_comes_back_with_its_true_ranks(tmp_path: Path) -> None:
    """Its ranks are not of the space: the levels that the sampler sees are only the nearest."""
    allocation = some_allocation(7)
    study = open_study(tmp_path)
    study.enqueue([(allocation, "enqueued")])
    planned = study.propose("random")
    assert planned == Planned(0, allocation)
    assert space_of(cost_model()).allocation(stored(tmp_path)[0].params) != allocation
    assert open_study(tmp_path).in_flight() == [Planned(0, allocation)]


def run(folder: Path, sampler: str, restarts: tuple[int, ...], count: int = 40) -> list[Allocation]:
    """`count` scored proposals, the driver started anew before the given ones."""
    folder.mkdir()
    study = open_study(folder, sampler, levels=40)
    proposed = []
    for number in range(count):
        if number in restarts:
            study = open_study(folder, sampler, levels=40)
        [planned] = propose_and_complete(study, 1)
        assert planned.number == number
        proposed.append(planned.allocation)
    return proposed


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_restart_changes_no_proposal(tmp_path: Path, sampler: str) -> None:
    whole = run(tmp_path / "whole", sampler, restarts=())
    assert run(tmp_path / "restarted", sampler, restarts=(1, 20, 33)) == whole


@every_sampler
def test_a_restart_does_not_repeat_the_first_proposals(tmp_path: Path, sampler: str) -> None:
    proposed = run(tmp_path / "study", sampler, restarts=(20,))
    assert proposed[20:30] != proposed[:10]
    assert len(set(proposed[:10]) & set(proposed[20:30])) <= 2
    assert len(set(proposed)) > 20


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3"])
def test_samplers_learn_from_the_mirror(tmp_path: Path, sampler: str) -> None:
    """The objectives agree here (fewer missing ranks, lower loss is all that counts): dense is best."""
    objectives = (Objective("nll", True), Objective("reasoning.acc", False))
    study = open_study(tmp_path, sampler, objectives=objectives, levels=40)
    losses = [loss(planned.allocation) for planned in propose_and_complete(study, 80)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.mark.parametrize(("sampler", "name"), [("nsga2", "NSGAIISampler"), ("nsga3", "NSGAIIISampler")])
def test_generations_survive_a_restart(tmp_path: Path, sampler: str, name: str) -> None:
    """Kept in each trial's attributes on disk: a restart goes on in the generation it left."""
    propose_and_complete(open_study(tmp_path, sampler, population=6), 14)
    propose_and_complete(open_study(tmp_path, sampler, population=6), 8)
    generations = [trial.system_attrs[f"{name}:generation"] for trial in stored(tmp_path)]
    assert generations == [number // 6 for number in range(22)]


# -- enqueued trials --------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_what_was_enqueued_can_be_a_parent(tmp_path: Path, sampler: str) -> None:
    """Its parameters were given: a genetic sampler is not asked for them, and counts it all the same."""
    study = open_study(tmp_path, sampler, population=6)
    study.enqueue((some_allocation(rank), "seed") for rank in (3, 9, 5))
    propose_and_complete(study, 7)
    [name] = {key for trial in stored(tmp_path) for key in trial.system_attrs if key.endswith(":generation")}
    assert [trial.system_attrs[name] for trial in stored(tmp_path)] == [0] * 6 + [1]
    assert [trial.params for trial in stored(tmp_path)[:3]] == [
        space_of(cost_model()).params(some_allocation(rank)) for rank in (3, 9, 5)
    ]


def test_enqueued_trials_come_first_and_in_order(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    propose_and_complete(study, 2)
    wanted = [some_allocation(rank) for rank in (3, 9, 5)]
    assert study.enqueue((allocation, "enqueued") for allocation in wanted) == [2, 3, 4]
    assert study.waiting
    assert study.started == 2
    assert [trial.state.name for trial in stored(tmp_path)[2:]] == ["WAITING"] * 3
    assert [study.propose("random") for _ in wanted] == [Planned(2 + i, a) for i, a in enumerate(wanted)]
    assert not study.waiting
    assert [row.origin for row in study.rows()] == ["sampler", "sampler", *["enqueued"] * 3]
    assert study.propose("random").number == 5


def test_known_allocations_are_not_enqueued_again(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    pairs = [(some_allocation(rank), "uniform") for rank in (3, 9)]
    assert study.enqueue([*pairs, *pairs]) == [0, 1]
    propose_and_complete(study, 1)
    assert study.enqueue(pairs) == []
    assert open_study(tmp_path).enqueue([*pairs, (some_allocation(5), "uniform")]) == [2]


def test_numbers_of_enqueued_trials_hold_when_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running driver may add a trial at the very moment."""
    study, other = open_study(tmp_path), open_study(tmp_path, seed=1)
    create = study._storage.create_new_trial

    def after_another(*arguments: object) -> int:
        monkeypatch.setattr(study._storage, "create_new_trial", create)
        other.propose("random")
        return create(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(study._storage, "create_new_trial", after_another)
    numbers = study.enqueue([(some_allocation(3), "enqueued"), (some_allocation(9), "enqueued")])
    assert [trial.state.name for trial in stored(tmp_path)] == ["RUNNING", "WAITING", "WAITING"]
    assert numbers == [1, 2]


def test_a_trial_enqueued_by_another_program_is_taken_up(tmp_path: Path) -> None:
    """As optuna-dashboard does: levels without our attribute."""
    study = open_study(tmp_path)
    propose_and_complete(study, 1)
    params = {"q_proj": 1, "up_proj": 10, "down_proj": 4}
    plain(tmp_path).enqueue_trial(params)
    planned = study.propose("random")
    assert planned == Planned(1, space_of(cost_model()).allocation(params))
    trial = stored(tmp_path)[1]
    assert (trial.state, trial.params) == (TrialState.RUNNING, params)
    assert open_study(tmp_path).in_flight() == [planned]
    study.complete(planned, score_of(planned.allocation))
    assert study.rows()[1].origin == "enqueued"
    assert study.rows()[1].allocation == planned.allocation


def test_levels_that_another_program_left_open_are_the_samplers(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    plain(tmp_path).enqueue_trial({"up_proj": 3})
    planned = study.propose("random")
    [trial] = stored(tmp_path)
    assert trial.params["up_proj"] == 3
    assert space_of(cost_model()).allocation(trial.params) == planned.allocation


@pytest.mark.parametrize("level", [999, -1, "many"])
def test_a_level_outside_the_space_fails_its_trial_only(tmp_path: Path, level: object) -> None:
    study = open_study(tmp_path)
    propose_and_complete(study, 1)
    plain(tmp_path).enqueue_trial({"q_proj": 1, "up_proj": level, "down_proj": 4})
    with contextlib.suppress(RankfrontError):  # the driver is told, or goes on to the next trial
        propose_and_complete(study, 1)
    trial = stored(tmp_path)[1]
    assert trial.state == TrialState.FAIL
    assert "up_proj" in trial.user_attrs[RESULT]["reason"]
    for driver in (study, open_study(tmp_path)):
        [planned] = propose_and_complete(driver, 1)
        assert planned.number == len(stored(tmp_path)) - 1
        states = [row.state for row in driver.rows()]
        assert states == ["COMPLETE", "FAIL", *["COMPLETE"] * (len(states) - 2)]
        assert driver.enqueue([(some_allocation(planned.number), "uniform")]) == [planned.number + 1]
        propose_and_complete(driver, 1)


def test_a_trial_that_slips_in_before_the_write_keeps_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone enqueues between our look at the storage and our write."""
    study = open_study(tmp_path)
    propose_and_complete(study, 2)
    create = study._storage.create_new_trial
    params = {"q_proj": 1, "up_proj": 2, "down_proj": 3}

    def after_another(*arguments: object) -> int:
        monkeypatch.setattr(study._storage, "create_new_trial", create)
        plain(tmp_path).enqueue_trial(params)
        return create(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(study._storage, "create_new_trial", after_another)
    planned = study.propose("random")
    assert planned.number == 3
    waiting, ours = stored(tmp_path)[2:]
    assert (waiting.state, ours.state) == (TrialState.WAITING, TrialState.RUNNING)
    study.complete(planned, score_of(planned.allocation))
    assert study.propose("random") == Planned(2, space_of(cost_model()).allocation(params))
    assert study.propose("random").number == 4
    after = stored(tmp_path)
    assert [trial.number for trial in after] == [0, 1, 2, 3, 4]
    assert after[3].values[1] == loss(planned.allocation)
    assert study.rows() == open_study(tmp_path).rows()


def test_a_trial_that_another_program_ended_keeps_what_it_wrote(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    plain(tmp_path).tell(0, [0.5, 3.0])
    with pytest.raises(TakenError, match="trial 0 was ended"):
        study.complete(planned, score_of(planned.allocation))
    assert stored(tmp_path)[0].values == [0.5, 3.0]
    assert study.rows()[0].values == (0.5, 3.0)
    assert study.scored_as(planned.allocation) is None, "no score of ours to copy"
    assert study.propose("random").number == 1


def test_a_trial_that_another_program_started_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look at the storage and our write; and before our look."""
    study = open_study(tmp_path)
    for _ in range(2):
        plain(tmp_path).enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    start = study._start_stored

    def after_another(trial: FrozenTrial) -> bool:
        plain(tmp_path).ask()
        return start(trial)

    monkeypatch.setattr(study, "_start_stored", after_another)
    with pytest.raises(TakenError, match="trial 0 was started"):
        study.propose("random")
    monkeypatch.undo()
    plain(tmp_path).ask()
    assert study.propose("random").number == 2


def test_a_running_trial_without_levels_is_another_programs(tmp_path: Path) -> None:
    plain_study = open_study(tmp_path) and plain(tmp_path)
    plain_study.ask()
    plain_study.tell(plain_study.ask(), [0.5, 3.0])
    study = open_study(tmp_path)
    assert study.in_flight() == []
    assert [row.state for row in study.rows()] == ["RUNNING", "COMPLETE"]
    assert study.propose("random").number == 2


# -- duplicates -------------------------------------------------------------------------------


def test_a_known_allocation_is_answered_from_the_record(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(2):
        plain(tmp_path).enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    first = study.propose("random")
    assert study.scored_as(first.allocation) is None
    values = study.complete(first, score_of(first.allocation))
    again = open_study(tmp_path)
    second = again.propose("random")
    assert again.scored_as(second.allocation) == 0
    assert again.copy_score(second, 0) == values
    rows = open_study(tmp_path).rows()
    assert [row.copied_from for row in rows] == [None, 0]
    assert rows[1].score == rows[0].score == score_of(first.allocation)


def test_a_failed_allocation_is_no_answer(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    study.fail(planned.number, "broken")
    assert study.scored_as(planned.allocation) is None
    assert open_study(tmp_path).scored_as(planned.allocation) is None


def test_numbers_have_no_gaps_whatever_ends_a_trial(tmp_path: Path) -> None:
    study = open_study(tmp_path, "tpe")
    for number in range(12):
        if number % 5 == 1:
            study.enqueue([(some_allocation(number + 1), "enqueued")])
        planned = study.propose("tpe")
        if number % 3 == 0:
            study.fail(planned.number, "broken")
        elif number % 3 == 1:
            study.complete(planned, score_of(planned.allocation))
        if number % 4 == 3:
            study = open_study(tmp_path, "tpe")
    numbers = [trial.number for trial in stored(tmp_path)]
    assert numbers[0] == 0
    assert all(after == before + 1 for before, after in pairwise(numbers))


# -- trials scored in part --------------------------------------------------------------------


def part_of(planned: Planned, rival: int = 0) -> Score:
    """The score of a trial that was stopped at the first stage."""
    return replace(score_of(planned.allocation, tokens=25), stopped_by=rival, tasks={})


def test_a_stopped_trial_is_pruned_with_its_part_and_no_values(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    propose_and_complete(study, 1)
    planned = study.propose("random")
    study.prune(planned, part_of(planned))
    trial = stored(tmp_path)[1]
    assert (trial.state, trial.values) == (TrialState.PRUNED, None)
    score = Score.from_dict(trial.user_attrs[RESULT]["score"])
    assert (score, score.stopped_by, score.forward_tokens) == (part_of(planned), 0, 25)
    for driver in (study, open_study(tmp_path)):
        row = driver.rows()[1]
        assert (row.state, row.values, row.score, row.stopped_by) == ("PRUNED", None, score, 0)
        assert row.reason == "dominated by trial 0 after 25 tokens"
        assert driver.scored_as(planned.allocation) is None, "a part is no answer"
        assert driver.stopped_as(planned.allocation) == 1
        assert driver.in_flight() == []


def test_a_part_is_written_before_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    with dies_before_the_state(study, monkeypatch):
        study.prune(planned, part_of(planned))
    again = open_study(tmp_path)
    assert again.replay() == [planned.number], "what was written is enough to end it, in part"
    assert again.in_flight() == []
    assert again.stopped_as(planned.allocation) == planned.number
    assert [(row.state, row.values) for row in again.rows()] == [("PRUNED", None)]
    assert again.rows()[0].score == part_of(planned)


@every_sampler
def test_samplers_go_on_among_stopped_trials(sampler: str, tmp_path: Path) -> None:
    """Before, between and after whole ones, over a restart; numbers stay those of the storage."""
    study = open_study(tmp_path, sampler)
    for number in range(24):
        planned = study.propose(sampler)
        assert planned.number == number
        if number < 3 or number % 3 == 1:
            study.prune(planned, part_of(planned))
        else:
            study.complete(planned, score_of(planned.allocation))
        if number == 14:
            study = open_study(tmp_path, sampler)
    assert study.count(TrialState.PRUNED) == 10
    assert [trial.state for trial in stored(tmp_path)] == [TrialState[row.state] for row in study.rows()]
    assert all(trial.number not in (0, 1, 2) for trial in plain(tmp_path).best_trials)


def test_what_was_scored_in_part_can_be_enqueued(tmp_path: Path) -> None:
    """Someone wants it whole; once."""
    study = open_study(tmp_path)
    study.enqueue([(some_allocation(3), "random")])
    planned = study.propose("random")
    study.prune(planned, part_of(planned))
    assert study.enqueue([(some_allocation(3), "enqueued")]) == [1]
    assert study.enqueue([(some_allocation(3), "enqueued")]) == []
    assert study.origin(0) == "random"
    assert study.origin(1) == "enqueued"


def test_a_part_answers_for_an_equal_allocation(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(2):
        plain(tmp_path).enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    first = study.propose("random")
    study.prune(first, part_of(first, rival=8))
    second = study.propose("random")
    assert study.copy_score(second, 0) is None
    rows = open_study(tmp_path).rows()
    assert [(row.state, row.stopped_by, row.copied_from) for row in rows] == [
        ("PRUNED", 8, None),
        ("PRUNED", 8, 0),
    ]
    assert study.origin(0) == "enqueued", "another program's"
