"""The command as a user types it: help, list, dry run, status, a launch, a relaunch."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import live_rows
import pytest

from stabstudy import config as cfg
from stabstudy import disk, store, sweep, trace, wording
from stabstudy.planning.plan import make_plan
from stabstudy.state import State

SMALL = [
    "model.depth=1",
    "model.dim=16",
    "train.steps=12",
    "train.eval_sequences=8",
    "optim.warmup_steps=2",
    "data=text",
]
KNOWN = """\
# @package _global_
# Is it known?
data: {seq_len: 64}
train: {steps: 150, eval_every: 75}
sweep:
  seeds: 2
  grid: {model.depth: [2, 4], optim.lr: [1e-3, 1e-2, 1e-1], optim.clip: [1.0, null]}
"""
"""24 trials of 12 cells, whatever the shipped sweeps become."""

CPU_SECONDS = 2.0
"""Goal for everything that answers without torch and ray."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """The sweep above in the place of quickstart: what a user's own folder holds comes first."""
    path = tmp_path / "sweeps" / "quickstart.yaml"
    path.parent.mkdir()
    path.write_text(KNOWN)
    return path


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of a launch of two trials that takes a second beside torch's import."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 600)
    cache = f"compute.cache_dir={tmp_path}/cache"
    return [
        *SMALL,
        f"data.path={tmp_path}/text.txt",
        "optim.lr=1e-3,1e-2",
        "optim.clip=1.0",
        "seeds=1",
        "launcher=local",
        "study=small",
        cache,
    ]


def test_help_names_every_group_and_preset(capsys):
    assert sweep.main(["--help"]) == 0
    said = capsys.readouterr().out
    for word in (
        "--dry-run",
        "--status",
        "--json",
        "study=NAME",
        "'optim.warmup_steps=${train.steps}' follows another setting",
        "compute=",
        "auto |",
        "model=",
        "tiny",
        "optim=",
        "train=",
        "data=",
    ):
        assert word in said
    assert all(len(line) <= 104 for line in said.splitlines())


def test_version(capsys):
    assert sweep.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("stabstudy ")


