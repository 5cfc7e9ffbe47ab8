"""The worker in a pack's process: it trains the pack, reports a heartbeat, watches the stop file.

Everything that matters is written by the trials themselves into their folders; what is reported to Ray Tune only feeds
the live table.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stabstudy import store
from stabstudy.stability.rules import Rules

STOP_FILE = ".stop"
"""Exists in the study's folder while its launch is stopping: trials checkpoint and end, new ones do not begin."""

HEARTBEAT_SECONDS = 1.0


class PackFailed(Exception):
    """Some members ended in a status that a further attempt may mend, and the process had better not be used again."""


def train_pack(
    trial_ids: Sequence[str], shared: Mapping[str, Any], report: Callable[[dict[str, Any]], None] | None = None
) -> list[store.State]:
    """Train the trials in `shared["study"]` as one pack; returns their states.

    `shared` holds study, engine (Engine's fields) and rules (JSON) as text. `report` gets {"members": [the fields of
    training.loop.Progress, ...]} at most once a second. Raises PackFailed, after all members have ended, where one has
    failed: what a failure leaves in a process, a broken CUDA context for one, must not reach the next pack.
    """
    from stabstudy.training.pack import run_pack  # torch: only inside a trial
    from stabstudy.training.trial import Engine

    study = store.StudyFolder(Path(shared["study"]))
    folders = [study.trial(trial_id) for trial_id in trial_ids]
    stop = study.path / STOP_FILE
    if stop.exists():
        return [folder.read_state() for folder in folders]
    engine = Engine(**{**shared["engine"], "cache_dir": Path(shared["engine"]["cache_dir"])})
    last = [0.0]

    def heartbeat(members: Sequence[Any]) -> bool:
        now = time.monotonic()
        if now - last[0] < HEARTBEAT_SECONDS:
            return False
        last[0] = now
        if stop.exists():  # first: a report waits for a driver that may no longer be there
            return True
        if report is not None:
            report({"members": [dataclasses.asdict(member) for member in members]})
        return False

    states = run_pack(folders, engine, Rules.from_json(shared["rules"]), heartbeat)
    if failed := [state for state in states if state.status in ("failed", "disk_full")]:
        first = failed[0]
        reason = first.error["message"] if first.error else first.status
        raise PackFailed(f"{len(failed)} of {len(states)} trials failed, {first.trial_id}: {reason}")
    return states


def tune_pack(config: dict[str, Any]) -> None:
    """The function that Ray Tune runs: `config` is {"pack": trial ids, "shared": ...}."""
    from ray import tune

    train_pack(config["pack"], config["shared"], tune.report)
