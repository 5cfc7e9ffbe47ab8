"""`stabstudy.run`: a launch from Python, resumed and grown, its errors, its interrupts, in threads and notebooks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from rich.console import Console
from test_launch import plant_foreign_checkpoint, same_traces, until

import stabstudy
from stabstudy import disk, store, sweep
from stabstudy.analysis.study import Study
from stabstudy.planning.compute import NotReadyError
from stabstudy.settings import ConfigError
from stabstudy.sweeping import progress
from stabstudy.sweeping.launch import Outcome
from stabstudy.sweeping.progress import Board

CHECK = """\
# @package _global_
# Does the launch do what it says?
sweep:
  seeds: [0]
  grid: {optim.lr: [1e-3, 1e-2]}
"""
TINY: dict[str, Any] = {
    "data": "synthetic",
    "data.synthetic.bytes": 15_000,
    "data.seq_len": 16,
    "model.dim": 16,
    "model.n_heads": 2,
    "model.depth": 2,
    "train.batch_size": 8,
    "train.steps": 30,
    "optim.warmup_steps": 3,
    "train.checkpoint_every": 10,
    "train.eval_sequences": 8,
    "train.eval_every": 15,
}
LONG = TINY | {
    "optim.lr": 1e-3,
    "train.steps": 1500,
    "train.checkpoint_every": 10_000,
    "train.eval_every": 150,
    "data.synthetic.bytes": 200_000,
}
pytestmark = pytest.mark.filterwarnings("ignore:(data|train)[^a-z].*(no verdict|repeated text):UserWarning")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a sweep of its own; the token cache is shared by the tests."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "check.yaml").write_text(CHECK)
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(study: store.StudyFolder, say: object, show: object) -> tuple[Study, Path, dict[str, object]]:
        return Study(study), study.report, {}

    monkeypatch.setattr("stabstudy.report.write", write)


def states(folder: Path, study: str = "check") -> dict[str, str]:
    trials = store.StudyFolder(folder / "results" / study).trials()
    return {trial.trial_id: trial.read_state().status for trial in trials}


def test_importing_imports_nothing_and_a_plan_neither_torch_nor_ray(folder: Path) -> None:
    code = (
        "import sys, stabstudy\n"
        "assert [m for m in sys.modules if m.startswith('stabstudy.')] == [] and 'numpy' not in sys.modules\n"
        "assert {'run', 'plan', '__version__'} <= set(dir(stabstudy))\n"
        f"print(stabstudy.plan('check', {TINY!r}))\n"
        "assert not {'torch', 'ray', 'pandas', 'matplotlib', 'IPython'} & set(sys.modules)\n"
        "from stabstudy import run\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[1:] == ["  optim.lr: 0.001, 0.01>"]


def test_it_trains_what_the_command_trains_then_resumes_then_grows(
    folder: Path, no_report: None, capsys: pytest.CaptureFixture[str]
) -> None:
    study = stabstudy.run("check", TINY, launcher="local")
    assert sorted(study.trials.index) == sorted(states(folder)) and set(states(folder).values()) == {"done"}
    assert "[2/2]" in capsys.readouterr().out
    words = [f"{name}={value}" for name, value in TINY.items()]
    assert sweep.main(["sweep=check", *words, "launcher=local", "results_dir=other"]) == 0
    assert same_traces(folder / "results" / "check", folder / "other" / "check")
    capsys.readouterr()
    stabstudy.run("check", TINY, launcher="local")
    assert "nothing to train: all 2 trials are done" in capsys.readouterr().out
    grown = stabstudy.run("check", TINY, seeds=2, launcher="local", progress=False)
    assert sum(grown.outcomes.values()) == 4 and set(states(folder)) > set(study.trials.index)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_script_without_a_main_guard_trains_and_reports(folder: Path) -> None:
    script = folder / "ask.py"
    script.write_text(f"import stabstudy\nprint(stabstudy.run('check', {TINY!r}, launcher='local').name)\n")
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith(f"report: {folder}/results/check/report/index.html\ncheck\n")
    assert ended.stdout.count("tokens to train on") == 1 and (folder / "results/check/report/index.html").exists()
    assert "UserWarning: train.steps: 2 of 2 trials will get no verdict" in ended.stderr


def test_errors_are_raised_and_nothing_is_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lrr: is not a setting \(did you mean optim\.lr"):
        stabstudy.run("check", {**TINY, "optim.lrr": [1, 2]})
    with pytest.raises(ConfigError, match=r"sweep: there is no such sweep \(did you mean check\?\)"):
        stabstudy.run("chek", TINY)
    with pytest.raises(ConfigError, match=r"train\.batch_size: must be at most"):
        stabstudy.run("check", {**TINY, "train.batch_size": 100_000}, launcher="local")
    with pytest.raises(NotReadyError, match=r"compute\.cpus_per_pack=1000: this machine has"):
        stabstudy.run("check", TINY, compute={"cpus_per_pack": 1000})
    assert not (folder / "results").exists() and capsys.readouterr().err == ""


def test_a_study_that_is_worked_on_or_newer_is_refused(folder: Path) -> None:
    plan = stabstudy.plan("check", TINY)
    plan.folder.mkdir(parents=True)
    with disk.lock(plan.folder), pytest.raises(disk.LockHeldError, match=f"pid {os.getpid()}"):
        stabstudy.run("check", TINY, launcher="local")
    (plan.folder / "provenance.json").write_text('{"format": 1000}')
    with pytest.raises(store.NewerFormatError):
        stabstudy.run("check", TINY, launcher="local")


def test_trials_that_fail_or_are_damaged_are_named_by_a_warning(folder: Path, no_report: None) -> None:
    plan = stabstudy.plan("check", TINY, seeds=2)
    victim, damaged, *_ = (store.StudyFolder(plan.folder).trial(trial.trial_id) for trial in plan.trials)
    plant_foreign_checkpoint(victim)
    damaged.path.mkdir(parents=True)
    damaged.state_file.write_text("{")
    (plan.folder / "sweep.yaml").write_text(plan.sweep_text)
    reason = f"check: not trained to the end: {victim.trial_id} failed: .*belongs to.*; {damaged.trial_id} damaged: "
    with pytest.warns(UserWarning, match=reason) as warned:
        study = stabstudy.run("check", TINY, seeds=2, launcher="local")
    assert Path(warned[-1].filename) == Path(__file__), "it points at the caller"
    assert study.outcomes["failed"] == 1 and sum(study.trials.state == "done") == 2


@pytest.mark.parametrize(
    ("outcome", "error", "said"),
    [
        (Outcome(3, early=True, reason="sweep=base failed"), store.StoreError, "sweep=base failed"),
        (Outcome(4, early=True, reason="no space left"), NotReadyError, "no space left"),
        (Outcome(130, early=True), KeyboardInterrupt, None),
    ],
)
def test_a_launch_that_ends_early_raises_and_writes_no_report(
    outcome: Outcome, error: type[BaseException], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the caller's own handler of the signal returns."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: numbers.append(number))
    monkeypatch.setattr("stabstudy.sweeping.launch.launch", lambda plan, say, console: outcome)
    try:
        with pytest.raises(error, match=said):
            stabstudy.run("check", TINY, launcher="local")
    finally:
        signal.signal(signal.SIGINT, before)
    assert numbers == ([signal.SIGINT] if outcome.signal else []) and not Path("results").exists()


def rows_of(folder: Path, study: str) -> int:
    """Steps in the live records of the study."""
    paths = (folder / "results" / study / "trials").glob("*/trace.live")
    return sum(path.stat().st_size for path in paths)


@pytest.mark.slow
def test_an_interrupt_leaves_checkpoints_and_the_same_call_goes_on(
    folder: Path, no_report: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        until(lambda: rows_of(folder, "check") > 2000)
        os.kill(os.getpid(), signal.SIGINT)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        stabstudy.run("check", LONG, launcher="local")
    thread.join()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == handlers
    assert list(states(folder).values()) == ["interrupted"]
    [stopped] = store.StudyFolder(folder / "results" / "check").trials()
    step = stopped.read_state().step
    assert 0 < step < LONG["train.steps"] and [p.name for p in stopped.checkpoints.iterdir()] == [f"step-{step:08d}"]
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("stopped; the same call resumes, and so does: python -m stabstudy.sweep sweep=check ")
    stabstudy.run("check", LONG, launcher="local")
    assert set(states(folder).values()) == {"done"} and len(stopped.read_state().attempts) == 2
    stabstudy.run("check", LONG, launcher="local", results_dir="whole")
    assert same_traces(folder / "results" / "check", folder / "whole" / "check")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 7), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_a_script_as_it_would_end_any(folder: Path, number: signal.Signals, code: int) -> None:
    script = (
        "import stabstudy\n"
        f"try: stabstudy.run('check', {LONG!r}, launcher='local')\n"
        "except KeyboardInterrupt: raise SystemExit(7)\n"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, text=True)
    until(lambda: rows_of(folder, "check") > 2000)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code and said.splitlines()[-1].startswith("stopped; the same call resumes")
    assert list(states(folder).values()) == ["interrupted"]


def test_it_runs_off_the_main_thread(folder: Path, no_report: None) -> None:
    with ThreadPoolExecutor(1) as pool:
        study = pool.submit(stabstudy.run, "check", TINY, launcher="local").result()
    assert sum(study.outcomes.values()) == 2 and set(states(folder).values()) == {"done"}


# in notebooks


class Handle:
    """What IPython gives to whoever displays something; keeps what is shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.shown.append(data["text/plain"])


