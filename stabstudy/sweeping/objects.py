"""The JSON objects that `--json` writes: a plan, the list of sweeps, a status, the end of a launch (docs/json.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabstudy import cli
from stabstudy.cli import Answer
from stabstudy.planning.compose import SweepPlace
from stabstudy.planning.preview import Preview
from stabstudy.stability.verdict import VERDICTS
from stabstudy.state import STATUSES, State
from stabstudy.sweeping.progress import UNKNOWN, Listed, Standing

if TYPE_CHECKING:
    from stabstudy.sweeping.launch import Outcome

NO_VERDICT = "none"
"""Among the counts of verdicts: done trials without one."""


def sweeps(places: Iterable[SweepPlace]) -> Answer:
    """What `--list` prints."""
    rows = [{"name": place.name, "question": place.question, "file": str(place.path)} for place in places]
    return cli.answer("sweeps", {"sweeps": rows})


def plan(preview: Preview) -> Answer:
    """What `--dry-run` prints, each trial with its state."""
    made, names = preview.plan, [axis.name for axis in preview.plan.axes]
    cells = [
        {"id": c.cell_id, "case": c.case, "settings": dict(zip(names, c.values, strict=True)), "trials": c.trials,
         "done": c.done}
        for c in preview.cells
    ]  # fmt: skip
    trials = [
        {"id": t.trial_id, "cell": t.cell_id, "settings": dict(zip(names, made.values(t), strict=True)),
         "seed": t.config.seed, "state": preview.states[t.trial_id]}
        for t in made.trials
    ]  # fmt: skip
    fields = {
        "study": made.study,
        "folder": str(made.folder),
        "question": made.question,
        "starts_from": made.start,
        "search": None if made.planner is None else made.planner.asked,
        "budget": made.budget.record | ({} if preview.hours_spent is None else {"hours_spent": preview.hours_spent}),
        "axes": {axis.name: axis.values for axis in made.axes},
        "seeds": list(dict.fromkeys(t.config.seed for t in made.trials)),
        "cells": cells,
        "trials": trials,
        "counts": {"cells": len(cells), "trials": len(trials), "done": preview.done, "to_do": preview.to_do,
                   "damaged": len(preview.damage)},
        "first": [dataclasses.asdict(start) for start in preview.starts],
        "packs": len(preview.packed),
        "cost": None if preview.cost is None else dataclasses.asdict(preview.cost),
        "notes": preview.notes,
        "warnings": made.warnings,
        "damaged": preview.damage,
        "obstacles": preview.obstacles,
    }  # fmt: skip
    return cli.answer("plan", fields)


def status(now: Standing) -> Answer:
    """What `--status` prints."""
    fields = {
        "study": now.study.name,
        "folder": str(now.study.path),
        "question": now.question,
        "launch_running": now.launch_running,
        "axes": now.axes,
        "trials": [_trial(trial, list(now.axes)) for trial in now.trials],
        "counts": counts(now),
    }
    return cli.answer("status", fields)


def launch(
    now: Standing, outcome: Outcome, resume: str, report: Path | None, answer: Mapping[str, Any] | None
) -> Answer:
    """How a launch ended. `resume`: the command that goes on; `report`: its page; `answer`: see `analysis.answer`."""
    fields = {
        "study": now.study.name,
        "folder": str(now.study.path),
        "question": now.question,
        "exit_code": outcome.code,
        "early": outcome.early,
        "reason": outcome.reason,
        "counts": counts(now),
        "report": None if report is None else str(report),
        "answer": answer,
        "resume": resume if outcome.code else None,
    }
    return cli.answer("launch", fields)


def counts(now: Standing) -> dict[str, Any]:
    """How many trials are in each state, and how many of the done ones have each verdict."""
    states, done = now.counts(), [trial.state for trial in now.trials if trial.state.status == "done"]
    verdicts = dict.fromkeys((*VERDICTS, NO_VERDICT), 0)
    for state in done:
        verdicts[state.verdict or NO_VERDICT] = verdicts.get(state.verdict or NO_VERDICT, 0) + 1
    return {"trials": len(now.trials), "states": {s: states[s] for s in STATUSES}, "verdicts": verdicts}


def _trial(trial: Listed, axes: list[str]) -> dict[str, Any]:
    state = trial.state
    known = {name: value for name in (*axes, "seed", "train.steps") if (value := trial.value(name)) != UNKNOWN}
    return {
        "id": trial.folder.trial_id,
        "cell": trial.cell,
        "case": trial.case,
        "settings": {name: known[name] for name in axes if name in known},
        "seed": known.get("seed"),
        "state": state.status,
        "step": trial.step,
        "steps": known.get("train.steps"),
        "verdict": state.verdict if state.status == "done" else None,
        "reason": _reason(state),
        "spikes": state.spike_events,
    }


def _reason(state: State) -> str | None:
    """Why it is not done, has no verdict, or diverged."""
    if state.status != "done":
        return None if state.error is None else str(state.error.get("message", ""))
    return (
        state.verdict_reason if state.verdict is None else state.verdict_code if state.verdict == "diverged" else None
    )
