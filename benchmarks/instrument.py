"""The cost of the detector and of a trial's statistics, beside reading the trace and beside pandas code for the rule.

The detector `jump` on both series: in blocks of 32 steps of 64 trials, as running trials hand them over, and on whole
series. Then finished traces of 10,000 steps (log-normal norms, log-sd .25; a learning loss; four layer groups; in every
second trace three spikes of x20), each read and summarised in this process. CPU seconds. Prints one JSON line for each
measurement; `us` is for a step of a trial, both series where both are judged.

    python benchmarks/instrument.py [--tiny] [--traces 20] [--steps 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabstudy.finished import read_parquet, write
from stabstudy.stability.detectors import Tail, jump, jump_block
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import TrialFacts, summarise
from stabstudy.trace import TRACE, Rows

Floats = NDArray[np.float64]
RULES = Rules()
BLOCK, TRIALS = 32, 64


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--traces", type=int, default=20)
    arguments.add_argument("--steps", type=int, default=10_000)
    arguments.add_argument("--tiny", action="store_true", help="the smallest shape, to see that all of it runs")
    given = arguments.parse_args()
    measure(*((2, 160) if given.tiny else (given.traces, given.steps)))


def measure(traces: int, steps: int) -> dict[str, float]:
    """Microseconds of CPU for a step of a trial, by what is done; printed too."""
    found = {f"jump, {BLOCK} steps of {TRIALS} trials at once": blocks(BLOCK, steps // BLOCK * BLOCK, traces)}
    found[f"jump, one step of {TRIALS} trials at once"] = blocks(1, steps, traces)
    with tempfile.TemporaryDirectory() as folder:
        files = [plant(Path(folder), seed, steps) for seed in range(traces)]
        rows = [read_parquet(file, TRACE) for file in files]
        facts = TrialFacts(steps, steps // 50, 1.0, "done", "complete", 6.5, 2.5, beta2=0.95)
        norms, losses = [t["grad_norm"] for t in rows], [t["loss"] for t in rows]
        jobs: dict[str, Callable[[int], Any]] = {
            "read": lambda i: read_parquet(files[i], TRACE),
            "summarise": lambda i: summarise(rows[i], None, facts, RULES),
            "jump, whole series": lambda i: (jump(norms[i], RULES, "grad"), jump(losses[i], RULES, "loss")),
            "jump, pandas": lambda i: by_pandas(norms[i], losses[i]),
        }
        for name, job in jobs.items():
            job(0)  # to warm up
            found[name] = 1e6 * statistics.median(cpu_seconds(job, i) for i in range(traces)) / steps
    for name, us in found.items():
        report(name, n=traces, steps=steps, us=round(us, 3))
    report("summarise over read", ratio=round(found["summarise"] / found["read"], 2))
    return found


def blocks(length: int, steps: int, rounds: int) -> float:
    """Microseconds of a step of a trial, both series; a norm in which one step in 200 is high, the median round."""
    rng = np.random.default_rng(0)
    norm = np.exp(0.25 * rng.standard_normal((TRIALS, steps)))
    norm[rng.random(norm.shape) < 1 / 200] *= 10
    loss = 2.5 + 0.05 * rng.standard_normal(norm.shape)
    steps = min(steps, 40 * length)

    def run(_: int) -> None:
        grad, lost = Tail.empty(TRIALS, RULES), Tail.empty(TRIALS, RULES)
        for begin in range(0, steps, length):
            _, grad = jump_block(norm[:, begin : begin + length], grad, RULES, "grad")
            _, lost = jump_block(loss[:, begin : begin + length], lost, RULES, "loss")

    run(0)
    return 1e6 * statistics.median(cpu_seconds(run, i) for i in range(rounds)) / steps / TRIALS


def cpu_seconds(job: Callable[[int], Any], i: int) -> float:
    begin = time.process_time()
    job(i)
    return time.process_time() - begin


def by_pandas(norm: Floats, loss: Floats) -> list[Any]:
    """The definition in rolling windows, for series without gaps."""
    flagged = []
    for y, k, least, scale in ((np.log(norm), 5, np.log(2), 0.05), (loss, 6, 0.1, 0.02)):
        level = pd.Series(y).rolling(5, min_periods=1).median().shift(1)
        e = pd.Series(y) - level
        windows = e.rolling(64, min_periods=11)
        spread = windows.apply(lambda w: np.nanmedian(np.abs(w - np.nanmedian(w))), raw=True).shift(1)
        z = (e - windows.median().shift(1)) / np.maximum(spread / 0.6745, scale)
        flagged.append((z >= k) & (e >= least))
    median = pd.Series(np.log(norm)).rolling(64, min_periods=12).median().shift(1)
    level = pd.Series(np.log(norm)).rolling(5).median().shift(1)
    return [*flagged, norm >= 3 * np.exp(np.maximum(median, level))]


def plant(folder: Path, seed: int, steps: int) -> Path:
    """A finished trace."""
    rng = np.random.default_rng(seed)
    norm = np.exp(0.25 * rng.standard_normal(steps))
    if seed % 2:
        norm[rng.integers(steps // 4, steps, 3)] *= 20
    loss = 2.5 + 4 * np.exp(-np.arange(steps) / 300) + 0.05 * rng.standard_normal(steps)
    plain = {"seconds": np.full(steps, 0.1), "lr": np.full(steps, 1e-3), "logit_absmax": np.full(steps, 6.0)}
    columns: dict[str, Any] = {"step": np.arange(steps), "tokens": 256 * np.arange(1, steps + 1), **plain}
    columns |= {"loss": loss, "grad_norm": norm, "clip_scale": np.minimum(1, 1 / norm)}
    columns |= {"logz_mean": np.full(steps, 5.0), "layer_grad_norm": np.repeat(norm[:, None] / 2, 4, axis=1)}
    absent = {"loss_scale": np.full(steps, np.nan), "skip": np.full(steps, None, object)}
    nulls = {n: np.full(steps, n in absent) for n in TRACE.names}
    write(Rows(TRACE, columns | absent, nulls), folder / f"{seed}.parquet", {})
    return folder / f"{seed}.parquet"


def report(what: str, **figures: Any) -> None:
    print(json.dumps({"what": what, **figures, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}), flush=True)


if __name__ == "__main__":
    main()
