"""The cost of recording a pack: microseconds of one core for a step of a trial, from the device's numbers to a verdict.

Made-up step vectors (log-normal norms, log-sd .25; a learning loss; in every fourth trial a few spikes of x20; no
divergence) of K trials go through the recorder in rings of 32 steps, a probe every 10 steps and a validation loss every
50, into K folders on disk; then every trial is compacted and judged as at its end. The parts:

    judge     the divergence monitor and the ends of trials (`Recorder.judge`)
    write     spikes, rows, the live files and their fsync (`Recorder.write`, `Writer.close`)
    compact   reading both records, Parquet and its checksum (`finished.read_whole`, `write`)
    verdict   all statistics, and `summary.json` (`judge_trial`, `write_summary`)

CPU seconds of the process, the median of the rounds; wall seconds are beside. One JSON line for each part and for the
sum, whose goal is 5 us at K 128, 1,000 steps and depth 6.

    python benchmarks/recording.py [--tiny] [--trials 128] [--steps 1000] [--depth 6] [--rounds 3] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import trainer
from numpy.typing import NDArray

from stabstudy import finished
from stabstudy.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import Source, judge_trial, write_summary
from stabstudy.state import State
from stabstudy.store import StudyFolder
from stabstudy.trace import PROBES, TRACE
from stabstudy.training.driver import Due, Taken, Tick
from stabstudy.training.probes import OF_LAYERS, SCALARS
from stabstudy.training.record import Recorder
from stabstudy.training.step import OF_STEP

RING = 32
COLUMNS = ("loss", "logz_mean", "logit_absmax", *OF_STEP)
TENSORS_OF_LAYER = 6
RULES = Rules()
GOAL_US = 5.0


@dataclass
class Clock:
    """Seconds of each part so far, of CPU and of the wall."""

    cpu: dict[str, float] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu[part] = self.cpu.get(part, 0.0) + time.process_time() - cpu
        self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where one round's time goes, and no figures")
    parser.add_argument("--tiny", action="store_true", help="the smallest shape, to see that all of it runs")
    given = parser.parse_args()
    trials, steps, depth, rounds = (
        (3, 70, 2, 1) if given.tiny else (given.trials, given.steps, given.depth, given.rounds)
    )
    if given.profile:
        profile(trials, steps, depth)
    else:
        measure(trials, steps, depth, rounds)


def measure(trials: int, steps: int, depth: int, rounds: int) -> dict[str, float]:
    """Microseconds of CPU for a step of a trial, by part; printed too."""
    clocks = [record(trials, steps, depth) for _ in range(rounds + 1)][1:]  # the first one imports and warms up
    shape = {"trials": trials, "steps": steps, "depth": depth, "rounds": rounds}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    found: dict[str, float] = {}
    for part in (*clocks[0].cpu, "sum"):
        cpu, wall = (
            1e6 * statistics.median(sum(c.values()) if part == "sum" else c[part] for c in series) / trials / steps
            for series in ([c.cpu for c in clocks], [c.wall for c in clocks])
        )
        found[part] = cpu
        line = {"benchmark": "recording", "part": part, **shape, "us": round(cpu, 3), "wall_us": round(wall, 3)}
        print(json.dumps(line | ({"goal": GOAL_US} if part == "sum" else {}) | machine), flush=True)
    return found


def profile(trials: int, steps: int, depth: int) -> None:
    """Print where a round's time goes."""
    record(trials, steps, depth)
    profiler = cProfile.Profile()
    profiler.runcall(record, trials, steps, depth)
    for order in ("cumtime", "tottime"):
        pstats.Stats(profiler).sort_stats(order).print_stats(45)


