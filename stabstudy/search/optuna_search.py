"""Optuna's samplers as a strategy: the next cells of a search, from the trials that stand in the study's folder.

Whenever it is asked, the search is told to a new Optuna study in memory, trial by trial as the files have it, and that
study is asked for what is next. So the files alone decide: a kill, a relaunch or a deleted journal changes nothing. A
sampler whose next suggestion follows from the course of the search (generations of NSGA-II, the distribution of CMA-ES,
the place in a QMC sequence) goes through that course again. The k-th suggestion has its own random numbers, from
`search.seed` and k.

Beware: Optuna keeps the state of CMA-ES as a pickle in its storage. It stays in memory here, and nothing of the journal
(`search/journal.py`) is ever read back: what lies in a study's folder cannot run code.

What the space allows and the rules of a trial refuse, or a constraint on settings alone, is told as infeasible and not
trained. A cell that is suggested again is told again at once, and does not count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from stabstudy import config as cfg
from stabstudy import extras, wording
from stabstudy.analysis import searches
from stabstudy.analysis.searches import History, Suggestion
from stabstudy.analysis.tables import Row, read_tables
from stabstudy.planning.compute import NotReadyError
from stabstudy.planning.trials import PlannedTrial
from stabstudy.search import journal
from stabstudy.settings import ConfigError, Problem
from stabstudy.space import CONSTRAINTS, SAMPLERS, Search
from stabstudy.store import StudyFolder
from stabstudy.wording import short_value

REPEATS = 10
"""Suggestions in a row of cells that are known or refused, after which the next ones are drawn at random."""

MOST_DRAWS = 1000
"""Random ones in a row that are known or refused, after which the space counts as exhausted."""

REFUSED = "refused"
"""In place of a cell_id, of values that no trial can have."""


class Planner(Protocol):
    """What a search needs of planning: complete trials of given values."""

    @property
    def rests(self) -> Sequence[Any]:
        """The combinations of what is not searched: one."""

    @property
    def seeds(self) -> Sequence[int]:
        """Those of every cell."""

    def replicates(self, rest: Any, values: Mapping[str, Any], seeds: Sequence[int]) -> list[PlannedTrial]:
        """The trials with these settings and presets. Raises ConfigError where they break a rule."""


class OptunaSearch:
    """A strategy, see `strategy.Strategy`."""

    def __init__(self, planner: Planner, search: Search):
        self.planner, self.search = planner, search
        self.seeds = list(dict.fromkeys(planner.seeds))
        self.note = ""  # what is wrong with the journal; the search goes on without it
        self._planned: dict[str, list[PlannedTrial] | Problem] = {}

    def known(self, study: StudyFolder) -> list[PlannedTrial]:
        """Every trial of the cells of this search that stand in the study's folder, all seeds, done or not."""
        return [trial for suggestion in self._suggestions(study) for trial in self._trials(suggestion.values)]

    def next(self, study: StudyFolder, room: int, given_up: Collection[str]) -> list[PlannedTrial]:
        """The trials of the next cells, as many cells as fit into `room` trials, at least one; [] at the end.

        `given_up`: ids of trials that failed and are not asked for again. Brings the journal up to date once there is
        a trial to tell of. Raises compute.NotReadyError where Optuna, or what the sampler needs, is not installed.
        """
        check_ready(self.search)
        tables = read_tables(study)
        lost = {*given_up, *(damaged.trial_id for damaged in tables.damaged)}
        judged = self._suggestions(study, lost, tables.trials)
        wanted = min(max(1, room // len(self.seeds)), self.search.trials - len(judged))
        asked = list(self._asked(judged, lost, wanted)) if room > 0 and wanted > 0 else []
        if judged:
            self.note = journal.write(study.journal, study.name, self.search, [*judged, *asked]) or ""
        return [trial for suggestion in asked for trial in self._trials(suggestion.values)]

    def answer(self, study: StudyFolder) -> str:
        """What is known so far, in a line: the best cell, or how many none is better than."""
        known = searches.history(self.search, self._suggestions(study))
        done = sum(suggestion.state == "done" for suggestion in known.suggestions)
        counted = f"{self.search.sampler}, {done} of {self.search.trials} cells"
        return "; ".join(filter(None, (f"{counted}: {self._best(known)}", self._refusals(), self.note)))

    def _refusals(self) -> str:
        """How many cells this process asked for that no trial can be: many of them are a mistake in the space."""
        rules = [p for p in self._planned.values() if isinstance(p, Problem) and p.setting != CONSTRAINTS]
        return f"{wording.count(len(rules), 'other')} cannot be trained: {rules[0]}" if rules else ""

    def _best(self, known: History) -> str:
        names = [objective.column for objective in self.search.objectives]
        if not known.front:
            return "none is feasible so far"
        if len(names) > 1:
            return f"{len(known.front)} that no other is better than in {', '.join(names)}"
        best = known.suggestions[known.front[0]]
        levels = (f"{name.rpartition('.')[2]}={short_value(value)}" for name, value in best.values.items())
        return f"best {names[0]} {best.objectives[0]:.4g} at {' '.join(levels)}"

    def _suggestions(
        self, study: StudyFolder, lost: Collection[str] = (), rows: Sequence[Row] | None = None
    ) -> list[Suggestion]:
        """The cells on disk, judged; those of other settings than this search's are left out.

        `lost`: ids of trials that will not be done; a cell that has one has failed. `rows`: of the trials, if read.
        """
        own = [row for row in (read_tables(study).trials if rows is None else rows) if self._is_own(row)]
        judged = searches.suggestions(own, self.search, self.seeds, searches.begun(study, own))
        return [
            replace(s, state="failed") if s.state != "done" and self._is_lost(s.values, lost) else s for s in judged
        ]

    def _is_lost(self, values: Mapping[str, Any], lost: Collection[str]) -> bool:
        return any(trial.trial_id in lost for trial in self._trials(values))

    def _is_own(self, row: Mapping[str, Any]) -> bool:
        values = self.search.values(row)
        if values is None or row["case"] is not None:
            return False
        trials = self._plan(values)
        return isinstance(trials, list) and row["trial_id"] in {trial.trial_id for trial in trials}

    def _trials(self, values: Mapping[str, Any]) -> list[PlannedTrial]:
        trials = self._plan(values)
        assert isinstance(trials, list)  # refused values are never passed on
        return trials

    def _plan(self, values: Mapping[str, Any]) -> list[PlannedTrial] | Problem:
        """The trials of a cell, or the first rule that it breaks; planned once."""
        key = repr(sorted(values.items(), key=lambda item: item[0]))
        if key not in self._planned:
            self._planned[key] = self._checked(values)
        return self._planned[key]

    def _checked(self, values: Mapping[str, Any]) -> list[PlannedTrial] | Problem:
        try:
            trials = self.planner.replicates(self.planner.rests[0], values, self.seeds)
        except ConfigError as error:
            return error.problems[0]
        settings = {**cfg.flat(trials[0].config), **trials[0].choices}
        for expression in self.search.constraints:
            if expression.names <= set(settings) and not expression.holds(settings):
                return Problem(expression.setting, f"{expression.text!r} does not hold")
        return trials

    def _asked(self, judged: Sequence[Suggestion], lost: Collection[str], wanted: int) -> Iterator[Suggestion]:
        """New cells, each running from now on."""
        with searches.quiet():
            course = Course(self.search, judged)
            known = {suggestion.cell_id: suggestion for suggestion in judged}
            for _ in range(wanted):
                suggestion = self._fresh(course, known, lost)
                if suggestion is None:
                    return
                known[suggestion.cell_id] = suggestion
                yield suggestion

    def _fresh(self, course: Course, known: Mapping[str, Suggestion], lost: Collection[str]) -> Suggestion | None:
        """The next cell that is not known, or None where the space seems to hold no other."""
        patience = REPEATS + (len(known) if self.search.sampler == "QMC" else 0)  # its sequence passes the known ones
        for draw in itertools.count():
            if len(known) >= self.search.size or draw >= patience + MOST_DRAWS:
                return None
            number, values = course.ask(len(known), draw, at_random=draw >= patience)
            trials = self._plan(values)
            if isinstance(trials, Problem):
                course.tell(number, course.refused(values))
            elif (cell := trials[0].cell_id) in known:
                course.tell(number, known[cell])
            elif self._is_lost(values, lost):  # every trial of the cell is damaged, so no row speaks of it
                course.tell(number, Suggestion(cell, values, (), "failed"))
            else:
                return Suggestion(cell, values, (), "running")
        return None


class Course:
    """A search told to an Optuna study in memory."""

    def __init__(self, search: Search, judged: Sequence[Suggestion]):
        self.search, self.kind = search, SAMPLERS[search.sampler]
        self.distributions = searches.distributions(search)
        done = [s.objectives for s in judged if s.state == "done"]
        each = zip(*done, strict=True) if done else [[0.0]] * len(search.objectives)
        self.worst = tuple(o.worst(list(v)) for o, v in zip(search.objectives, each, strict=True))
        if not self.kind.replayed:
            self.study = searches.as_optuna(judged, search)
            return
        self.study = searches.new_study(search)
        for place, suggestion in enumerate(judged):
            self.study.sampler = self._sampler(place, 0)
            self.study.enqueue_trial(searches.parameters(suggestion.values, search))
            trial = self.study.ask(self.distributions)
            _ = trial.relative_params  # the sampler's own suggestion, with which it keeps its account; lazy in Optuna
            self.tell(trial, suggestion)

    def ask(self, place: int, draw: int, at_random: bool = False) -> tuple[Any, dict[str, Any]]:
        """Optuna's next trial, running from now on, and its values; `place`, `draw`: which random numbers to use."""
        self.study.sampler = self._sampler(place, draw, "Random" if at_random else None)
        trial = self.study.ask(self.distributions)
        space = self.search.space
        rounded = {name: space[name].nearest(value) for name, value in trial.params.items()}
        return trial, rounded

    def tell(self, trial: Any, suggestion: Suggestion) -> None:
        """End the trial as the suggestion did; one that runs goes on."""
        from optuna.trial import TrialState

        if suggestion.state == "failed":
            self.study.tell(trial, state=TrialState.FAIL)
        elif suggestion.state == "done":
            if self.kind.constrained:
                for name, value in searches.constraints(suggestion, self.search).items():
                    trial.set_constraint(name, value)
            values = suggestion.objectives if self.kind.constrained or suggestion.feasible else self.worst
            self.study.tell(trial, values)

    def refused(self, values: Mapping[str, Any]) -> Suggestion:
        """Values that no trial can have, as an infeasible suggestion."""
        broken = (1.0,) * (1 + len(self.search.constraints))
        return Suggestion(REFUSED, values, (), "done", self.worst, broken, True)

    def _sampler(self, place: int, draw: int, name: str | None = None) -> Any:
        own = int(np.random.SeedSequence([self.search.seed, place, draw]).generate_state(1)[0])
        return sampler(self.search, own, name)


def sampler(search: Search, seed: int, name: str | None = None) -> Any:
    """Optuna's sampler of this name, by default the search's own.

    `seed`: for all of its random numbers but the scrambling of a QMC sequence, which is the same throughout a search.
    """
    from optuna import samplers

    independent = samplers.RandomSampler(seed=seed)
    population = max(4, min(50, search.trials // 5))  # Optuna's 50, or five generations of a short search
    ranges = sum(1 for domain in searches.distributions(search).values() if not hasattr(domain, "choices"))
    match name or search.sampler:
        case "TPE":
            return samplers.TPESampler(seed=seed)
        case "GP":
            return samplers.GPSampler(seed=seed, independent_sampler=independent)
        case "CMA-ES":
            size = 4 + math.floor(3 * math.log(max(2, ranges)))
            return samplers.CmaEsSampler(
                seed=seed, popsize=size, independent_sampler=independent, warn_independent_sampling=False
            )
        case "QMC":
            return samplers.QMCSampler(
                seed=search.seed, scramble=True, independent_sampler=independent, warn_independent_sampling=False
            )
        case "NSGA-II":
            return samplers.NSGAIISampler(seed=seed, population_size=population)
        case "NSGA-III":
            return samplers.NSGAIIISampler(seed=seed, population_size=population)
        case _:
            return independent


def check_ready(search: Search) -> None:
    """Raises compute.NotReadyError, one line, where Optuna or what the sampler needs beside it is not installed."""
    lines = extras.why_not(["optuna"])
    for package in SAMPLERS[search.sampler].packages:
        if extras.installed(package) == "none":
            ours = any(package in packages for packages in extras.EXTRAS.values())
            hint = extras.install([package]) if ours else f"pip install {package}"
            lines.append(f"sampler {search.sampler} needs {package}, not installed here: {hint}")
    if lines:
        raise NotReadyError("; ".join(f"sweep.search: {line}" for line in lines))
