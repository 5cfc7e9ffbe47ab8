"""The worker in a trial's process: it trains one pack (one trial), reports a heartbeat, watches the stop file.

Everything that matters is written by the trial itself into its folder; what is reported to Ray Tune only feeds the
live table.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stabstudy import store
from stabstudy.stability.rules import Rules

STOP_FILE = ".stop"
"""Exists in the study's folder while its launch is stopping: trials checkpoint and end, new ones do not begin."""

HEARTBEAT_SECONDS = 1.0


class TrialFailed(Exception):
    """An attempt ended in a status that a further attempt may mend."""


def train_pack(
    trial_id: str, shared: Mapping[str, Any], report: Callable[[dict[str, Any]], None] | None = None
) -> store.State:
    """Train the trial in `shared["study"]`. `shared` holds study, engine (Engine's fields) and rules (JSON) as text.

    Raises TrialFailed for a failed attempt, so that the scheduler may start another. A trial without memory is not
    tried again in the same launch: it would only fail again.
    """
    from stabstudy.training.trial import Engine, run_trial  # torch: only inside a trial

    study = store.StudyFolder(Path(shared["study"]))
    folder = study.trial(trial_id)
    stop = study.path / STOP_FILE
    if stop.exists():
        return folder.read_state()
    engine = Engine(**{**shared["engine"], "cache_dir": Path(shared["engine"]["cache_dir"])})
    last = [0.0]

    def heartbeat(progress: Any) -> bool:
        now = time.monotonic()
        if now - last[0] < HEARTBEAT_SECONDS:
            return False
        last[0] = now
        if report is not None:
            report({**dataclasses.asdict(progress), "pid": os.getpid()})
        return stop.exists()

    state = run_trial(folder, engine, Rules.from_json(shared["rules"]), heartbeat)
    if state.status in ("failed", "disk_full"):
        raise TrialFailed(f"{trial_id}: {state.error['message'] if state.error else state.status}")
    return state


def tune_trial(config: dict[str, Any]) -> None:
    """The function that Ray Tune runs: `config` is {"pack": trial id, "shared": ...}."""
    from ray import tune

    train_pack(config["pack"], config["shared"], tune.report)
