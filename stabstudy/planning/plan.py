"""The Plan of a launch: the trials of a command line and a sweep file, with every problem of them at once.

Nothing is started and nothing is written here, and neither torch nor ray is imported: `--dry-run` and every error in
a configuration answer from this module alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader

from stabstudy import config as cfg
from stabstudy import disk, store
from stabstudy.config import COMPILE_FROM, DataConfig, TrialConfig
from stabstudy.data import tokens, weights
from stabstudy.data.batches import supply
from stabstudy.data.weights import Weights
from stabstudy.planning import axes, budget, compose, compute, estimate, overrides, sweepfile
from stabstudy.planning.axes import Between, Choices, Chosen, Factor
from stabstudy.planning.budget import Budget
from stabstudy.planning.compute import Compute
from stabstudy.planning.overrides import Request
from stabstudy.planning.sweepfile import SweepFile
from stabstudy.planning.trials import (
    Cell,
    Composer,
    PlannedTrial,
    distinct,
    fingerprints,
    packs,
    planned,
    without_excluded,
)
from stabstudy.settings import ConfigError, DataError, Issues
from stabstudy.wording import count, short_value

__all__ = ["Axis", "Compute", "Plan", "PlannedTrial", "Planner", "Rest", "make_plan"]

ENOUGH = 20
"""Problems after which no further cell is looked at."""


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
    planner: Planner | None = None  # of a search; `trials` are then those that show that it can be planned

    def __repr__(self) -> str:
        """'<Plan depth_lr: 24 trials of 8 cells in results/depth_lr', and a line such as 'optim.lr: 0.001, 0.01'."""
        cells = len({trial.cell_id for trial in self.trials})
        more = " so far" if self.planner else ""
        size = f"{count(len(self.trials), 'trial', ',')} of {count(cells, 'cell', ',')}{more}"
        lines = [f"  {axis.name}: {', '.join(map(short_value, axis.values))}" for axis in self.axes]
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
    product: tuple[Factor, ...]  # of the axes beside what is searched
    rests: tuple[Rest, ...]
    composer: Composer
    known: dict[DataConfig, str]  # fingerprints
    resources: Compute
    folder: Path
    before: Mapping[str, Any]  # sweep.yaml of the launch before
    warnings: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.request.seeds or self.sweep.seeds

    @property
    def budget(self) -> Budget:
        return replace(self.sweep.budget, **self.request.budget)

    @property
    def searched(self) -> tuple[str, ...]:
        """The names that are searched."""
        return () if self.frontier is None else (self.frontier.setting,)

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
            self.known.update(fingerprints([cell.config.data], _cache(self.resources), issues))
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
        body = _body(self, tuple(varying), trials) | {"data": sweepfile.data_records(self.before, self.known)}
        body |= {"compute": dataclasses.asdict(self.resources), "command": list(self.request.given)}
        return Plan(
            self.request.study,
            self.folder,
            body["question"],
            tuple(varying),
            tuple(trials),
            sweepfile.record_text(body),
            self.resources,
            self.request.launch.launcher,
            tuple(dict.fromkeys((*self.warnings, *sweepfile.record_changes(self.before, body)))),
            tuple(sweepfile.redact(list(self.request.given))),
            self.sweep.conditions,
            tuple(self.composer.starts.plans.values()),
            _start(self.request, body["choices"]) if self.request.sweep is None else None,
            self.budget,
            self if self.searched else None,
        )


@dataclass(frozen=True)
class Starts:
    """Sources of starting weights, each looked up once, of the plan typed as `given`, which the sweeps `above` need."""

    given: list[str]
    cwd: Path
    above: tuple[str, ...]
    plans: dict[str, Plan] = field(default_factory=dict)  # of sweeps
    weights: dict[tuple[str, str | None], Weights] = field(default_factory=dict)

    def of(self, text: str, family: str | None) -> Weights:
        """The weights of an `objective.init_from`; those of a sweep may be yet to be trained.

        Raises DataError where there are none, ConfigError for a sweep that has no end to start from.
        """
        if (text, family) not in self.weights:
            is_sweep = text in compose.sweep_names(self.cwd)
            self.weights[text, family] = self._of_sweep(text) if is_sweep else weights.find(text, self.cwd, family)
        return self.weights[text, family]

    def _of_sweep(self, name: str) -> Weights:
        if name in self.above:
            raise DataError(weights.START, "a sweep cannot start from itself", " -> ".join((*self.above, name)))
        where = [g for g in self.given if g.partition("=")[0] in ("results_dir", "launcher", "force", "compute")]
        where += [g for g in self.given if g.startswith("compute.") and not g.startswith("compute.keep_checkpoints=")]
        issues = Issues()
        try:
            ask = functools.partial(overrides.read, [f"sweep={name}", *where])
            plan = _plan(ask, self.cwd, issues, False, self.above)
        except ConfigError as error:
            first = (issues.problems or error.problems)[0]
            raise DataError(weights.START, f"the sweep {name} cannot be launched first: {first}") from error
        if len(plan.trials) != 1:
            raise DataError(weights.START, "must be a sweep of exactly one trial", f"{name} with {len(plan.trials)}")
        self.plans[name] = replace(plan, compute=replace(plan.compute, keep_checkpoints=True))
        trial = plan.trials[0]
        folder = store.StudyFolder(plan.folder).trial(trial.trial_id)
        if folder.read_state().status == "done":
            return weights.of_trial(folder)
        return weights.planned(folder, trial.trial_id, trial.config.model, None, trial.config.data.tokenizer)


Ask = Callable[[ConfigLoader, Issues], Request]
"""Reads what a launch asks, with the presets of conf/ at hand."""


def make_plan(given: Sequence[str] | Ask, cwd: Path, to_launch: bool = False) -> Plan:
    """The plan of `python -m stabstudy.sweep GIVEN...` (flags taken out) typed in folder `cwd`, or of another request.

    Raises ConfigError with every problem of the launch: its settings, and the data that they name. `to_launch`: raises
    disk.LockHeldError where the study is being worked on, before anything is composed or any data looked at.
    """
    issues = Issues()
    ask = given if callable(given) else functools.partial(overrides.read, list(given))
    try:
        return _plan(ask, cwd, issues, to_launch, ())
    except ConfigError as error:  # what made going on impossible, behind what was found before
        issues.take(error.problems)
        raise ConfigError(issues.problems) from error


def _plan(ask: Ask, cwd: Path, issues: Issues, to_launch: bool, above: tuple[str, ...]) -> Plan:
    with compose.conf() as loader:
        request = ask(loader, issues)
        if to_launch and not issues.problems:
            disk.check_unlocked(study_folder(request, cwd))
        named = request.sweep
        sweep = sweepfile.without_file() if named is None else sweepfile.read(named, cwd, loader, issues)
        frontier = request.frontier or (None if _is_chosen(sweep.frontier, request) else sweep.frontier)
        left_out = {} if frontier is None else {frontier.setting: Chosen(frontier.low, frontier.origin)}
        product = axes.factors(sweep.factors, request.axes, request.pins | left_out)
        starts = Starts(list(request.given), cwd, above if named is None else (*above, named))
        composer = Composer(sweep, issues, starts)
        cells = _cells(composer, sweep, request, product, frontier)
        resources = composer.compute(request)
    known = fingerprints((cell.config.data for cell in cells), _cache(resources), issues)
    issues.stop()
    every = planned(cells, request.seeds or sweep.seeds, known)
    trials = distinct(without_excluded(every, sweep.exclude, request.names, issues), issues)
    folder = study_folder(request, cwd)
    before = sweepfile.check_belongs(folder, sweep.name, known, issues)
    _check_engines([t.config for t in trials], issues)
    if (
        frontier is not None
        and frontier.holds != axes.HOLDS[0]
        and any(t.config.objective.kind == "kto" for t in trials)
    ):
        issues.refuse(frontier.setting, "objective kto has a frontier of holds: stable only", frontier.holds)
    issues.stop()
    rests = tuple(Rest(case, choices) for case, choices in axes.combinations(product, sweep.cases, request.pins))
    if frontier is not None:
        rests = tuple(rest for rest in rests if frontier.setting not in rest.choices)
    planner = Planner(request, sweep, frontier, tuple(product), rests, composer, known, resources, folder, before)
    trials = budget.within(trials, lambda trial: trial.cell_id, planner.budget if frontier is None else Budget())
    _check_room(trials, resources, request, issues)
    names = [*axes.axis_values(product), *planner.searched]
    supplies = {data: supply(data, fingerprint, _cache(resources)) for data, fingerprint in known.items()}
    for caveat in estimate.caveats([t.config for t in trials], names, supplies):
        issues.warn(caveat)
    return replace(planner, warnings=tuple(issues.warnings)).plan(trials)


def _check_rule(frontier: Between | None, trials: Sequence[PlannedTrial], issues: Issues) -> None:
    """KTO's loss is no distance to the best training in nats, by which `works` judges."""
    if frontier and frontier.holds != axes.HOLDS[0] and any(t.config.objective.kind == "kto" for t in trials):
        issues.refuse(frontier.setting, "objective kto has a frontier of holds: stable only", frontier.holds)


