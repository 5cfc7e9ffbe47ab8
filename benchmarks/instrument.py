"""What do a trial's statistics cost, beside reading its trace and beside pandas code for the same rules?

Planted traces of 10,000 steps (log-normal norms, log-sd .25; a learning loss; four layer groups; in every second trace
three spikes of x20), each read and summarised in this process. CPU seconds, scaled to 1,000 traces. Prints one JSON
line for each measurement.

    python benchmarks/instrument.py [--traces 20] [--steps 10000]
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
from stabstudy.stability.calm import mad_outliers, ratio3_outliers

from stabstudy.finished import compact, read_parquet
from stabstudy.stability.detectors import mad_lin, mad_log, ratio3
from stabstudy.stability.rules import rules_for
from stabstudy.stability.summary import TrialFacts, summarise
from stabstudy.trace import TRACE, RowWriter


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--traces", type=int, default=20)
    arguments.add_argument("--steps", type=int, default=10_000)
    given = arguments.parse_args()
    rules = rules_for(given.steps)
    with tempfile.TemporaryDirectory() as folder:
        files = [plant(Path(folder), seed, given.steps) for seed in range(given.traces)]
        traces = [read_parquet(file, TRACE) for file in files]
        facts = TrialFacts(given.steps, given.steps // 50, 1.0, "done", "complete", 6.5, 2.5, beta2=0.95)
        norms, losses = [t["grad_norm"] for t in traces], [t["loss"] for t in traces]
        jobs: dict[str, Callable[[int], Any]] = {
            "read": lambda i: read_parquet(files[i], TRACE),
            "summarise": lambda i: summarise(traces[i], None, facts, rules),
            "our three rules": lambda i: (
                mad_outliers(norms[i], rules, "grad"),
                mad_outliers(losses[i], rules, "loss"),
                ratio3_outliers(norms[i], rules),
            ),
            "our three rules, streaming": lambda i: (
                mad_log(norms[i], rules),
                mad_lin(losses[i], rules),
                ratio3(norms[i], rules),
            ),
            "our three rules, pandas": lambda i: by_pandas(norms[i], losses[i], rules.window, rules.min_fill),
        }
        seconds = {name: measure(name, job, given.traces, given.steps) for name, job in jobs.items()}
    report("summarise over read", ratio=round(seconds["summarise"] / seconds["read"], 2))


def measure(name: str, job: Callable[[int], Any], traces: int, steps: int) -> float:
    """Median CPU seconds for a trace; the first is run once before, to warm up."""
    job(0)
    seconds = []
    for i in range(traces):
        begin = time.process_time()
        job(i)
        seconds.append(time.process_time() - begin)
    middle = statistics.median(seconds)
    us = round(1e6 * middle / steps, 3)
    report(name, n=traces, steps=steps, cpu_s_per_1000_traces=round(1000 * middle, 2), us_per_step=us)
    return middle


def by_pandas(norm: np.ndarray[Any, Any], loss: np.ndarray[Any, Any], window: int, fill: int) -> list[Any]:
    """The rules in rolling windows: without admission of levels that last, for which pandas has no window."""
    flagged = []
    for series, jump in ((np.log(norm), 0.3), (loss, 0.1)):
        y = pd.Series(series)
        rolling = y.rolling(window, min_periods=fill)
        center = rolling.median().shift(1)
        spread = rolling.apply(lambda w: np.median(np.abs(w - np.median(w))), raw=True).shift(1)
        flagged.append((y - center) / np.maximum(spread / 0.6745, jump / 6) >= 6)
    norms = pd.Series(norm)
    return [*flagged, norms >= 3 * norms.rolling(window, min_periods=fill).median().shift(1)]


def plant(folder: Path, seed: int, steps: int) -> Path:
    """A finished trace."""
    rng = np.random.default_rng(seed)
    norm = np.exp(0.25 * rng.standard_normal(steps))
    if seed % 2:
        norm[rng.integers(steps // 4, steps, 3)] *= 20
    loss = 2.5 + 4 * np.exp(-np.arange(steps) / 300) + 0.05 * rng.standard_normal(steps)
    writer = RowWriter(folder / f"{seed}.jsonl", TRACE)
    plain: dict[str, Any] = dict.fromkeys(TRACE.names)
    for step, (g, x) in enumerate(zip(norm.tolist(), loss.tolist(), strict=True)):
        known = {"step": step, "tokens": 256 * (step + 1), "seconds": 0.1, "lr": 1e-3, "loss": x, "grad_norm": g}
        known |= {"clip_scale": min(1.0, 1 / g), "layer_grad_norm": [g / 2] * 4, "logit_absmax": 6.0, "logz_mean": 5.0}
        writer.append(plain | known)
    writer.close()
    compact(writer.path, folder / f"{seed}.parquet", TRACE, {})
    writer.path.unlink()
    return folder / f"{seed}.parquet"


def report(what: str, **numbers: Any) -> None:
    print(json.dumps({"what": what, **numbers, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}), flush=True)


if __name__ == "__main__":
    main()
