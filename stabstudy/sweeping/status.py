"""`--status`: how far a study is, from its files alone, while it runs, after it, or from another shell."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from stabstudy import store, trace
from stabstudy.store import State, TrialFolder
from stabstudy.sweeping import words

TAIL = 64 * 1024
"""Bytes at the end of a live trace in which its last whole line lies."""


def show(folder: Path) -> None:
    """Print the study's trials and counts. Raises StoreError where the folder is no study."""
    study = store.open_study(folder)
    trials = study.trials()
    states = [_state(trial) for trial in trials]
    if trials:
        axes = _axes(study)
        rows = [_row(trial, state, axes) for trial, state in zip(trials, states, strict=True)]
        words.table(("trial", "settings", "status", "step", "verdict", "spikes"), rows)
    print(summary(study, states))


def summary(study: store.StudyFolder, states: list[State]) -> str:
    """'depth_lr: 24 trials: 20 done (18 stable, 2 spiky), 4 running; launched now by pid 7 ...'."""
    counts = Counter(state.status for state in states)
    verdicts = Counter(state.verdict or "not judged" for state in states if state.status == "done")
    parts = []
    for status in store.STATUSES:
        if counts[status]:
            judged = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items())) if status == "done" else ""
            parts.append(f"{counts[status]} {status}" + (f" ({judged})" if judged else ""))
    live = "a launch is at work" if store.is_locked(study.path) else "no launch is at work"
    return f"{study.name}: {words.count(len(states), 'trial')}: {', '.join(parts) or 'none begun'}; {live}"


def _state(trial: TrialFolder) -> State:
    """The trial's state; one that cannot be read counts as failed, with the reason."""
    try:
        return trial.read_state()
    except store.StoreError as error:
        return State(trial.trial_id, status="failed", error={"kind": "StoreError", "message": str(error)})


def _axes(study: store.StudyFolder) -> list[str]:
    """The names of what varies, as the last launch said."""
    try:
        return list(store.read_json(study.provenance_file).get("axes", {}))
    except store.StoreError:
        return []


def _row(trial: TrialFolder, state: State, axes: list[str]) -> list[str]:
    try:
        described = trial.read_config()
    except store.StoreError:
        described = {}
    config = described.get("config", {})
    reached = state.step
    if state.status in ("running", "lost"):
        reached = max(reached, _live_steps(trial))
    steps = f"{reached}/{config.get('train', {}).get('steps', '?')}"
    verdict = state.verdict or (state.error or {}).get("message", "")
    spikes = "" if state.spike_events is None else str(state.spike_events)
    return [trial.trial_id, _settings(described, config, axes), state.status, steps, str(verdict), spikes]


def _settings(described: dict[str, Any], config: dict[str, Any], axes: list[str]) -> str:
    """'depth=4 lr=0.01 clip=off seed=1'."""
    shown = []
    for name in axes:
        group, _, key = name.partition(".")
        value = config.get(group, {}).get(key) if key else described.get("choices", {}).get(group)
        text = "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        shown.append(f"{key or group}={text}")
    return " ".join([*shown, f"seed={config.get('seed', '?')}"])


def _live_steps(trial: TrialFolder) -> int:
    """Steps in the live trace, from its last whole line; 0 where there is none."""
    try:
        with trial.live(trace.TRACE).open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - TAIL))
            lines = f.read().split(b"\n")
        last: Any = json.loads(lines[-2]) if len(lines) > 1 else {}
    except (OSError, ValueError):
        return 0
    step = last.get("step") if isinstance(last, dict) else None
    return step + 1 if type(step) is int else 0