def _is_chosen(frontier: Between | None, request: Request) -> bool:
    """Whether the launch itself gives values of what the sweep searches, which is then not searched."""
    return frontier is not None and frontier.setting in request.names


def _cache(resources: Compute) -> Path | None:
    """The token cache, if there is one."""
    return Path(resources.cache_dir) if resources.cache_dir else tokens.existing_cache_dir()


def _start(request: Request, choices: Mapping[str, str]) -> str:
    presets = ", ".join(f"{group}={preset}" for group, preset in choices.items())
    hint = "" if request.launch.study else "; study=NAME names the study, so that values can be added later"
    return f"starts from {sweepfile.PRIMARY} alone ({presets}), not from a sweep{hint}"


def _question(sweep: SweepFile, varying: tuple[Axis, ...]) -> str:
    """The sweep's own question, unless the command line changed its axes: then one that names them."""
    names = [axis.name for axis in varying]
    own = {name for factor in sweep.factors for alternative in factor for name in alternative}
    own |= set() if sweep.frontier is None else {sweep.frontier.setting}
    if sweep.question and own == set(names):
        return sweep.question
    if not names:
        return "How stable is this one recipe?"
    *others, last = names
    return f"What {'do' if others else 'does'} {', '.join(others)}{' and ' if others else ''}{last} change?"


