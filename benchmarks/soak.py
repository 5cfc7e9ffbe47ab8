"""A long sweep of tiny trials: does anything grow with their number?

    python benchmarks/soak.py [--tiny] [--trials 4000] [--pack auto] [--launcher ray]

Looks at the processes of one launch and at its temporary folder every two seconds. Prints a JSON line for each tenth of
the trials, and one with the last figures and what grew, per 1,000 trials, from the second tenth to the last (the first
is start-up):

- `driver_mb`, `ray_mb`, `worker_mb`: resident memory of the launch, of its process that talks to Ray, of the largest
  process that trains, MB.
- `driver_handles`, `ray_handles`, `worker_handles`: open file descriptors of the same.
- `workers`: processes that train.
- `temporary_mb`, `temporary_files`: what Ray and the launch have in the temporary folder.
- `scheduler_mb`: what the scheduler keeps in the study's folder (`.ray/`) while it runs.
- `report_seconds`, `report_mb`: of the report at the end, its time, and the driver's memory with it.
- `left_files`, `left_processes`: of those, at the end; must be 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Look:
    """What is there at one moment; see the module."""

    seconds: float
    done: int
    driver_mb: float
    driver_handles: int
    ray_mb: float
    ray_handles: int
    workers: int
    worker_mb: float
    worker_handles: int
    temporary_mb: float
    temporary_files: int
    scheduler_mb: float


GROWING = (
    *("driver_mb", "driver_handles", "ray_mb", "ray_handles", "workers", "worker_mb", "worker_handles"),
    *("temporary_mb", "temporary_files", "scheduler_mb"),
)


def words(trials: int, pack: str, launcher: str) -> list[str]:
    """Trials that differ in rate and seed, so that all cost the same."""
    rates = max(1, min(40, trials // 10))
    seeds = -(-trials // rates)
    grid = ",".join(f"{1e-3 * (1 + i / rates):.6f}" for i in range(rates))
    tiny = ["data=synthetic", "data.synthetic.bytes=15000", "data.seq_len=16", "model.dim=16", "model.n_heads=2"]
    tiny += ["model.depth=1", "train.batch_size=4", "train.steps=8", "optim.warmup_steps=0", "train.eval_sequences=4"]
    where = ["study=soak", "results_dir=results", f"launcher={launcher}", f"compute.pack={pack}"]
    return ["sweep=quickstart", *tiny, *where, "optim.clip=1.0", f"optim.lr={grid}", f"seeds={seeds}"]


def tree(root: int) -> list[int]:
    """The process and all below it."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def memory_mb(pid: int) -> float:
    """Resident; 0 for a process that has gone."""
    try:
        kilobytes = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(kilobytes[1]) / 1024 if kilobytes else 0.0


def handles(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def size(folder: Path) -> tuple[float, int]:
    """(MB, files) below a folder."""
    total = count = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except OSError:
                continue
            count += 1
    return total / 1e6, count


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def trains(pid: int) -> bool:
    """Whether this is a process that Ray trains in; without Ray the driver does."""
    return command_of(pid).startswith(b"ray::") and b"Agent" not in command_of(pid)


def look(began: float, driver: int, folder: Path, log: Path, temporary: Path) -> Look:
    pids = tree(driver)
    workers = [pid for pid in pids if trains(pid)] or [driver]
    ray = [pid for pid in pids if b"stabstudy.sweeping.ray_driver" in command_of(pid)] or [driver]
    done = re.findall(r"^\[(\d+)/", log.read_text(), re.MULTILINE)
    return Look(
        round(time.monotonic() - began, 1),
        int(done[-1]) if done else 0,
        round(memory_mb(driver), 1),
        handles(driver),
        round(memory_mb(ray[0]), 1),
        handles(ray[0]),
        len(workers),
        round(max(map(memory_mb, workers)), 1),
        max(map(handles, workers)),
        *(round(x, 2) for x in size(temporary)),
        round(size(folder / "results" / "soak" / ".ray")[0], 2),
    )


def growth(looks: list[Look]) -> dict[str, float]:
    """What grew per 1,000 trials: the medians of the last tenth of the looks less those of the second."""
    tenth = max(1, len(looks) // 10)
    early, late = looks[tenth : 2 * tenth] or looks[:1], looks[-tenth:]
    trials = median(late, "done") - median(early, "done") or 1
    return {f"{n}_per_1000": round((median(late, n) - median(early, n)) / trials * 1000, 2) for n in GROWING}


def left(pids: set[int]) -> int:
    """How many of these are there ten seconds later; Python's helpers of a process end just after it."""
    limit = time.monotonic() + 10
    while (count := sum(memory_mb(pid) > 0 for pid in pids)) and time.monotonic() < limit:
        time.sleep(0.1)
    return count


def median(looks: list[Look], name: str) -> float:
    return statistics.median(getattr(x, name) for x in looks)


def measure(trials: int, pack: str = "auto", launcher: str = "ray", every: float = LOOK_SECONDS) -> dict[str, object]:
    """Run the sweep; print looks and return the last line."""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as temporary:
        folder, log = Path(scratch), Path(scratch, "log")
        environment = os.environ | {"TMPDIR": temporary, "STABSTUDY_CACHE": str(folder / "cache")}
        command = [sys.executable, "-m", "stabstudy.sweep", *words(trials, pack, launcher)]
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        began, looks, pids = time.monotonic(), list[Look](), set[int]()
        while process.poll() is None:
            pids |= set(tree(process.pid))
            looks.append(look(began, process.pid, folder, log, Path(temporary)))
            if len(looks) == 1 or looks[-1].done // max(1, trials // 10) > looks[-2].done // max(1, trials // 10):
                print(json.dumps(asdict(looks[-1])), flush=True)
            time.sleep(every)
        if process.returncode:
            raise RuntimeError(f"exit {process.returncode}: {log.read_text()[-500:]}")
        training = [x for x in looks if 0 < x.done < looks[-1].done] or looks
        last = {"benchmark": "soak", "trials": looks[-1].done, "seconds": training[-1].seconds, "looks": len(training)}
        last |= growth(training) | {name: getattr(training[-1], name) for name in GROWING}
        last |= {"report_seconds": round(looks[-1].seconds - training[-1].seconds, 1), "report_mb": looks[-1].driver_mb}
        last |= {"left_files": size(Path(temporary))[1], "left_processes": left(pids)}
        return last | {"launcher": launcher, "pack": pack, "load": os.getloadavg()[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--pack", default="auto")
    parser.add_argument("--launcher", default="ray")
    parser.add_argument("--tiny", action="store_true", help="a few trials in one process, to see that all of it runs")
    given = parser.parse_args()
    tiny = (8, "auto", "local", 0.2)
    print(json.dumps(measure(*(tiny if given.tiny else (given.trials, given.pack, given.launcher)))))