def test_a_board_in_a_notebook_shows_one_table_and_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handle, clock = Handle(), [0.0]
    monkeypatch.setattr("IPython.display.display", lambda data, raw, display_id: handle)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Board("study: q?", {"a": "lr=1", "b": "lr=2"}, 0, console=Console(force_jupyter=True)) as board:
        board.start("a")
        for i in range(100):
            clock[0] += 0.1
            board.progress("a", {"step": i, "steps": 100, "loss": 2.5})
        board.say("a line")
    *tables, last = handle.shown
    assert 9 <= len(tables) <= 10, "one a second"
    assert tables[-1].startswith("study: q?\n0 of 2 trials ended") and "/100  2.500 " in tables[-1]
    assert "\x1b" not in tables[-1] and last.startswith("0 of 2 trials ended")
    assert capsys.readouterr().out == "a line\n"


@pytest.fixture
def kernel_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(Path(stabstudy.__file__).parent.parent))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.ray)])
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::PendingDeprecationWarning"
)
def test_a_notebook_trains_and_shows_progress(folder: Path, kernel_environment: None, launcher: str) -> None:
    given = TINY | {"train.steps": 200, "data.synthetic.bytes": 400_000}
    cells = [
        f"import stabstudy\nstudy = stabstudy.run('check', {given!r}, launcher={launcher!r})",
        "print(len(study.trials), sorted(study.trials.state.unique()))",
        f"study = stabstudy.run('check', {given!r}, seeds=2, launcher={launcher!r}, progress=False)",
        "print(len(study.trials))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    first, counted, silent, grown = (cell.outputs for cell in notebook.cells)
    assert counted[0].text == "2 ['done']\n" and grown[0].text == "4\n" and silent == []
    [table] = [o for o in first if o.output_type == "display_data"]
    assert table.data["text/plain"].startswith("2 of 2 trials ended, ")
    lines = "".join(o.text for o in first if o.get("name") == "stdout")
    assert "[2/2]" in lines and "report: " in lines and "\x1b" not in lines
    assert not [o for o in first if o.get("name") == "stderr"]


@pytest.fixture
def kernel(folder: Path, kernel_environment: None) -> Iterator[tuple[KernelManager, Any]]:
    manager = KernelManager()
    manager.start_kernel(cwd=str(folder))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.ray)])
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::PendingDeprecationWarning"
)
def test_interrupting_the_kernel_leaves_the_study_resumable(
    folder: Path, kernel: tuple[KernelManager, Any], launcher: str
) -> None:
    manager, client = kernel
    given = LONG | {"optim.lr": [1e-3, 1e-2], "train.steps": 3000}
    call = f"import stabstudy; stabstudy.run('check', {given!r}, launcher={launcher!r})"
    asked = client.execute(call, stop_on_error=False)  # else what is sent soon after an error is answered "aborted"
    until(lambda: rows_of(folder, "check") > 5000)
    manager.interrupt_kernel()
    reply = reply_to(client, asked)
    assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt"
    found = states(folder)
    assert "interrupted" in found.values() and not {"running", "lost"} & set(found.values())
    for trial in store.StudyFolder(folder / "results" / "check").trials():
        assert trial.read_state().status == "pending" or any(trial.checkpoints.iterdir())
    assert reply_to(client, client.execute("1 + 1"))["status"] == "ok", "the kernel lives"


def reply_to(client: Any, asked: str) -> dict[str, Any]:
    limit = time.monotonic() + 90
    while time.monotonic() < limit:
        message = client.get_shell_msg(timeout=90)
        if message["parent_header"].get("msg_id") == asked:
            return dict(message["content"])
    raise AssertionError("no reply")