def study_folder(request: Request, cwd: Path) -> Path:
    """Where the study's files lie."""
    return cwd / Path(request.launch.results_dir).expanduser() / request.study


def _check_room(trials: Sequence[PlannedTrial], resources: Compute, request: Request, issues: Issues) -> None:
    """Memory, by estimate: refuse what cannot fit unless forced, warn about what fits only in smaller numbers."""
    launcher = request.launch.launcher
    if not request.launch.force:
        issues.take(estimate.too_large([t.config for t in trials], resources))
        issues.stop()
    packed = [[t.config for t in pack] for pack in packs(trials, resources, launcher)]
    for crowd in estimate.crowded(packed, resources, launcher):
        issues.warn(crowd)
    for idle in compute.idle(resources, launcher):
        issues.warn(idle)


def _check_engines(configs: list[TrialConfig], issues: Issues) -> None:
    """`train.compile: auto` must decide alike for all trials: eager and compiled ones may not be compared."""
    chosen = {c.compiled for c in configs if c.train.compile == "auto"}
    if len(chosen) > 1:
        rule = f"auto compiles from {COMPILE_FROM} steps on, and cells on both sides cannot be compared: set on or off"
        issues.refuse("train.compile, train.steps", rule)
    elif True in chosen and (missing := compute.why_not_compile()):
        issues.warn(f"train.compile=auto: {missing}; every trial of this launch trains uncompiled")


def _cells(
    composer: Composer, sweep: SweepFile, request: Request, product: list[Factor], frontier: Between | None
) -> list[Cell]:
    """Every cell without a problem; along what is searched those at both ends of its range.

    Raises ConfigError at once for a product that is too large to look at.
    """
    seeds, issues = request.seeds or sweep.seeds, composer.issues
    if not axes.check_count(product, len(sweep.cases), len(seeds), request.launch.max_trials, issues):
        issues.stop()
    cells = []
    for case, chosen in axes.combinations(product, sweep.cases, request.pins):
        for choices in _at_ends(chosen, frontier):
            if cell := composer.cell(choices, case):
                cells.append(cell)
        if len(issues.problems) >= ENOUGH:
            issues.stop()
    return cells


def _at_ends(chosen: Choices, frontier: Between | None) -> list[Choices]:
    if frontier is None or frontier.setting in chosen:
        return [chosen]
    return [axes.without_rivals(chosen | {frontier.setting: Chosen(end, frontier.origin)}) for end in frontier.ends]


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
        **({} if planner.frontier is None else {"frontier": {planner.frontier.setting: planner.frontier.record}}),
        **({"budget": planner.budget.record} if planner.budget.limited else {}),
        "cases": {case: {n: c.value for n, c in chosen.items()} for case, chosen in sweep.cases.items()},
        "exclude": [expression.text for expression in sweep.exclude],
        **({} if sweep.conditions is None else {"conditions": list(sweep.conditions)}),
        "choices": choices,
        "settings": fixed,
        "launcher": planner.request.launch.launcher,
    }
