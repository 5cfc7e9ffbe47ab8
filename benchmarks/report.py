"""How long does a report on a large study take, and where does the time go?

A planted study (log-normal norms, a learning loss; every tenth trial has spikes of x20 that come back), written as the
trainer leaves it, is reported in this process: reading the records and computing every statistic (`tables`), words,
tables and figures of the page (`page`), writing everything, trial pages included (`write`). A second report of the
unchanged study follows. Prints one JSON line: seconds of wall clock and CPU, peak memory, sizes. The goal for 1,000
trials of 10,000 steps is 60 s on two cores, 2 GB, and a page under 8 MB.

    python benchmarks/report.py [--trials 100] [--steps 10000]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from stabstudy import config as cfg
from stabstudy import finished, store
from stabstudy.analysis.page import report
from stabstudy.analysis.publish import publish
from stabstudy.analysis.study import update_tables
from stabstudy.trace import TRACE, Rows

FINGERPRINT = "f" * 16
DEPTHS, RATES = (2, 4), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trials", type=int, default=100)
    arguments.add_argument("--steps", type=int, default=10_000)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = plant(Path(folder) / "planted", given.trials, given.steps)
        first, second = measure(study), measure(study)
        page = (study / "report" / "index.html").stat().st_size
        written = sum(f.stat().st_size for f in (study / "report").rglob("*") if f.is_file())
    line = {
        "trials": given.trials,
        "steps": given.steps,
        "first": first,
        "unchanged": second,
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "index_mb": round(page / 1e6, 2),
        "report_mb": round(written / 1e6, 1),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
    }
    print(json.dumps(line))


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each part of a report."""
    marks = [_clock()]
    study = update_tables(store.StudyFolder(folder))
    marks.append(_clock())
    made = report(study)
    marks.append(_clock())
    publish(study, made, folder / "report")
    marks.append(_clock())
    parts = {"tables": (0, 1), "page": (1, 2), "write": (2, 3), "total": (0, 3)}
    return {
        name: {"wall_s": round(marks[b][0] - marks[a][0], 1), "cpu_s": round(marks[b][1] - marks[a][1], 1)}
        for name, (a, b) in parts.items()
    }


def plant(folder: Path, trials: int, steps: int) -> Path:
    """A finished study: depth x learning rate x as many seeds as it takes."""
    folder.mkdir()
    (folder / "sweep.yaml").write_text("# planted by a benchmark\n")
    cells = list(itertools.product(DEPTHS, RATES))
    for number in range(trials):
        seed, (depth, lr) = number // len(cells), cells[number % len(cells)]
        settings = {"model": {"depth": depth}, "optim": {"lr": lr}, "train": {"steps": steps}, "seed": seed}
        plant_trial(folder, cfg.from_dict(settings), number)
    return folder


def plant_trial(folder: Path, config: cfg.TrialConfig, number: int) -> None:
    """One trial as the trainer leaves it, without probes."""
    trial = store.StudyFolder(folder).trial(cfg.trial_id(config, FINGERPRINT))
    trial.path.mkdir(parents=True)
    identity = {"format": cfg.FORMAT_VERSION, "trial_id": trial.trial_id, "cell_id": cfg.cell_id(config, FINGERPRINT)}
    data = {"choices": {}, "case": None, "data_fingerprint": FINGERPRINT}
    store.write_json(trial.config_file, identity | {"config": cfg.to_dict(config)} | data)
    rows = record(config, number)
    sha = finished.write(rows, trial.finished(TRACE), {"trial_id": trial.trial_id})
    state = store.State(
        trial.trial_id,
        status="done",
        step=config.train.steps,
        stop_reason="complete",
        init_loss=6.5,
        final_loss=2.5 + abs(np.log10(config.optim.lr) + 2) / 5 + number % 7 / 100,
        eval_hash="e" * 16,
        records={"trace": {"rows": len(rows), "sha256": sha}},
    )
    trial.write_state(state)


def record(config: cfg.TrialConfig, number: int) -> Rows:
    """The trace of trial `number`."""
    random, steps = np.random.default_rng(number), config.train.steps
    norm = np.exp(0.2 * random.standard_normal(steps))
    if number % 10 == 0:
        norm[steps // 4 :: steps // 8] *= 20
    groups = config.model.depth + 2
    given: dict[str, Any] = {
        "step": np.arange(steps),
        "tokens": np.arange(1, steps + 1) * config.tokens_per_step,
        "loss": 2.5 + 4 * np.exp(-np.arange(steps) / 60) + 0.05 * random.standard_normal(steps),
        "grad_norm": norm,
        "clip_scale": np.minimum(1, 1 / norm),
        "layer_grad_norm": np.repeat(norm[:, None] / np.sqrt(groups), groups, axis=1),
        "skip": np.full(steps, None, dtype=object),
        "loss_scale": np.full(steps, np.nan),
    }
    columns = {c.name: given.get(c.name, np.full(steps, 0.01)) for c in TRACE.columns}
    absent = ("skip", "loss_scale")
    return Rows(TRACE, columns, {name: np.full(steps, name in absent) for name in columns})


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main()
