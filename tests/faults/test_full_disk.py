"""Disks that are full or broken: the trial says so, nothing committed is lost, and it goes on when there is room."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import children, launches, studies
from faults.campaign import Part
from faults.invariants import of_ended_trial, of_interrupted_trial
from faults.killer import Child
from stabstudy import failpoints, store

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
Begin = Callable[[str], Part]
REFUSED = [
    *("live.write", "live.short_write", "trace.written", "probes.written", "summary.written", "state.written"),
    *("checkpoint.begun", "checkpoint.tensors_written", "checkpoint.written", "finish.begun", "resume.append"),
]
"""Where a disk may refuse."""


def fault(rng: random.Random) -> tuple[str, int | None]:
    """(failpoints, limit on the size of files): one refusal, a disk that stays full from then on, or a short write."""
    kind = rng.choice(["once", "from then on", "everything", "limit"])
    if kind == "limit":
        return "", rng.choice([3_000, 8_000, 15_000, 20_000, 30_000, 60_000, 150_000])
    if kind == "everything":
        at = rng.randint(2, 6)
        return ",".join(f"{name}:enospc@{at}+" for name in REFUSED if failpoints.POINTS[name]), None
    on = "+" if kind == "from then on" else ""
    return f"{rng.choice(REFUSED)}:{rng.choice(['enospc', 'eio'])}@{rng.randint(1, 4)}{on}", None


def test_a_disk_that_refuses(part: Begin, tmp_path: Path, cache: Path) -> None:
    config = studies.configs()[0]
    (whole,) = studies.write_study(tmp_path / "whole", [config]).trials()
    Child(children.train, [whole.path], 1, cache).end()
    with part("disk full") as running:
        for rng in running.injections():
            study = studies.write_study(tmp_path / f"{running.tried}", [config])
            (trial,) = study.trials()
            points, limit = fault(rng)
            child = Child(children.train, [trial.path], 1, cache, limit, failpoint=points)
            committed = launches.acknowledged(child.end())
            running.count(trial.read_state().status != "done" or child.code != 0)
            label = f"{points or f'limit {limit}'}: "
            running.add([label + b for b in of_interrupted_trial(trial, committed.get(trial.trial_id, 0))])
            running.add([label + b for b in named(trial, points)])
            running.add([f"{label}I2 {p.name} is left over" for p in trial.path.rglob("*.tmp") if p.is_file()])
            again = Child(children.train, [trial.path], 1, cache)
            again.end()
            running.check(again.code == 0, f"{label}exit {again.code} when resumed")
            running.add([label + b for b in of_ended_trial(trial, whole) if "attempts" not in b])


def named(trial: store.TrialFolder, points: str) -> list[str]:
    """Whether the state says what happened; where the state itself could not be written it says nothing, or lost."""
    state = trial.read_state()
    if state.status == "done" or "state." in points:
        return []
    right = ("failed",) if ":eio" in points else ("disk_full",)
    message = str((state.error or {}).get("message", ""))
    return [] if state.status in right and message else [f"status {state.status}, {message!r}"]
