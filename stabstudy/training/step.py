"""One optimizer step: micro-batches, one normaliser, one norm measurement, one decision, one update.

The loss of a step is the sum of cross-entropies over ALL its micro-batches divided by N, the valid targets of the whole
step, so neither loss nor gradient depends on `micro_batch_size` (the mean of micro-batch means does, and its gradient
norm is off by up to 1.9 where its loss looks right: LLaMA-Factory issue 7743).

Nothing here waits for the device: a step leaves one vector of numbers on it. What follows from a non-finite norm (skip
the update, or freeze the weights because the trial ends here) is decided on the device too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.training import clip
from stabstudy.training.clip_rules import clip_rule
from stabstudy.training.compiling import compiled_sums
from stabstudy.training.hf import Model
from stabstudy.training.model import fused_rows
from stabstudy.training.muon import Muon
from stabstudy.training.noise_scale import MicroBatches
from stabstudy.training.optim import AdamW, decay_rate
from stabstudy.training.precision import Forward
from stabstudy.training.softcap import soft_cap
from stabstudy.training.spike_skip import SpikeSkip

IGNORE = -100
"""A target that counts for nothing (padding)."""

SCALE_START, SCALE_GROWTH_STEPS = 2.0**16, 2000
"""fp16 loss scaling: the first scale, and the good steps after which it doubles (torch.amp.GradScaler's values)."""

LOSS, LOGIT_ABSMAX, LOGZ_MEAN, GRAD_NORM, CLIP_SCALE, LOSS_SCALE, SPIKE, TENSOR_NORMS = 0, 1, 2, 3, 4, 5, 6, 7
"""Positions in the vector of a step; the per-tensor gradient norms fill the rest."""


@dataclass(frozen=True)
class Sums:
    """Sums over the valid targets of one micro-batch; 0-dim tensors."""

    cross_entropy: Tensor
    logz: Tensor
    logz_squared: Tensor
    logit_absmax: Tensor


def target_sums(
    logits_BTV: Tensor, targets_BT: Tensor, masked: bool, want_squares: bool, cap: float | None = None
) -> Sums:
    """Cross-entropy and logit statistics in float32. logsumexp is cross-entropy plus the target's own logit.

    With a soft cap, cross-entropy and logsumexp are of the capped logits; `logit_absmax` is what they were before it.
    """
    logits_NV = logits_BTV.flatten(0, 1).float()
    targets_N = targets_BT.flatten()
    if masked:
        valid = targets_N != IGNORE
        logits_NV, targets_N = logits_NV[valid], targets_N[valid]
    raw_NV = logits_NV.detach()
    if cap is not None:
        logits_NV = soft_cap(logits_NV, cap)
    ce_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    with torch.set_grad_enabled(want_squares and torch.is_grad_enabled()):
        logz_N = ce_N + logits_NV.gather(1, targets_N[:, None]).squeeze(1)
        squares = logz_N.square().sum() if want_squares else logz_N.new_zeros(())
    with torch.no_grad():
        low, high = torch.aminmax(raw_NV) if len(raw_NV) else (raw_NV.new_zeros(()),) * 2
    return Sums(ce_N.sum(), logz_N.detach().sum(), squares, torch.maximum(-low, high))


class Stepper:
    """Model, optimizer and loss scale of one trial. `step` makes one update and returns its vector."""

    def __init__(self, config: TrialConfig, model: Model, device: torch.device, compiled: bool = False):
        self.config, self.model, self.device = config, model, device
        self.forward = Forward(model, config.train.precision, device)
        named = list(model.named_parameters())
        self.parameters = [p for _, p in named]
        self.layer_index = np.array(clip.layer_index([n for n, _ in named], config.model.depth))
        decay, muon = decay_rate(config.optim, config.peak_matrix_lr), config.optim.kind == "muon"
        self.muon = Muon(named, fused_rows(config.model), config.optim, decay) if muon else None
        rest = [(n, p) for n, p in named if self.muon is None or n not in self.muon.matrices]
        self.optimizer = AdamW(rest, config.optim, config.peak_lr)
        self.clip_rule = clip_rule(config.optim, self.parameters)
        self.spike_skip = SpikeSkip(device) if config.train.skip_spikes else None
        self.scaled = config.train.precision == "fp16"
        self.loss_scale = torch.tensor(SCALE_START if self.scaled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.halted = torch.zeros((), device=device)  # 1 from the non-finite step that ends the trial on
        self.left_out = torch.ones((), device=device)  # 1 where the last step made no update, and before the first
        self.measure_noise = False  # set before a step that a probe follows
        self.noise: Tensor | None = None  # of the last step, see noise_scale.py; None: not measured
        self._sums: Callable[..., Sums] = compiled_sums(self._micro) if compiled else self._micro

    def step(self, windows: NDArray[np.int64], lr: float) -> Tensor | None:
        """One update on windows [batch, T+1] (targets are the inputs shifted by one; IGNORE marks invalid ones).

        Returns the step's vector on the device, or None when it had no valid target (no update then).
        """
        self.noise = None
        valid = int((windows[:, 1:] != IGNORE).sum())
        if valid == 0:
            self.left_out = torch.ones_like(self.left_out)
            return None
        loss, logz, absmax = self.accumulate(windows, valid)
        grads = clip.gradients(self.parameters)
        if self.scaled:
            clip.scale_(grads, 1.0 / self.loss_scale)
        norms = clip.tensor_norms(grads)
        norm = torch.linalg.vector_norm(norms)
        used_scale = self.loss_scale.clone()
        factor = self._clip(grads, norms, norm)
        spike = torch.zeros_like(norm) if self.spike_skip is None else self.spike_skip.judge(loss, norm)
        self._update(norm, loss, lr, spike)
        return torch.cat([torch.stack([loss, absmax, logz, norm, factor, used_scale, spike]), norms])

    def accumulate(self, windows: NDArray[np.int64], valid: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the whole step into `.grad`. Returns (loss, mean logsumexp, largest absolute logit)."""
        for p in self.parameters:
            p.grad = None
        loss = logz = absmax = torch.zeros((), device=self.device)
        masked = valid != windows[:, 1:].size
        watched = self._watched(windows)
        for inputs, targets in self._micro_batches(windows):
            # padded micro-batches have a shape of their own each: compiling them would cost more than it gives
            sums = (self._micro if masked else self._sums)(inputs, targets, masked)
            objective = (sums.cross_entropy + self.config.train.z_loss * sums.logz_squared) / valid
            (objective * self.loss_scale if self.scaled else objective).backward()  # type: ignore[no-untyped-call]
            if watched is not None:
                watched.add()
            loss = loss + sums.cross_entropy.detach() / valid
            logz = logz + sums.logz / valid
            absmax = torch.maximum(absmax, sums.logit_absmax)
        if watched is not None:
            self.noise = watched.terms() / self.loss_scale.double().square()
        return loss, logz, absmax

    def loss_on(self, windows: NDArray[np.int64]) -> float:
        """Mean cross-entropy on fixed windows, nat/token, no gradient. Waits for the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for inputs, targets in self._micro_batches(windows):
                total += self._micro(inputs, targets, False).cross_entropy.double()
        return total.item() / windows[:, 1:].size

    def _micro(self, inputs_BT: Tensor, targets_BT: Tensor, masked: bool) -> Sums:
        logits_BTV = self.forward.run(lambda model: model(inputs_BT))
        cap = self.config.model.logit_softcap
        return target_sums(logits_BTV, targets_BT, masked, self.config.train.z_loss > 0, cap)

    def _micro_batches(self, windows: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(windows), self.config.train.micro_batch):
            part = torch.from_numpy(windows[start : start + self.config.train.micro_batch])
            part = part.to(self.device, non_blocking=True)
            # an ignored position is a target only; as an input it may be any token
            yield part[:, :-1].clamp(min=0), part[:, 1:]

    def _watched(self, windows: NDArray[np.int64]) -> MicroBatches | None:
        """What measures the noise of this step, where it is due and there is more than one micro-batch to compare."""
        if not self.measure_noise:
            return None
        starts = range(0, len(windows), self.config.train.micro_batch)
        targets = np.add.reduceat((windows[:, 1:] != IGNORE).sum(1), starts)
        return MicroBatches(self.parameters, targets.tolist()) if np.count_nonzero(targets) > 1 else None

    def _clip(self, grads: list[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """Scale the gradients; returns the factor (1 where clipping is off; null in the record)."""
        if self.clip_rule is None:
            return torch.ones((), device=self.device)
        return self.clip_rule.apply(grads, norms, norm)

    def _update(self, norm: Tensor, loss: Tensor, lr: float, spike: Tensor) -> None:
        """The optimizer's step, which it leaves out by itself, on the device, where `found_inf` is 1."""
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        if not self.scaled and not self.config.train.skip_nonfinite:
            self.halted = torch.maximum(self.halted, bad)
        self.left_out = torch.maximum(torch.maximum(bad, spike), self.halted)
        self.optimizer.step(lr, self.left_out)
        if self.muon is not None:
            self.muon.step(lr, self.left_out)
        if self.scaled:
            self._rescale(bad)

    def _rescale(self, bad: Tensor) -> None:
        grow = (self.good_steps + 1 >= SCALE_GROWTH_STEPS).float() * (1 - bad)
        self.loss_scale = self.loss_scale * (1 + grow) * (1 - 0.5 * bad)
        self.good_steps = (self.good_steps + 1) * (1 - bad) * (1 - grow)
