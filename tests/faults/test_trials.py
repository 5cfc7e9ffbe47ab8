"""Trials and packs that are killed: resumed, they are bitwise what they would have been."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import children, launches, studies
from faults.campaign import Part
from faults.invariants import assert_invariants, of_interrupted_trial, tree_hash, violations
from faults.killer import Child, killed
from stabstudy import disk, failpoints, store
from stabstudy.store import tidy_done_trial

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
Begin = Callable[[str], Part]
OF_TRIALS = [
    name
    for name in failpoints.POINTS
    if name.split(".")[0] not in ("study", "table", "file", "cut") and name != "live.truncate"
] + ["cut.truncate"]
"""Points that such a trial reaches."""


def point(rng: random.Random) -> str:
    """Half of the kills are at a failpoint, early or late in the process."""
    if rng.random() < 0.5:
        return ""
    return f"{rng.choice(OF_TRIALS)}:kill@{rng.choice([1, 1, 2, 3, 5, 8, 13])}"


def campaign(running: Part, folder: Path, reference: Path, cache: Path, pack: int) -> None:
    """Kill, look, kill again; when a study is done, compare it and begin another one."""
    number, study, other = 0, None, tree_hash(reference)
    for rng in running.injections():
        if study is None:
            number += 1
            study = studies.write_study(folder / f"study{number}", studies.configs())
        left = [t for t in study.trials() if t.read_state().status != "done"]
        rng.shuffle(left)
        child = killed(children.train, [t.path for t in left], pack, cache, rng=rng, seconds=4, point=point(rng))
        committed = launches.acknowledged(child.end())
        running.count(child.was_killed)
        for trial in study.trials():
            running.add(of_interrupted_trial(trial, committed.get(trial.trial_id, 0)))
        if all(trial.read_state().status == "done" for trial in study.trials()):
            tidy(study)
            running.add(violations(study.path, reference, {reference: other}))
            shutil.rmtree(study.path)
            study = None
    if study is not None:
        Child(children.train, studies.trial_paths(study), pack, cache).end(600)
        tidy(study)
        running.add(violations(study.path, reference, {reference: other}))


def tidy(study: store.StudyFolder) -> None:
    """As a launch does before it trains what is left."""
    for trial in study.trials():
        tidy_done_trial(trial, keep_checkpoints=False)


def test_trials_one_at_a_time(part: Begin, tmp_path: Path, reference: Path, cache: Path) -> None:
    with part("trials") as running:
        campaign(running, tmp_path, reference, cache, pack=1)


def test_packs_of_four(part: Begin, tmp_path: Path, cache: Path) -> None:
    """Their reference is trained in packs too: sums over a batch of stacked models round otherwise."""
    whole = studies.trained(tmp_path / "whole", cache, pack=4)
    with part("packs") as running:
        campaign(running, tmp_path, whole, cache, pack=4)


def test_the_end_of_a_trial(part: Begin, tmp_path: Path, cache: Path) -> None:
    """Killed while its records are compacted: they are there in one form or the other, whole."""
    config = studies.configs()[0]
    study = studies.write_study(tmp_path / "study", [config])
    (trial,) = study.trials()
    child = Child(children.train, [trial.path], 1, cache, failpoint="finish.begun:kill")
    child.end()
    whole, path = children.copied(trial.path, tmp_path / "whole"), trial.path
    Child(children.finish_trial, path, cache).end()
    ended = store.TrialFolder(children.copied(path, tmp_path / "ended" / path.name))
    points = [p for p in OF_TRIALS if p.split(".")[0] in ("finish", "trace", "probes", "summary", "state")]
    with part("compaction") as running:
        children.copied(whole, path)
        for rng in running.injections():
            at = f"{rng.choice(points)}:kill@{rng.choice([1, 1, 2])}" if rng.random() < 0.5 else ""
            child = killed(children.finish_trial, path, cache, rng=rng, seconds=0.1, point=at)
            acks = child.end()
            running.count(child.was_killed)
            running.add(of_interrupted_trial(trial, config.train.steps))
            if trial.read_state().status == "done" or "finished" in acks or rng.random() < 0.3:
                Child(children.finish_trial, path, cache).end()
                for name in ("trace.parquet", "probes.parquet"):
                    same = (path / name).read_bytes() == (ended.path / name).read_bytes()
                    running.check(same, f"I5 {name} differs")
                children.copied(whole, path)


def test_a_row_of_a_killed_trial_that_is_lost_would_be_seen(
    tmp_path: Path,
    reference: Path,
    cache: Path,
) -> None:
    """Negative control of the invariants: a cut record, a stale lock file, a changed neighbour, a leftover."""
    study = store.StudyFolder(children.copied(reference, tmp_path / "study"))
    assert_invariants(study.path, reference)
    trial, other = study.trials()[:2]
    (trial.path / "state.json.1.tmp").touch()
    state = trial.read_state()
    trial.write_state(store.replace(state, attempts=(*state.attempts, state.attempts[-1]), final_loss=1.0))
    (other.path / "probes.parquet").write_bytes(b"")
    with disk.lock(other.path):
        broken = violations(study.path, reference, {study.path: ""})
    kinds = sorted(line.split()[0] for line in broken)
    assert kinds == ["I2", "I2", "I2", "I4", "I5", "I6", "I7"], broken
