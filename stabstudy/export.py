"""The command `python -m stabstudy.export results/NAME --to tensorboard|wandb`: trials for the user's own tracker."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stabstudy import cli, disk, extras, wording
from stabstudy.settings import ConfigError, Problem, nearest
from stabstudy.store import StoreError, StudyFolder, check_name, open_study

if TYPE_CHECKING:
    from stabstudy.exporting.exporter import Exporter, Tracker

TRACKERS = ("tensorboard", "wandb")
LEAST_SECONDS, SECONDS, MOST_SECONDS = 1, 5, 86_400
FOLLOW_RULE = f"must be a number of seconds in [{LEAST_SECONDS}, {MOST_SECONDS}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the command line's). Returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    return cli.run(lambda: _run(_parser().parse(given)), "export")


def _run(args: argparse.Namespace) -> int:
    try:
        study = open_study(args.study)
        wanted = _wanted(study, args.trials)
    except StoreError as error:
        return cli.fail("export", cli.BAD_INPUT, str(error))
    out = _out(args, study)
    if reasons := extras.why_not([args.to]):
        return cli.fail("export", cli.ENVIRONMENT, *reasons)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with disk.lock(out):
            return _export(args, study, out, wanted)
    except StoreError as error:  # a state of an export that is not ours
        return cli.fail("export", cli.BAD_INPUT, str(error))
    except disk.LockHeldError as error:
        return cli.fail("export", cli.ENVIRONMENT, str(error))
    except OSError as error:
        return cli.fail("export", cli.ENVIRONMENT, disk.describe(error))


def _export(args: argparse.Namespace, study: StudyFolder, out: Path, wanted: list[str] | None) -> int:
    from stabstudy.exporting.exporter import Exporter

    tracker = _tracker(args, study, out)
    exporter = Exporter(study, tracker, wanted)
    cli.say(f"export: {tracker.hint()}")
    try:
        if args.follow is None:
            exporter.once()
        else:
            exporter.follow(args.follow, cli.say)
    finally:
        tracker.close()
    return _conclude(exporter, args)


def _conclude(exporter: Exporter, args: argparse.Namespace) -> int:
    """Say what was written and what could not be; returns the exit code."""
    trials = exporter.study.trials()
    kept = len(trials) if args.trials is None else len(args.trials)
    name, steps = exporter.study.path.resolve().name, wording.count(exporter.steps, "new step", ",")
    cli.say(f"{name}: {steps} of {len(exporter.trials)} of {wording.count(kept, 'trial')}")
    for reason in exporter.damaged.values():
        cli.say(f"damaged, left out: {reason}")
    return cli.PARTIAL if exporter.damaged or not trials else cli.OK


def _tracker(args: argparse.Namespace, study: StudyFolder, out: Path) -> Tracker:
    name = study.path.resolve().name
    if args.to == "tensorboard":
        from stabstudy.exporting.event_files import EventFiles

        return EventFiles(out)
    from stabstudy.exporting.wandb_runs import WandbRuns

    return WandbRuns(out, name, args.project or "stabstudy")


def _out(args: argparse.Namespace, study: StudyFolder) -> Path:
    """Where it goes. Raises ConfigError for a folder in the study, and for words that do not go together."""
    problems = []
    out: Path = Path("runs", study.path.resolve().name) if args.out is None else args.out
    if "\0" in str(out):
        problems.append(Problem("--out", "must not contain a NUL"))
    elif out.resolve().is_relative_to(study.path.resolve()):
        problems.append(Problem("--out", "must lie outside of the study, of which nothing is written", str(out)))
    if args.follow is not None and not (math.isfinite(args.follow) and LEAST_SECONDS <= args.follow <= MOST_SECONDS):
        problems.append(Problem("--follow", FOLLOW_RULE, f"{args.follow:g}"))
    if args.project is not None:
        if args.to != "wandb":
            problems.append(Problem("--project", "goes with --to wandb"))
        elif rule := check_name(args.project):
            problems.append(Problem("--project", rule, args.project))
    if problems:
        raise ConfigError(problems)
    return out


def _wanted(study: StudyFolder, beginnings: list[str] | None) -> list[str] | None:
    """The ids that begin so, one for each; None: all trials. Raises StoreError for none, and for several."""
    if beginnings is None:
        return None
    known = [trial.trial_id for trial in study.trials()]
    wanted = []
    for beginning in beginnings:
        matches = [trial_id for trial_id in known if trial_id.startswith(beginning)]
        if len(matches) != 1:
            rule = (
                f"fits {len(matches)} trials" if matches else f"is no trial of {study.path}{nearest(beginning, known)}"
            )
            raise StoreError(f"--trials {beginning}: {rule}")
        wanted += matches
    return wanted


def _seconds(text: str) -> float:
    """Raises ArgumentTypeError for what is no number, such as a study behind --follow."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{FOLLOW_RULE} (name the study before it), got {text}") from None


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "python -m stabstudy.export",
        "Write each trial's steps, settings and verdict to TensorBoard or W&B; again: what is new since. Docs: "
        "docs/exporting.md.",
    )
    parser.add_argument(
        "study", type=Path, help="a study's folder, such as results/quickstart; nothing of it is written"
    )
    parser.add_argument("--to", required=True, choices=TRACKERS, help="the tracker")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where its files go (default runs/<study>)")
    parser.add_argument("--project", metavar="NAME", help="of W&B (default stabstudy)")
    parser.add_argument(
        "--follow",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=SECONDS,
        help=f"go on while a launch trains the study, every so many seconds (default {SECONDS})",
    )
    parser.add_argument("--trials", metavar="ID", nargs="+", help="these trials alone; an id may be shortened")
    return parser


if __name__ == "__main__":
    sys.exit(main())
