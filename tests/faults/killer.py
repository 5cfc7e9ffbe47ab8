"""Child processes that are made to be killed, what they have acknowledged, and whatever of a launch is still alive.

Children are forked from a server that has imported torch and the package and has no thread, lock or file of ours; so
one costs 20 ms and not four seconds, and no descriptor of a test lives on in it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "STABSTUDY_TEST_MARK"
"""A variable in the environment of a launch and of all that it starts; names the launch."""

# the server and every command read it
_paths = [str(ROOT), str(ROOT / "tests"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(_paths))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "faults.children"])  # pytest: what runs as __main__ is imported by children


class Child:
    """A child that runs `work(acknowledge, *arguments)`; `acknowledge(text)` is a line that the parent will have."""

    def __init__(self, work: Callable[..., None], *arguments: Any, failpoint: str = "", cwd: Path | None = None):
        reader, writer = CONTEXT.Pipe(duplex=False)
        self._acks, self._read = reader, b""
        self.process = CONTEXT.Process(target=_begin, args=(work, writer, failpoint, cwd, arguments), daemon=True)
        self.process.start()
        writer.close()

    def wait(self, seconds: float) -> bool:
        """Read what is acknowledged for so long; True where the child ended before."""
        limit = time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0:
            ready, _, _ = select.select([self._acks], [], [], left)
            if ready and not self._take():
                return True
        return False

    def wait_for_acks(self, count: int, seconds: float = 120) -> None:
        """Until so many lines are there, the child has ended, or the time is over."""
        limit = time.monotonic() + seconds
        while self._read.count(b"\n") < count and time.monotonic() < limit:
            ready, _, _ = select.select([self._acks], [], [], 1)
            if ready and not self._take():
                return

    def kill(self) -> list[str]:
        """SIGKILL, if it is still there; the lines that it acknowledged."""
        self.process.kill()
        return self.end(10)

    def end(self, seconds: float = 120) -> list[str]:
        """Wait for its end; the lines that it acknowledged. Raises TimeoutError where it does not end."""
        limit = time.monotonic() + seconds
        while self._take(blocking=False) and time.monotonic() < limit:
            time.sleep(0.001)
        self.process.join(max(0.1, limit - time.monotonic()))
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"a child did not end in {seconds} s")
        while self._take():
            pass
        self._acks.close()
        return self._read.decode().splitlines() if self._read.endswith(b"\n") else self._read.decode().splitlines()[:-1]

    @property
    def was_killed(self) -> bool:
        """By a signal; else it had ended before."""
        return self.process.exitcode is not None and self.process.exitcode < 0

    @property
    def code(self) -> int | None:
        """The exit code; negative: the signal that ended it."""
        return self.process.exitcode

    def _take(self, blocking: bool = True) -> bool:
        """Take what is in the pipe; False at its end."""
        if not blocking and not select.select([self._acks], [], [], 0)[0]:
            return True
        data = os.read(self._acks.fileno(), 1 << 16)
        self._read += data
        return bool(data)


def _begin(
    work: Callable[..., None], writer: Any, failpoint: str, cwd: Path | None, arguments: tuple[Any, ...]
) -> None:
    from stabstudy import failpoints

    if cwd is not None:
        os.chdir(cwd)
    failpoints.arm(failpoint)
    descriptor = writer.fileno()
    work(lambda text: os.write(descriptor, f"{text}\n".encode()), *arguments)


def killed(
    work: Callable[..., None],
    *arguments: Any,
    rng: random.Random,
    seconds: float,
    point: str = "",
    cwd: Path | None = None,
) -> Child:
    """A child that was killed: at a random moment, or, given a point, when that is reached, if it is in time."""
    child = Child(work, *arguments, failpoint=point, cwd=cwd)
    if not child.wait(30 if point else rng.uniform(0, seconds)):
        child.process.kill()
    return child


def marked(mark: str) -> dict[int, str]:
    """Processes with this mark in their environment: their command lines by pid. Zombies are none."""
    alive = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    alive[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return {pid: command for pid, command in alive.items() if command}


def kill_marked(mark: str, name: str = "") -> int:
    """SIGKILL at once what has the mark and `name` in its command line; how many there were."""
    pids = [pid for pid, command in marked(mark).items() if name in command]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(pids)


def start(words: list[str], cwd: Path, mark: str, **environment: str) -> subprocess.Popen[str]:
    """A command of its own session, marked, with its output in files of `cwd` named by the mark."""
    with (cwd / f"{mark}.out").open("w") as out, (cwd / f"{mark}.err").open("w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=cwd,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | {MARK: mark} | environment,
            start_new_session=True,
        )
