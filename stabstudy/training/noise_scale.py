"""The gradient noise scale: how many tokens a step needs before its gradient is more signal than noise.

McCandlish et al., arXiv 1812.06162, appendix A.1, from the micro-batches of one step. With G the true gradient, S the
trace of the covariance of one token's gradient, and g_i the mean gradient of micro-batch i with its n_i valid targets:

    E norm(g_i)^2 = G2 + S / n_i          the step's own, over all N targets: E norm(g)^2 = G2 + S / N

    Gs^2 = sum over micro-batches of (n_i / N) norm(g_i)^2        Gb^2 = norm(g)^2
    B_s = N / m, m micro-batches with any target                  B_b = N
    G2 = (B_b Gb^2 - B_s Gs^2) / (B_b - B_s)                      S = (Gs^2 - Gb^2) / (1/B_s - 1/B_b)

Weighted by their targets, micro-batches of unequal size give unbiased G2 and S too: sum of (n_i / N) (S / n_i) is
S m / N. One step's G2 and S scatter widely, and their ratio is biased, so the moving means are taken of each and the
ratio last.

Tokens of one sequence are not independent: in tokens the scale is comparable between trials of one kind of data, and is
no promise about other sequence lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.training.clipping import global_norm, tensor_norms

DECAY = 0.9
"""Of the moving means, for each measured step; both begin at 0, which their ratio does not feel."""


class MicroBatches:
    """What the micro-batches of one step add to the gradients, which are read and never written; K members at once."""

    def __init__(self, targets: Tensor):
        """`targets`: valid targets of each micro-batch, in their order, [micro-batches, K]."""
        self.targets = targets.double()
        self.squares: list[Tensor] = []  # n_i norm(g_i)^2 / N^2 of each, [K] float64
        self._before: list[Tensor] = []

    def add(self, grads: Sequence[Tensor]) -> None:
        """Look at the gradients [K, ...] after the backward pass of the next micro-batch."""
        if self._before:
            torch._foreach_sub_(self._before, list(grads))  # minus what was added; in place: one copy is enough
        added = self._before or list(grads)
        square = global_norm(tensor_norms(added)).double().square()
        targets = self.targets[len(self.squares)]
        self.squares.append(torch.where(targets > 0, square / targets, 0.0))
        if self._before:
            torch._foreach_copy_(self._before, list(grads))
        else:
            self._before = [g.clone() for g in grads]

    def terms(self, grads: Sequence[Tensor]) -> Tensor:
        """[K, 2], G2 and S in float64; not finite where fewer than two micro-batches have targets."""
        big, count = self.targets.sum(0), (self.targets > 0).sum(0)
        small = big / count
        big_square = global_norm(tensor_norms(grads)).double().square()
        small_square = big * torch.stack(self.squares).sum(0)
        g2 = (big * big_square - small * small_square) / (big - small)
        return torch.stack([g2, (small_square - big_square) / (1 / small - 1 / big)], dim=1)


class NoiseMeans:
    """Moving means of G2 and S over the measured steps of a trial."""

    def __init__(self) -> None:
        self.g2 = self.s = 0.0

    def add(self, g2: float, s: float) -> float | None:
        """Take the next pair, if it is finite; returns the noise scale in tokens, None where mean G2 <= 0."""
        if not math.isfinite(g2 + s):
            return None
        self.g2 = DECAY * self.g2 + (1 - DECAY) * g2
        self.s = DECAY * self.s + (1 - DECAY) * s
        return self.s / self.g2 if self.g2 > 0 else None

    def row(self, g2: float, s: float) -> dict[str, float | None]:
        """The probes columns of a step; all null where it was not measured, or its gradients were not finite."""
        if not math.isfinite(g2) or not math.isfinite(s):
            return {"noise_g2": None, "noise_s": None, "noise_scale": None}
        return {"noise_g2": g2, "noise_s": s, "noise_scale": self.add(g2, s)}

    def replay(self, g2: NDArray[np.float64], s: NDArray[np.float64]) -> None:
        """Bring the means to where an uninterrupted trial would have them; rows not measured are NaN."""
        for pair in zip(g2.tolist(), s.tolist(), strict=True):
            self.add(*pair)
