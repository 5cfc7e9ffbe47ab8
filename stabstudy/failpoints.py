"""Failpoints: the named places at which a test can inject a fault.

    STABSTUDY_FAILPOINT=checkpoint.tensors_synced:kill@3,state.written:enospc

Each part is POINT:ACTION, with @N for the N-th time that the point is reached (default 1), or @N+ for that and every
later time. Actions: kill (SIGKILL of this process), raise (FailpointError), enospc, eio (OSError), sleep or
sleep=SECONDS (default 60). The variable is read once, when the process starts. Unset, a point costs a look at a dict.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "STABSTUDY_FAILPOINT"

POINTS = {
    # the live records (D1)
    "live.write": "before a block of rows is written",
    "live.short_write": "half of a block is written",
    "live.truncate": "a write has failed, its torn block is not cut yet",
    "live.written": "a block is written, and not synced",
    "live.synced": "the rows so far are durable",
    # the end of a trial (D2), in this order; the folder is synced once for both records
    "finish.begun": "all rows are durable, nothing is compacted",
    "trace.written": "trace.parquet.tmp is written, and not synced",
    "trace.synced": "trace.parquet.tmp is durable",
    "trace.renamed": "trace.parquet has its name",
    "probes.written": "probes.parquet.tmp is written, and not synced",
    "probes.synced": "probes.parquet.tmp is durable",
    "probes.renamed": "probes.parquet has its name, which may not survive a power cut",
    "probes.folder_synced": "both names are durable",
    "summary.written": "summary.json has no name yet",
    "summary.renamed": "summary.json has its name",
    "finish.done": "state.json says done, the live records are still there",
    "finish.unlinked": "one live record is gone",
    "finish.checkpoints": "the live records are gone, the checkpoints are still there",
    "stop.judged": "the checkpoint of a trial that is ended early is durable, its state does not say so yet",
    # state.json, at its every change
    "state.written": "the new state.json is written, and not synced",
    "state.synced": "the new state.json is durable, and has no name yet",
    "state.renamed": "the new state.json has its name, which may not survive a power cut",
    "state.folder_synced": "the new state.json is durable",
    # checkpoints (D3), in this order
    "checkpoint.begun": "the rows are durable, an empty temporary folder is there",
    "checkpoint.tensors_written": "the tensors are written, and not synced",
    "checkpoint.tensors_synced": "the tensors are durable",
    "checkpoint.written": "the JSON is written, and not synced",
    "checkpoint.synced": "the JSON is durable",
    "checkpoint.renamed": "the JSON has its name",
    "checkpoint.folder_synced": "all in the temporary folder is durable",
    "checkpoint.named": "the checkpoint has its name, which may not survive a power cut",
    "checkpoint.durable": "the checkpoint is durable, older ones are still there",
    "checkpoint.removed": "one older checkpoint is gone",
    # a further attempt (D4), in this order
    "resume.swept": "temporary files of the attempt before are gone",
    "resume.chosen": "the checkpoint is chosen, no record is cut",
    "cut.truncate": "before a record is cut between two blocks",
    "cut.written": "a record cut within a block is written anew, and not synced",
    "cut.synced": "a record cut within a block is durable, and has no name yet",
    "cut.renamed": "a record cut within a block has its name, which may not survive a power cut",
    "cut.folder_synced": "a record cut within a block is durable",
    "resume.cut": "the trace is cut, the probes are not",
    "resume.ready": "both records are cut, the state does not say so yet",
    "resume.append": "before the first rows of this attempt are queued",
    # the files of a study: sweep.yaml, provenance.json, config.json
    "study.written": "such a file is written, and not synced",
    "study.synced": "such a file is durable, and has no name yet",
    "study.renamed": "such a file has its name, which may not survive a power cut",
    "study.folder_synced": "such a file is durable",
    # tables, the report, and what else is written whole
    "table.written": "a table of the study is written, and not synced",
    "table.renamed": "a table of the study has its name",
    "file.written": "any other file, as of the report, is written, and not synced",
    "file.synced": "any other file, as of the report, is durable, and has no name yet",
    "file.renamed": "any other file, as of the report, has its name, which may not survive a power cut",
    "file.folder_synced": "any other file, as of the report, is durable",
}
"""Name -> what is on disk when it is reached."""

_PREFIXES = {
    "trace.parquet": "trace",
    "probes.parquet": "probes",
    "trace.live": "cut",
    "probes.live": "cut",
    "summary.json": "summary",
    "state.json": "state",
} | dict.fromkeys(("sweep.yaml", "provenance.json", "config.json"), "study")
_PART = re.compile(
    r"(?P<point>[^:@]+):(?P<action>kill|raise|enospc|eio|sleep)"
    r"(=(?P<seconds>\d+(\.\d+)?))?(@(?P<at>[1-9]\d*)(?P<on>\+)?)?"
)


class FailpointError(Exception):
    """What the action `raise` raises."""


@dataclass(frozen=True)
class Fault:
    """What happens at a point, from the `at`-th time on that it is reached; once, or every time."""

    action: str
    at: int
    again: bool
    seconds: float


_armed: dict[str, Fault] = {}
_reached: Counter[str] = Counter()


def parse(text: str) -> dict[str, Fault]:
    """The faults that the variable's text names, by point. Raises ValueError, in one line."""
    faults = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"must be POINT:ACTION[@N[+]], ACTION kill, raise, enospc, eio or sleep, got {part!r}")
        if match["point"] not in POINTS:
            raise ValueError(f"{match['point']!r} is no failpoint; they are {', '.join(POINTS)}")
        at, seconds = int(match["at"] or 1), float(match["seconds"] or 60)
        faults[match["point"]] = Fault(match["action"], at, bool(match["on"]), seconds)
    return faults


def arm(text: str) -> None:
    """Let these faults happen from now on, in place of those before; "" for none. Raises ValueError."""
    faults = parse(text)
    _armed.clear()
    _reached.clear()
    _armed.update(faults)


def reached() -> dict[str, int]:
    """How often each armed point was reached since it was armed."""
    return dict(_reached)


def hit(point: str, first: Callable[[], object] | None = None) -> None:
    """This point is reached. `first` is done before a fault that ends what was going on, and never else."""
    if not _armed or point not in _armed:
        return
    fault = _armed[point]
    _reached[point] += 1
    if _reached[point] == fault.at or (fault.again and _reached[point] > fault.at):
        if first is not None and fault.action != "sleep":
            first()
        _act(fault, point)


def of_file(path: Path, step: str) -> None:
    """A file that is being replaced is `written`, `synced`, `renamed`, or its folder is `folder_synced`."""
    if _armed:
        hit(f"{prefix(path)}.{step}")


def prefix(path: Path) -> str:
    """The first part of the names of the points at which this file is replaced."""
    in_checkpoint = path.parent.name.startswith("step-")
    return "checkpoint" if in_checkpoint else _PREFIXES.get(path.name, "file")


def _act(fault: Fault, point: str) -> None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "sleep":
        time.sleep(fault.seconds)
        return
    if fault.action == "raise":
        raise FailpointError(f"failpoint {point}")
    number = errno.ENOSPC if fault.action == "enospc" else errno.EIO
    raise OSError(number, os.strerror(number), point)


try:
    arm(os.environ.get(VARIABLE, ""))
except ValueError as mistake:
    print(f"error: {VARIABLE}: {mistake}", file=sys.stderr)
    raise SystemExit(2) from None
