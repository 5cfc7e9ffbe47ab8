"""The policy `train.skip_spikes`: leave out the update of a step whose loss or gradient norm stands out.

A value stands out above mean + 6 standard deviations (of a sample) of the last 128 steps, from 64 on, its own step
excluded; a deviation below 1e-10 proves nothing. The rule of OLMo-core's and Levanter's skip-step, but for one flaw: a
step whose loss or norm is not finite enters nothing here, where one NaN in their window has them skip the next 128
ordinary steps. The values of a step that this policy skipped do enter, as published: so a new, higher level stops being
skipped by itself.

All of it happens on the device, in float64; nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabstudy.config import SPIKE_SKIP_FROM

WINDOW, SIGMAS, FLAT = 128, 6.0, 1e-10


class SpikeSkip:
    """The last losses and norms of one trial. `state` is all it remembers."""

    def __init__(self, device: torch.device):
        self.state = {
            "seen": torch.zeros((), dtype=torch.float64, device=device),
            "window": torch.zeros(2, WINDOW, dtype=torch.float64, device=device),  # losses, norms; a ring
        }
        self._places = torch.arange(WINDOW, dtype=torch.float64, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1 where this step must be skipped, else 0 (0-dim float32); then the step enters the window."""
        seen, window = self.state["seen"], self.state["window"]
        x = torch.stack([loss, norm]).double()
        finite = torch.isfinite(x).all()
        filled = self._places < seen
        n = seen.clamp(min=2, max=WINDOW)
        mean = torch.where(filled, window, 0.0).sum(1) / n
        sd = (torch.where(filled, window - mean[:, None], 0.0).square().sum(1) / (n - 1)).sqrt()
        out = (x > mean + SIGMAS * sd) & (sd >= FLAT)
        window.copy_(torch.where((self._places == seen % WINDOW) & finite, x[:, None], window))
        spike = out.any() & finite & (seen >= SPIKE_SKIP_FROM)
        seen.add_(finite)
        return spike.float()
