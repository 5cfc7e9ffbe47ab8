"""Plans, and the Planner that makes them: what a launch asks, read and composed.

The plan of a grid is made once; that of a search anew with the trials of each round.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stabstudy import config as cfg
from stabstudy import wording
from stabstudy.config import DataConfig
from stabstudy.data import tokens
from stabstudy.planning import asked, axes, compose
from stabstudy.planning.axes import Between, Choices, Chosen, Factor
from stabstudy.planning.budget import Budget
from stabstudy.planning.compute import Compute
from stabstudy.planning.overrides import Request
from stabstudy.planning.sweepfile import SweepFile
from stabstudy.planning.trials import (
    Composer,
    PlannedTrial,
    fingerprints,
    planned,
)
from stabstudy.settings import Issues
from stabstudy.space import HOLDS, Search
from stabstudy.stability.hopeless import STOPS


@dataclass(frozen=True)
class Axis:
    """What varies: a setting under its dotted name, or a group ("data"), and its values in order."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything that a launch needs to know. Trials come seed by seed: every cell once before any cell twice."""

    study: str
    folder: Path
    question: str
    axes: tuple[Axis, ...]
    trials: tuple[PlannedTrial, ...]
    sweep_text: str  # text of sweep.yaml
    compute: Compute
    launcher: str
    warnings: tuple[str, ...]
    argv: tuple[str, ...]  # as typed, secrets hidden
    conditions: tuple[str, ...] | None = None  # axes that are given, where the sweep lists them
    first: tuple[Plan, ...] = ()  # sweeps of one trial that are launched before it: its trials start from their ends
    start: str | None = None  # what a launch without a sweep starts from, in words; None where a sweep is named
    budget: Budget = Budget()
    stop: str = STOPS[0]  # which trials the launch ends early, see stability/hopeless.py
    planner: Planner | None = None  # of a search; `trials` are then those that show that it can be planned

    def __repr__(self) -> str:
        """'<Plan depth_lr: 24 trials of 8 cells in results/depth_lr', and a line such as 'optim.lr: 0.001, 0.01'."""
        cells = len({trial.cell_id for trial in self.trials})
        more = " to begin with" if self.planner else ""
        size = f"{wording.count(len(self.trials), 'trial', ',')} of {wording.count(cells, 'cell', ',')}{more}"
        lines = [f"  {axis.name}: {', '.join(map(wording.short_value, axis.values))}" for axis in self.axes]
        return "\n".join([f"<Plan {self.study}: {size} in {self.folder}", *lines]) + ">"

    def values(self, trial: PlannedTrial) -> list[Any]:
        """The trial's value on each axis, in the order of the axes; of starting weights their identity."""
        known = {**cfg.flat(trial.config), **trial.choices, cfg.PLACE: trial.config.objective.init_id}
        return [known[axis.name] for axis in self.axes]


@dataclass(frozen=True)
class Rest:
    """A combination of the axes beside what is searched, or a named case that leaves that open."""

    case: str | None
    choices: Choices