def record(trials: int, steps: int, depth: int) -> Clock:
    """One pack from its first step to its last member's verdict."""
    clock, configs = Clock(), [config(seed, steps, depth) for seed in range(trials)]
    rings = list(planted(configs))
    with tempfile.TemporaryDirectory() as folder:
        layers = np.repeat(np.arange(depth + 2), [1, *[TENSORS_OF_LAYER] * depth, 2])
        study = StudyFolder(Path(folder))
        folders = [study.trial(f"{k:016x}") for k in range(trials)]
        recorder = trainer.recorder_of(configs, [f.path for f in folders], COLUMNS, layers)
        for ticks, taken in rings:
            with clock.of("judge"):
                ended = recorder.judge(range(trials), ticks, taken, 0.002)
            assert not ended, "a planted trial diverged"
            with clock.of("write"):
                recorder.write()
        with clock.of("write"):
            for member in recorder.members:
                member.trace.close()
                member.probes.close()
        for k in range(trials):
            finish(recorder, k, folders[k], clock)
    return clock


def finish(recorder: Recorder, k: int, folder: Any, clock: Clock) -> None:
    """What Trial.finish does with the records of a member."""
    steps = int(recorder.rows[k])
    with clock.of("compact"):
        rows, probes = (finished.read_whole(folder.live(schema), schema) for schema in (TRACE, PROBES))
        records: dict[str, Any] = {}
        for table in (rows, probes):
            path, note = folder.finished(table.schema), {"trial_id": folder.trial_id}
            sha = finished.write(table, path, note, synced="folder" if table is probes else "file")
            records[table.schema.name] = {"rows": len(table), "sha256": sha}
    assert records["trace"]["rows"] == recorder.members[k].config.train.steps
    with clock.of("verdict"):
        done = State(folder.trial_id, "done", steps, stop_reason="complete", init_loss=6.5, records=records)
        source = Source(recorder.members[k].config, done)
        write_summary(folder, judge_trial(rows, probes, source, RULES), source, RULES)


def config(seed: int, steps: int, depth: int) -> TrialConfig:
    return TrialConfig(
        model=ModelConfig(depth=depth, dim=128, n_heads=4),
        optim=OptimConfig(lr=1e-3),
        data=DataConfig(seq_len=256),
        train=TrainConfig(steps=steps),
        seed=seed,
    )


def planted(configs: list[TrialConfig]) -> Iterator[tuple[list[Tick], Taken]]:
    """The rings of a pack: log-normal norms, with spikes in every fourth member."""
    random, K, steps = np.random.default_rng(0), len(configs), configs[0].train.steps
    depth, live = configs[0].model.depth, (True,) * len(configs)
    tensors = TENSORS_OF_LAYER * depth + 3
    norm = np.exp(0.25 * random.standard_normal((steps, K)))
    norm[random.integers(steps // 4, steps, 3)[:, None], np.arange(0, K, 4)] *= 20
    loss = 2.5 + 4 * np.exp(-np.arange(steps) / 300)[:, None] + 0.05 * random.standard_normal((steps, K))
    of_column: dict[str, Any] = {"loss": loss, "logz_mean": loss + 1, "logit_absmax": 6 + norm, "grad_norm": norm}
    of_column |= {"clip_scale": np.minimum(1, 1 / norm), "loss_scale": 1.0, "spike": 0.0, "targets": 2048.0}
    vectors = np.empty((steps, K, len(COLUMNS) + tensors))
    for i, name in enumerate(COLUMNS):
        vectors[..., i] = of_column[name]
    vectors[..., len(COLUMNS) :] = norm[..., None] / np.sqrt(tensors)
    for first in range(0, steps, RING):
        count = min(RING, steps - first)
        ticks = [Tick(i, (1e-3,) * K, live, Due.NOTHING) for i in range(first, first + count)]
        measured = {i: _probes(random, K, depth) for i in range(count) if (first + i + 1) % 10 == 0}
        yield ticks, Taken(vectors[first : first + count], measured)


def _probes(random: np.random.Generator, K: int, depth: int) -> NDArray[np.float64]:
    """Vectors [K, columns] of a probe, every number positive."""
    vectors = np.exp(0.1 * random.standard_normal((K, len(SCALARS) + len(OF_LAYERS) * depth)))
    vectors[:, SCALARS.index("sized")] = 1
    return vectors


if __name__ == "__main__":
    main()
