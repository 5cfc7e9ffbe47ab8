"""Launching for real: in this process, and through a real Ray, with trials that die and a user who interrupts."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from stabstudy import disk, live, store, trace
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.settings import ConfigError
from stabstudy.state import State
from stabstudy.sweeping.launch import Outcome, _git, label, launch
from stabstudy.sweeping.progress import Board

SWEEP = """\
# @package _global_
# Does the launch do what it says?
sweep:
  seeds: [0]
  grid:
    optim.lr: [1e-3, 1e-2]
    optim.clip: [1.0, null]
"""
TINY = [
    "sweep=check", "data=synthetic", "data.synthetic.bytes=15000", "data.seq_len=16", "model.dim=16", "model.n_heads=2",
    "model.depth=2", "train.batch_size=4", "train.steps=30", "optim.warmup_steps=3", "train.checkpoint_every=10",
    "train.eval_sequences=8",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a sweep of its own; the token cache is shared by the tests."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "check.yaml").write_text(SWEEP)
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(folder: Path, *words: str) -> Plan:
    return make_plan([*TINY, *words], folder)


def states(folder: Path, study: str = "check") -> list[State]:
    return [t.read_state() for t in store.StudyFolder(folder / "results" / study).trials()]


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.05)


def same_traces(a: Path, b: Path) -> bool:
    for trial in store.StudyFolder(a).trials():
        rows, other = trial.rows(trace.TRACE), store.StudyFolder(b).trial(trial.trial_id).rows(trace.TRACE)
        assert rows is not None and other is not None
        for name in set(trace.TRACE.names) - {"seconds", "skip"}:
            if not np.array_equal(rows[name], other[name], equal_nan=True):
                return False
    return True


def test_local_launch_trains_then_skips_then_grows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    assert launch(plan(folder, "launcher=local"), said.append) == Outcome(0)
    assert [s.status for s in states(folder)] == ["done"] * 4
    assert launch(plan(folder, "launcher=local"), said.append) == Outcome(0)
    assert said[-1] == "nothing to train: all 4 trials are done"
    before = {s.trial_id: s for s in states(folder)}
    assert launch(plan(folder, "launcher=local", "optim.lr=1e-3,1e-2,3e-2"), said.append) == Outcome(0)
    after = {s.trial_id: s for s in states(folder)}
    assert len(after) == 6 and before.items() <= after.items()
    assert "[2/2]" in capsys.readouterr().out
    study = store.StudyFolder(folder / "results" / "check")
    told = json.loads(study.provenance_file.read_text())
    assert told["question"] == "Does the launch do what it says?" and "optim.lr" in told["axes"]


def test_labels_name_the_axes(folder: Path) -> None:
    made = plan(folder, "launcher=local")
    assert label(made.trials[1], made) == "lr=0.001 clip=off seed=0"


def test_too_little_data_is_refused_before_anything_is_made(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: must be at most"):
        launch(plan(folder, "launcher=local", "train.batch_size=100000"))
    assert not (folder / "results").exists()


def test_a_locked_study_is_refused(folder: Path) -> None:
    made = plan(folder, "launcher=local")
    made.folder.mkdir(parents=True)
    with disk.lock(made.folder), pytest.raises(disk.LockHeldError, match=f"pid {os.getpid()}"):
        launch(made)


def test_a_failing_trial_stops_no_other_and_is_tried_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(folder, "launcher=local")
    victim = store.StudyFolder(made.folder).trial(made.trials[0].trial_id)
    plant_foreign_checkpoint(victim)
    assert launch(made) == Outcome(3)
    found = {s.trial_id: s for s in states(folder)}
    assert [s.status for s in found.values()].count("done") == 3
    assert found[victim.trial_id].status == "failed" and len(found[victim.trial_id].attempts) == 2
    assert "belongs to trial" in capsys.readouterr().out
    shutil.rmtree(victim.checkpoints)
    assert launch(made) == Outcome(0)


def plant_foreign_checkpoint(trial: store.TrialFolder) -> None:
    """A checkpoint that names another trial: the attempt must fail, every time."""
    import safetensors.torch
    import torch

    at = trial.checkpoints / "step-00000000"
    at.mkdir(parents=True)
    safetensors.torch.save_file({"x": torch.zeros(1)}, at / "tensors.safetensors")
    sha = disk.file_sha256(at / "tensors.safetensors")
    store.write_json(at / "state.json", {"format": 1, "trial_id": "0123456789", "next_step": 0, "sha256": sha})


@pytest.fixture
def command(folder: Path) -> Callable[..., list[str]]:
    def words(*more: str) -> list[str]:
        return [sys.executable, "-m", "stabstudy.sweep", *TINY, *more]

    return words


@pytest.fixture
def started(folder: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start a command in its own session; whatever is left of it is killed at the end."""
    running: list[subprocess.Popen[str]] = []

    def start(words: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


Command, Started = Callable[..., list[str]], Callable[[list[str]], "subprocess.Popen[str]"]


@pytest.mark.slow
@pytest.mark.ray
def test_ray_equals_local_survives_a_kill_and_keeps_quiet(folder: Path, command: Command, started: Started) -> None:
    launch(plan(folder, "launcher=local", "study=local", "train.steps=300"))
    study = store.StudyFolder(folder / "results" / "scheduled")
    process = started(command("study=scheduled", "train.steps=300"))
    until(
        lambda: any(s.status == "running" and s.step == 0 and _rows(study, s) > 15 for s in states(folder, "scheduled"))
    )
    victim = next(s for s in states(folder, "scheduled") if s.status == "running" and _rows(study, s) > 15)
    os.kill(victim.attempts[-1].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    ended = {s.trial_id: s for s in states(folder, "scheduled")}
    assert [s.status for s in ended.values()] == ["done"] * 4
    assert len(ended[victim.trial_id].attempts) == 2 and ended[victim.trial_id].attempts[1].from_step >= 10
    assert same_traces(folder / "results" / "local", study.path)
    assert out.count("] ") >= 4 and "index.html" in out
    noise = [line for line in (out + err).splitlines() if "ray" in line.lower() and "results/scheduled" not in line]
    assert noise == ["starting Ray"], "which is our own line"
    assert sorted(p.name for p in study.path.iterdir() if p.name.startswith(".")) == [".lock"]


def _rows(study: store.StudyFolder, state: State) -> int:
    return live.last_step(study.trial(state.trial_id).live(trace.TRACE)) + 1


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_checkpoints_and_the_same_command_goes_on(folder: Path, command: Command, started: Started) -> None:
    words = command("study=stopped", "train.steps=1500", "train.checkpoint_every=100000", "optim.clip=1.0")
    study = store.StudyFolder(folder / "results" / "stopped")
    process = started(words)
    until(lambda: any(s.status == "running" and _rows(study, s) > 20 for s in states(folder, "stopped")))
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 30
    assert "the same command resumes" in err.splitlines()[-1]
    stopped = [s for s in states(folder, "stopped") if s.status == "interrupted"]
    assert stopped and all(s.step > 0 for s in stopped)
    assert not any(s.status in ("running", "lost") for s in states(folder, "stopped"))
    for state in stopped:
        assert [p.name for p in study.trial(state.trial_id).checkpoints.iterdir()] == [f"step-{state.step:08d}"]
    # the same command again, in this process: it continues and repeats nothing
    launch(make_plan([*words[3:], "launcher=local"], folder))
    for state in states(folder, "stopped"):
        assert state.status == "done" and state.step == 1500
        rows = study.trial(state.trial_id).rows(trace.TRACE)
        assert rows is not None and len(rows) == 1500
    resumed = {s.trial_id: s.attempts[-1].from_step for s in states(folder, "stopped")}
    assert all(resumed[s.trial_id] == s.step for s in stopped)


@pytest.mark.ray
def test_asking_for_what_is_not_there_is_an_answer_not_a_hang(command: Command, started: Started) -> None:
    process = started(command("compute.address=127.0.0.1:1"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4 and "compute.address=127.0.0.1:1" in err and "Traceback" not in err


CLUSTER = """
import json, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
done = subprocess.run([*sys.argv[1:], f"compute.address={cluster.address}"])
cluster.shutdown()
sys.exit(done.returncode)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_two_node_cluster(folder: Path, command: Command, started: Started) -> None:
    process = started([sys.executable, "-c", CLUSTER, *command("study=cluster", "train.steps=200")])
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert [s.status for s in states(folder, "cluster")] == ["done"] * 4
    assert "index.html" in out


TWICE = """
import sys
from pathlib import Path
from stabstudy.planning.plan import make_plan
from stabstudy.sweeping.launch import launch
for study in ("first", "second"):
    assert launch(make_plan([*sys.argv[1:], f"study={study}"], Path.cwd())).code == 0
"""


@pytest.mark.ray
@pytest.mark.slow
def test_one_process_may_launch_twice(folder: Path, started: Started) -> None:
    """As a notebook does: Ray reads its token once in a process, so the second Ray needs the same one."""
    process = started([sys.executable, "-c", TWICE, *TINY, "optim.lr=1e-3", "optim.clip=1.0"])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_the_live_table_ends_with_the_last_trial_in_words() -> None:
    text = io.StringIO()
    board = Board("study", {"a": "lr 0.1"}, 0, console=Console(file=text, width=160))
    board.finish("a", State("a", status="done", verdict="spiky", outcome="Spiky: a spike lasted more than 10 steps."))
    text.truncate(0)
    board.console.print(board)
    assert text.getvalue().rstrip().splitlines()[-1] == "lr 0.1: Spiky: a spike lasted more than 10 steps."


def test_only_changed_code_makes_a_checkout_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    for name in ("stabstudy/module.py", "results/example/trials.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr("stabstudy.sweeping.launch.__file__", str(tmp_path / "stabstudy" / "launch.py"))
    clean = _git()
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty_patch"] == ""
    (tmp_path / "results" / "example" / "trials.csv").unlink()
    assert _git() == clean
    (tmp_path / "stabstudy" / "module.py").write_text("2\n")
    changed = _git()
    assert changed is not None and len(changed["dirty_patch"]) == 12 and changed["commit"] == clean["commit"]


def losses(folder: Path, study: str) -> dict[str, np.ndarray]:
    trials = store.StudyFolder(folder / "results" / study).trials()
    found = {t.trial_id: t.rows(trace.TRACE) for t in trials}
    return {trial_id: rows["loss"] for trial_id, rows in found.items() if rows is not None}


def test_packs_in_this_process_train_what_lone_trials_train(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(plan(folder, "launcher=local", "study=lone"))
    assert launch(plan(folder, "launcher=local", "study=packed", "compute.pack=4")) == Outcome(0)
    assert "[4/4]" in capsys.readouterr().out
    lone, packed = losses(folder, "lone"), losses(folder, "packed")
    assert lone.keys() == packed.keys() and len(packed) == 4
    for trial_id, expected in lone.items():
        np.testing.assert_allclose(packed[trial_id][:12], expected[:12], rtol=1e-4)


def test_a_member_that_fails_in_a_pack_stops_no_other(folder: Path) -> None:
    made = plan(folder, "launcher=local", "compute.pack=4")
    victim = store.StudyFolder(made.folder).trial(made.trials[1].trial_id)
    plant_foreign_checkpoint(victim)
    assert launch(made) == Outcome(3)
    found = {s.trial_id: s for s in states(folder)}
    assert [t for t, s in found.items() if s.status != "done"] == [victim.trial_id]
    assert found[victim.trial_id].status == "failed" and len(found[victim.trial_id].attempts) == 2


DEADLY = """
import os, sys
from stabstudy import store

written = store.TrialFolder.write_state

def write_state(self, state):
    written(self, state)
    if self.trial_id == os.environ["DEADLY"] and state.status == "running":
        os._exit(7)

store.TrialFolder.write_state = write_state
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_member_that_kills_its_process_under_ray_is_found_and_the_others_end(
    folder: Path, command: Command, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("study=deadly", "compute.pack=4", "compute.retries=0")
    victim = plan(folder, *words).trials[1].trial_id
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(DEADLY)
    root = Path(store.__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "site"), str(root)]))
    monkeypatch.setenv("DEADLY", victim)
    process = started(command(*words))
    out, err = process.communicate(timeout=150)
    assert process.returncode == 3, err
    ended = {s.trial_id: s for s in states(folder, "deadly")}
    assert [t for t, s in ended.items() if s.status != "done"] == [victim]
    assert len(ended[victim].attempts) == 3, "in packs of 4, 2 and 1"
    assert "[4/4]" in out and "Traceback" not in out + err
