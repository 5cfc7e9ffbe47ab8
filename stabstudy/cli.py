"""Exit codes, arguments and output streams of all commands, and the console script `stabstudy`.

Whatever a command does is imported by it, late: this module answers `--help` without numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import stabstudy
from stabstudy.settings import ConfigError, Problem, line, nearest

OK, BUG, BAD_INPUT, PARTIAL, ENVIRONMENT, GATE_FAILED = range(6)
INTERRUPTED = 128 + signal.SIGINT
MAX_ERRORS = 20

EXIT_CODES = {
    OK: "done: every trial trained, every report written, every log taken",
    BAD_INPUT: "bad input, a line for each problem; nothing is started, nothing written",
    PARTIAL: "done in part: a trial failed or is damaged, none is done yet, a log cannot be used",
    ENVIRONMENT: "this machine cannot: a full disk, a held lock, no GPU, a dead Ray, a missing package",
    GATE_FAILED: "the gate failed: by report --fail-on the study is worse than its baseline",
    INTERRUPTED: "ended by Ctrl-C; the same command resumes",
    128 + signal.SIGTERM: "ended by SIGTERM; the same command resumes",
    128 + signal.SIGHUP: "ended by SIGHUP; the same command resumes",
    128 + signal.SIGUSR1: "ended by SIGUSR1, a batch system's warning; the same command resumes",
    BUG: "a bug of ours",
}
"""What each exit code of each command means, as their `--help` shows it."""

COMMANDS = {
    "sweep": "train a sweep of small models, or go on with it, and report it",
    "report": "write the report of a study; compare several",
    "ingest": "make a study out of the logs of other trainers",
    "export": "write the trials of a study to TensorBoard or W&B",
    "status": "progress of a study: its name or its folder",
}


SCHEMA = 1
"""Of the objects of `--json`; raised where a field goes, or changes its meaning."""

JSON_HELP = "one JSON object on standard output, all else on standard error: docs/json.md"

Answer = Mapping[str, Any]
Ending = tuple[int, Answer | None]
"""The exit code of a command, and its object with `--json`."""


class Version(argparse.Action):
    """The flag `--version`; argparse's own looks the version up on every start, which takes a tenth of a second."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"stabstudy {stabstudy.__version__}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser of one command's arguments: every problem is a ConfigError, a misspelt flag with the nearest names."""

    def __init__(self, command: str, description: str, usage: str | None = None, epilog: str = ""):
        table = "\n".join(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())
        super().__init__(
            prog=command,
            usage=usage,
            description=description if "\n" in description else textwrap.fill(description, 100),
            epilog=f"{epilog}exit codes:\n{table}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action=Version, nargs=0, help="show the version and exit")

    def error(self, message: str) -> NoReturn:
        name, _, rule = message.removeprefix("argument ").partition(": ")
        raise ConfigError(Problem(name, rule))

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments, flags before, between and behind the others. Raises ConfigError."""
        options, rest = self.parse_known_intermixed_args(list(argv))
        self.refuse_flags(rest)
        return options

    def parse_flags(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and all that is none, in order. Raises ConfigError."""
        options, rest = self.parse_known_args(list(argv))
        self.refuse_flags(rest)
        return options, rest

    def refuse_flags(self, arguments: Sequence[str]) -> None:
        """Raises ConfigError with a problem for each argument that looks like a flag."""
        known = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        problems = [Problem(a, f"is not a flag{nearest(a, known)}") for a in arguments if a.startswith("-")]
        if problems:
            raise ConfigError(problems)


class Nowhere(io.TextIOBase):
    """A stream that drops what is written."""

    def write(self, text: str) -> int:
        return len(text)


class Outlet:
    """A text stream that drops what is written once nobody takes it any more; else the stream's own."""

    def __init__(self, stream: TextIO | None):
        self._stream: TextIO | Nowhere = Nowhere() if stream is None else stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:  # a closed pipe, a full disk, a terminal that has gone
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _let_go(self) -> None:
        """Point the stream's descriptor at nothing: what is buffered, now and at exit, goes there."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def outlets() -> Iterator[None]:
    """Standard output and error as Outlets: neither `... | head`, a full disk nor a closed stream ends a study."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed (`>&-`): else the next file that is opened would be written by every print
            os.open(os.devnull, os.O_RDWR)
    out, err = Outlet(sys.stdout), Outlet(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()


def run(command: Callable[[], int], kind: str) -> int:
    """The exit code of a command. `kind` heads the lines on arguments that cannot be read: `error: KIND: ...`."""
    with outlets():
        return _ended(lambda: (command(), None), kind)[0]


def reply(command: Callable[[], Ending], kind: str, given: Collection[str]) -> int:
    """As `run`, of a command that has an answer for `--json`: then standard output holds that object and no more."""
    if "--json" not in given or {"-h", "--help", "--version"} & set(given):
        return run(lambda: command()[0], kind)
    with outlets():
        with _nothing_printed():
            code, result = _ended(command, kind)
        if result is not None:
            print(json.dumps(_strict(result), allow_nan=False))
        return code


def _ended(command: Callable[[], Ending], kind: str) -> Ending:
    try:
        return command()
    except ConfigError as error:
        return fail(kind, BAD_INPUT, *map(str, error.problems)), failure(kind, BAD_INPUT, error.problems)
    except SystemExit as end:  # argparse's way out of --help and --version
        return int(end.code or OK), None
    except KeyboardInterrupt:
        return INTERRUPTED, failure("interrupted", INTERRUPTED, [Problem("", "ended by Ctrl-C")])


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    """Standard error takes what is printed to standard output, by processes that are started as well."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def answer(kind: str, fields: Mapping[str, Any]) -> Answer:
    """The object of `--json` with these fields: docs/json.md."""
    return {"schema": SCHEMA, "kind": kind, **fields}


def failure(kind: str, code: int, problems: Sequence[Problem]) -> Answer:
    """The object of a command that ends with errors; a problem of no setting has an empty one."""
    rows = [{"kind": kind, "setting": p.setting or None, "rule": p.rule, "got": p.got or None} for p in problems]
    return answer("error", {"error": rows, "exit_code": code})


def _strict(value: Any) -> Any:
    """The value as strict JSON has it: numbers that are not finite as text, as state.json has them."""
    from stabstudy.state import encode_float

    if isinstance(value, Mapping):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # a file's name may hold half a surrogate pair
    return encode_float(value) if isinstance(value, float) else value


def fail(kind: str, code: int, *messages: str) -> int:
    """Print each error on a line of its own, `error: KIND: ...`, at most MAX_ERRORS of them; returns the code."""
    for message in messages[:MAX_ERRORS]:
        print(f"error: {kind}: {line(message)}", file=sys.stderr)
    if len(messages) > MAX_ERRORS:
        print(f"error: and {len(messages) - MAX_ERRORS} more", file=sys.stderr)
    return code


def say(text: str) -> None:
    """Print a line at once, fit for a terminal whatever file names are in it."""
    print(line(text), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: `stabstudy sweep|report|ingest|export|status ...`. Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    command, rest = (given[0], given[1:]) if given else ("", [])
    if command not in COMMANDS:
        return run(lambda: _usage(given), "stabstudy")
    if command == "status":
        return run(lambda: _status(rest), "status")
    # within run(): a Ctrl-C may come while numpy is imported
    return run(lambda: int(importlib.import_module(f"stabstudy.{command}").main(rest)), command)


def _status(given: Sequence[str]) -> int:
    """The progress of the study that is named."""
    words: list[str] = []

    def read() -> Ending:
        words.extend(_status_words(given))
        return OK, None

    code = reply(read, "status", given)
    return int(importlib.import_module("stabstudy.sweep").main(words)) if words else code


def _status_words(given: Sequence[str]) -> list[str]:
    """What it is for `sweep`. Raises ConfigError where several studies are named, SystemExit for `--help`."""
    usage = "stabstudy status [--debug] [--json] [NAME | FOLDER | OVERRIDE ...]"
    parser = Parser("stabstudy status", COMMANDS["status"], usage)
    parser.add_argument("--debug", action="store_true", help="tracebacks behind one-line errors")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    flags, rest = parser.parse_flags(given)
    if len(names := [a for a in rest if "=" not in a]) > 1:
        raise ConfigError(Problem("study", "give one name or folder", ", ".join(names)))
    kept = ["--debug"] * flags.debug + ["--json"] * flags.json
    return ["--status", *kept, *(word for a in rest for word in _study(a))]


def _usage(given: Sequence[str]) -> int:
    """Answers what names no command. Raises ConfigError, or SystemExit for `--help` and `--version`."""
    summary = "\n".join(f"  {name:<8}{purpose}" for name, purpose in COMMANDS.items())
    parser = Parser(
        "stabstudy",
        "Which training recipes are stable, how spiky each is, and why.",
        "stabstudy COMMAND ...",
        f"commands (each has its own --help):\n{summary}\n\n",
    )
    _, rest = parser.parse_flags(["--help"] if given[:1] in ([], ["help"]) else given[:1])
    near = nearest(rest[0], [*COMMANDS])
    rule = f"must be one of {', '.join(COMMANDS)}{near if 'did you mean' in near else ''}"
    raise ConfigError(Problem("command", rule, rest[0]))


def _study(argument: str) -> list[str]:
    """The overrides that name a study given as its name or its folder; any other argument as it is."""
    if "=" in argument:
        return [argument]
    if os.sep not in argument and argument not in (".", "..") and not _is_beside(argument):
        return [f"study='{argument}'"]
    folder = Path(os.path.abspath(argument))
    return [f"study='{folder.name}'", f"results_dir='{folder.parent}'"]


def _is_beside(name: str) -> bool:
    """Whether the name is that of a folder here, and of none in results/."""
    return not os.path.exists(Path("results", name)) and os.path.isdir(Path(name, "trials"))


if __name__ == "__main__":
    # not main() of this file: run by -m it is `__main__`, and what it imports would see a second copy of it
    from stabstudy.cli import main as imported_main

    raise SystemExit(imported_main())
