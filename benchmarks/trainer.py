"""The trainer's own loop on random tokens, for benchmarks: what pack.py runs, everything recorded, without a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stabstudy import live
from stabstudy.config import TrialConfig
from stabstudy.data.batches import Batches
from stabstudy.data.tokens import Corpus
from stabstudy.stability.rules import Rules
from stabstudy.stability.verdict import MonitorFacts
from stabstudy.trace import PROBES, TRACE, widths
from stabstudy.training import families
from stabstudy.training.clipping import NoiseMeans
from stabstudy.training.driver import Captured, Driver, Eager, feed
from stabstudy.training.loop import End, Heartbeat, Loop, Plan
from stabstudy.training.record import Recorded, Recorder
from stabstudy.training.step import Stepper, stacked

START_LOSS = 20.0
"""Given to the divergence monitor for the loss of the initial weights: no member of a benchmark ends."""


class NoCrew:
    """A crew that keeps no checkpoints; nothing ends."""

    def save(self, next_steps: dict[int, int]) -> None:
        pass

    def ended(self, member: int, end: End) -> None:
        raise RuntimeError(f"member {member} of a benchmark ended: {end.reason}")

    def hopeless(self, members: Sequence[int]) -> dict[int, str]:
        return {}

    def stopped(self, reasons: Mapping[int, str]) -> None:
        pass


def random_batches(config: TrialConfig, vocab: int, windows: int = 1024) -> Batches:
    """The batches of a trial from so many windows of random tokens."""
    count = windows * config.data.seq_len + 1
    tokens = np.random.default_rng(0).integers(0, vocab, count, np.uint32)
    corpus = Corpus(tokens, np.array([count], np.uint64), vocab, f"random {vocab} {count}", Path())
    sizes = config.train.batch_size, config.seed, config.data.validation_share, config.train.eval_sequences
    return Batches(corpus, config.data.seq_len, *sizes, config.final_eval_sequences)


def stepper_of(configs: Sequence[TrialConfig], vocab: int, device: torch.device, compiled: bool = False) -> Stepper:
    """As pack.py builds it."""
    models = (families.build(c.model, vocab, c.data.seq_len, c.seed) for c in configs)
    return Stepper(configs, models, device, compiled)


def recorder_of(
    configs: Sequence[TrialConfig], folders: Sequence[Path], columns: Sequence[str], layers: NDArray[np.int64]
) -> Recorder:
    """A recorder that writes two live files into each member's folder, which it makes."""
    members = []
    for folder, config in zip(folders, configs, strict=True):
        folder.mkdir(parents=True)
        entries = widths(config.model.depth)
        writers = [live.Writer(folder / f"{schema.name}.live", schema, entries) for schema in (TRACE, PROBES)]
        facts = MonitorFacts(config.train.steps, config.warmup_steps, START_LOSS)
        members.append(Recorded(config, writers[0], writers[1], facts, NoiseMeans(), 0))
    return Recorder(members, columns, layers, Rules())


def loop_of(
    configs: Sequence[TrialConfig],
    vocab: int,
    device: torch.device,
    folder: Path,
    heartbeat: Heartbeat,
    compiled: bool = False,
    ring: int | None = None,
) -> Loop:
    """The loop of a pack of these trials: captured on CUDA and, in rings of one step, eager on a CPU.

    `folder` receives the records. `heartbeat` stops the loop; its `run` goes on where it stopped.
    """
    cuda = device.type == "cuda"
    ring = ring or (32 if cuda else 1)
    stepper, batches = stepper_of(configs, vocab, device, compiled), [random_batches(c, vocab) for c in configs]
    evaluation, final = (
        stacked([part(b) for b in batches], device) for part in (Batches.evaluation, Batches.final_evaluation)
    )
    windows = feed(batches, [0] * len(configs), [c.train.steps for c in configs], device)
    driver: Driver = Eager(stepper, windows, evaluation)
    if ring > 1:
        driver = Captured(stepper, windows, evaluation, ring)
    names = tuple(str(k) for k in range(len(configs)))
    recorder = recorder_of(configs, [folder / name for name in names], stepper.columns, stepper.layer_index)
    plan = Plan(tuple(range(len(configs))), tuple(configs), names, ring, 1e9, 0.0, ((),) * len(configs))
    return Loop(plan, stepper, driver, recorder, evaluation, final, NoCrew(), heartbeat)
