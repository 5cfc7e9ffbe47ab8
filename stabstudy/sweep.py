"""The command `python -m stabstudy.sweep`: it plans a sweep and trains what is not done.

Everything is imported late: `--help` and every error in a configuration answer without torch and ray.
"""

from __future__ import annotations

import argparse
import errno
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stabstudy import api, cli

if TYPE_CHECKING:
    from stabstudy.planning.plan import Plan
    from stabstudy.settings import Problem
    from stabstudy.sweeping.launch import Outcome

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
'a={between:[1e-4,1]}' searches the largest value that is stable, in place of an axis.
'optim.warmup_steps=${train.steps}' follows another setting, in each cell by itself.

  sweep=NAME           which question; ./sweeps comes before the shipped ones. Without it: quickstart,
                       or, where a setting is given, conf/trial.yaml alone with three seeds
  study=NAME           folder of the results below results_dir (default: the sweep's name, or adhoc-...)
  results_dir=DIR      default results
  seeds=5              or seeds=[0,7]
  launcher=ray|local   local: in this process, one pack after another
  stop=hopeless        end trials early that have hardly a chance to end near the best; default diverged
  max_trials=10000     larger products are refused, and a search ends there
  force=true           launch although the memory estimate refuses it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the command line's). Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return cli.reply(lambda: _answer(given), "conf", given)


def _answer(given: list[str]) -> cli.Ending:
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
    parser.add_argument("--json", action="store_true", help=cli.JSON_HELP)
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


def _run(flags: argparse.Namespace, overrides: list[str]) -> cli.Ending:
    from stabstudy.planning import compute

    if reason := compute.why_not_python():
        raise compute.NotReadyError(reason)
    if flags.list:
        return _list(flags.json)
    if flags.status:
        return _status(overrides, flags.json)
    return _sweep(overrides, flags.dry_run, flags.json)


def _sweep(overrides: list[str], dry_run: bool, as_json: bool) -> cli.Ending:
    from stabstudy import settings

    plan = api.planned(overrides, Path.cwd(), not dry_run)
    if plan.start:
        print(f"{plan.study} {plan.start}")
    for warning in plan.warnings:
        print(f"warning: {settings.line(warning)}", file=sys.stderr)
    if dry_run:
        return _dry_run(plan, as_json)
    outcome, written = api.trained(plan, _print)
    if outcome.reason is not None:
        cli.fail("study" if outcome.code == cli.PARTIAL else "machine", outcome.code, outcome.reason)
    if outcome.early and outcome.code != cli.PARTIAL:
        print(_resume(overrides), file=sys.stderr, flush=True)
    return outcome.code, _ending(plan, outcome, overrides, written) if as_json else None


def _dry_run(plan: Plan, as_json: bool) -> cli.Ending:
    from stabstudy.planning import preview

    seen = preview.look(plan)
    if as_json:
        from stabstudy.sweeping import objects

        return cli.OK, objects.plan(seen)
    preview.show(seen)
    return cli.OK, None


def _ending(plan: Plan, outcome: Outcome, overrides: Sequence[str], written: api.Reported | None) -> cli.Answer:
    """The end of a launch as an object."""
    from stabstudy.sweeping import objects, progress
    from stabstudy.wording import command

    page, answer = (None, None) if written is None else written[1:]
    return objects.launch(progress.standing(plan.folder), outcome, command(overrides), page, answer)


def _print(text: str) -> None:
    """A line at once, so that those of standard error stand where they belong in a log of both."""
    print(text, flush=True)


def _resume(overrides: Sequence[str]) -> str:
    from stabstudy.wording import command

    return f"stopped; the same command resumes: {command(overrides)}"


def _list(as_json: bool) -> cli.Ending:
    from stabstudy import wording
    from stabstudy.planning import compose

    places = compose.sweeps(Path.cwd())
    if as_json:
        from stabstudy.sweeping import objects

        return cli.OK, objects.sweeps(places)
    wording.table(("sweep", "question"), [(place.name, place.question) for place in places])
    return cli.OK, None


def _status(overrides: list[str], as_json: bool) -> cli.Ending:
    from stabstudy.planning import compose, plan
    from stabstudy.planning.overrides import read
    from stabstudy.settings import Issues
    from stabstudy.sweeping import objects, progress

    issues = Issues()
    with compose.conf() as loader:  # glob() needs the presets, and is part of a name such as adhoc-0123abcd
        request = read(overrides, loader, issues)
    issues.stop()
    now = progress.standing(plan.study_folder(request, Path.cwd()))
    if as_json:
        return cli.OK, objects.status(now)
    progress.show_status(now)
    return cli.OK, None


def _explain(error: Exception, given: Sequence[str]) -> cli.Ending:
    """Print one line for each thing that is wrong; return the exit code of its kind, and all of it as an object."""
    from stabstudy import disk

    kind, code, problems = _reasons(error)
    cli.fail(kind, code, *(str(p) if p.setting else p.rule for p in problems))
    if disk.is_full(error):
        print(_resume(given), file=sys.stderr)
    return code, cli.failure(kind, code, problems)


def _reasons(error: Exception) -> tuple[str, int, list[Problem]]:
    """The kind of an error, its exit code, and everything that is wrong."""
    from stabstudy import disk
    from stabstudy.disk import EntryError, LockHeldError
    from stabstudy.planning.compute import NotReadyError
    from stabstudy.settings import ConfigError, DataError, Problem
    from stabstudy.store import StoreError

    def of(kind: str, code: int, *rules: str) -> tuple[str, int, list[Problem]]:
        return kind, code, [Problem("", rule) for rule in rules]

    if isinstance(error, ConfigError):
        return "conf", cli.BAD_INPUT, error.problems
    if isinstance(error, DataError):
        return "data", cli.BAD_INPUT, [error.problem]
    if isinstance(error, StoreError):
        return of("study", cli.BAD_INPUT, str(error))
    if isinstance(error, NotReadyError | LockHeldError | EntryError):
        return of("machine", cli.ENVIRONMENT, *str(error).splitlines())
    if isinstance(error, ModuleNotFoundError) and not (error.name or "stabstudy").startswith("stabstudy"):
        return of(
            "machine",
            cli.ENVIRONMENT,
            f"needs {error.name}, not installed here: pip install 'stabstudy[all]'",
        )
    if isinstance(error, OSError) and (disk.is_full(error) or error.errno in (errno.EROFS, errno.EACCES)):
        return of("machine", cli.ENVIRONMENT, disk.describe(error))
    return of("internal", cli.BUG, f"{type(error).__name__}: {error} (a bug; --debug shows where)")


if __name__ == "__main__":
    # not main() of this file: run by -m it is `__main__`, and what it imports would see a second copy of it
    from stabstudy.sweep import main as imported_main

    raise SystemExit(imported_main())
