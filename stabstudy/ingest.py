"""The command `python -m stabstudy.ingest PATH ... --study NAME`: it makes a study of the logs of other trainers.

No byte of a source is changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabstudy import cli

if TYPE_CHECKING:
    from collections import Counter

    from stabstudy.ingesting.runs import Run
    from stabstudy.ingesting.search import Source

MOST_SHOWN = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the command line's). Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return cli.run(lambda: _run(_parser().parse(given), given), "ingest")


def _run(args: argparse.Namespace, given: Sequence[str]) -> int:
    from stabstudy import disk
    from stabstudy.disk import LockHeldError
    from stabstudy.ingesting import choice, runs
    from stabstudy.store import StoreError
    from stabstudy.wording import command

    folder = args.results_dir.expanduser() / args.study
    try:
        columns, settings = choice.parse_columns(args.columns), choice.parse_settings(args.set)
        study = runs.open_study(folder, args.study)
    except (StoreError, ValueError) as error:
        return cli.fail("ingest", cli.BAD_INPUT, str(error))
    usable, code = _read(args.path, columns, settings, args.allow_loss)
    if not usable:
        return cli.fail("ingest", code, "no log could be used, nothing was written")
    try:
        outcomes = runs.write_study(study, usable, ["python", "-m", "stabstudy.ingest", *given])
    except (OSError, LockHeldError) as error:
        return cli.fail("ingest", cli.ENVIRONMENT, disk.describe(error) if isinstance(error, OSError) else str(error))
    except StoreError as error:
        return cli.fail("ingest", cli.BAD_INPUT, str(error))
    _say_meanings(usable)
    cli.say(f"{_counted(outcomes)} in {folder}; next: {command([str(folder)], 'stabstudy.report')}")
    return cli.PARTIAL if code else cli.OK


def _read(
    paths: Sequence[Path], columns: Mapping[str, str], settings: Mapping[str, Any], allow_loss: bool
) -> tuple[list[Run], int]:
    """Every usable run, each printed in one line, and the exit code for the others (0: there are none)."""
    from stabstudy.ingesting import runs
    from stabstudy.ingesting.points import LogError
    from stabstudy.ingesting.readers import ReaderMissingError

    usable: dict[str, Run] = {}
    sources, codes = _search(paths, columns)
    for source in sources:
        try:
            for run in runs.read(source, columns, settings, allow_loss):
                if (twin := usable.setdefault(run.trial_id, run)) is not run:
                    cli.say(f"{run.path}: the same rows as {twin.path}, taken once")
        except ReaderMissingError as error:
            codes.add(cli.fail("ingest", cli.ENVIRONMENT, f"{source.files[0]}: {error}"))
        except (LogError, OSError) as error:
            codes.add(cli.fail("ingest", cli.BAD_INPUT, f"{source.files[0]}: {_reason(error)}"))
    named = runs.named(list(usable.values()))
    for run in named[:MOST_SHOWN]:
        _say_run(run)
    if len(named) > MOST_SHOWN:
        cli.say(f"and {len(named) - MOST_SHOWN} more runs")
    return named, min(codes, default=0)


def _search(paths: Sequence[Path], columns: Mapping[str, str]) -> tuple[list[Source], set[int]]:
    """What the paths hold, tables that were passed over printed in a line each, and the exit codes of bad paths."""
    from stabstudy.ingesting.points import LogError
    from stabstudy.ingesting.search import MOST_SHOWN as MOST_PASSED
    from stabstudy.ingesting.search import join_charts, search

    sources: dict[Source, None] = {}
    passed_over: list[str] = []
    codes: set[int] = set()
    for path in paths:
        try:
            there = search(path, columns)
        except (LogError, OSError) as error:
            codes.add(cli.fail("ingest", cli.BAD_INPUT, f"{path}: {_reason(error)}"))
        else:
            sources |= dict.fromkeys(there.sources)
            passed_over += there.passed_over
    for line in passed_over[:MOST_PASSED]:
        cli.say(line)
    if len(passed_over) > MOST_PASSED:
        cli.say(f"and {len(passed_over) - MOST_PASSED} more tables were passed over")
    return join_charts(sources, columns), codes


def _say_run(run: Run) -> None:
    """One line for the run, and one for each thing that a reader of its numbers must know."""
    from stabstudy.external import FORMATS

    log, grid = run.log, run.grid
    every = "every step" if log.stride == 1 else f"every {log.stride} steps"
    every += " (approximate)" if run.approximate else ""
    norms = f"{run.count('grad_norm')} gradient norms" if run.count("grad_norm") else "no gradient norm"
    left_out = [f"{what}: {n}" for what, n in log.left_out.items()]
    left_out += [f"rows missing: {grid.missing}"] if grid.missing else []
    cli.say(
        f"{log.run}: {FORMATS[log.format].name}, {len(grid.points) - grid.missing} rows {every}, steps "
        f"{run.first_step} to {run.last_step}, {norms}, {run.count('loss')} losses"
        + (f"; left out: {', '.join(left_out)}" if left_out else "")
    )
    for note in log.notes:
        cli.say(f"  {note}")
    if not run.count("grad_norm"):
        cli.say("  without a gradient norm only the loss is judged: whether it diverged")
    elif log.after_clipping:
        cli.say("  gradient norms after clipping do not show spikes: only the loss is judged, whether it diverged")


def _say_meanings(runs: Sequence[Run]) -> None:
    from stabstudy.external import FORMATS

    for key in dict.fromkeys(run.log.format for run in runs):
        cli.say(f"{FORMATS[key].name}: {FORMATS[key].meaning}.")


def _counted(outcomes: Counter[str]) -> str:
    total = sum(outcomes.values())
    parts = ", ".join(f"{outcomes[kind]} {kind}" for kind in ("new", "grown", "changed", "unchanged") if outcomes[kind])
    return f"{total} trial{'' if total == 1 else 's'} ({parts})"


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "python -m stabstudy.ingest",
        "Make a study out of training logs: Hugging Face trainer_state.json, LLaMA-Factory "
        "trainer_log.jsonl, Lingua metrics.jsonl, CSV, JSON lines, Parquet, TensorBoard event files, text logs.",
    )
    parser.add_argument("path", type=Path, nargs="+", help="a log, or a folder that is searched for logs")
    parser.add_argument("--study", metavar="NAME", required=True, help="the study; runs are added to an existing one")
    parser.add_argument("--results-dir", metavar="DIR", type=Path, default=Path("results"), help="default: results")
    parser.add_argument(
        "--columns",
        metavar="step=iter,loss=train_loss",
        help="which columns are step, loss, grad_norm and lr; also as JSON, which takes any name: "
        """'{"grad_norm": "a,b - train/grad_norm"}'""",
    )
    parser.add_argument(
        "--allow-loss", action="store_true", help="take a log of which more than one row in a hundred is lost"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="optim.clip=1.0", help="a setting that the logs lack"
    )
    return parser


if __name__ == "__main__":
    # not main() of this file: run by -m it is `__main__`, and what it imports would see a second copy of it
    from stabstudy.ingest import main as imported_main

    sys.exit(imported_main())
