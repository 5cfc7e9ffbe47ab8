"""How launches end: signals to them, the death of what they depend on, and what is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stabstudy import disk, store
from stabstudy.cli import outlets
from stabstudy.state import State
from stabstudy.sweeping import ray_backend

TINY = [
    "optim.lr=1e-3,1e-2", "seeds=1", "study=s", "data=synthetic", "data.synthetic.bytes=15000", "data.seq_len=16",
    "model.dim=16", "model.n_heads=2", "model.depth=1", "train.batch_size=4", "optim.warmup_steps=3",
    "train.checkpoint_every=10", "train.eval_sequences=8",
]  # fmt: skip
LONG, SHORT = "train.steps=200000", "train.steps=40"
MARK = "STABSTUDY_TEST_ENDINGS"


@dataclasses.dataclass(frozen=True)
class Running:
    """A launch in a process group of its own."""

    process: subprocess.Popen[str]
    study: store.StudyFolder
    mark: str

    def states(self) -> list[State]:
        return [trial.read_state() for trial in self.study.trials()]

    def wait_for_checkpoints(self, count: int) -> None:
        self.wait_until(lambda: sum(any(t.checkpoints.glob("step-*0")) for t in self.study.trials()) >= count)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < limit, "waited too long"
            time.sleep(0.05)

    def alive(self) -> dict[int, str]:
        """Every process of the launch: pid -> name."""
        names = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"{MARK}={self.mark}\0".encode() in (path / "environ").read_bytes()
                state = (path / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if marked and state != "Z":
                    names[int(path.name)] = (path / "comm").read_text().strip()
            except OSError:
                continue
        return names

    def pid_of(self, name: str) -> int:
        return next(pid for pid, other in self.alive().items() if other == name)

    def end(self, seconds: float) -> tuple[int, str]:
        """(exit code, standard error), at the latest after so many seconds."""
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Start]:
    runs: list[Running] = []

    def begin(*words: str, command: tuple[str, ...] = (), **popen: object) -> Running:
        mark = f"{request.node.name}-{os.getpid()}-{len(runs)}"
        cache = str(tmp_path_factory.getbasetemp() / "cache")
        environment = {**os.environ, MARK: mark, "STABSTUDY_CACHE": cache}
        process = subprocess.Popen(
            [*command, sys.executable, "-m", "stabstudy.sweep", *TINY, *words],
            cwd=tmp_path,
            env=environment,
            text=True,
            start_new_session=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen,  # type: ignore[call-overload]
        )
        runs.append(Running(process, store.StudyFolder(tmp_path / "results" / "s"), mark))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in run.alive():
            os.kill(pid, signal.SIGKILL)
        run.process.communicate()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder below which the path of a socket stays short enough."""
    with tempfile.TemporaryDirectory(prefix="e-") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_signal_ends_a_local_launch_with_a_checkpoint(start: Start, number: signal.Signals, code: int) -> None:
    run = start(LONG, "launcher=local")
    run.wait_for_checkpoints(1)
    began = time.monotonic()
    run.process.send_signal(number)
    ended, errors = run.end(30)
    assert ended == code and time.monotonic() - began < 15
    assert errors.splitlines()[-1].startswith("stopped; the same command resumes: python -m stabstudy.sweep ")
    [state] = [s for s in run.states() if s.status != "pending"]
    assert state.status == "interrupted" and state.attempts[-1].ended is not None
    [*_, newest] = sorted(run.study.trial(state.trial_id).checkpoints.iterdir())
    assert newest.name == f"step-{state.step:08d}", "the step at which it was stopped"


@pytest.mark.slow
def test_a_signal_leaves_one_object_that_says_how_to_go_on(start: Start) -> None:
    run = start(LONG, "launcher=local", "--json")
    run.wait_for_checkpoints(1)
    run.process.send_signal(signal.SIGTERM)
    out, errors = run.process.communicate(timeout=30)
    body = json.loads(out)
    assert run.process.returncode == body["exit_code"] == 143 and (body["kind"], body["early"]) == ("launch", True)
    assert errors.splitlines()[-1] == f"stopped; the same command resumes: {body['resume']}"
    assert body["counts"]["states"]["interrupted"] == 1 and body["report"] is None


