"""The Plan of a launch: the trials of a command line and a sweep file, with every problem of them at once.

Nothing is started and nothing is written here, and neither torch nor ray is imported: `--dry-run` and every error in
a configuration answer from this module alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabstudy import config as cfg
from stabstudy import locks
from stabstudy.config import COMPILE_FROM, TrialConfig
from stabstudy.data import tokens
from stabstudy.data.batches import supply
from stabstudy.planning import arguments, caveats, cells, compose, compute, estimate, machine, packs, record, sweepfile
from stabstudy.planning.arguments import Request
from stabstudy.planning.axes import Alternatives
from stabstudy.planning.complete import Composed, Composer
from stabstudy.planning.compute import Compute
from stabstudy.planning.findings import Findings
from stabstudy.planning.sweepfile import SweepFile
from stabstudy.planning.trials import PlannedTrial, distinct, fingerprints, planned, without_excluded
from stabstudy.settings import ConfigError

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
    start: str | None = None  # what a launch without a sweep starts from, in words; None where a sweep is named

    def values(self, trial: PlannedTrial) -> list[Any]:
        """The trial's value on each axis, in the order of the axes."""
        known = {**cfg.flat(trial.config), **trial.choices}
        return [known[axis.name] for axis in self.axes]


def make_plan(given: list[str], cwd: Path, to_launch: bool = False) -> Plan:
    """The plan of `python -m stabstudy.sweep GIVEN...` (flags taken out) typed in folder `cwd`.

    Raises ConfigError with every problem of the launch: its settings, and the data that they name. `to_launch`: raises
    locks.LockHeldError where the study is being worked on, before anything is composed or any data looked at.
    """
    found = Findings()
    try:
        return _plan(given, cwd, found, to_launch)
    except ConfigError as error:  # what made going on impossible, behind what was found before
        found.take(error.problems)
        raise ConfigError(found.problems) from error


def _plan(given: list[str], cwd: Path, found: Findings, to_launch: bool) -> Plan:
    with compose.conf() as loader:
        request = arguments.read(given, loader, found)
        if to_launch and not found.problems:
            locks.check_free(study_folder(request, cwd))
        named = request.sweep
        sweep = sweepfile.without_file() if named is None else sweepfile.read(named, cwd, loader, found)
        product = cells.factors(sweep, request)
        composer = Composer(sweep, found)
        composed = _completed(composer, sweep, request, product)
        resources = composer.compute(request)
    cache = Path(resources.cache_dir) if resources.cache_dir else tokens.existing_cache_dir()
    known = fingerprints((c.config.data for c in composed), cache, found)
    found.stop()
    every = planned(composed, request.seeds or sweep.seeds, known)
    trials = distinct(without_excluded(every, sweep.exclude, {*request.pins, *request.axes}, found), found)
    folder = study_folder(request, cwd)
    before = record.belongs(folder, sweep.name, known, found)
    _check_engines([t.config for t in trials], found)
    found.stop()
    configs = [t.config for t in trials]
    _check_room(trials, resources, request, found)
    varying = tuple(Axis(name, values) for name, values in cells.axis_values(product).items())
    supplies = {data: supply(data, fingerprint, cache) for data, fingerprint in known.items()}
    for caveat in caveats.caveats(configs, [axis.name for axis in varying], supplies):
        found.warn(caveat)
    body = _body(sweep, request, varying, trials) | {"data": record.data_records(before, known)}
    body |= {"compute": dataclasses.asdict(resources), "command": given}
    for change in record.changes(before, body):
        found.warn(change)
    return Plan(
        request.study,
        folder,
        body["question"],
        varying,
        tuple(trials),
        record.text(body),
        resources,
        request.launch.launcher,
        tuple(found.warnings),
        tuple(record.redact(given)),
        sweep.conditions,
        _start(request, body["choices"]) if request.sweep is None else None,
    )


def _start(request: Request, choices: Mapping[str, str]) -> str:
    presets = ", ".join(f"{group}={preset}" for group, preset in choices.items())
    hint = "" if request.launch.study else "; study=NAME names the study, so that values can be added later"
    return f"starts from {sweepfile.PRIMARY} alone ({presets}), not from a sweep{hint}"


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


def _check_room(trials: Sequence[PlannedTrial], resources: Compute, request: Request, found: Findings) -> None:
    """Memory, by estimate: refuse what cannot fit unless forced, warn about what fits only in smaller numbers."""
    launcher = request.launch.launcher
    if not request.launch.force:
        found.take(estimate.too_large([t.config for t in trials], resources))
        found.stop()
    packed = [[t.config for t in pack] for pack in packs.packs(trials, resources, launcher)]
    for crowd in estimate.crowded(packed, resources, launcher):
        found.warn(crowd)
    for idle in compute.idle(resources, launcher):
        found.warn(idle)


def _check_engines(configs: list[TrialConfig], found: Findings) -> None:
    """`train.compile: auto` must decide alike for all trials: eager and compiled ones may not be compared."""
    chosen = {c.compiled for c in configs if c.train.compile == "auto"}
    if len(chosen) > 1:
        rule = f"auto compiles from {COMPILE_FROM} steps on, and cells on both sides cannot be compared: set on or off"
        found.refuse("train.compile, train.steps", rule)
    elif True in chosen and (missing := machine.why_not_compile()):
        found.warn(f"train.compile=auto: {missing}; every trial of this launch trains uncompiled")


def _completed(composer: Composer, sweep: SweepFile, request: Request, product: list[Alternatives]) -> list[Composed]:
    """Every cell without a problem. Raises ConfigError at once for a product that is too large to look at."""
    seeds, found = request.seeds or sweep.seeds, composer.found
    if not cells.check_count(product, len(sweep.cases), len(seeds), request.launch.max_trials, found):
        found.stop()
    composed = []
    for cell in cells.enumerate_cells(sweep, request, product):
        complete = composer.trial(cell)
        if complete:
            composed.append(complete)
        elif len(found.problems) >= ENOUGH:
            found.stop()
    return composed


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
