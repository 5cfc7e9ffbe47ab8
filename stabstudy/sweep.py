"""The command `python -m stabstudy.sweep`: it plans a sweep and trains what is not done.

Everything is imported late: `--help` and every error in a configuration answer without torch and ray.
"""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

from stabstudy import api, cli

EXAMPLES = """\
Which training recipes are stable, how spiky each is, and why: trains a sweep of small models.

  python -m stabstudy.sweep                     the quickstart sweep: real text, CPU, about two minutes
  python -m stabstudy.sweep sweep=depth_lr      the sweep in sweeps/depth_lr.yaml; again: resume it
  python -m stabstudy.sweep sweep=depth_lr optim.lr=1e-4,1e-3 'model.depth=range(2,11,4)' seeds=5
  python -m stabstudy.sweep optim.lr=1e-4,1e-3  a question of your own: conf/trial.yaml with these alone
"""

OVERRIDES = """\
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the command line's). Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return cli.run(lambda: _answer(given), "conf")


def _answer(given: list[str]) -> int:
    flags, overrides = _parser().parse_flags(given)
    try:
        return _run(flags, overrides)
    except Exception as error:
        if flags.debug:
            traceback.print_exc()
        return _explain(error, given)


def _parser() -> cli.Parser:
    usage = "python -m stabstudy.sweep [FLAG ...] [OVERRIDE ...]"
    parser = cli.Parser("python -m stabstudy.sweep", EXAMPLES, usage, f"{OVERRIDES}\n{_presets()}\n\n")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="every sweep with its question")
    instead.add_argument("--dry-run", action="store_true", help="trials to do, time, disk; starts nothing")
    instead.add_argument("--status", action="store_true", help="progress of a study")
    parser.add_argument("--debug", action="store_true", help="tracebacks behind one-line errors")
    parser.add_argument("-m", "--multirun", action="store_true", help=argparse.SUPPRESS)  # every sweep is one
    return parser


def _presets() -> str:
    """Every group of conf/ with its presets, and where the settings stand."""
    from stabstudy.planning import compose

    folder = compose.conf_folder()
    lines = []
    for group in sorted(p for p in folder.iterdir() if p.is_dir()):
        presets = " | ".join(sorted(p.stem for p in group.glob("*.yaml")))
        lines.append(textwrap.fill(presets, 100, initial_indent=f"  {group.name}=", subsequent_indent=" " * 10))
    return "\n".join([*lines, "", f"Every setting with its default: {folder}"])


def _run(flags: argparse.Namespace, overrides: list[str]) -> int:
    from stabstudy.planning import compute

    if reason := compute.why_not_python():
        raise compute.NotReadyError(reason)
    if flags.list:
        return _list()
    if flags.status:
        return _status(overrides)
    return _sweep(overrides, flags.dry_run)


def _sweep(overrides: list[str], dry_run: bool) -> int:
    from stabstudy import settings
    from stabstudy.planning import preview

    plan = api.planned(overrides, Path.cwd(), not dry_run)
    if plan.start:
        print(f"{plan.study} {plan.start}")
    for warning in plan.warnings:
        print(f"warning: {settings.line(warning)}", file=sys.stderr)
    if dry_run:
        preview.show(plan)
        return cli.OK
    outcome = api.trained(plan, print)
    if outcome.reason is not None:
        cli.fail("study" if outcome.code == cli.PARTIAL else "machine", outcome.code, outcome.reason)
    if outcome.early and outcome.code != cli.PARTIAL:
        print(_resume(overrides), file=sys.stderr, flush=True)
    return outcome.code


def _resume(overrides: Sequence[str]) -> str:
    return f"stopped; the same command resumes: {shlex.join(['python', '-m', 'stabstudy.sweep', *overrides])}"


def _list() -> int:
    from stabstudy import wording
    from stabstudy.planning import compose

    wording.table(("sweep", "question"), [(s.name, s.question) for s in compose.sweeps(Path.cwd())])
    return cli.OK


def _status(overrides: list[str]) -> int:
    from stabstudy.planning import compose, plan
    from stabstudy.planning.overrides import read
    from stabstudy.settings import Issues
    from stabstudy.sweeping import progress

    issues = Issues()
    with compose.conf() as loader:  # glob() needs the presets, and is part of a name such as adhoc-0123abcd
        request = read(overrides, loader, issues)
    issues.stop()
    progress.show_status(plan.study_folder(request, Path.cwd()))
    return cli.OK


def _explain(error: Exception, given: Sequence[str]) -> int:
    """Print one line for each thing that is wrong; return the exit code of its kind."""
    from stabstudy import disk
    from stabstudy.disk import EntryError, LockHeldError
    from stabstudy.planning.compute import NotReadyError
    from stabstudy.settings import ConfigError, DataError
    from stabstudy.store import StoreError

    if isinstance(error, ConfigError):
        code = cli.fail("conf", cli.BAD_INPUT, *map(str, error.problems))
    elif isinstance(error, DataError | StoreError):
        code = cli.fail("data" if isinstance(error, DataError) else "study", cli.BAD_INPUT, str(error))
    elif isinstance(error, NotReadyError | LockHeldError | EntryError):
        code = cli.fail("machine", cli.ENVIRONMENT, *str(error).splitlines())
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "stabstudy").startswith("stabstudy"):
        rule = f"needs {error.name}, not installed here: pip install 'stabstudy[all]'"
        code = cli.fail("machine", cli.ENVIRONMENT, rule)
    elif isinstance(error, OSError) and (disk.is_full(error) or error.errno in (errno.EROFS, errno.EACCES)):
        code = cli.fail("machine", cli.ENVIRONMENT, disk.describe(error))
    else:
        code = cli.fail("internal", cli.BUG, f"{type(error).__name__}: {error} (a bug; --debug shows where)")
    if disk.is_full(error):
        print(_resume(given), file=sys.stderr)
    return code


if __name__ == "__main__":
    # not main() of this file: run by -m it is `__main__`, and what it imports would see a second copy of it
    from stabstudy.sweep import main as imported_main

    raise SystemExit(imported_main())