@pytest.mark.slow
def test_nohup_protects(start: Start) -> None:
    run = start("train.steps=400", "launcher=local", command=("nohup",))
    run.wait_for_checkpoints(1)
    run.process.send_signal(signal.SIGHUP)
    assert run.end(120)[0] == 0 and {s.status for s in run.states()} == {"done"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("to_group", [False, True], ids=["driver", "group"])
def test_sigterm_ends_a_launch_through_ray_in_order(start: Start, to_group: bool) -> None:
    """As a batch system, a container runtime, an init system send it: to one process, or to all of them."""
    run = start(LONG)
    run.wait_for_checkpoints(2)
    began = time.monotonic()
    if to_group:
        for pid in run.alive():
            os.kill(pid, signal.SIGTERM)
    else:
        run.process.send_signal(signal.SIGTERM)
    code, errors = run.end(60)
    assert code == 143 and time.monotonic() - began < 20, errors
    assert errors.splitlines()[-1].startswith("stopped; the same command resumes: ")
    assert "Traceback" not in errors and "C++" not in errors
    assert {s.status for s in run.states()} == {"interrupted"}
    assert [p.name for p in run.study.path.iterdir() if p.name.startswith(".")] == [".lock"]
    limit = time.monotonic() + 30
    while run.alive() and time.monotonic() < limit:
        time.sleep(0.2)
    assert run.alive() == {}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("process", "name"), [("raylet", "node manager (raylet)"), ("gcs_server", "control service (gcs_server)")]
)
def test_the_death_of_a_part_of_ray_ends_the_launch(start: Start, process: str, name: str) -> None:
    run = start(LONG)
    run.wait_for_checkpoints(2)
    os.kill(run.pid_of(process), signal.SIGKILL)
    code, errors = run.end(60)
    assert code == 4, errors
    *_, reason, last = errors.splitlines()
    assert reason == f"error: machine: Ray's {name} has died"
    assert last.startswith("stopped; the same command resumes: ")
    assert {s.status for s in run.states()} == {"interrupted"}


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_launch_leaves_no_process_and_the_next_one_takes_its_folders(
    start: Start, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_folder))
    run = start(LONG)
    run.wait_for_checkpoints(2)
    run.process.kill()
    limit = time.monotonic() + 60
    while run.alive() and time.monotonic() < limit:
        time.sleep(0.2)
    assert run.alive() == {}
    [left] = short_folder.glob("stabstudy-*")
    os.utime(left, (0, 0))  # a minute has passed
    ray_backend.remove_abandoned_scratch(short_folder)
    assert not left.exists()


def test_folders_in_use_and_foreign_ones_stay(tmp_path: Path) -> None:
    used, gone, foreign, young = (tmp_path / f"stabstudy-{name}" for name in ("used", "gone", "foreign", "young"))
    for folder in (used, gone, foreign, young):
        folder.mkdir()
    for folder in (used, gone, young):
        (folder / ".lock").touch()
    link = tmp_path / "stabstudy-link"
    link.symlink_to(gone)
    for folder in (used, gone, foreign):
        os.utime(folder, (0, 0))
    with disk.lock(used):
        ray_backend.remove_abandoned_scratch(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"stabstudy-{n}" for n in ("foreign", "link", "used", "young")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_full_disk_is_named_ends_the_launch_and_leaves_nothing_half_written(
    start: Start, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    monkeypatch.setenv("STABSTUDY_FAILPOINT", "checkpoint.tensors_written:enospc@2+")
    run = start("train.steps=60", f"launcher={launcher}")
    code, errors = run.end(120)
    assert code == 4, errors
    *_, reason, last = errors.splitlines()
    assert reason.startswith("error: machine: No space left on device")
    assert last.startswith("stopped; the same command resumes: ")
    assert "disk_full" in {s.status for s in run.states()} <= {"disk_full", "pending", "interrupted"}
    assert list(run.study.path.rglob("*.tmp")) == []
    monkeypatch.delenv("STABSTUDY_FAILPOINT")
    assert start("train.steps=60", "launcher=local").end(120)[0] == 0


@pytest.mark.slow
def test_a_full_or_closed_output_stops_nothing(start: Start, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        code, errors = start(SHORT, "launcher=local", stdout=full).end(120)
        assert (code, errors.count("Error")) == (0, 0), errors
    shell = ("sh", "-c", 'exec "$@" >&- 2>&-', "sh")
    run = start(SHORT, "launcher=local", "optim.clip=0.5", "study=t", command=shell)
    run.process.communicate(timeout=120)
    assert run.process.returncode == 0
    trials = store.StudyFolder(tmp_path / "results" / "t").trials()
    assert {trial.read_state().status for trial in trials} == {"done"}


CLOSED = """
import os, sys
os.close(1)
from stabstudy.cli import outlets
with outlets():
    file = open(sys.argv[1], "w")
    print("to nobody", flush=True)
    assert file.fileno() > 2
    file.close()
"""


def test_a_closed_output_is_not_the_next_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    subprocess.run([sys.executable, "-c", CLOSED, str(path)], check=True)
    assert path.read_text() == ""


def test_streams_that_are_none_take_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with outlets():
        print("nothing", flush=True)
