"""A folder with a sweep of a few tiny trials, and launches of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from faults import children
from faults.killer import Child

SWEEP = """\
# @package _global_
# What survives?
sweep:
  seeds: [0]
  grid:
    optim.lr: [1e-3, 1e-2, 1e-1]
    optim.clip: [1.0, null]
"""
TINY = ["sweep=check", "data=synthetic", "data.synthetic.bytes=15000", "data.seq_len=16", "model.dim=16",
        "model.n_heads=2", "model.depth=2", "train.batch_size=4", "optim.warmup_steps=3",
        "train.eval_sequences=8", "study=check"]  # fmt: skip


def folder(path: Path) -> Path:
    """A user's folder with the sweep."""
    (path / "sweeps").mkdir(parents=True)
    (path / "sweeps" / "check.yaml").write_text(SWEEP)
    return path


def study(folder: Path) -> Path:
    return folder / "results" / "check"


def words(cache: Path, steps: int = 40, launcher: str = "local") -> list[str]:
    """What is typed; there are four checkpoints, or one every 100 steps."""
    every = min(100, steps // 4)
    where = [f"compute.cache_dir={cache}", f"launcher={launcher}"]
    return [*TINY, *where, f"train.steps={steps}", f"train.checkpoint_every={every}"]


def local(folder: Path, cache: Path, steps: int = 40) -> Child:
    """A launch in one process."""
    return Child(children.sweep, words(cache, steps), folder / "log.txt", cwd=folder)


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def acknowledged(lines: Sequence[str]) -> dict[str, int]:
    """Rows by trial, as of the last write that returned."""
    pairs = [line.split() for line in lines]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit() and pair[0] != "exit"}


def ended(racers: Sequence[Child], count: int, seconds: float) -> list[Child]:
    """Those that have ended, once there are so many or the time is over."""
    limit = time.monotonic() + seconds
    over: list[Child] = []
    while len(over) < count and time.monotonic() < limit:
        over = [racer for racer in racers if racer.wait(0.01)]
    for racer in over:
        racer.end()
    return over
