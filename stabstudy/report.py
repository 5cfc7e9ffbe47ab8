"""The command `python -m stabstudy.report results/NAME [results/OTHER ...] [--out DIR]`: it writes reports.

With `--baseline OLD --fail-on worse|rough` it is a gate for CI too: the report of NAME, and exit code 5 where it fails.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabstudy import cli, disk, wording
from stabstudy.progress_line import ProgressLine
from stabstudy.settings import ConfigError, Problem
from stabstudy.store import NewerFormatError, StoreError, StudyFolder, open_study, read_sealed

if TYPE_CHECKING:
    from stabstudy.analysis.report.gate import Gate
    from stabstudy.analysis.report.watched import Mark
    from stabstudy.analysis.study import Study

ELSEWHERE = "--out DIR writes the report elsewhere, and nothing into the study"

LEAST_SECONDS, SECONDS, MOST_SECONDS = 1, 30, 86_400
WATCH_RULE = f"must be a number of seconds in [{LEAST_SECONDS}, {MOST_SECONDS}]"

Say = Callable[[str], None]


def write_report(folder: Path, say: Say, out: Path | None = None) -> Path:
    """Bring the study's tables up to date and write its report; returns the path of the page.

    `say` gets one line at a time. `out` takes the place of the study's own report/, and of the study for its tables:
    then nothing is written into the study. Raises StoreError where there is no study, OSError where nothing can be
    written.
    """
    return write(open_study(folder), say, out)[1]


def answer(study: Study) -> dict[str, Any]:
    """What the report of this study answers first, as data: see `analysis.answer`."""
    from stabstudy.analysis import answer

    return answer.answer(study)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the command line's). Returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    return cli.run(lambda: _run(_parser().parse(given)), "report")


def _run(args: argparse.Namespace) -> int:
    try:
        folders = [_opened(path) for path in args.study]
        names = [path.resolve().name for path in args.study]  # "." has no name of its own
        if len(set(names)) < len(names):
            raise StoreError(f"two of the studies have the same name: {', '.join(names)}")
        if "\0" in str(args.out):
            raise StoreError(f"--out {args.out}: must not contain a NUL")
        if args.watch is not None:
            _check_watch(args)
    except StoreError as error:
        return cli.fail("report", cli.BAD_INPUT, str(error))
    code, pages = cli.OK, []
    try:
        if args.watch is not None:
            return _watch(folders[0], args.watch, args.out)
        gate = None if args.baseline is None and args.fail_on is None else _gate(args)  # refuses before all is written
        for folder, name in zip(folders, names, strict=True):
            out = args.out / name if args.out is not None and len(folders) > 1 else args.out
            _check_writable(folder, out)
            study, page, _ = write(folder, cli.say, out, cli.say)
            pages.append(page)
            code = max(code, _judge(study))
        if len(folders) > 1:
            together = folders[0].report / f"with-{'-'.join(names[1:])}" if args.out is None else args.out
            _compare(folders, pages, together)
    except StoreError as error:
        return cli.fail("report", cli.BAD_INPUT, str(error))
    except OSError as error:
        refused = args.out is None and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        return cli.fail("report", cli.ENVIRONMENT, f"{disk.describe(error)}{'; ' + ELSEWHERE if refused else ''}")
    return code if gate is None else _conclude(gate, code)


def _check_watch(args: argparse.Namespace) -> None:
    """Raises ConfigError for what cannot be watched."""
    if not (math.isfinite(args.watch) and LEAST_SECONDS <= args.watch <= MOST_SECONDS):
        raise ConfigError(Problem("--watch", WATCH_RULE, f"{args.watch:g}"))
    if args.baseline is not None or args.fail_on is not None:
        raise ConfigError(Problem("--watch", "does not go with --baseline and --fail-on"))
    if len(args.study) > 1:
        raise ConfigError(Problem("--watch", "watches one study", ", ".join(map(str, args.study))))


def _watch(folder: StudyFolder, seconds: float, out: Path | None) -> int:
    """Write the report again and again until the study is over."""
    from stabstudy.analysis.report import watched

    _check_writable(folder, out)
    page = (folder.report if out is None else out) / "index.html"
    codes: list[int] = []

    def write_marked(mark: watched.Mark | None) -> None:
        study, *_ = write(folder, _nothing if mark else cli.say, out, None if mark else cli.say, mark)
        codes.append(_judge(study))

    cli.say(f"report: {page} (written again every {seconds:g} s where a trial has changed; Ctrl-C ends that)")
    watched.watch(folder, page, seconds, write_marked, cli.say)
    return codes[-1]


def _nothing(line: str) -> None:
    """No lines for a report that is soon written again."""


def _seconds(text: str) -> float:
    """Raises ArgumentTypeError for what is no number, such as a study behind --watch."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{WATCH_RULE} (name the study before it), got {text}") from None


