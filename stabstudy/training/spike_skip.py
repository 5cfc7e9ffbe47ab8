"""The policy `train.skip_spikes`: leave out the update of a step whose loss or gradient norm stands out.

A value stands out above mean + 6 standard deviations (of a sample) of the last 128 steps, from 64 on, its own step
excluded; a deviation below 1e-10 proves nothing. The rule of OLMo-core's and Levanter's skip-step, but for one flaw: a
step whose loss or norm is not finite enters nothing here, where one NaN in their window has them skip the next 128
ordinary steps. The values of a step that this policy skipped do enter, as published: so a new, higher level stops being
skipped by itself.

All of it happens on the device, in float64, for each member of a pack by itself; nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabstudy.config import SPIKE_SKIP_FROM

WINDOW, SIGMAS, FLAT = 128, 6.0, 1e-10


class SpikeSkip:
    """The last losses and norms of each member. `state` is all it remembers, by the keys of a checkpoint."""

    def __init__(self, members: int, device: torch.device):
        self.state = {
            "spike_skip/seen": torch.zeros(members, dtype=torch.float64, device=device),
            # losses, norms; a ring
            "spike_skip/window": torch.zeros(members, 2, WINDOW, dtype=torch.float64, device=device),
        }
        self._places = torch.arange(WINDOW, dtype=torch.float64, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1 where this step of a member must be skipped, else 0 (float32 [K]); then it enters the member's window."""
        seen_K, window_K2W = self.state.values()
        seen_K11 = seen_K[:, None, None]
        x_K2 = torch.stack([loss, norm], 1).double()
        finite_K = torch.isfinite(x_K2).all(1)
        filled = self._places < seen_K11
        n_K1 = seen_K[:, None].clamp(min=2, max=WINDOW)
        mean_K2 = torch.where(filled, window_K2W, 0.0).sum(2) / n_K1
        sd_K2 = (torch.where(filled, window_K2W - mean_K2[..., None], 0.0).square().sum(2) / (n_K1 - 1)).sqrt()
        out_K2 = (x_K2 > mean_K2 + SIGMAS * sd_K2) & (sd_K2 >= FLAT)
        entered = (self._places == seen_K11 % WINDOW) & finite_K[:, None, None]
        window_K2W.copy_(torch.where(entered, x_K2[..., None], window_K2W))
        spike_K = out_K2.any(1) & finite_K & (seen_K >= SPIKE_SKIP_FROM)
        seen_K.add_(finite_K)
        return spike_K.float()
