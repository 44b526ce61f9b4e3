"""What rankfront keeps in an Optuna trial (plan at creation, result at its end), and its row."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from actors.types import Allocation, RankfrontError, Score
from search.allocations import method_list
from search.cost import CostModel
from search.records import TrialRow
from search.space import Space

# Our one attribute before a trial runs, and our one packed result written before its final state.
PLAN, RESULT = "rankfront.plan", "rankfront.result"
UNSCORED = "another program completed it, without a score"


def origin_of(trial: FrozenTrial) -> str:
    """Who proposed a trial; `enqueued` where another program did."""
    return str(trial.user_attrs.get(PLAN, {}).get("origin", "enqueued"))


def has_plan(trial: FrozenTrial) -> bool:
    """Whether a driver of ours made a trial or took it up; an empty plan is one that was taken back."""
    return bool(trial.user_attrs.get(PLAN))


def result_of(score: Score, copied_from: int | None = None) -> dict[str, Any]:
    """The result of a score, and the trial it was copied from, if it was."""
    result: dict[str, Any] = {"score": score.to_dict()}
    if copied_from is not None:
        result["copied_from"] = copied_from
    return result


def failure_of(reason: str, lost: bool = False) -> dict[str, Any]:
    """The result of a trial without a score; `lost` where the reason is none of the model's."""
    return {"reason": reason, "lost": True} if lost else {"reason": reason}


def was_lost(trial: FrozenTrial) -> bool:
    """Whether a trial's result is a failure that says nothing of its model, as a replica's that died.

    Results of versions that did not tell count as the model's.
    """
    return bool(trial.user_attrs.get(RESULT, {}).get("lost", False))


def score_in(trial: FrozenTrial) -> Score | None:
    """The score that a trial's result holds, if it holds one."""
    result = trial.user_attrs.get(RESULT, {})
    return Score.from_dict(result["score"]) if "score" in result else None


def scored(trial: FrozenTrial) -> bool:
    """Whether a trial completed with a whole score of ours; what another program told of one is none."""
    return trial.state == TrialState.COMPLETE and "score" in trial.user_attrs.get(RESULT, {})


@dataclass(frozen=True)
class Packing:
    """Between trials and the allocations they stand for, in one study's space and by its cost model."""

    space: Space
    cost: CostModel

    def plan(self, allocation: Allocation, origin: str) -> dict[str, Any]:
        """The attribute: ranks by target, and methods likewise where any differs from the configured one."""
        plan: dict[str, Any] = {"origin": origin, "ranks": [rank for _, rank in allocation]}
        if allocation.methods:
            plan["methods"] = method_list(allocation)
        return plan

    def trial(
        self, allocation: Allocation, origin: str, state: TrialState, result: Mapping[str, Any] | None = None
    ) -> FrozenTrial:
        """A new trial of an allocation, with the parameters that come nearest to it."""
        attributes = {PLAN: self.plan(allocation, origin)}
        if result is not None:
            attributes[RESULT] = dict(result)
        return create_trial(
            state=state,
            params=self.space.params(allocation),
            distributions=self.space.distributions,
            user_attrs=attributes,
        )

    def allocation(self, trial: FrozenTrial) -> Allocation:
        """What a trial scores: the plan's ranks, where another program made it those of its parameters.

        Raises:
            RankfrontError: it has no plan, and its parameters are not of this space.
        """
        plan = trial.user_attrs.get(PLAN)
        if plan is None or "ranks" not in plan:
            return self.space.allocation(trial.params)
        names = [target.name for target in self.cost.targets]
        methods = zip(names, plan.get("methods", [None] * len(names)), strict=True)
        return Allocation(
            tuple(zip(names, plan["ranks"], strict=True)),
            tuple((name, method) for name, method in methods if method is not None),
        )

    def row(self, trial: FrozenTrial) -> TrialRow:
        """A trial as the reports see it."""
        result = trial.user_attrs.get(RESULT, {})
        allocation, ranked = Allocation.dense(self.cost.targets), False
        with contextlib.suppress(RankfrontError):  # another program's trial may have no ranks of this space
            allocation, ranked = self.allocation(trial), True
        budgets = self.cost.budgets(allocation)
        score = score_in(trial)
        return TrialRow(
            number=trial.number,
            state=trial.state.name,
            origin=origin_of(trial),
            allocation=allocation,
            budget_linear=budgets["budget.linear"],
            budget_model=budgets["budget.model"],
            budget_bytes=budgets["budget.bytes"],
            values=tuple(trial.values) if trial.state == TrialState.COMPLETE else None,
            score=score,
            seconds=score.seconds if score else None,
            replica=score.replica if score else None,
            reason=UNSCORED if trial.state == TrialState.COMPLETE and score is None else result.get("reason"),
            copied_from=result.get("copied_from"),
            macs=self.cost.macs(allocation),
            constraints=trial.constraints,
            ranked=ranked,
            lost=was_lost(trial),
        )
