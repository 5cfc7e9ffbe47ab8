"""What killed processes leave behind, and what of it is removed by whom."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trials import BASE, Make

from stabstudy import disk, failpoints, store, trace
from stabstudy.stability.rules import Rules
from stabstudy.store import sweep_abandoned, sweep_study, tidy_done_trial
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine, Trial


def test_only_files_of_the_dead_are_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f"index.html.{dead.pid}.tmp", f"index.html.{os.getpid()}.tmp", "trace.parquet.tmp", "notes.tmp", "a.1"]
    for name in names:
        (tmp_path / name).touch()
    assert sweep_abandoned(tmp_path) == names[:1]
    assert {p.name for p in tmp_path.iterdir()} == set(names[1:])


@pytest.fixture
def left(make: Make, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], store.TrialFolder]:
    """A trial whose process was killed at this point of its end."""

    def at(point: str) -> store.TrialFolder:
        folder = make(BASE)
        with monkeypatch.context() as patch:
            patch.setattr(Trial, "fail", lambda trial, error: None)  # a killed process writes no more
            failpoints.arm(f"{point}:raise")
            run_pack([folder], Engine(cache), Rules(), lambda members: False)
            failpoints.arm("")
        return folder

    return at


@pytest.mark.parametrize("point", ["finish.done", "finish.unlinked", "finish.checkpoints"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_end_of_a_done_trial_is_finished(point: str, keep: bool, left: Callable[[str], store.TrialFolder]) -> None:
    folder = left(point)
    names = {p.name for p in folder.path.iterdir()}
    records = {f"{name}.live" for name in ("trace", "probes")} & names
    expected = sorted(records | ({"checkpoint"} if not keep else set()))
    assert folder.read_state().status == "done" and len(records) == {"finish.done": 2, "finish.unlinked": 1}.get(
        point, 0
    )
    with disk.lock(folder.path):
        assert tidy_done_trial(folder, keep) == []
    assert sorted(tidy_done_trial(folder, keep)) == expected
    assert {p.name for p in folder.path.iterdir()} == names - set(expected)
    rows = folder.rows(trace.TRACE)
    assert rows is not None and len(rows) == 12


@pytest.mark.parametrize(("point", "removed"), [("finish.done", ["state.reserve.tmp"]), ("finish.begun", [])])
def test_the_room_kept_for_a_state_goes_with_its_trial(
    point: str, removed: list[str], left: Callable[[str], store.TrialFolder]
) -> None:
    """A process that was killed between its last state and giving the room back."""
    folder = left(point)
    tidy_done_trial(folder, False)
    folder.reserve()
    assert tidy_done_trial(folder, False) == removed
    assert [p.name for p in folder.path.glob("*.tmp")] == ([] if removed else ["state.reserve.tmp"])


def test_rows_beside_a_damaged_finished_record_stay(left: Callable[[str], store.TrialFolder]) -> None:
    folder = left("finish.done")
    file = folder.finished(trace.PROBES)
    data = file.read_bytes()
    file.write_bytes(data[:-9] + b"x" + data[-8:])
    assert tidy_done_trial(folder, False) == [] and folder.live(trace.TRACE).exists()
    file.unlink()
    assert tidy_done_trial(folder, False) == [] and folder.live(trace.PROBES).exists()
    file.write_bytes(data)
    assert len(tidy_done_trial(folder, False)) == 3


@pytest.mark.parametrize("point", ["state.renamed", "finish.begun"])
def test_a_trial_that_is_not_done_is_left_alone(point: str, left: Callable[[str], store.TrialFolder]) -> None:
    folder = left(point)
    before = {p.name for p in folder.path.iterdir()}
    assert tidy_done_trial(folder, False) == [] and {p.name for p in folder.path.iterdir()} == before


def test_a_launch_sweeps_its_study(left: Callable[[str], store.TrialFolder]) -> None:
    trial = left("finish.done")
    study = store.StudyFolder(trial.path.parent.parent)
    (study.path / ".ray" / "tune").mkdir(parents=True)
    (study.path / "sweep.yaml.999999999.tmp").touch()
    sweep_study(study, [trial.trial_id], keep_checkpoints=False)
    assert [p.name for p in study.path.iterdir()] == ["trials"]
    assert not trial.live(trace.TRACE).exists() and not trial.checkpoints.exists()
