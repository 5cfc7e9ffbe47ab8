"""Launches from the question to the report: what the command and Python share, and the functions of Python.

Everything is imported late: a call whose settings are wrong is answered without torch and ray.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from stabstudy.analysis.study import Study
    from stabstudy.planning.plan import Ask, Plan
    from stabstudy.store import StudyFolder
    from stabstudy.sweeping.launch import Outcome

NAMED = 5
"""Trials that a warning names before the rest is counted."""


def planned(asked: Sequence[str] | Ask, cwd: Path, to_launch: bool) -> Plan:
    """The plan of a launch, with the first trials of its search. Raises as `planning.plan.make_plan`."""
    from stabstudy.planning.plan import make_plan
    from stabstudy.search import strategy

    return strategy.begun(make_plan(asked, cwd, to_launch))


Reported = tuple["Study", Path, dict[str, Any]]
"""The study as its report was written, the report's page, and what it answers first as data."""


def trained(plan: Plan, say: Callable[[str], None], console: Console | None = None) -> tuple[Outcome, Reported | None]:
    """Train what is not done of the plan, and write the report; unless that ended early, which is counted alone.

    `say` gets one line at a time, `console` shows the progress (None: on standard output; one that is quiet: nothing
    is). Raises NotReadyError for a machine that cannot start it, and as `sweeping.launch.launch` and
    `report.write_report`.
    """
    from stabstudy import report
    from stabstudy.planning import preview
    from stabstudy.store import StoreError, open_study
    from stabstudy.sweeping import launch, progress

    preview.check_machine(plan)
    outcome = launch.launch(plan, say, console)
    if outcome.early:
        with contextlib.suppress(StoreError):  # a sweep from whose end it would start has failed: there is none
            say(progress.tally(progress.standing(plan.folder)))
        return outcome, None
    show = None if console is not None and console.quiet else say
    if show is not None:
        show("writing the report")
    return outcome, report.write(open_study(plan.folder), say, show=show)


def run(
    sweep: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    study: str | None = None,
    results_dir: str | os.PathLike[str] | None = None,
    launcher: str | None = None,
    compute: str | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Study:
    """Train a sweep, or go on with it, and write its report, as `python -m stabstudy.sweep` does in this folder.

        study = stabstudy.run("depth_lr", {"optim.lr": [1e-3, 3e-3], "model.depth": 4}, seeds=3)

    `overrides`: values by the names of settings, groups and keys of a launch (`budget.hours`, `force`). A list, tuple,
    range or array makes an axis, `{"log": [1e-4, 1e-2], "num": 5}` one that is evenly spaced, `{"between": [1e-4, 1]}`
    a search of the largest value that is stable; any other value pins. `compute`: settings of where trials run, such as
    `{"gpus_per_pack": 1}`, or a preset such as `"cpu"`. `progress`: whether anything is printed.

    Returns the study. The same call again resumes it; other values are added to it. An interrupt lets running trials
    write a checkpoint and raises KeyboardInterrupt; trials that failed are named by a warning.

    Raises settings.ConfigError with every problem of what was asked, store.StoreError for a study that cannot be
    written to, planning.compute.NotReadyError where this machine cannot train, disk.LockHeldError where the study is
    being worked on.
    """
    from stabstudy.analysis.study import Study
    from stabstudy.store import StudyFolder

    say: Callable[[str], None] = functools.partial(print, flush=True) if progress else _nothing
    plan = planned(_asked(sweep, overrides, seeds, study, results_dir, launcher, compute), Path.cwd(), True)
    if plan.start:
        say(f"{plan.study} {plan.start}")
    for warning in plan.warnings:
        warnings.warn(warning, stacklevel=2)
    outcome, written = trained(plan, say, None if progress else _silence())
    if outcome.early:
        _end(plan, outcome, say)
    if outcome.left:
        warnings.warn(_failures(StudyFolder(plan.folder), outcome.left), stacklevel=2)
    return Study.load(plan.folder) if written is None else written[0]


def plan(
    sweep: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    study: str | None = None,
    results_dir: str | os.PathLike[str] | None = None,
    launcher: str | None = None,
    compute: str | Mapping[str, Any] | None = None,
) -> Plan:
    """What `run` would train, given the same; starts nothing and writes nothing. Raises settings.ConfigError."""
    return planned(_asked(sweep, overrides, seeds, study, results_dir, launcher, compute), Path.cwd(), False)


def _asked(
    sweep: str | None,
    overrides: Mapping[str, Any] | None,
    seeds: int | Sequence[int] | None,
    study: str | None,
    results_dir: str | os.PathLike[str] | None,
    launcher: str | None,
    compute: str | Mapping[str, Any] | None,
) -> Ask:
    """The request of these arguments. Raises ConfigError for what two of them give, TypeError for no mapping."""
    from stabstudy.planning import values
    from stabstudy.settings import ConfigError, Problem

    named = {"sweep": sweep, "seeds": seeds, "study": study, "results_dir": results_dir, "launcher": launcher}
    arguments = {name: value for name, value in named.items() if value is not None}
    if isinstance(compute, str):
        arguments["compute"] = compute
    else:
        arguments |= {f"compute.{name}": value for name, value in (compute or {}).items()}
    if not isinstance(overrides, Mapping | None):
        raise TypeError(f"overrides must be a mapping from names to values, got {overrides!r}")
    if twice := sorted(arguments.keys() & (overrides or {}).keys()):
        raise ConfigError([Problem(name, "is given twice: as an argument and in the overrides") for name in twice])
    return functools.partial(values.request, {**arguments, **(overrides or {})})


def _end(plan: Plan, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Raise what a launch that ended early raises: after a signal that signal again, as its former handler takes it."""
    from stabstudy import cli
    from stabstudy.planning.compute import NotReadyError
    from stabstudy.store import StoreError
    from stabstudy.wording import command

    if outcome.code == cli.PARTIAL:
        raise StoreError(outcome.reason)
    say(f"stopped; the same call resumes, and so does: {command(plan.argv)}")
    if outcome.signal is None:
        raise NotReadyError(outcome.reason)
    signal.raise_signal(outcome.signal)
    raise KeyboardInterrupt


def _failures(study: StudyFolder, ids: Sequence[str]) -> str:
    """A line on trials that have not ended, with the reason of each of the first."""
    reasons = [f"{trial_id} {_reason(study, trial_id)}" for trial_id in ids[:NAMED]]
    more = [f"and {len(ids) - NAMED} more"] if len(ids) > NAMED else []
    return f"{study.name}: not trained to the end: {'; '.join([*reasons, *more])}"


def _reason(study: StudyFolder, trial_id: str) -> str:
    """'failed: CUDA out of memory'."""
    from stabstudy.store import StoreError

    try:
        state = study.trial(trial_id).read_state()
    except StoreError as error:
        return f"damaged: {error}"
    return f"{state.status}: {state.error['message']}" if state.error else state.status


def _silence() -> Console:
    """A console that shows nothing, anywhere."""
    from rich.console import Console

    return Console(quiet=True, force_jupyter=False, force_terminal=False)


def _nothing(line: str) -> None:
    """No lines without progress."""
