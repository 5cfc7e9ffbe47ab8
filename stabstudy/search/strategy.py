"""Strategies of adaptive sweeps, and the first round of a plan that has one.

A launch asks its strategy again after each round. What it answers follows from the trials in the study's folder, so a
kill, a relaunch or another machine changes nothing: trials that stand there and are not done come first, and only then
is it asked for more.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from stabstudy import store
from stabstudy.planning import estimate
from stabstudy.planning.plan import Plan, PlannedTrial
from stabstudy.planning.trials import most_per_pack
from stabstudy.settings import ConfigError, Problem


class Strategy(Protocol):
    """What decides what is trained next."""

    def known(self, study: store.StudyFolder) -> list[PlannedTrial]:
        """The trials of this search that stand in the study's folder, done or not."""
        ...

    def next(self, study: store.StudyFolder, room: int, given_up: Collection[str]) -> list[PlannedTrial]:
        """What to train next; [] where nothing is left to ask.

        `room`: how many trials fit at once. `given_up`: trials that have failed and are not to be asked for again.
        """
        ...

    def answer(self, study: store.StudyFolder) -> str:
        """What is known so far, in a line."""
        ...


def strategy(plan: Plan) -> Strategy | None:
    """The strategy of the plan; None for a grid."""
    planner = plan.planner
    if planner is not None and planner.frontier is not None:
        from stabstudy.search.bisection import Frontier

        return Frontier(planner, planner.frontier)
    if planner is not None and planner.search is not None:
        from stabstudy.search.optuna_search import OptunaSearch

        return OptunaSearch(planner, planner.search)
    return None


def room(plan: Plan, slots: int | None = None) -> int:
    """How many trials of the plan train at once: so many packs as there are slots, each filled."""
    slots = slots or estimate.slots(plan.compute, plan.launcher) or 1
    return slots * most_per_pack(plan.trials[0].config, plan.compute)


def begun(plan: Plan) -> Plan:
    """The plan with the trials that its search has asked for until now, or its first round; a grid's as it is.

    Raises ConfigError where there is nothing to ask for.
    """
    if plan.planner is None or (search := strategy(plan)) is None:
        return plan
    study = store.StudyFolder(plan.folder)
    trials = search.known(study) or search.next(study, room(plan), ())
    if not trials:
        raise ConfigError(Problem("sweep.exclude", "leaves nothing to train"))
    each = {trial.trial_id: trial for trial in (*trials, *plan.planner.fixed)}
    return plan.planner.plan(list(each.values())[: plan.planner.most[1]])
