"""The Plan of a launch: the trials of a command line and a sweep file, with every problem of them at once.

Nothing is started and nothing is written here, and neither torch nor ray is imported: `--dry-run` and every error in
a configuration answer from this module alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader

from stabstudy import disk, store
from stabstudy.config import COMPILE_FROM, TrialConfig
from stabstudy.data import weights
from stabstudy.data.batches import supply
from stabstudy.data.weights import Weights
from stabstudy.planning import asked, axes, budget, compose, compute, estimate, overrides, searchspace, sweepfile
from stabstudy.planning.axes import Between, Choices, Chosen, Factor
from stabstudy.planning.budget import Budget
from stabstudy.planning.compute import Compute
from stabstudy.planning.overrides import Request
from stabstudy.planning.planner import Axis, Plan, Planner, Rest, existing_cache
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
from stabstudy.space import HOLDS, Search
from stabstudy.stability.hopeless import HOPELESS, why_not

__all__ = ["Axis", "Compute", "Plan", "PlannedTrial", "Planner", "Rest", "make_plan"]

ENOUGH = 20
"""Problems after which no further cell is looked at."""


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
        search = _search(sweep, request, issues)
        sweep = _applicable(sweep, frontier, issues)
        ends = _ends(frontier, search)
        left_out = {name: Chosen(value, "") for name, value in ends[0].items()}
        product = axes.factors(sweep.factors, request.axes, request.pins | left_out)
        starts = Starts(list(request.given), cwd, above if named is None else (*above, named))
        composer = Composer(sweep, issues, starts)
        cells = _cells(composer, sweep, request, product, ends)
        resources = composer.compute(request)
    known = fingerprints((cell.config.data for cell in cells), existing_cache(resources), issues)
    issues.stop()
    every = planned(cells, request.seeds or sweep.seeds, known)
    trials = distinct(without_excluded(every, sweep.exclude, request.names, issues), issues)
    folder = study_folder(request, cwd)
    way = asked.kind({"frontier": frontier, "search": search})
    before = asked.check_belongs(folder, sweep.name, way, known, issues)
    _check_engines([t.config for t in trials], issues)
    _check_rule(frontier, trials, issues)
    issues.stop()
    rests = [Rest(case, choices) for case, choices in axes.combinations(product, sweep.cases, request.pins)]
    is_open = [bool(ends[0]) and not any(name in rest.choices for name in ends[0]) for rest in rests]
    fixed = {rest.case for rest, searched in zip(rests, is_open, strict=True) if not searched}
    planner = Planner(
        request, sweep, frontier, search, tuple(product), tuple(rest for rest in rests if rest.case not in fixed),
        tuple(trial for trial in trials if trial.case in fixed),
        composer, known, resources, folder, before,
    )  # fmt: skip
    trials = budget.within(trials, lambda trial: trial.cell_id, Budget() if planner.searched else planner.budget)
    _check_room(trials, resources, request, issues)
    names = [*axes.axis_values(product), *planner.searched]
    supplies = {data: supply(data, fingerprint, existing_cache(resources)) for data, fingerprint in known.items()}
    for caveat in estimate.caveats([t.config for t in trials], names, supplies):
        issues.warn(caveat)
    stop = request.launch.stop or sweep.stop
    _check_stop(stop, [t.config for t in trials], issues)
    if before.get("stop") == HOPELESS != stop:
        issues.warn(f"sweep.stop: {stop} now, {HOPELESS} in the launch before: trials that it stopped go on")
    if planner.searched:
        rests = [rest for rest in planner.rests if planner.replicates(rest, ends[0], planner.seeds)]
    return replace(planner, stop=stop, rests=tuple(rests), warnings=tuple(issues.warnings)).plan(trials)


def _search(sweep: SweepFile, request: Request, issues: Issues) -> Search | None:
    """The search, less what the launch pins. Axes are refused there: a search has no grid."""
    if sweep.search is None:
        return None
    for name in sorted(request.names - set(request.pins)):
        issues.refuse(name, "cannot be an axis beside sweep.search: pin it, or write it under sweep.search.space")
    return searchspace.fixed(sweep.search, request.pins, issues)


def _ends(frontier: Between | None, search: Search | None) -> list[dict[str, Any]]:
    """Values of what is searched by which a plan is checked: a range's ends, the first of a space; [{}]: a grid."""
    if frontier is not None:
        return [{frontier.setting: end} for end in frontier.ends]
    if search is not None:
        return [{name: domain.first for name, domain in search.space.items()}]
    return [{}]


