"""The recorder: step vectors on the device become rows of the trace, spikes so far, and divergence.

On a CPU every step becomes a row at once. On CUDA up to `RING` steps stay on the device and come over in one copy, so
that no step waits for the device; rows of steps after the one that ended the trial (their updates were left out on the
device) are dropped.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.stability.block import Block
from stabstudy.stability.monitor import DivergenceMonitor
from stabstudy.stability.summary import LiveSpikes
from stabstudy.trace import SKIPS, Rows, RowWriter
from stabstudy.training import step as st

RING = 32
BLOCK = 32  # steps that the detector judges at once: one at a time would cost a hundred times as much


@dataclass(frozen=True)
class Pending:
    """One step whose vector may still be on the device; `vector` None: it had no valid target."""

    step: int
    lr: float
    vector: Tensor | None


class Recorder:
    """Writes the trace, and knows the step reached, the spikes up to the last block and whether the trial diverged."""

    def __init__(
        self,
        config: TrialConfig,
        layer_index: NDArray[np.int64],
        writer: RowWriter,
        monitor: DivergenceMonitor,
        spikes: LiveSpikes,
        on_device: bool,
    ):
        self.config, self.layer_index, self.writer = config, layer_index, writer
        self.monitor, self.spikes = monitor, spikes
        self.ring = RING if on_device else 1
        self.pending: list[Pending] = []
        self._unjudged: list[Block] = []
        self.rows = 0
        self.loss = self.grad_norm = math.nan
        self.tokens_per_second = 0.0
        self._clock = time.perf_counter()

    @property
    def code(self) -> str | None:
        """The divergence code that has fired."""
        return self.monitor.code[0]

    def replay(self, rows: Rows) -> None:
        """Bring the live detectors to where an uninterrupted trial would have them."""
        if len(rows):
            block = Block.of(rows)
            self.monitor.update(block)
            self.spikes.update(block)
            self.loss, self.grad_norm = float(block.loss[0, -1]), float(block.norm[0, -1])

    def start_clock(self) -> None:
        """Begin timing a step: what lay between (a probe, a checkpoint) is not part of it."""
        if not self.pending:
            self._clock = time.perf_counter()

    def add(self, step: int, lr: float, vector: Tensor | None) -> None:
        """Queue one step; it reaches the trace at the latest `RING` steps later."""
        self.pending.append(Pending(step, lr, vector))
        if len(self.pending) >= self.ring:
            self.drain()

    def drain(self) -> None:
        """Copy what is queued to the host (one copy) and append its rows."""
        if not self.pending:
            return
        vectors = [p.vector for p in self.pending if p.vector is not None]
        values = iter(torch.stack(vectors).cpu().double().numpy() if vectors else ())
        seconds = (time.perf_counter() - self._clock) / len(self.pending)
        for pending in self.pending:
            row = self._row(pending, None if pending.vector is None else next(values), seconds)
            alarm = self._watch(row["loss"], row["grad_norm"], row["skip"])
            self.writer.append(row, urgent=alarm)
            self.rows += 1
            if self.code == "nonfinite":
                break
        self.pending = []
        self.tokens_per_second = self.config.tokens_per_step / max(seconds, 1e-9)
        self._clock = time.perf_counter()

    def _watch(self, loss: float | None, norm: float | None, skip: str | None) -> bool:
        """Feed the live detectors; True where something happened that must reach the disk at once."""
        self.loss = math.nan if loss is None else loss
        self.grad_norm = math.nan if norm is None else norm
        block = Block(
            np.array([[self.loss]]),
            np.array([[self.grad_norm]]),
            np.array([[0 if skip is None else 1 + SKIPS.index(skip)]], np.uint8),
            loss_null=np.array([[loss is None]]),
            norm_null=np.array([[norm is None]]),
        )
        fired = self.monitor.update(block)[0] >= 0
        self._unjudged.append(block)
        spiked = len(self._unjudged) >= BLOCK and self._judge_spikes()
        return bool(spiked or skip is not None or fired or not math.isfinite(self.grad_norm + self.loss))

    def _judge_spikes(self) -> bool:
        """Let the detector take the rows since its last block; True where it flags one."""
        blocks, self._unjudged = self._unjudged, []
        loss, norm, skip = (np.hstack([getattr(b, name) for b in blocks]) for name in ("loss", "norm", "skip"))
        return bool(self.spikes.update(Block(loss, norm, skip))[0])

    def _row(self, pending: Pending, values: NDArray[np.float64] | None, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": pending.step,
            "tokens": (pending.step + 1) * self.config.tokens_per_step,
            "seconds": round(seconds, 6),
            "lr": pending.lr,
            "loss": None,
            "grad_norm": None,
            "clip_scale": None,
            "layer_grad_norm": None,
            "logit_absmax": None,
            "logz_mean": None,
            "loss_scale": None,
            "skip": "no_targets",
        }
        if values is None:
            return row
        number = values.tolist()
        row["loss"], row["grad_norm"] = number[st.LOSS], number[st.GRAD_NORM]
        row["logit_absmax"], row["logz_mean"] = number[st.LOGIT_ABSMAX], number[st.LOGZ_MEAN]
        row["clip_scale"] = number[st.CLIP_SCALE] if self.config.optim.clip is not None else None
        row["layer_grad_norm"] = self._layer_norms(values[st.TENSOR_NORMS :])
        scaled = self.config.train.precision == "fp16"
        row["loss_scale"] = number[st.LOSS_SCALE] if scaled else None
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        policy = "amp" if scaled else "nonfinite" if self.config.train.skip_nonfinite else None
        row["skip"] = ("spike" if number[st.SPIKE] else None) if finite else policy
        return row

    def _layer_norms(self, tensor_norms: NDArray[np.float64]) -> list[float]:
        squares = np.zeros(self.config.model.depth + 2)
        np.add.at(squares, self.layer_index, tensor_norms**2)
        norms: list[float] = np.sqrt(squares).tolist()
        return norms
