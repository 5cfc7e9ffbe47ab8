"""The cost of scheduling: a sweep through Ray Tune on 2 slots against the same trials trained in two bare processes.

    python benchmarks/orchestration.py [--tiny] [--trials 24] [--steps 200] [--repeats 3]

Prints one JSON line. Terms, all medians over the repeats, in seconds:

- `bare`: wall time of two processes (one thread each) that train half of the trials each, imports included.
- `ray`: wall time of `launch` with Ray Tune over the same trials, report and tables left out.
- `ray_start`: wall time of the same launch with two one-step trials: Ray's start, two actors, torch's import, shutdown.
- `bare_start`: the same for the bare processes, so that imports are not counted as training.
- `overhead`: (ray - ray_start) / (bare - bare_start) - 1, the share that orchestration adds to training.
- `driver_cpu_per_trial`: CPU seconds of the driver process per further trial.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from stabstudy import store
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.stability.rules import Rules
from stabstudy.sweeping.launch import launch, write_study
from stabstudy.sweeping.worker import train_pack


def plan(folder: Path, name: str, trials: int, steps: int) -> Plan:
    """`trials` cells that differ in the learning rate only, so that all cost the same."""
    rates = ",".join(f"{1e-3 * (1 + i / trials):.6f}" for i in range(trials))
    words = [
        "sweep=quickstart",
        f"optim.lr={rates}",
        "model.depth=2",
        "optim.clip=1.0",
        "seeds=1",
        f"train.steps={steps}",
    ]
    words += ["optim.warmup_steps=0", "train.checkpoint_every=1000000"]
    return make_plan([*words, f"study={name}", f"results_dir={folder}"], folder)


def train_bare(study: str, ids: list[str], cache: str) -> None:
    """What a hand-written script would do: one trial after another in one process."""
    engine = {"cache_dir": cache, "device": "cpu", "threads": 1, "keep_checkpoints": False}
    for trial_id in ids:
        train_pack([trial_id], {"study": study, "engine": engine, "rules": Rules().to_json()})


def bare_seconds(planned: Plan, cache: Path) -> float:
    study = store.StudyFolder(planned.folder)
    study.path.mkdir(parents=True)
    write_study(study, planned, planned.trials)
    ids = [t.trial_id for t in planned.trials]
    context = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    halves = [
        context.Process(target=train_bare, args=(str(study.path), part, str(cache))) for part in (ids[::2], ids[1::2])
    ]
    for process in halves:
        process.start()
    for process in halves:
        process.join()
    took = time.perf_counter() - began
    assert all(study.trial(i).read_state().status == "done" for i in ids)
    return took


def ray_seconds(planned: Plan) -> tuple[float, float]:
    """(wall, CPU of this process) of a launch through Ray."""
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):  # the board's lines; standard output is for the result
        outcome = launch(planned)
    assert outcome.code == 0, outcome
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(trials: int, steps: int, repeats: int) -> dict[str, Any]:
    rows: list[dict[str, float]] = []
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            cache = Path(os.environ.get("STABSTUDY_CACHE", scratch)) / "tokens"
            os.environ["STABSTUDY_CACHE"] = str(cache)
            ray_start, cpu_start = ray_seconds(plan(folder, f"ray-start-{repeat}", 2, 1))
            bare_start = bare_seconds(plan(folder, f"bare-start-{repeat}", 2, 1), cache)
            ray, cpu = ray_seconds(plan(folder, f"ray-{repeat}", trials, steps))
            bare = bare_seconds(plan(folder, f"bare-{repeat}", trials, steps), cache)
        rows.append(
            {
                "bare": bare,
                "bare_start": bare_start,
                "ray": ray,
                "ray_start": ray_start,
                "overhead": (ray - ray_start) / (bare - bare_start) - 1,
                "driver_cpu_per_trial": (cpu - cpu_start) / (trials - 2),
            }
        )
    medians = {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
    machine = {"cpus": len(os.sched_getaffinity(0)), "platform": platform.platform(), "load": os.getloadavg()[0]}
    return {
        "benchmark": "orchestration",
        "trials": trials,
        "steps": steps,
        "n": repeats,
        **medians,
        "overhead_all": [round(row["overhead"], 4) for row in rows],
        "machine": machine,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few short trials, to see that all of it runs")
    given = parser.parse_args()
    print(json.dumps(measure(*((4, 5, 1) if given.tiny else (given.trials, given.steps, given.repeats)))))