@dataclass(frozen=True)
class Planner:
    """What a launch asks, read and composed: it makes trials of values, and plans of trials."""

    request: Request
    sweep: SweepFile
    frontier: Between | None
    search: Search | None
    product: tuple[Factor, ...]  # of the axes beside what is searched
    rests: tuple[Rest, ...]
    fixed: tuple[PlannedTrial, ...]  # named cases that leave nothing open, beside what is searched
    composer: Composer
    known: dict[DataConfig, str]  # fingerprints
    resources: Compute
    folder: Path
    before: Mapping[str, Any]  # sweep.yaml of the launch before
    warnings: tuple[str, ...] = ()
    stop: str = STOPS[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.request.seeds or self.sweep.seeds

    @property
    def budget(self) -> Budget:
        return replace(self.sweep.budget, **self.request.budget)

    @property
    def most(self) -> tuple[str, int]:
        """How many trials a search may plan for the study, those of earlier launches too, and the key that says so."""
        limits = {"max_trials": self.request.launch.max_trials, "budget.trials": self.budget.trials}
        return min(((key, n) for key, n in limits.items() if n is not None), key=lambda limit: limit[1])

    @property
    def searched(self) -> tuple[str, ...]:
        """The names that are searched."""
        if self.frontier is not None:
            return (self.frontier.setting,)
        return () if self.search is None else tuple(self.search.space)

    @property
    def asked(self) -> dict[str, Any]:
        """What is searched, as sweep.yaml has it; {} for a grid."""
        if self.frontier is not None:
            return {"frontier": {self.frontier.setting: self.frontier.record}}
        return {} if self.search is None else {"search": self.search.body()}

    @property
    def aim(self) -> str:
        """What is searched, in words; "" for a grid."""
        if (frontier := self.frontier) is not None:
            low, high = frontier.ends
            width = f"a factor {frontier.resolution:g}" if frontier.log else f"{frontier.resolution:g}"
            what = "is stable" if frontier.holds == HOLDS[0] else "works"
            return f"the largest {frontier.setting} from {low:g} to {high:g} that {what}, to within {width}"
        if (search := self.search) is not None:
            ways = [f"{'highest' if o.maximize else 'lowest'} {o.column}" for o in search.objectives]
            seeds = wording.count(len(self.seeds), "seed")
            return f"{search.sampler} for {' and '.join(ways)}, {search.trials} cells of {seeds}"
        return ""

    def trial(self, rest: Rest, values: Mapping[str, Any], seed: int) -> PlannedTrial | None:
        """The trial of these values of what is searched; None where `sweep.exclude` names it.

        Raises ConfigError for values that break a rule.
        """
        return next(iter(self.replicates(rest, values, [seed])), None)

    def replicates(self, rest: Rest, values: Mapping[str, Any], seeds: Sequence[int]) -> list[PlannedTrial]:
        """The trials of these values with each of the seeds; [] where `sweep.exclude` names them. Raises as `trial`."""
        issues = Issues()
        chosen = axes.without_rivals(rest.choices | {name: Chosen(value, "") for name, value in values.items()})
        composer = replace(self.composer, issues=issues)
        with compose.conf() if set(values) & set(compose.PRESET_GROUPS) else contextlib.nullcontext():
            cell = composer.cell(chosen, rest.case)
        issues.stop()
        assert cell is not None
        if cell.config.data not in self.known:
            self.known.update(fingerprints([cell.config.data], existing_cache(self.resources), issues))
            issues.stop()
        named = {**cfg.flat(cell.config), **cell.choices}
        excluded = rest.case is None and any(e.holds(named) for e in self.sweep.exclude)
        return [] if excluded else planned([cell], seeds, self.known)

    def plan(self, trials: Sequence[PlannedTrial]) -> Plan:
        """The plan of these trials."""
        varying = [Axis(name, values) for name, values in axes.axis_values(self.product).items()]
        flats = [{**cfg.flat(trial.config), **trial.choices} for trial in trials]
        for name in self.searched:
            values = dict.fromkeys(flat[name] for flat in flats)
            varying.append(Axis(name, tuple(sorted(values, key=axes.rank))))
        body = _body(self, tuple(varying), trials) | {"data": asked.data_records(self.before, self.known)}
        body |= {} if self.stop == STOPS[0] else {"stop": self.stop}
        body |= {"compute": dataclasses.asdict(self.resources), "command": list(self.request.given)}
        return Plan(
            self.request.study,
            self.folder,
            body["question"],
            tuple(varying),
            tuple(trials),
            asked.record_text(body),
            self.resources,
            self.request.launch.launcher,
            tuple(dict.fromkeys((*self.warnings, *asked.record_changes(self.before, body)))),
            tuple(asked.redact(list(self.request.given))),
            self.sweep.conditions,
            tuple(self.composer.starts.plans.values()),
            _start(self.request, body["choices"]) if self.request.sweep is None else None,
            self.budget,
            self.stop,
            self if self.searched else None,
        )


def existing_cache(resources: Compute) -> Path | None:
    """The token cache, if there is one."""
    return Path(resources.cache_dir) if resources.cache_dir else tokens.existing_cache_dir()


def _start(request: Request, choices: Mapping[str, str]) -> str:
    presets = ", ".join(f"{group}={preset}" for group, preset in choices.items())
    hint = "" if request.launch.study else "; study=NAME names the study, so that values can be added later"
    return f"starts from {asked.PRIMARY} alone ({presets}), not from a sweep{hint}"


def _question(sweep: SweepFile, varying: tuple[Axis, ...]) -> str:
    """The sweep's own question, unless the command line changed its axes: then one that names them."""
    names = [axis.name for axis in varying]
    own = {name for factor in sweep.factors for alternative in factor for name in alternative}
    own |= set() if sweep.frontier is None else {sweep.frontier.setting}
    own |= set() if sweep.search is None else set(sweep.search.space)
    if sweep.question and own == set(names):
        return sweep.question
    if not names:
        return "How stable is this one recipe?"
    return wording.question(names)


def _body(planner: Planner, varying: tuple[Axis, ...], trials: Sequence[PlannedTrial]) -> dict[str, Any]:
    """The part of sweep.yaml on the question; `settings` are those that all trials share."""
    sweep, flats = planner.sweep, [cfg.flat(t.config) for t in trials]
    own = {"seed", *planner.searched}
    fixed = {k: v for k, v in flats[0].items() if k not in own and all(f[k] == v for f in flats)}
    choices = {g: p for g, p in trials[0].choices.items() if all(t.choices[g] == p for t in trials)}
    seeds = planner.seeds if planner.searched else dict.fromkeys(t.config.seed for t in trials)
    return {
        "format": cfg.FORMAT_VERSION,
        "sweep": sweep.name,
        "question": _question(sweep, varying),
        "trials": len(trials),
        "seeds": list(seeds),
        "axes": {axis.name: list(axis.values) for axis in varying},
        **planner.asked,
        **({"budget": planner.budget.record} if planner.budget.limited else {}),
        "cases": {case: {n: c.value for n, c in chosen.items()} for case, chosen in sweep.cases.items()},
        "exclude": [expression.text for expression in sweep.exclude],
        **({} if sweep.conditions is None else {"conditions": list(sweep.conditions)}),
        "choices": choices,
        "settings": fixed,
        "launcher": planner.request.launch.launcher,
    }
