"""Launches through a real Ray whose parts are killed: the driver ends in time and in words, and the study goes on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults import launches
from faults.campaign import Part
from faults.invariants import of_interrupted_trial, of_tables, violations
from faults.killer import kill_marked, marked, start
from stabstudy import disk, live, store, trace

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(1800)]
Begin = Callable[[str], Part]
STEPS = 1500
DRIVER_SECONDS = 60
"""In which a driver must end that has lost its Ray."""
AGENT_SECONDS = 60
"""In which Ray's agents must end whose raylet or driver was killed."""


@dataclass(frozen=True)
class Launch:
    """A launch that trains, in a folder of its own; `mark` names its processes."""

    folder: Path
    process: subprocess.Popen[str]
    mark: str

    @property
    def study(self) -> store.StudyFolder:
        return store.StudyFolder(launches.study(self.folder))

    def rows(self) -> dict[str, int]:
        """Rows on disk by trial, growing or finished."""
        found = {}
        for trial in self.study.trials():
            finished = trial.read_state().records.get("trace", {}).get("rows", 0)
            found[trial.trial_id] = finished or live.last_step(trial.live(trace.TRACE)) + 1
        return found

    @property
    def words(self) -> str:
        """What it printed."""
        return "".join((self.folder / f"{self.mark}.{end}").read_text() for end in ("out", "err"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = launches.folder(tmp_path_factory.mktemp("whole"))
    child = launches.local(folder, cache, STEPS)
    child.end(300)
    assert child.code == 0, launches.log(folder)
    return launches.study(folder)


def begun(folder: Path, cache: Path, rng: random.Random) -> Launch:
    """A launch that has some rows."""
    mark = f"{folder.name}-{rng.randrange(10**9)}"
    words = ["stabstudy.sweep", *launches.words(cache, STEPS, "ray")]
    launch = Launch(launches.folder(folder), start(words, folder, mark), mark)
    wanted, limit = rng.randint(20, 800), time.monotonic() + 120
    while max(launch.rows().values(), default=0) < wanted:
        assert launch.process.poll() is None and time.monotonic() < limit, f"no rows: {launch.words[-500:]}"
        time.sleep(0.05)
    return launch


@contextlib.contextmanager
def running_launch(folder: Path, cache: Path, rng: random.Random) -> Iterator[Launch]:
    """A launch that has some rows, and none of whose processes is left behind."""
    launch = begun(folder, cache, rng)
    try:
        yield launch
    finally:
        kill_marked(launch.mark)
        launch.process.wait()


def gone(mark: str, seconds: float) -> bool:
    """Whether all processes of a launch end in this time."""
    limit = time.monotonic() + seconds
    while marked(mark):
        if time.monotonic() > limit:
            return False
        time.sleep(0.2)
    return True


def free(launch: Launch, seconds: float) -> bool:
    """Whether no lock is held, in this time; a process that is killed on a loaded machine takes a while to be gone."""
    limit = time.monotonic() + seconds
    folders = [launch.study.path, *(trial.path for trial in launch.study.trials())]
    while any(map(disk.is_locked, folders)):
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def code_within(launch: Launch, seconds: float) -> int | None:
    try:
        return launch.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def resumed(launch: Launch, whole: Path, cache: Path) -> list[str]:
    """What does not hold when the study is brought to its end, in one process."""
    broken = []
    for trial in launch.study.trials():
        broken += of_interrupted_trial(trial)
    child = launches.local(launch.folder, cache, STEPS)
    child.end(300)
    broken += [f"exit {child.code} when resumed: {launches.log(launch.folder)[-200:]}"] if child.code else []
    return broken + violations(launch.study.path, whole) + of_tables(launch.study.path, whole)


def lost_ray(running: Part, folder: Path, whole: Path, cache: Path, name: str) -> None:
    """Kill a part of Ray that a launch cannot do without."""
    for rng in running.injections():
        with running_launch(folder / f"f{running.tried}", cache, rng) as launch:
            before = launch.rows()
            running.count(kill_marked(launch.mark, name) > 0 and launch.process.poll() is None)
            code = code_within(launch, DRIVER_SECONDS)
            running.check(code == 4, f"exit {code} within {DRIVER_SECONDS} s")
            last = launch.words.splitlines()[-1] if code is not None else ""
            running.check("the same command resumes" in last, f"its last line: {last[:100]!r}")
            running.check(gone(launch.mark, AGENT_SECONDS), f"I6 left: {list(marked(launch.mark).values())}"[:300])
            after = launch.rows()
            running.check(all(after[t] >= before[t] for t in before), "I1 rows are lost")
        running.add(resumed(launch, whole, cache))


def test_raylet(part: Begin, tmp_path: Path, whole: Path, cache: Path) -> None:
    with part("raylet") as running:
        lost_ray(running, tmp_path, whole, cache, "raylet/raylet ")


def test_gcs(part: Begin, tmp_path: Path, whole: Path, cache: Path) -> None:
    with part("gcs") as running:
        lost_ray(running, tmp_path, whole, cache, "gcs_server")


def test_worker(part: Begin, tmp_path: Path, whole: Path, cache: Path) -> None:
    """The launch goes on without it and trains its trial again."""
    with part("worker") as running:
        for rng in running.injections():
            with running_launch(tmp_path / f"f{running.tried}", cache, rng) as launch:
                training = [s for t in launch.study.trials() if (s := t.read_state()).status == "running"]
                running.count(bool(training))
                if training:
                    os.kill(rng.choice(training).attempts[-1].pid, signal.SIGKILL)
                code = code_within(launch, 180)
                running.check(code == 0, f"exit {code}: {launch.words[-200:]}")
                running.check(gone(launch.mark, AGENT_SECONDS), "I6 processes are left")
                running.check("Traceback" not in launch.words, "a traceback")
            running.add(violations(launch.study.path, whole) + of_tables(launch.study.path, whole))


def test_driver(part: Begin, tmp_path: Path, whole: Path, cache: Path) -> None:
    """Its trials stop soon, and all of Ray goes."""
    with part("driver of Ray") as running:
        for rng in running.injections():
            with running_launch(tmp_path / f"f{running.tried}", cache, rng) as launch:
                running.count(launch.process.poll() is None)
                launch.process.kill()
                running.check(free(launch, 30), "trials go on 30 s after their driver")
                running.check(gone(launch.mark, AGENT_SECONDS), f"I6 left: {list(marked(launch.mark).values())}"[:300])
            running.add(resumed(launch, whole, cache))


def test_everything_at_once(part: Begin, tmp_path: Path, whole: Path, cache: Path) -> None:
    with part("process group") as running:
        for rng in running.injections():
            launch = begun(tmp_path / f"f{running.tried}", cache, rng)
            running.count(launch.process.poll() is None)
            while kill_marked(launch.mark):
                time.sleep(0.05)
            launch.process.wait()
            running.check(free(launch, 5), "I6 a lock is held")
            running.add(resumed(launch, whole, cache))
