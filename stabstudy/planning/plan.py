"""The Plan of a launch: the trials of a command line and a sweep file, with every problem of them at once.

Nothing is started and nothing is written here, and neither torch nor ray is imported: `--dry-run` and every error in
a configuration answer from this module alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stabstudy import config as cfg
from stabstudy import disk, store
from stabstudy.config import COMPILE_FROM, TrialConfig
from stabstudy.data import tokens, weights
from stabstudy.data.batches import supply
from stabstudy.data.weights import Weights
from stabstudy.planning import axes, compose, compute, estimate, overrides, sweepfile
from stabstudy.planning.axes import Factor
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
from stabstudy.stability.hopeless import HOPELESS, STOPS, why_not

__all__ = ["Axis", "Compute", "Plan", "PlannedTrial", "make_plan"]

ENOUGH = 20
"""Problems after which no further cell is looked at."""


@dataclass(frozen=True)
class Axis:
    """What varies: a setting under its dotted name, or a group ("data"), and its values in order."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
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
    stop: str = STOPS[0]  # which trials the launch ends early, see stability/hopeless.py
    start: str | None = None  # what a launch without a sweep starts from, in words; None where a sweep is named

    def values(self, trial: PlannedTrial) -> list[Any]:
        """The trial's value on each axis, in the order of the axes; of starting weights their identity."""
        known = {**cfg.flat(trial.config), **trial.choices, cfg.PLACE: trial.config.objective.init_id}
        return [known[axis.name] for axis in self.axes]


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
            plan = _plan([f"sweep={name}", *where], self.cwd, issues, False, self.above)
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


def make_plan(given: list[str], cwd: Path, to_launch: bool = False) -> Plan:
    """The plan of `python -m stabstudy.sweep GIVEN...` (flags taken out) typed in folder `cwd`.

    Raises ConfigError with every problem of the launch: its settings, and the data that they name. `to_launch`: raises
    disk.LockHeldError where the study is being worked on, before anything is composed or any data looked at.
    """
    issues = Issues()
    try:
        return _plan(given, cwd, issues, to_launch, ())
    except ConfigError as error:  # what made going on impossible, behind what was found before
        issues.take(error.problems)
        raise ConfigError(issues.problems) from error


def _plan(given: list[str], cwd: Path, issues: Issues, to_launch: bool, above: tuple[str, ...]) -> Plan:
    with compose.conf() as loader:
        request = overrides.read(given, loader, issues)
        if to_launch and not issues.problems:
            disk.check_unlocked(study_folder(request, cwd))
        named = request.sweep
        sweep = sweepfile.without_file() if named is None else sweepfile.read(named, cwd, loader, issues)
        product = axes.factors(sweep.factors, request.axes, request.pins)
        starts = Starts(given, cwd, above if named is None else (*above, named))
        composer = Composer(sweep, issues, starts.of)
        cells = _cells(composer, sweep, request, product)
        resources = composer.compute(request)
    cache = Path(resources.cache_dir) if resources.cache_dir else tokens.existing_cache_dir()
    known = fingerprints((cell.config.data for cell in cells), cache, issues)
    issues.stop()
    every = planned(cells, request.seeds or sweep.seeds, known)
    trials = distinct(without_excluded(every, sweep.exclude, {*request.pins, *request.axes}, issues), issues)
    folder = study_folder(request, cwd)
    before = sweepfile.check_belongs(folder, sweep.name, known, issues)
    _check_engines([t.config for t in trials], issues)
    issues.stop()
    configs = [t.config for t in trials]
    _check_room(trials, resources, request, issues)
    varying = tuple(Axis(name, values) for name, values in axes.axis_values(product).items())
    supplies = {data: supply(data, fingerprint, cache) for data, fingerprint in known.items()}
    for caveat in estimate.caveats(configs, [axis.name for axis in varying], supplies):
        issues.warn(caveat)
    body = _body(sweep, request, varying, trials) | {"data": sweepfile.data_records(before, known)}
    body |= {"compute": dataclasses.asdict(resources), "command": given}
    stop = request.launch.stop or sweep.stop
    body |= {} if stop == STOPS[0] else {"stop": stop}
    _check_stop(stop, configs, issues)
    if before.get("stop") == HOPELESS != stop:
        issues.warn(f"sweep.stop: {stop} now, {HOPELESS} in the launch before: trials that it stopped go on")
    for change in sweepfile.record_changes(before, body):
        issues.warn(change)
    return Plan(
        request.study,
        folder,
        body["question"],
        varying,
        tuple(trials),
        sweepfile.record_text(body),
        resources,
        request.launch.launcher,
        tuple(issues.warnings),
        tuple(sweepfile.redact(given)),
        sweep.conditions,
        tuple(starts.plans.values()),
        stop,
        _start(request, body["choices"]) if request.sweep is None else None,
    )


def _start(request: Request, choices: Mapping[str, str]) -> str:
    presets = ", ".join(f"{group}={preset}" for group, preset in choices.items())
    hint = "" if request.launch.study else "; study=NAME names the study, so that values can be added later"
    return f"starts from {sweepfile.PRIMARY} alone ({presets}), not from a sweep{hint}"


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


def _question(sweep: SweepFile, varying: tuple[Axis, ...]) -> str:
    """The sweep's own question, unless the command line changed its axes: then one that names them."""
    names = [axis.name for axis in varying]
    own = {name for factor in sweep.factors for alternative in factor for name in alternative}
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


def _cells(composer: Composer, sweep: SweepFile, request: Request, product: list[Factor]) -> list[Cell]:
    """Every cell without a problem. Raises ConfigError at once for a product that is too large to look at."""
    seeds, issues = request.seeds or sweep.seeds, composer.issues
    if not axes.check_count(product, len(sweep.cases), len(seeds), request.launch.max_trials, issues):
        issues.stop()
    cells = []
    for case, chosen in axes.combinations(product, sweep.cases, request.pins):
        cell = composer.cell(chosen, case)
        if cell:
            cells.append(cell)
        elif len(issues.problems) >= ENOUGH:
            issues.stop()
    return cells


def _body(
    sweep: SweepFile, request: Request, varying: tuple[Axis, ...], trials: Sequence[PlannedTrial]
) -> dict[str, Any]:
    """The part of sweep.yaml on the question; `settings` are those that all trials share."""
    flats = [cfg.flat(t.config) for t in trials]
    fixed = {k: v for k, v in flats[0].items() if k != "seed" and all(f[k] == v for f in flats)}
    choices = {g: p for g, p in trials[0].choices.items() if all(t.choices[g] == p for t in trials)}
    return {
        "format": cfg.FORMAT_VERSION,
        "sweep": sweep.name,
        "question": _question(sweep, varying),
        "trials": len(trials),
        "seeds": list(dict.fromkeys(t.config.seed for t in trials)),
        "axes": {axis.name: list(axis.values) for axis in varying},
        "cases": {case: {n: c.value for n, c in chosen.items()} for case, chosen in sweep.cases.items()},
        "exclude": [expression.text for expression in sweep.exclude],
        **({} if sweep.conditions is None else {"conditions": list(sweep.conditions)}),
        "choices": choices,
        "settings": fixed,
        "launcher": request.launch.launcher,
    }
