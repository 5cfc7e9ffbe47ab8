"""The time that a report on a large study takes, and its parts.

A planted study (log-normal norms, a learning loss; every tenth trial has spikes of x20 that come back), written as the
trainer leaves it, is reported as the command does it, on all cores. Prints the share of each part of the wall clock and
one JSON line. The parts: `reading` the records and their checksums, `statistics`, the `figures` of the page, its
`words` and tables, `writing` everything, the pages of the trials with their figures included. Reading is timed by
itself, by the same workers; statistics are what the tables take beyond it. `older`: the trials have no judgement of
their own, as in studies of older versions, so the report judges them; `judged`: they have, as trials do now. Memory is
that of this process and of its largest worker. The goal for 1,000 trials of 10,000 steps is 60 s on two cores, 2 GB in
all, and a page under 8 MB.

    python benchmarks/report.py [--tiny] [--trials 100] [--steps 10000]
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import resource
import tempfile
import time
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np

from stabstudy import config as cfg
from stabstudy import finished, store
from stabstudy.analysis.figures import registry
from stabstudy.analysis.report import study_page
from stabstudy.analysis.report.publish import publish
from stabstudy.analysis.spreading import spread
from stabstudy.analysis.study import update_tables
from stabstudy.analysis.tables import read_record
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import Source, judge_trial, write_summary
from stabstudy.state import State
from stabstudy.trace import TRACE, Rows

FINGERPRINT = "f" * 16
DEPTHS, RATES = (2, 4), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trials", type=int, default=100)
    arguments.add_argument("--steps", type=int, default=10_000)
    arguments.add_argument("--tiny", action="store_true", help="the smallest study, to see that all of it runs")
    given = arguments.parse_args()
    if given.tiny:
        given.trials, given.steps = 20, 120
    with tempfile.TemporaryDirectory() as folder:
        study = plant(Path(folder) / "planted", given.trials, given.steps)
        _start_workers()
        reading = read(study, given.trials * given.steps)
        older = measure(study, reading)
        spread(_judge, store.StudyFolder(study).trials(), given.trials * given.steps * 1e-5)
        judged = measure(study, reading)
        worker = max(spread(_peak_rss, range(64), 60.0))
        index = (study / "report" / "index.html").stat().st_size
        written = sum(f.stat().st_size for f in (study / "report").rglob("*") if f.is_file())
    line = {
        "trials": given.trials,
        "steps": given.steps,
        "older": older,
        "judged": judged,
        "peak_rss_gb": {"this": max(_peak_rss([0])), "worker": worker},
        "index_mb": round(index / 1e6, 2),
        "report_mb": round(written / 1e6, 1),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
    }
    for name, parts in (("older", older), ("judged", judged)):
        shares = ", ".join(
            f"{part} {seconds / parts['total']:.0%}" for part, seconds in parts.items() if part != "total"
        )
        print(f"{name}: {parts['total']:.1f} s: {shares}")
    print(json.dumps(line))


def read(folder: Path, steps: int) -> float:
    """Seconds to read every trace and verify it, without a statistic."""
    started = time.perf_counter()
    spread(_read, store.StudyFolder(folder).trials(), steps * 1e-6)
    return time.perf_counter() - started


def _read(trials: list[store.TrialFolder]) -> list[int]:
    return [len(rows) if (rows := read_record(trial, TRACE)) is not None else 0 for trial in trials]


def _judge(trials: list[store.TrialFolder]) -> list[int]:
    """Let each trial keep its judgement, as it does at its end."""
    for trial in trials:
        source = Source(cfg.stored(trial.read_config()["config"]), trial.read_state())
        rows = read_record(trial, TRACE)
        assert rows is not None
        write_summary(trial, judge_trial(rows, None, source, Rules()), source, Rules())
    return [0] * len(trials)


def _start_workers() -> None:
    """Start the processes that all parts share, so that their start counts in none."""
    spread(_imported, range(64), 60.0)


def _imported(items: list[int]) -> list[int]:
    for name in ("matplotlib.figure", "stabstudy.analysis.report.publish"):
        importlib.import_module(name)
    return items


def _peak_rss(items: list[int]) -> list[float]:
    """GB that the process that is asked has held at most."""
    return [round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)] * len(items)


def measure(folder: Path, reading: float) -> dict[str, float]:
    """Seconds of each part of a report; `reading` is that part of making the tables."""
    drawing = 0.0

    def timed(study: Any) -> Any:
        nonlocal drawing
        started = time.perf_counter()
        found = list(registry.figures(study))
        drawing += time.perf_counter() - started
        return found

    marks = [time.perf_counter()]
    study = update_tables(store.StudyFolder(folder))
    marks.append(time.perf_counter())
    with unittest.mock.patch.object(study_page, "figures", timed):
        made = study_page.report(study)
    marks.append(time.perf_counter())
    publish(study, made, folder / "report")
    marks.append(time.perf_counter())
    tables, words, writing = (b - a for a, b in itertools.pairwise(marks))
    parts = {
        "reading": reading, "statistics": tables - reading, "figures": drawing, "words": words - drawing,
        "writing": writing, "total": marks[-1] - marks[0],
    }  # fmt: skip
    return {name: round(seconds, 1) for name, seconds in parts.items()}


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
    state = State(
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


if __name__ == "__main__":
    main()
