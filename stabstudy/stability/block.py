"""The next steps of several trials, as the live detectors and the divergence monitor take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stabstudy.trace import SKIPS, Rows

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SPIKE, NO_TARGETS = SKIPS.index("spike") + 1, SKIPS.index("no_targets") + 1


@dataclass(frozen=True)
class Block:
    """Up to n rows of the trace of each of K trials, in order; what lies behind a trial's last row is not read.

    A null (not measured) is NaN here, and `loss_null` or `norm_null` keeps it apart from a NaN that was measured.
    """

    loss: Floats  # [K, n], nat/token
    norm: Floats  # [K, n], before clipping
    skip: NDArray[np.uint8]  # [K, n]; 0: none, else 1 + the policy's place in `trace.SKIPS`
    rows: NDArray[np.int64] | None = None  # [K], how many of the n rows a trial has; None: all of them
    loss_null: Bools | None = None  # [K, n]; None: no null
    norm_null: Bools | None = None

    @staticmethod
    def of(trace: Rows) -> Block:
        """A whole trace as the one block of one trial."""
        loss_null, norm_null = (trace.is_null(name)[None] for name in ("loss", "grad_norm"))
        return Block(
            np.asarray(trace["loss"], np.float64)[None],
            np.asarray(trace["grad_norm"], np.float64)[None],
            skip_codes(trace)[None],
            loss_null=loss_null if loss_null.any() else None,
            norm_null=norm_null if norm_null.any() else None,
        )

    @property
    def live(self) -> Bools | None:
        """The rows that the trials have, shape [K, n]; None: all of them."""
        return None if self.rows is None else np.arange(self.loss.shape[1]) < self.rows[:, None]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Rows of each trial, shape [K]."""
        return np.full(len(self.loss), self.loss.shape[1]) if self.rows is None else self.rows


def skip_codes(trace: Rows) -> NDArray[np.uint8]:
    """The column `skip` as numbers, shape [rows]; a policy that is not known counts as `nonfinite`."""
    codes = np.zeros(len(trace), np.uint8)
    skipped = np.flatnonzero(~trace.is_null("skip"))
    if len(skipped):
        known = {name: i + 1 for i, name in enumerate(SKIPS)}
        codes[skipped] = [known.get(name, known["nonfinite"]) for name in trace["skip"][skipped].tolist()]
    return codes


def proven(skip: NDArray[np.uint8]) -> Bools:
    """Whether a step's loss and norm count: it made an update, or would have but for `train.skip_spikes`.

    A spike is one whether or not a policy left its update out, as it is whether or not it was clipped. Steps skipped
    for other reasons had no value that is finite, or none at all.
    """
    counted: Bools = (skip == 0) | (skip == SPIKE)
    return counted
