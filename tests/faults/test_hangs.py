"""Workers that hang, and pauses of everything: the one is found in time, the other is not taken for it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import launches
from faults.campaign import Part
from faults.killer import kill_marked, marked, start
from faults.test_ray import Launch

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(1800)]
Begin = Callable[[str], Part]
LIMIT = 8
"""compute.hang_timeout, seconds."""
LATE = 10
"""So many seconds later a hang must have been found."""


@pytest.fixture
def launch(tmp_path: Path, cache: Path) -> Iterator[Launch]:
    """A launch of one trial that goes on for longer than all injections."""
    mark = f"hang-{random.randrange(10**9)}"
    folder = launches.folder(tmp_path / "hang")
    words = ["stabstudy.sweep", *launches.words(cache, 10_000_000, "ray"), f"compute.hang_timeout={LIMIT}"]
    words += ["optim.lr=1e-3", "optim.clip=1.0", "compute.retries=100"]
    run = Launch(folder, start(words, folder, mark), mark)
    yield run
    while kill_marked(mark):
        time.sleep(0.05)
    run.process.wait()


def wait_for_rows(launch: Launch, attempts: int, seconds: float = 120) -> bool:
    """Until an attempt of this number records rows of its own."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        for trial in launch.study.trials():
            state = trial.read_state()
            last = state.attempts[-1] if len(state.attempts) == attempts else None
            # only an attempt that names its engine names the step that it goes on from
            if last and last.engine and launch.rows()[trial.trial_id] > last.from_step + 20:
                return True
        time.sleep(0.05)
    return False


def attempts(launch: Launch) -> list[str]:
    """How each attempt of the trial ended."""
    [trial] = launch.study.trials()
    return [attempt.status for attempt in trial.read_state().attempts]


def test_hangs(part: Begin, launch: Launch) -> None:
    with part("hang") as running:
        for _ in running.injections():
            before = running.tried + 1
            assert wait_for_rows(launch, before), launch.words[-500:]
            [trial] = launch.study.trials()
            os.kill(trial.read_state().attempts[-1].pid, signal.SIGSTOP)
            began = time.monotonic()
            while attempts(launch)[before - 1] == "running" and time.monotonic() - began < 60:
                time.sleep(0.05)
            took = time.monotonic() - began
            running.check(attempts(launch)[before - 1] == "timeout", f"the attempt ended as {attempts(launch)[-1]}")
            running.check(took + 0.5 >= LIMIT and took < LIMIT + LATE, f"found after {took:.1f} s")
            running.check(f"{trial.trial_id} hung: nothing was recorded" in launch.words, "the user was not told")


def test_pauses(part: Begin, launch: Launch) -> None:
    """All processes of the launch stand still for longer than the limit, and go on."""
    with part("pause") as running:
        assert wait_for_rows(launch, 1), launch.words[-500:]
        for rng in running.injections():
            stopped = list(marked(launch.mark))
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(LIMIT + rng.uniform(1, 6))
            rng.shuffle(stopped)  # those that go on first see the others silent
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
                time.sleep(rng.uniform(0, 0.05))
            rows = max(launch.rows().values())
            limit = time.monotonic() + 30
            while max(launch.rows().values()) <= rows + 20 and time.monotonic() < limit:
                time.sleep(0.05)
            running.check(attempts(launch) == ["running"], f"attempts: {attempts(launch)}")
            running.check(max(launch.rows().values()) > rows + 20, "training did not go on")
            if attempts(launch) != ["running"]:
                break
