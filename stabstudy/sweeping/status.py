"""Progress of a study (`--status`), from its files alone: while it runs, after it, or from another shell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabstudy import entries, live, locks, store, trace
from stabstudy.config import CURRENT_NAMES
from stabstudy.planning import words
from stabstudy.settings import renamed, renamed_below
from stabstudy.store import State, TrialFolder

UNKNOWN = "?"


@dataclass(frozen=True)
class Listed:
    """A trial on disk: its state, and its settings in config.json ({} where that cannot be read)."""

    folder: TrialFolder
    state: State
    settings: dict[str, Any]
    choices: dict[str, Any]

    def values(self, axes: Sequence[str]) -> list[Any]:
        """Its value on each axis, and its seed."""
        groups = [_at(self.settings if "." in name else self.choices, name) for name in axes]
        return [*groups, _at(self.settings, "seed")]


def show(folder: Path) -> None:
    """Print the study's trials, in the order of their values, and counts. Raises StoreError for what is not a study."""
    study = store.open_study(folder)
    axes = _axes(study)
    listed = sorted(map(_found, study.trials()), key=lambda trial: [_rank(v) for v in trial.values(axes)])
    if listed:
        rows = [_row(trial, axes) for trial in listed]
        words.table(("trial", "settings", "status", "step", "verdict", "spikes"), rows)
    print(summary(study, [trial.state for trial in listed]))


def summary(study: store.StudyFolder, states: Sequence[State]) -> str:
    """'depth_lr: 24 trials: 20 done (18 stable, 2 spiky), 4 running; a launch is running'."""
    counts = Counter(state.status for state in states)
    verdicts = Counter(words.judged(state) for state in states if state.status == "done")
    judged = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
    parts = [f"{counts[s]} {s}" + (f" ({judged})" if s == "done" else "") for s in store.STATUSES if counts[s]]
    launch = "a launch is running" if locks.is_locked(study.path) else "no launch is running"
    return f"{study.name}: {words.count(len(states), 'trial')}: {', '.join(parts) or 'none begun'}; {launch}"


def _axes(study: store.StudyFolder) -> list[str]:
    """The names of the axes of the last launch."""
    try:
        axes = store.read_sealed(study.provenance_file).get("axes")
    except store.StoreError:
        return []
    return list(renamed(axes, CURRENT_NAMES)) if isinstance(axes, dict) else []


def _found(folder: TrialFolder) -> Listed:
    """The trial; one whose state cannot be read counts as failed, with the reason."""
    try:
        if wrong := entries.of_trial(folder.path, links=True):
            raise store.StoreError(wrong)
        state = folder.read_state()
    except store.StoreError as error:
        state = State(folder.trial_id, status="failed", error={"kind": "StoreError", "message": str(error)})
    try:
        said = folder.read_config()
    except store.StoreError:
        said = {}
    settings, choices = said.get("config"), said.get("choices")
    return Listed(
        folder,
        state,
        renamed_below(settings, CURRENT_NAMES) if isinstance(settings, dict) else {},
        choices if isinstance(choices, dict) else {},
    )


def _row(trial: Listed, axes: Sequence[str]) -> list[str]:
    state = trial.state
    shown = [f"{n.rpartition('.')[2]}={_text(v)}" for n, v in zip((*axes, "seed"), trial.values(axes), strict=True)]
    reached = max(state.step, _live_steps(trial.folder)) if state.status in ("running", "lost") else state.step
    verdict = words.judged(state) if state.status == "done" else str((state.error or {}).get("message", ""))
    spikes = "" if state.spike_events is None else str(state.spike_events)
    steps = f"{reached}/{_text(_at(trial.settings, 'train.steps'))}"
    return [trial.folder.trial_id, " ".join(shown), state.status, steps, verdict, spikes]


def _at(nested: Any, dotted: str) -> Any:
    """The value under the dotted name, UNKNOWN where there is none."""
    for key in dotted.split("."):
        nested = nested.get(key, UNKNOWN) if isinstance(nested, dict) else UNKNOWN
    return nested


def _rank(value: Any) -> tuple[int, float, str]:
    """Sorts numbers by size before text, and null last."""
    number = isinstance(value, int | float)
    return (0 if number else 2 if value is None else 1, float(value) if number else 0.0, str(value))


def _text(value: Any) -> str:
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _live_steps(trial: TrialFolder) -> int:
    """Steps in the live trace, from its last whole row; 0 where there is none or it cannot be read."""
    try:
        return live.last_step(trial.live(trace.TRACE)) + 1
    except (OSError, trace.DamagedRecord):
        return 0