def _applicable(sweep: SweepFile, frontier: Between | None, issues: Issues) -> SweepFile:
    """The sweep without the conditions of `exclude` on what is searched: the range says where it is."""
    kept = tuple(e for e in sweep.exclude if frontier is None or frontier.setting not in e.names)
    for expression in set(sweep.exclude) - set(kept):
        issues.warn(
            f"sweep.exclude: {expression.text!r} does not apply: {frontier.setting if frontier else ''} is searched"
        )
    return replace(sweep, exclude=kept)


def _check_rule(frontier: Between | None, trials: Sequence[PlannedTrial], issues: Issues) -> None:
    """KTO's loss is no distance to the best training in nats, by which `works` judges; and a search needs verdicts."""
    if frontier is None:
        return
    if frontier.holds != HOLDS[0] and any(t.config.objective.kind == "kto" for t in trials):
        issues.refuse(frontier.setting, "objective kto has a frontier of holds: stable only", frontier.holds)
    if short := [t.config.train.steps for t in trials if t.config.train.steps < estimate.STEPS_TO_JUDGE]:
        rule = f"must be at least {estimate.STEPS_TO_JUDGE}, or no trial of the search gets a verdict"
        issues.refuse("train.steps", rule, str(min(short)))


def _is_chosen(frontier: Between | None, request: Request) -> bool:
    """Whether the launch itself gives values of what the sweep searches, which is then not searched."""
    return frontier is not None and frontier.setting in request.names


def _check_stop(stop: str, configs: Sequence[TrialConfig], issues: Issues) -> None:
    """Refuse a rule that would never end any trial of the launch, warn of those that it passes over."""
    reasons = [reason for c in configs if (reason := why_not(c.objective.kind, c.tokens_per_step))]
    if stop != HOPELESS or not reasons:
        return
    named = "; ".join(dict.fromkeys(reasons))
    if len(reasons) == len(configs):
        issues.refuse("sweep.stop", f"{HOPELESS} would end no trial of this sweep: it is {named}", stop)
        issues.stop()
    issues.warn(f"sweep.stop: {HOPELESS} never ends {len(reasons)} of {len(configs)} trials: it is {named}")


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
    composer: Composer, sweep: SweepFile, request: Request, product: list[Factor], ends: Sequence[Mapping[str, Any]]
) -> list[Cell]:
    """Every cell without a problem; along what is searched those at both ends of it.

    Raises ConfigError at once for a product that is too large to look at.
    """
    issues = composer.issues
    seeds = 1 if ends[0] else len(request.seeds or sweep.seeds)  # a search begins with one trial of each cell
    if not axes.check_count(product, len(sweep.cases), seeds, request.launch.max_trials, issues):
        issues.stop()
    cells = []
    for case, chosen in axes.combinations(product, sweep.cases, request.pins):
        for choices in _at_ends(chosen, ends):
            if cell := composer.cell(choices, case):
                cells.append(cell)
        if len(issues.problems) >= ENOUGH:
            issues.stop()
    return cells


def _at_ends(chosen: Choices, ends: Sequence[Mapping[str, Any]]) -> list[Choices]:
    if any(name in chosen for name in ends[0]):
        return [chosen]
    return [axes.without_rivals(chosen | {name: Chosen(v, "") for name, v in end.items()}) for end in ends]
