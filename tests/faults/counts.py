"""How many injections each part makes: as the sample that CI runs (0: none, it takes minutes), and under `--full`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Count:
    """Injections of a part; `what` is its row in the table of the campaign."""

    sample: int
    full: int
    what: str


COUNTS = {
    "writer": Count(100, 1000, "SIGKILL of a process that writes live rows"),
    "state": Count(40, 400, "SIGKILL of a process that replaces state.json"),
    "checkpoint": Count(50, 500, "SIGKILL of a process that saves checkpoints"),
    "checkpoint damage": Count(50, 500, "bit flips, cuts and edits of the newest checkpoint"),
    "compaction": Count(20, 200, "SIGKILL at the end of a trial, while its records are compacted"),
    "trials": Count(6, 100, "SIGKILL of a process that trains the 24 trials of a study, one at a time"),
    "packs": Count(6, 100, "SIGKILL of a process that trains the same 24 trials in packs of 4"),
    "driver": Count(3, 40, "SIGKILL of a driver with launcher=local, anywhere from its plan to its report"),
    "driver of Ray": Count(1, 10, "SIGKILL of a driver with launcher=ray"),
    "process group": Count(0, 10, "SIGKILL of every process of a launch with launcher=ray at once"),
    "worker": Count(0, 10, "SIGKILL of a Ray worker that trains"),
    "raylet": Count(1, 10, "SIGKILL of the raylet"),
    "gcs": Count(0, 10, "SIGKILL of the GCS server"),
    "hang": Count(0, 20, "SIGSTOP of a Ray worker that trains"),
    "pause": Count(0, 20, "SIGSTOP of every process of a launch at once, for longer than its limit for a hang"),
    "launches": Count(8, 400, "launches of one study at once, 20 at a time under --full"),
    "report": Count(2, 60, "SIGKILL while tables and report are written"),
    "disk full": Count(8, 100, "ENOSPC, EIO or a short write in a trial, at a failpoint or by a limit on file sizes"),
    "overrides": Count(120, 7000, "fuzzed overrides of a sweep, planned"),
    "sweep files": Count(40, 3000, "fuzzed sweep files, planned"),
    "records": Count(100, 2000, "mutations of live and finished records"),
    "states and configs": Count(60, 1500, "mutations of state.json, config.json and summary.json"),
    "logs": Count(60, 1000, "mutations of logs of other trainers, ingested"),
}
