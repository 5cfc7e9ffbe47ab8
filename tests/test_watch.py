"""What counts as a hanging pack, and as a part of Ray that is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import live_rows
import pytest

from stabstudy import store, trace
from stabstudy.state import State
from stabstudy.sweeping import rounds
from stabstudy.sweeping.rounds import LOOK_SECONDS, Service, Silences, Watch

HANGING = """
import contextlib, os, socket, sys, time
from pathlib import Path
from stabstudy import disk, state, store
with contextlib.ExitStack() as held:
    for folder in map(store.TrialFolder, map(Path, sys.argv[1:])):
        held.enter_context(disk.lock(folder.path))
        attempt = state.Attempt(socket.gethostname(), os.getpid(), disk.utc_now(), engine={"device": "cpu"})
        folder.write_state(state.State(folder.trial_id, status="running", attempts=(attempt,)))
    print("ready", flush=True)
    time.sleep(600)
"""


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rounds.time, "monotonic", made)
    return made


class Running:
    """Packs as `Rounds` has them, and what is told to it."""

    def __init__(self, *packs: tuple[str, ...]):
        self.running = packs
        self.reasons: dict[str, str] = {}

    def hung(self, reasons: dict[str, str]) -> None:
        self.reasons |= reasons


class Hang:
    """A study with one process that holds the locks of these trials and does nothing."""

    def __init__(self, folder: Path, ids: Sequence[str]):
        self.study = store.StudyFolder(folder)
        self.members = [self.study.trial(trial_id) for trial_id in ids]
        for member in self.members:
            member.path.mkdir(parents=True)
        words = [sys.executable, "-c", HANGING, *(str(member.path) for member in self.members)]
        self.process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"
        self.rounds = Running(tuple(ids))

    def watch(self, limit: float = 120) -> Watch:
        return Watch(self.study, self.rounds, [], limit)  # type: ignore[arg-type]


Hanging = Callable[..., Hang]


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    hangs: list[Hang] = []

    def make(*ids: str) -> Hang:
        hangs.append(Hang(tmp_path / str(len(hangs)), ids))
        return hangs[-1]

    yield make
    for hang in hangs:
        hang.process.kill()
        hang.process.communicate()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that would have been killed."""
    pids: list[int] = []
    monkeypatch.setattr(rounds.os, "kill", lambda pid, number: pids.append(pid))
    return pids


def pass_time(watching: Watch, clock: Clock, seconds: float) -> None:
    """Look as often as a launch does for so long."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += LOOK_SECONDS
        assert watching.look() is None


def record(member: store.TrialFolder, step: int, seconds: float) -> None:
    live_rows.write(member.live(trace.TRACE), [{"step": step, "tokens": 1, "lr": 0.1, "seconds": seconds}])


def test_a_process_is_ended_after_the_limit_and_a_slow_one_after_twenty_median_steps(
    hanging: Hanging, clock: Clock, killed: list[int]
) -> None:
    quick, slow = hanging("0123456789"), hanging("123456789a")
    record(quick.members[0], 0, 0.1)
    record(slow.members[0], 0, 30.0)
    for hang, allowed in ((quick, 120), (slow, 600)):
        killed.clear()
        watching = hang.watch()
        pass_time(watching, clock, allowed)
        assert killed == []
        pass_time(watching, clock, 2 * LOOK_SECONDS)
        assert set(killed) == {hang.process.pid}
        [reason] = hang.rounds.reasons.values()
        assert f"{allowed} s were allowed" in reason


def test_a_process_before_its_first_step_may_be_compiling(hanging: Hanging, clock: Clock, killed: list[int]) -> None:
    hang = hanging("0123456789")
    watching = hang.watch()
    pass_time(watching, clock, 1200)
    assert killed == []
    pass_time(watching, clock, 2 * LOOK_SECONDS)
    assert killed, "but not for ever"


def test_a_row_ends_a_silence(hanging: Hanging, clock: Clock, killed: list[int]) -> None:
    hang = hanging("0123456789")
    record(hang.members[0], 0, 0.1)
    watching = hang.watch()
    for silent in range(1, 6):
        pass_time(watching, clock, 100)
        os.utime(hang.members[0].live(trace.TRACE), (silent, silent))
    assert killed == []


def test_a_pack_hangs_only_where_all_its_running_members_are_silent(
    hanging: Hanging, clock: Clock, killed: list[int]
) -> None:
    hang = hanging("0123456789", "123456789a", "23456789ab")
    for member in hang.members[:2]:
        record(member, 0, 0.1)
    # a done member's lock is held until the pack ends
    records = {"trace": {"rows": 1, "sha256": "0" * 64}}
    hang.members[2].write_state(State("23456789ab", status="done", records=records))
    watching = hang.watch()
    for written in range(1, 6):
        pass_time(watching, clock, 100)
        os.utime(hang.members[written % 2].live(trace.TRACE), (written, written))
    assert killed == [], "one member writes"
    pass_time(watching, clock, 140)
    assert set(killed) == {hang.process.pid}
    assert set(hang.rounds.reasons) == {"0123456789", "123456789a"}, "the done member is none of it"


def test_pauses_of_everything_are_no_silence(hanging: Hanging, clock: Clock, killed: list[int]) -> None:
    """A frozen machine, a suspended container: this process wakes with the trials, which write again."""
    hang = hanging("0123456789")
    record(hang.members[0], 0, 0.1)
    watching = hang.watch()
    for pause in (100.0, 500.0, 86_400.0) * 10:
        clock.now += pause
        assert watching.look() is None
    assert killed == []


def test_control_wall_clock_silence_would_have_killed(clock: Clock) -> None:
    silences = Silences()
    clock.now += 500.0
    silences.look({1: "a"})
    clock.now += 500.0
    assert silences.look({1: "a"}) == {1: LOOK_SECONDS}
    assert 500.0 > 120 > LOOK_SECONDS


def test_the_process_is_gone(hanging: Hanging, clock: Clock) -> None:
    hang = hanging("0123456789")
    record(hang.members[0], 0, 0.1)
    pass_time(hang.watch(limit=8), clock, 12)
    assert hang.process.wait(timeout=10) == -signal.SIGKILL
    assert hang.members[0].read_state().status == "lost"


def test_a_service_is_gone_where_it_refuses_twice(clock: Clock, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        service = Service("raylet", ("127.0.0.1", server.getsockname()[1]))
        watching = Watch(store.StudyFolder(tmp_path), Running(), [service], 120)  # type: ignore[arg-type]
        pass_time(watching, clock, 10)
    clock.now += LOOK_SECONDS
    assert watching.look() is None
    clock.now += LOOK_SECONDS
    assert watching.look() == "Ray's raylet has died"
