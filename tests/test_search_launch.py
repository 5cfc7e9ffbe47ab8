"""A sweep with a search, from its file to its study: plans, launches, kills, and a machine without optuna."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from stabstudy import extras
from stabstudy.analysis.searches import search_history
from stabstudy.planning.compute import NotReadyError
from stabstudy.planning.plan import make_plan
from stabstudy.search import strategy
from stabstudy.settings import ConfigError
from stabstudy.store import StudyFolder
from stabstudy.sweeping.launch import launch

pytest.importorskip("optuna")

SWEEP = """\
# @package _global_
# Which recipe has the lowest loss?
data: {seq_len: 16}
model: {dim: 16, n_heads: 2, depth: 2}
train: {batch_size: 4, steps: 64, eval_sequences: 8}
sweep:
  seeds: [0, 1]
  search:
    trials: 6
    minimize: final_loss
    space:
      optim.lr: {log: [1e-3, 1e-1]}
      optim.warmup_steps: {int: [1, 20]}
      data: [synthetic, pysrc]
"""
WORDS = ["sweep=mine", "launcher=local", "compute.pack=4"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(SWEEP)
    return tmp_path


def test_a_plan_is_the_first_round_of_its_search(here: Path):
    plan = strategy.begun(make_plan(WORDS, here))
    assert [a.name for a in plan.axes] == ["optim.lr", "optim.warmup_steps", "data"]
    assert [t.config.seed for t in plan.trials] == [0, 1] * (len(plan.trials) // 2)
    assert "trials: 6" in plan.sweep_text and "sampler: TPE" in plan.sweep_text
    assert plan.question == "Which recipe has the lowest loss?"
    assert not plan.folder.exists(), "nothing is written"


def test_the_command_line_pins_axes_and_adds_none(here: Path):
    plan = strategy.begun(make_plan([*WORDS, "optim.lr=2e-3", "data=pysrc"], here))
    assert [a.name for a in plan.axes] == ["optim.warmup_steps"]
    assert {(t.config.optim.lr, t.choices["data"]) for t in plan.trials} == {(2e-3, "pysrc")}
    with pytest.raises(ConfigError, match="cannot be an axis beside sweep.search"):
        make_plan([*WORDS, "optim.eps=1e-8,1e-7"], here)
    with pytest.raises(ConfigError, match="has no axis left"):
        make_plan([*WORDS, "optim.lr=2e-3", "data=pysrc", "optim.warmup_steps=3"], here)


def test_a_launch_without_optuna_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch):
    real = extras.installed
    monkeypatch.setattr(extras, "installed", lambda package: "none" if package == "optuna" else real(package))
    with pytest.raises(NotReadyError, match="needs optuna, not installed here: pip install"):
        strategy.begun(make_plan(WORDS, here))


def test_max_trials_bounds_a_search(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(here)
    words = [*WORDS, "data=synthetic", "data.synthetic.bytes=15000", "train.final_eval_tokens=64", "max_trials=4"]
    for _ in range(2):
        assert launch(strategy.begun(make_plan(words, here))).code == 0
        assert len(StudyFolder(here / "results" / "mine").trials()) == 4, "two cells of two seeds"
        known, reached = capsys.readouterr().out.splitlines()[-2:]
        assert known.startswith("TPE, 2 of 6 cells: ") and reached.startswith("max_trials=4 is reached: ")


@pytest.mark.slow
def test_a_killed_search_goes_on(here: Path):
    command = [sys.executable, "-m", "stabstudy.sweep", *WORDS]
    first = subprocess.Popen(command, cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = StudyFolder(here / "results" / "mine")
    end = time.monotonic() + 200
    while len(folder.trials()) < 8 and first.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    first.kill()
    first.wait()
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TPE, 6 of 6 cells: best final_loss" in done.stdout
    known = search_history(folder)
    assert known is not None and [s.state for s in known.suggestions] == ["done"] * 6
    assert len(folder.trials()) == 12 and folder.journal.exists()
    assert "search-history" in (folder.report / "report.md").read_text()
    again = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and len(folder.trials()) == 12
