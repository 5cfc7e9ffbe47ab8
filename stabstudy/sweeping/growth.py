"""A plan that grows while its launch lasts: after each round the strategy of its search is asked for more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from stabstudy import store
from stabstudy.planning import trials
from stabstudy.planning.plan import Plan, PlannedTrial
from stabstudy.planning.preview import intact
from stabstudy.search import strategy
from stabstudy.state import is_over

Take = Callable[[Plan, Sequence[PlannedTrial]], None]
"""Prepares trials that are new: their data, their files, their line on the board."""


class Growth:
    """The plan as it stands, and more packs of it as long as its search asks for trials."""

    def __init__(self, plan: Plan, study: store.StudyFolder, take: Take, say: Callable[[str], None]):
        self.plan, self.study = plan, study
        self._take, self._say = take, say
        self._strategy, self._rounds = strategy.strategy(plan), 0

    def _is_over(self, trial: PlannedTrial) -> bool:
        return is_over(self.study.trial(trial.trial_id).read_state().status, self.plan.stop)

    def more(self, slots: int | None) -> list[trials.Pack]:
        """The packs of the next round; [] where nothing is left to ask, or no more trials may be planned.

        `slots`: how many packs run at once; None: as many as this machine has.
        """
        if self._strategy is None or self.plan.planner is None:
            return []
        (limit, most), before = self.plan.planner.most, self.plan.trials
        given_up = {t.trial_id for t in before if not self._is_over(t)}
        if self._rounds or not given_up:
            self._say(self._strategy.answer(self.study))
        if len(before) >= most:
            self._say(f"{limit}={most} is reached: the search ends here; launched with a larger one, it goes on")
            return []
        asked = self._strategy.next(self.study, strategy.room(self.plan, slots), given_up)
        known = {trial.trial_id for trial in before}
        asked = [trial for trial in asked if trial.trial_id not in known][: most - len(before)]
        if not asked:
            return []
        grown = self.plan.planner.plan([*before, *asked])
        whole, _ = intact(dataclasses.replace(grown, trials=tuple(asked)), self.study)
        self.plan, self._rounds = grown, self._rounds + 1
        self._take(grown, whole.trials)
        return trials.packs(whole.trials, grown.compute, grown.launcher)
