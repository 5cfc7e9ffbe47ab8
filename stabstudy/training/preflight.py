"""A check that gradient accumulation is exact for a model: one real batch, whole and in pieces, one gradient.

What a foreign model does with its inputs is not ours to know, and a wrong gradient hides well: a mean of micro-batch
means has about the right loss, and Adam hides a constant factor (LLaMA-Factory issue 7743). The targets are masked to
very unequal numbers, for equal ones would hide it all.

Run as a program, in a process of its own, so that its caller needs no torch: see `main`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stabstudy import config as cfg
from stabstudy.data.batches import Batches, open_batches
from stabstudy.training import clipping, families
from stabstudy.training.objective import IGNORE
from stabstudy.training.step import Stepper

SEQUENCES = 8
"""Of the trial's first batch, at most; more would take longer and show nothing else."""


def differences(config: cfg.TrialConfig, cache_dir: Path, device: torch.device) -> tuple[float, float]:
    """(of the loss, of the gradient norm): relative difference between the whole batch and one sequence at a time.

    At the initial weights, in fp32, on the first sequences of the trial's own data. NaN where one is not finite.
    """
    count = min(max(2, config.train.batch_size), SEQUENCES)
    train = replace(config.train, batch_size=count, micro_batch_size=count, precision="fp32", compile="off")
    whole = replace(config, train=train)
    split = replace(config, train=replace(train, micro_batch_size=1))
    batches = open_batches(whole, cache_dir)
    masked = unequal(batches.batch(0))
    (loss, norm), (split_loss, split_norm) = (_measured(c, batches, masked, device) for c in (whole, split))
    return abs(split_loss / loss - 1), abs(split_norm / norm - 1)


def unequal(windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The windows [B, T+1] with about T/B, 2T/B, ... T targets left in them."""
    masked = windows.copy()
    B, T = masked.shape[0], masked.shape[1] - 1
    for row in range(B):
        masked[row, 1 + max(1, T * (row + 1) // B) :] = IGNORE
    return masked


def _measured(
    config: cfg.TrialConfig, batches: Batches, windows: NDArray[np.int64], device: torch.device
) -> tuple[float, float]:
    """Loss and gradient norm of the batch in the micro-batches of the config, at the initial weights."""
    model = families.build(config.model, batches.corpus.vocab_size, config.data.seq_len, config.seed)
    stepper = Stepper([config], [model], device)
    of_pack = torch.from_numpy(windows)[None].to(device)
    scalars = stepper.accumulate(of_pack, (of_pack[..., 1:] != IGNORE).sum((1, 2)).float(), masked=True)
    return scalars["loss"].item(), clipping.global_norm(clipping.tensor_norms(stepper.grads)).item()


def main() -> None:
    """Read {cache_dir, device, threads, configs} as JSON, print [loss difference, norm difference] for each config."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    for values in asked["configs"]:
        apart = differences(cfg.from_dict(values), Path(asked["cache_dir"]), torch.device(asked["device"]))
        print(json.dumps(apart), flush=True)


if __name__ == "__main__":
    main()
