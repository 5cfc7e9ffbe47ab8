"""The hours of a budget: what a study has spent over all its launches, and what a launch does with what is left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import planted
import pytest

from stabstudy import cli, store, sweep
from stabstudy.planning.budget import hours_spent
from stabstudy.planning.plan import make_plan
from stabstudy.state import Attempt, State
from stabstudy.sweeping import launch as launching
from stabstudy.sweeping.launch import launch

HALF = 1800
SMALL = ["optim.lr=1e-3,1e-2", "seeds=2", "study=small", "model.depth=1", "model.dim=16", "data=synthetic",
         "data.synthetic.bytes=100000", "data.seq_len=16", "launcher=local", "compute.pack=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def attempt(began: str, ended: str | None, from_step: int = 0) -> Attempt:
    at = "2026-11-27T{}:00+00:00"
    return Attempt("host", 1, at.format(began), from_step, ended=None if ended is None else at.format(ended))


def study(folder: Path, *attempts: list[Attempt]) -> store.StudyFolder:
    """A study whose trials were trained so."""
    planted.plant_study(folder / "s", depths=(2,), lrs=(1e-3,), seeds=range(len(attempts)))
    of = store.StudyFolder(folder / "s")
    for trial, own in zip(of.trials(), attempts, strict=True):
        trial.write_state(dataclasses.replace(trial.read_state(), attempts=tuple(own)))
    return of


def test_what_trains_at_once_counts_once_and_pauses_do_not_count(here: Path) -> None:
    trained = study(
        here,
        [attempt("10:00", "10:30"), attempt("15:00", "15:30")],
        [attempt("10:15", "11:00")],
        [attempt("10:20", "10:25")],
        [],
    )
    assert hours_spent(trained) == pytest.approx(1.5)


def test_a_trial_that_was_killed_counts_as_long_as_its_recorded_steps(here: Path) -> None:
    trained = study(here, [attempt("10:00", None), attempt("20:00", None, from_step=30)])
    (trial,) = trained.trials()
    rows: Any = trial.rows(store.trace.TRACE)
    assert hours_spent(trained) == pytest.approx(float(rows["seconds"].sum()) / 3600) and len(rows) > 30
    trial.write_state(dataclasses.replace(trial.read_state(), attempts=(attempt("10:00", None),)))
    trial.finished(store.trace.TRACE).unlink()
    assert hours_spent(trained) == 0, "a damaged trial counts nothing"


@pytest.fixture
def half_hours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials that are done at once and say that they took half an hour each, one after another."""
    trained: list[str] = []

    def train(pack: Any, shared: Any, report: Any = None) -> None:
        for trial_id in pack:
            hour, rest = divmod(len(trained), 2)
            began, ended = f"{10 + hour}:{30 * rest:02}", f"{10 + hour + rest}:{30 * (1 - rest):02}"
            folder = store.StudyFolder(Path(shared["study"])).trial(trial_id)
            record = {"trace": {"rows": 1, "sha256": "0" * 64}}
            folder.write_state(State(trial_id, "done", attempts=(attempt(began, ended),), records=record))
            trained.append(trial_id)

    monkeypatch.setattr(launching, "train_pack", train)
    return trained


def test_a_relaunch_gets_no_fresh_hours(here: Path, half_hours: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = make_plan([*SMALL, "budget.hours=1.5"], here)
    assert launch(first).code == 0 and len(half_hours) == 4, "the clock of the test stands still within a launch"
    more = [*SMALL, "seeds=3", "budget.hours=1.5"]
    capsys.readouterr()
    outcome = launch(make_plan(more, here))
    assert (outcome.code, outcome.early, len(half_hours)) == (0, False, 4)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "the budget of 1.5 h is spent: 4 of 6 trials have ended; launched with a larger one, it goes on"
    assert not (here / "results" / "small" / ".stop").exists()
    assert launch(make_plan([*more, "budget.hours=9"], here)).code == 0 and len(half_hours) == 6


def test_a_dry_run_says_what_is_spent_and_left(
    here: Path, half_hours: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    launch(make_plan(SMALL, here))
    words = [*SMALL, "seeds=3", "budget.hours=5"]
    capsys.readouterr()
    assert sweep.main([*words, "--dry-run"]) == cli.OK
    assert "\nbudget of 5 h: 2 h spent, 3 h left\n" in capsys.readouterr().out
    assert sweep.main([*words, "--dry-run", "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["budget"] == {"hours": 5, "hours_spent": 2}
    assert sweep.main([*SMALL, "--dry-run", "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["budget"] == {}
