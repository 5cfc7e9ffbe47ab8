"""What children do until they are killed, with the package's own functions; see killer.py."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import stabstudy.analysis.report.publish  # noqa: F401
import stabstudy.analysis.report.study_page  # noqa: F401  # imported once, in the server
import stabstudy.planning.plan  # noqa: F401
import stabstudy.planning.preview  # noqa: F401
import stabstudy.sweeping.launch  # noqa: F401
from stabstudy import disk, live, store, trace
from stabstudy.encodings import Table
from stabstudy.stability.rules import Rules
from stabstudy.training import checkpoint
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine, Trial

Acknowledge = Callable[[str], object]

DEPTH = 12


def columns_at(steps: NDArray[np.int64]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A trace as a function of its steps, with NaN, infinities and nulls: (values, where they are null)."""
    x = np.sin(steps * 0.7) * 1e3
    columns = {
        "step": steps,
        "tokens": steps * 64 + 64,
        "seconds": steps / 1024,
        "lr": 1e-3 / (1 + steps),
        "loss": np.where(steps % 97 == 3, np.nan, x),
        "grad_norm": np.where(steps % 89 == 5, np.inf, np.abs(x)),
        "clip_scale": x / 3,
        "layer_grad_norm": x[..., None] * np.arange(1, DEPTH + 3),
        "skip": (steps % 4).astype(np.uint8),
    }
    return columns, {"clip_scale": steps % 13 == 0, "skip": steps % 5 > 0}


def rows_at(first: int, n: int) -> Table:
    """Rows of `columns_at`."""
    return live.records(trace.TRACE, trace.widths(DEPTH), *columns_at(np.arange(first, first + n)))


def write_rows(acknowledge: Acknowledge, path: Path, seed: str, most: int) -> None:
    """Append blocks of 1-64 rows to a record, and acknowledge its rows after each."""
    rng = random.Random(seed)
    writer = live.Writer(path, trace.TRACE, trace.widths(DEPTH))
    step = live.last_step(path) + 1
    while step < most:
        n = rng.randint(1, 64)
        writer.append(rows_at(step, n), urgent=True)
        step += n
        acknowledge(str(step))


def write_states(acknowledge: Acknowledge, folder: Path) -> None:
    """Replace a state again and again, each with one step more."""
    trial = store.TrialFolder(folder)
    state = trial.read_state()
    while True:
        state = dataclasses.replace(state, status="interrupted", step=state.step + 1, outcome="x" * (state.step % 5000))
        trial.write_state(state)
        acknowledge(str(state.step))


def tensors_at(step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint after so many steps holds."""
    generator = torch.Generator().manual_seed(step)
    shapes = {"model/a": (64, 128), "model/b": (257,), "optim/m": (64, 128), "step": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_checkpoints(acknowledge: Acknowledge, folder: Path, trial_id: str, first: int) -> None:
    """One checkpoint after another."""
    step = first
    while True:
        checkpoint.save(folder, trial_id, tensors_at(step), step)
        acknowledge(str(step))
        step += 1


def finish_trial(acknowledge: Acknowledge, folder: Path, cache: Path) -> None:
    """The end of a trial all of whose rows are recorded."""
    trial_folder = store.TrialFolder(folder)
    with disk.lock(folder):
        if trial_folder.read_state().status == "done":
            return
        trial = Trial(trial_folder, Engine(cache), Rules())
        trial.begin()
        acknowledge("begun")
        trial.finish("complete", trial.config.train.steps, 3.25)
        acknowledge("finished")


def train(acknowledge: Acknowledge, folders: Sequence[Path], pack: int, cache: Path, limit: int | None = None) -> None:
    """Train trials as packs, one after another; acknowledge each trial's rows when their write has returned.

    `limit`: bytes that a file may have; what is more is a short write, then EFBIG.
    """
    acknowledge_rows(acknowledge)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    trials = [store.TrialFolder(folder) for folder in folders]
    for first in range(0, len(trials), pack):
        states = run_pack(trials[first : first + pack], Engine(cache), Rules(), lambda members: False)
        for state in states:
            acknowledge(f"{state.trial_id} {state.status}")


def acknowledge_rows(acknowledge: Acknowledge) -> None:
    """From here on, each write to a trace that returned is a line 'trial_id rows'."""
    write = live.Writer._write

    def acknowledged(self: Any, rows: bytes) -> None:
        write(self, rows)
        if self.schema is trace.TRACE:
            last = int(np.frombuffer(rows, self.dtype)["step"][-1])
            acknowledge(f"{self.path.parent.name} {last + 1}")

    live.Writer._write = acknowledged  # type: ignore[method-assign]


def sweep(acknowledge: Acknowledge, words: Sequence[str], log: Path, go: Path | None = None) -> None:
    """The command `python -m stabstudy.sweep`, with its output in a file; exits with its code.

    `go`: a file that is waited for, so that many launches begin at once.
    """
    from stabstudy.sweep import main

    acknowledge_rows(acknowledge)
    if go is not None:
        acknowledge("ready")
        while not go.exists():
            time.sleep(0.001)
    with log.open("a", buffering=1) as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        code = main(list(words))
    acknowledge(f"exit {code}")
    sys.exit(code)


def sweep_without_a_lock(acknowledge: Acknowledge, words: Sequence[str], log: Path, go: Path | None = None) -> None:
    """For a negative control."""
    disk.lock = lambda folder: contextlib.nullcontext()  # type: ignore[assignment]
    sweep(acknowledge, words, log, go)


def report(acknowledge: Acknowledge, study: Path) -> None:
    """The report of a study, from its trials' files alone."""
    from stabstudy.report import write_report

    write_report(study, lambda line: None)
    acknowledge("written")


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder in place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def files(folder: Path) -> dict[str, bytes]:
    """All files below, by their relative paths."""
    return {os.fspath(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