def test_list_shows_every_sweep_with_its_question(capsys):
    Path("sweeps").mkdir()
    Path("sweeps", "mine.yaml").write_text("# @package _global_\n# Does mine\n# work?\n# More.\nsweep: {}\n")
    assert sweep.main(["--list"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    shipped = {"quickstart", "depth_lr", "batch_lr", "clip_warmup", "weight_decay", "dataset", "lingua_depth"}
    assert shipped | {"mine", "lingua_depth_cpu"} <= set(lines)
    assert lines["mine"].strip() == "Does mine work?"
    assert all(line.strip().endswith("?") for name, line in lines.items() if name != "sweep")


def test_dry_run_counts_and_creates_nothing(capsys, tmp_path, known):
    assert sweep.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "24 trials of 12 cells: 0 done, 24 to do in " in said
    assert "1.84 M tokens" in said, "24 trials x 150 steps x 8 x 64 tokens"
    assert "a rule of thumb" in said and list(tmp_path.iterdir()) == [known.parent]
    rows = [line.split() for line in said.splitlines() if line[:10].isalnum() and len(line.split()) == 6]
    cells = {(depth, lr, clip) for _, depth, lr, clip, trials, done in rows}
    assert len(cells) == 12 and ("4", "0.1", "null") in cells


def finished(plan, trial_id: str, seconds: float) -> None:
    """Write what a finished trial leaves, `seconds` for each step."""
    trial = next(t for t in plan.trials if t.trial_id == trial_id)
    folder = store.StudyFolder(plan.folder).trial(trial_id)
    folder.path.mkdir(parents=True)
    body = {"cell_id": trial.cell_id, "config": cfg.to_dict(trial.config), "choices": trial.choices}
    store.write_json(folder.config_file, body | {"data_fingerprint": trial.data_fingerprint})
    plain = {"tokens": 512, "seconds": seconds, "lr": 0.1, "layer_grad_norm": [1.0] * (trial.config.model.depth + 2)}
    live_rows.write(folder.live(trace.TRACE), [plain | {"step": step} for step in range(trial.config.train.steps)])
    rows, sha = live_rows.compact(folder.live(trace.TRACE), folder.finished(trace.TRACE), trace.TRACE, {})
    state = State(trial_id, status="done", step=rows, verdict="stable", spike_events=3)
    folder.write_state(dataclasses.replace(state, records={"trace": {"rows": rows, "sha256": sha}}))


def test_dry_run_learns_the_time_from_finished_trials(capsys, tmp_path, known):
    plan = make_plan(["sweep=quickstart", "model.depth=2"], tmp_path)
    finished(plan, plan.trials[0].trial_id, seconds=1.0)
    (plan.folder / "sweep.yaml").write_text(plan.sweep_text)
    assert sweep.main(["--dry-run", "sweep=quickstart", "model.depth=2", "compute.max_concurrent=1"]) == 0
    said = capsys.readouterr().out
    assert "12 trials of 6 cells: 1 done, 11 to do" in said
    # 11 trials x 150 steps of a second, evaluations of 4 x 32 and 2 x 256 sequences (of 64 tokens) at a third of a
    # step for each 8, and 3 s to begin
    assert wording.duration(11 * (3 + 150 + (4 * 32 + 2 * 256) / 8 / 3)) in said
    assert "from this study's finished trials" in said


def test_status_reads_files_alone(capsys, tmp_path, known):
    plan = make_plan(["seeds=1"], tmp_path)
    (plan.folder / "trials").mkdir(parents=True)
    (plan.folder / "sweep.yaml").write_text(plan.sweep_text)
    store.write_json(plan.folder / "provenance.json", {"axes": {a.name: list(a.values) for a in plan.axes}})
    study = store.StudyFolder(plan.folder)
    finished(plan, plan.trials[0].trial_id, 0.1)
    rows = [{"step": step, "tokens": 512, "seconds": 1.0, "lr": 0.1} for step in range(42)]
    for trial, status in zip(plan.trials[1:5], ("pending", "running", "failed", "lost"), strict=True):
        folder = study.trial(trial.trial_id)
        folder.path.mkdir()
        store.write_json(folder.config_file, {"config": cfg.to_dict(trial.config), "choices": trial.choices})
        if status == "running":
            live_rows.write(folder.live(trace.TRACE), rows)
        if status == "lost":  # of an older version
            (folder.path / "trace.jsonl").write_text('{"step": 0}\n{"step": 41}\n{"step": 4')
        if status != "pending":
            error = {"kind": "X", "message": "it \x1b[31mbroke", "step": 7} if status == "failed" else None
            folder.write_state(State(trial.trial_id, "failed" if error else "running", step=7, error=error))
    with disk.lock(study.trial(plan.trials[2].trial_id).path):
        assert sweep.main(["--status"]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines()}
    ids = [t.trial_id for t in plan.trials]
    assert lines[ids[0]].split()[-3:] == ["150/150", "stable", "3"]
    assert "depth=2 lr=0.001 clip=1 seed=0" in lines[ids[0]] and "clip=off" in lines[ids[1]]
    assert lines[ids[2]].split()[-2:] == ["running", "42/150"]
    assert "7/150" in lines[ids[3]] and "it \\x1b[31mbroke" in lines[ids[3]]
    assert "lost" in lines[ids[4]], "says running, and no process holds it"
    assert said.splitlines()[-1] == (
        "quickstart: 5 trials: 1 pending, 1 running, 1 done (1 stable), 1 failed, 1 lost; no launch is running"
    )


def test_status_of_a_damaged_trial(capsys, tmp_path):
    folder = tmp_path / "results" / "s" / "trials" / "0123456789"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    (folder / "state.json").write_text("[]")
    odd = folder.with_name("1123456789")
    odd.mkdir()
    (odd / "config.json").write_text('{"config": {"train": 3}, "choices": []}')
    (tmp_path / "results" / "s" / "provenance.json").write_text('{"axes": {"optim.lr": [], "data": []}}')
    assert sweep.main(["--status", "study=s"]) == 0
    assert "failed" in capsys.readouterr().out


def test_status_of_a_running_launch(capsys, tmp_path):
    (tmp_path / "results" / "s" / "trials").mkdir(parents=True)
    with disk.lock(tmp_path / "results" / "s"):
        assert sweep.main(["--status", "study=s"]) == 0
    assert capsys.readouterr().out == "s: 0 trials: none begun; a launch is running\n"


def test_warnings_go_to_stderr(capsys, known):
    assert sweep.main(["--dry-run", "sweep=quickstart", "optim.lr=1e-3,0.001"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("warning: optim.lr: 0.001 is listed twice") and "twice" not in said.out


def test_a_locked_study_is_left_alone(capsys, small, tmp_path):
    folder = tmp_path / "results" / "small"
    folder.mkdir(parents=True)
    with disk.lock(folder):
        assert sweep.main(small) == 4
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: machine: {folder}: locked by pid {os.getpid()} on ") and " since " in line


def test_data_that_is_too_small_is_refused_before_anything_is_created(capsys, small, tmp_path):
    (tmp_path / "text.txt").write_text("too short")
    assert sweep.main(small) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: conf: data.")
    assert not (tmp_path / "results").exists()


def test_a_launch_and_its_relaunch(capsys, small, tmp_path):
    assert sweep.main(small) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"report: {tmp_path}/results/small/report/index.html"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "results" / "small" / "trials").rglob("*.parquet")}
    assert len(before) == 4

    assert sweep.main(small) == 0
    assert "nothing to train: all 2 trials are done" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before

    assert sweep.main([*small, "optim.lr=1e-3,1e-2,1e-1"]) == 0
    after = {p for p in (tmp_path / "results" / "small" / "trials").rglob("trace.parquet")}
    assert len(after) == 3, "one more cell, two kept"
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_bug_of_ours_is_exit_code_1_and_debug_shows_where(capsys, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("stabstudy.planning.plan.make_plan", broken)
    assert sweep.main(["--dry-run"]) == 1
    assert capsys.readouterr().err == "error: internal: RuntimeError: boom (a bug; --debug shows where)\n"
    assert sweep.main(["--dry-run", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_stopped_launch_says_how_to_go_on(capsys, monkeypatch, small):
    from stabstudy.sweeping import launch

    monkeypatch.setattr(launch, "launch", lambda plan, say, console: launch.Outcome(130, early=True))
    assert sweep.main(small) == 130
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("stopped; the same command resumes: python -m stabstudy.sweep model.depth=1 ")
    assert last.endswith(small[-1]) and "report" not in said.out


def test_a_full_disk_says_where_and_how_to_go_on(capsys, monkeypatch, small):
    from stabstudy.sweeping import launch

    def full(plan, say, console):
        raise OSError(errno.ENOSPC, "No space left on device", "/results/x/sweep.yaml")

    monkeypatch.setattr(launch, "launch", full)
    assert sweep.main(small) == 4
    first, last = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("error: machine: No space left on device: /results/x/sweep.yaml (")
    assert first.endswith(" bytes free there)")
    assert last.startswith("stopped; the same command resumes: python -m stabstudy.sweep model.depth=1 ")


# as a process of its own


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stabstudy.sweep", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


IMPORTS = """
import json, resource, sys
from stabstudy import sweep
code = sweep.main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [m for m in ("torch", "ray", "pandas", "matplotlib", "transformers", "datasets", "optuna") if m in sys.modules]
print(json.dumps({"code": code, "heavy": heavy, "cpu": used.ru_utime + used.ru_stime}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--list"], 0),
        (["--version"], 0),
        (["--dry-run"], 0),
        (["optim.lr=1e-3,1e-2", "data=synthetic,pysrc", "--dry-run"], 0),
        (["sweep=dataset", "--dry-run", "--json"], 0),
        (["--list", "--json"], 0),
        (["--status"], 2),
        (["optim.lr=nan", "optim.lrr=1"], 2),
    ],
)
def test_what_answers_without_training_is_quick_and_light(arguments, code):
    done = subprocess.run([sys.executable, "-c", IMPORTS, *arguments], capture_output=True, text=True, check=False)
    found = json.loads(done.stderr.splitlines()[-1])
    assert (found["code"], found["heavy"]) == (code, [])
    # CPU time, not wall time; on a machine much slower than the one of the goal, twice what a bare numpy import takes
    assert found["cpu"] < max(CPU_SECONDS, 20 * numpy_import_seconds()), found


def numpy_import_seconds() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_reader_that_goes_away_is_no_error():
    """Row 59: `... | head -1`."""
    pipe = subprocess.Popen(
        [sys.executable, "-m", "stabstudy.sweep", "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert pipe.stdout and pipe.stderr
    pipe.stdout.close()
    assert pipe.stderr.read() == ""
    assert pipe.wait() == 0
    pipe.stderr.close()


@pytest.mark.slow
def test_a_study_goes_on_when_its_reader_goes_away(small, tmp_path):
    """Row 59, while training: torch is imported, and every line of the board meets a closed pipe."""
    command = [sys.executable, "-m", "stabstudy.sweep", *small]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as pipe:
        assert pipe.stdout and pipe.stderr
        pipe.stdout.close()
        assert all(line.startswith("warning: train.") for line in pipe.stderr.read().splitlines())
    assert pipe.returncode == 0
    trials = store.open_study(tmp_path / "results" / "small").trials()
    assert [t.read_state().status for t in trials] == ["done", "done"]


def test_any_locale_and_no_home(tmp_path):
    """Row 60."""
    done = run(
        "--list", LC_ALL="C", LANG="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", HOME="/nonexistent", TZ="Odd/Zone"
    )
    assert done.returncode == 0 and "quickstart" in done.stdout, done.stderr
    done = run("study=ünder", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert done.returncode == 2 and done.stderr.startswith("error: conf: study: ")


def test_run_as_a_module_it_exits_with_the_code():
    assert run("optim.lr=nan").returncode == 2