def _gate(args: argparse.Namespace) -> Gate:
    """The answer of the gate. Raises ConfigError where there is nothing to compare, StoreError for no study."""
    if args.baseline is None or args.fail_on is None:
        missing = ("--fail-on", "needs --baseline OLD") if args.baseline is None else ("--baseline", "needs --fail-on")
        raise ConfigError(Problem(*missing))
    if len(args.study) > 1:
        raise ConfigError(Problem("--baseline", "is compared with one study", ", ".join(map(str, args.study))))
    new, old = _opened(args.study[0]), _opened(args.baseline)
    if new.path.resolve() == old.path.resolve():
        raise ConfigError(Problem("--baseline", "must be another study", str(args.baseline)))
    from stabstudy.analysis.compare import Refused
    from stabstudy.analysis.report.gate import judge
    from stabstudy.analysis.study import Study

    try:
        return judge(Study(new), Study(old), args.fail_on)
    except Refused as refused:
        raise ConfigError(Problem("--baseline", str(refused))) from refused


def _conclude(gate: Gate, code: int) -> int:
    """Print what the gate answers, its conclusion last; returns the exit code."""
    for text in (*gate.lines, gate.conclusion):
        cli.say(text)
    return max(code, cli.PARTIAL if gate.unfinished else cli.OK) if gate.passed else cli.GATE_FAILED


def _opened(path: Path) -> StudyFolder:
    """The study. Raises StoreError where there is none, or a newer version wrote it."""
    folder = open_study(path)
    try:
        read_sealed(folder.provenance_file)
    except NewerFormatError:
        raise
    except StoreError:
        return folder
    return folder


def _check_writable(folder: StudyFolder, out: Path | None) -> None:
    """Raises OSError, before anything is read, where the report would go into a study that cannot be written."""
    if out is None and not os.access(folder.path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder.path))


def write(
    folder: StudyFolder,
    say: Say,
    out: Path | None = None,
    show: Say | None = None,
    mark: Mark | None = None,
) -> tuple[Study, Path, dict[str, Any]]:
    """As `write_report`; the study as it was read, its page and its `answer`, of which the last lines before it are.

    `show` takes the lines that say how far it is, off a terminal, where there is time for them; None: nothing does.
    `mark`: of a page that will be written again.
    """
    # here and not above: --help and a misspelt path must not wait for pandas and matplotlib
    from stabstudy.analysis import closing

    with ProgressLine("report", show) as progress:
        study, page = _published(folder, progress, out, mark)
        progress("its first answers")
        answers = answer(study)
        lines = [*_counted(study), *closing.lines(study, answers), f"report: {page}"]
    for text in lines:
        say(text)
    return study, page, answers


def _published(folder: StudyFolder, progress: ProgressLine, out: Path | None, mark: Mark | None) -> tuple[Study, Path]:
    progress(f"reading {wording.count(len(folder.trials()), 'trial')}")
    from stabstudy.analysis import forecasts
    from stabstudy.analysis.report.publish import publish
    from stabstudy.analysis.report.study_page import report
    from stabstudy.analysis.study import update_tables

    study = update_tables(folder, out)
    progress("statistics and figures")
    content = report(study)
    if out is None and study.searched is not None:
        forecasts.register(folder, study.searched)
    progress("pages of trials")
    place = folder.report if out is None else out
    disk.check_report_folder(place)
    place.mkdir(parents=True, exist_ok=True)
    with disk.turn(place):  # the launch writes its report at its end, perhaps beside one that watches it
        return study, publish(study, content, place, progress, mark or str)


def _counted(study: Study) -> Iterator[str]:
    """How many trials have which outcome, and what is damaged."""
    yield f"{study.name}: {wording.count(sum(study.outcomes.values()), 'trial')}"
    yield from (f"{number:6} {outcome}" for outcome, number in study.outcomes.items() if number)
    for damaged in study.damaged:
        yield f"damaged, left out: {damaged.trial_id}: {damaged.reason}"
    if not study.provenance and study.folder.provenance_file.exists():
        yield "not shown, damaged: provenance.json"


def _compare(folders: Sequence[StudyFolder], pages: Sequence[Path], out: Path) -> None:
    """The report on several studies, in `out`; `pages` are those of each."""
    from stabstudy.analysis.report import comparison_page
    from stabstudy.analysis.report.publish import publish
    from stabstudy.analysis.study import Study

    studies = [Study(folder) for folder in folders]
    ways = [urllib.parse.quote(os.path.relpath(page, out)) for page in pages]
    page = publish(Study.concat(studies), comparison_page.report(studies, ways), out)
    cli.say(f"comparison: {page}")


def _judge(study: Study) -> int:
    done = bool((study.trials["state"] == "done").any())
    return cli.OK if done and not study.damaged else cli.PARTIAL


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "python -m stabstudy.report",
        "Write report/index.html, a page per trial, report.md, figures, tables; compare several studies.",
    )
    parser.add_argument("study", type=Path, nargs="+", help="a study's folder, such as results/quickstart")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="write report and tables here, and nothing into the study, which may be read-only "
        "(several studies: theirs into DIR/<study>)",
    )
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=SECONDS,
        help=f"write the report again whenever a trial has changed, while a launch trains the study (default every "
        f"{SECONDS} s); its page reloads itself meanwhile",
    )
    parser.add_argument(
        "--baseline", metavar="OLD", type=Path, help="hold the study against this one, of which nothing is written"
    )
    parser.add_argument(
        "--fail-on",
        choices=("worse", "rough"),
        help="exit with 5 where it is worse than its baseline by any claim, or where a trial is spiky, rough or "
        "diverged in a cell that is stable in the baseline",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
