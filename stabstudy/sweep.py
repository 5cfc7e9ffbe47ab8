"""The command `python -m stabstudy.sweep`: it plans a sweep and trains what is not done.

Exit codes: 0 all trials done; 2 bad input, nothing started; 3 some trials failed; 4 this machine cannot (disk, lock,
GPU, Ray, versions); 128 + signal when stopped, resumable; 1 a bug of ours. Everything is imported late: `--help` and
every error in a configuration answer without torch and ray.
"""

from __future__ import annotations

import errno
import shlex
import sys
import textwrap
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stabstudy.planning.plan import Plan

FLAGS = ("--help", "-h", "--version", "--list", "--dry-run", "--status", "--debug")
MAX_ERRORS = 20

HELP = """\
Which training recipes are stable, how spiky each is, and why: trains a sweep of small models.

  python -m stabstudy.sweep                     the quickstart sweep: real text, CPU, about two minutes
  python -m stabstudy.sweep sweep=depth_lr      the sweep in sweeps/depth_lr.yaml; again: resume it
  python -m stabstudy.sweep sweep=depth_lr optim.lr=1e-4,1e-3 'model.depth=range(2,11,4)' seeds=5
  python -m stabstudy.sweep optim.lr=1e-4,1e-3  a question of your own: conf/trial.yaml with these alone

  --list       every sweep with its question    --dry-run   trials to do, time, disk; starts nothing
  --status     progress of a study              --debug     tracebacks behind one-line errors
  --help       this text                        --version

Everything else is an override in Hydra's grammar. Several values (a=1,2  range()  choice()  glob()
or 'a={log:[1e-4,1e-2],num:5}') make an axis or replace it; one value pins the setting, also in cases.

  sweep=NAME           which question; ./sweeps comes before the shipped ones. Without it: quickstart,
                       or, where a setting is given, conf/trial.yaml alone with three seeds
  study=NAME           folder of the results below results_dir (default: the sweep's name, or adhoc-...)
  results_dir=DIR      default results
  seeds=5              or seeds=[0,7]
  launcher=ray|local   local: in this process, one pack after another
  max_trials=10000     larger products are refused
  force=true           launch although the memory estimate refuses it
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command with these arguments (default: the command line's). Returns the exit code."""
    from stabstudy.outlet import outlets

    given = sys.argv[1:] if arguments is None else arguments
    flags = [a for a in given if a.startswith("-") and a not in ("-m", "--multirun")]
    overrides = [a for a in given if a not in flags]
    with outlets():
        try:
            return _run(flags, overrides)
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            if "--debug" in flags:
                traceback.print_exc()
            return _explain(error, shlex.join(["python", "-m", "stabstudy.sweep", *given]))


def _run(flags: list[str], overrides: list[str]) -> int:
    from stabstudy import extras
    from stabstudy.planning import machine

    if reason := machine.why_not_python():
        raise machine.NotReadyError(reason)
    if unknown := [flag for flag in flags if flag not in FLAGS]:
        raise _no_flags(unknown)
    if "--help" in flags or "-h" in flags:
        return _help()
    if "--version" in flags:
        print(f"stabstudy {extras.installed('stabstudy')}")
        return 0
    if "--list" in flags:
        return _list()
    if "--status" in flags:
        return _status(overrides)
    return _sweep(overrides, dry_run="--dry-run" in flags)


def _sweep(overrides: list[str], dry_run: bool) -> int:
    from stabstudy import settings
    from stabstudy.planning import plan, preview

    made = plan.make_plan(overrides, Path.cwd(), not dry_run)
    if made.start:
        print(f"{made.study} {made.start}")
    for warning in made.warnings:
        print(f"warning: {settings.line(warning)}", file=sys.stderr)
    if dry_run:
        preview.show(made)
        return 0
    preview.check_machine(made)
    return _train(made, overrides)


def _train(made: Plan, overrides: list[str]) -> int:
    from stabstudy.report import write_report
    from stabstudy.sweeping import launch

    outcome = launch.launch(made, command=shlex.join(["python", "-m", "stabstudy.sweep", *overrides]))
    if not outcome.early:
        write_report(made.folder, print)
    return outcome.code


def _help() -> int:
    from stabstudy.planning import places

    print(HELP)
    folder = places.conf_folder()
    for group in sorted(p for p in folder.iterdir() if p.is_dir()):
        presets = " | ".join(sorted(p.stem for p in group.glob("*.yaml")))
        print(textwrap.fill(presets, 100, initial_indent=f"  {group.name}=", subsequent_indent=" " * 10))
    print(f"\nEvery setting with its default: {folder}")
    return 0


def _list() -> int:
    from stabstudy.planning import places, words

    words.table(("sweep", "question"), [(s.name, s.question) for s in places.sweeps(Path.cwd())])
    return 0


def _status(overrides: list[str]) -> int:
    from stabstudy.planning import arguments, compose, findings, plan
    from stabstudy.sweeping import progress

    found = findings.Findings()
    with compose.conf() as loader:  # glob() needs the presets, and is part of a name such as adhoc-0123abcd
        request = arguments.read(overrides, loader, found)
    found.stop()
    progress.show_status(plan.study_folder(request, Path.cwd()))
    return 0


def _no_flags(unknown: list[str]) -> Exception:
    from stabstudy.settings import ConfigError, Problem, nearest

    return ConfigError([Problem(flag, f"is not a flag{nearest(flag, list(FLAGS))}") for flag in unknown])


def _explain(error: Exception, command: str) -> int:
    """Print one line for each thing that is wrong; return the exit code of its kind."""
    from stabstudy import disk, settings
    from stabstudy.disk import EntryError
    from stabstudy.locks import LockHeldError
    from stabstudy.planning.machine import NotReadyError
    from stabstudy.settings import ConfigError, DataError
    from stabstudy.store import StoreError

    if isinstance(error, ConfigError):
        lines, code = [f"conf: {problem}" for problem in error.problems], 2
    elif isinstance(error, DataError | StoreError):
        lines, code = [f"{'data' if isinstance(error, DataError) else 'study'}: {error}"], 2
    elif isinstance(error, NotReadyError | LockHeldError | EntryError):
        lines, code = [f"machine: {line}" for line in str(error).splitlines()], 4
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "stabstudy").startswith("stabstudy"):
        lines, code = [f"machine: needs {error.name}, not installed here: pip install 'stabstudy[all]'"], 4
    elif isinstance(error, OSError) and (disk.is_full(error) or error.errno in (errno.EROFS, errno.EACCES)):
        lines, code = [f"machine: {disk.describe(error)}"], 4
    else:
        lines, code = [f"internal: {type(error).__name__}: {error} (a bug; --debug shows where)"], 1
    for line in lines[:MAX_ERRORS]:
        print(f"error: {settings.line(line)}", file=sys.stderr)
    if len(lines) > MAX_ERRORS:
        print(f"error: and {len(lines) - MAX_ERRORS} more", file=sys.stderr)
    if disk.is_full(error):
        print(f"stopped; the same command resumes: {command}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # not main() of this file: run by -m it is `__main__`, and what it imports would see a second copy of it
    from stabstudy.sweep import main as imported_main

    raise SystemExit(imported_main())
