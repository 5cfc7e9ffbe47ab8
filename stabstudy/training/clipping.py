"""Gradient norms of a pack, the noise scale, the clipping rules of `optim.clip_kind`, and the skipping of spikes.

Norms are measured once per step, before anything touches the gradients, by member: `norms_NK` has a row per tensor.
torch's `clip_grad_norm_` multiplies by c/norm even when the norm is Inf or NaN, and one bad entry then turns every
gradient into 0 or NaN without an error. Here the norm is measured, recorded, tested, and only then used:

    norm    g <- g * min(1, clip / (|g| + 1e-6)), |g| the global norm (torch's form)
    zclip   as `norm`, and from the 25th step on lower where a moving mean and variance of |g| say so (arXiv 2504.02507)
    adagc   the first 100 steps as `norm`; then each tensor has its own moving threshold (arXiv 2502.11034)
    agc     each output unit u is held to |g_u| <= 0.01 * max(|w_u|, 1e-3) (arXiv 2102.06171); `clip` has no part in it

`optim.clip` is the threshold of `norm`, the cap of `zclip` and the threshold of the first steps of `adagc`; null is no
clipping, whatever the kind: a threshold of infinity. The other numbers of `zclip` and `adagc` are those published. What
is applied is recorded as `clip_scale`: norm after / norm before, 1 where nothing was clipped.

`train.skip_spikes` leaves out the update of a step whose loss or gradient norm stands out: above mean + 6 standard
deviations (of a sample) of the last 128 steps, from 64 on, its own step excluded; a deviation below 1e-10 proves
nothing. It is the rule of OLMo-core's and Levanter's skip-step but for their flaw that after one NaN in the window the
next 128 ordinary steps are skipped. The values of a step that was skipped do enter, as published: so a new, higher
level stops being skipped by itself.

A loss or norm that is not finite enters no memory, so it blinds no rule (in the published ZClip one NaN lets every
later spike pass). The step that had it is left out or ends the trial, so what its gradients become does not matter; its
`clip_scale` is that of `norm`, or NaN. Memory lives on the device in float64, for each member by itself, and nothing
here waits for it.

The gradient noise scale: how many tokens a step needs before its gradient is more signal than noise.

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
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.config import SPIKE_SKIP_FROM, TrialConfig
from stabstudy.training.stack import beside, vector

CLIP_EPS = 1e-6
"""torch adds it to the norm (`clip_grads_with_norm_`); kept so that clip_scale equals torch's."""

SKIP_WINDOW, SKIP_SIGMAS, SKIP_FLAT = 128, 6.0, 1e-10
Z_FIRST, Z_LIMIT, Z_KEEP, Z_EPS = 25, 2.5, 0.97, 1e-6
ADAGC_FIRST, ADAGC_ROOM, ADAGC_KEEP = 100, 1.05, 0.98
AGC_SHARE, AGC_FLOOR = 0.01, 1e-3


def tensor_norms(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of each gradient [K, *shape] of each member: float32, [len(grads), K]."""
    if len(grads[0]) == 1:  # the same sums, in a few launches for all tensors
        return torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32))[:, None]
    return torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float32) for g in grads])


def global_norm(norms_NK: Tensor) -> Tensor:
    """The norm of all gradients of each member, [K], from those of its tensors.

    Summed along contiguous rows, so that a member's norm does not depend on how many members there are.
    """
    norm_K: Tensor = torch.linalg.vector_norm(norms_NK.T.contiguous(), dim=1)
    return norm_K


def clip_scale(norm_K: Tensor, threshold_K: Tensor) -> Tensor:
    """min(1, threshold / (norm + 1e-6)), the factor torch uses; exactly 1 where the threshold is infinite."""
    factor_K = (threshold_K / (norm_K + CLIP_EPS)).clamp(max=1.0)
    return torch.where(torch.isinf(threshold_K), 1.0, factor_K)


def scale_(grads: Sequence[Tensor], factor_K: Tensor) -> None:
    """Multiply every gradient of each member in place by its factor."""
    if len(factor_K) == 1:  # the same products, in a few launches for all tensors
        torch._foreach_mul_(list(grads), factor_K[0])
        return
    for grad in grads:
        grad.mul_(beside(factor_K, grad))


class ClipRule(Protocol):
    """A rule with its memory: `state` has [K, ...] tensors, written in place, by their keys in a checkpoint."""

    state: dict[str, Tensor]

    def apply(self, grads: Sequence[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """Scale `grads` in place; returns norm after / norm before, [K].

        `norms`: of each tensor, [len(grads), K]; `norm`: the global norms, [K]; both float32 and before any clipping.
        """


class NormClip:
    """By the global norm, at a fixed threshold. Remembers nothing."""

    def __init__(self, threshold_K: Tensor):
        self.threshold_K = threshold_K.float()
        self.state: dict[str, Tensor] = {}

    def apply(self, grads: Sequence[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """See `ClipRule.apply`."""
        return _scale_all(grads, clip_scale(norm, self.threshold_K))


class ZClip:
    """By the global norm, where it stands out: z = (|g| - mean) / (sd + 1e-6) > 2.5.

    Such a norm is allowed mean + 2.5 * sd / (z / 2.5), and the moving mean and variance (factor .97, the variance about
    the new mean) see that value instead. As published, the rule is not monotone: the larger the spike, the smaller the
    norm it is allowed, down to the mean.

    No norm is ever allowed more than `cap`, which the mean and variance do not see: what its authors' code does by
    default, with a cap (`max_grad_norm`) of 1. A cap far above every norm leaves the rule alone, as their None does.
    """

    def __init__(self, cap_K: Tensor):
        self.cap_K = cap_K.float()
        self.state = {f"clip/{name}": torch.zeros_like(cap_K) for name in ("seen", "mean", "var")}

    def apply(self, grads: Sequence[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """See `ClipRule.apply`."""
        seen, mean, var = self.state.values()
        x, sd = norm.double(), var.sqrt()
        z = (x - mean) / (sd + Z_EPS)
        early = seen < Z_FIRST
        outlier = ~early & (z > Z_LIMIT)
        allowed = torch.where(outlier, mean + Z_LIMIT * sd / (z / Z_LIMIT), x)
        factor = clip_scale(norm, self.cap_K)
        adaptive = (allowed / (x + CLIP_EPS)).float()
        factor = torch.where(outlier & torch.isfinite(norm), torch.minimum(factor, adaptive), factor)
        self._remember(allowed, torch.isfinite(norm), early)
        return _scale_all(grads, factor)

    def _remember(self, x: Tensor, admitted: Tensor, early: Tensor) -> None:
        """Mean and population variance of the first 25 norms, then moving ones."""
        seen, mean, var = self.state.values()
        share = torch.where(early, 1 / (seen + 1), 1 - Z_KEEP)
        new_mean = mean + share * (x - mean)
        square = torch.where(early, (x - mean) * (x - new_mean), (x - new_mean).square())
        var.copy_(torch.where(admitted, var + share * (square - var), var))
        mean.copy_(torch.where(admitted, new_mean, mean))
        seen.add_(admitted)


class AdaGC:
    """Each tensor by its own norm: h = min(1, 1.05 * gamma / |g|), then gamma <- .98 gamma + .02 |h g|.

    In the first 100 steps the global norm is clipped and gamma is the smallest |g| so far, of the gradients BEFORE that
    clipping: so does the authors' code, PaddlePaddle's `ClipGradByAdaptiveNorm` (whose 1.03 or 1.04 and .98 or .99 vary
    by version); the paper's formula, as quoted second-hand, has the norms after it, which are smaller. A norm of 0 is
    left out of that minimum, and a tensor whose gradients were all 0 until then takes its first norm as gamma: a gamma
    of 0 would never let it learn.
    """

    def __init__(self, first_threshold_K: Tensor, tensors: int):
        self.first_threshold_K = first_threshold_K.float()
        infinite_KN = first_threshold_K.new_full((len(first_threshold_K), tensors), torch.inf)
        self.state = {"clip/seen": torch.zeros_like(first_threshold_K), "clip/gamma": infinite_KN}

    def apply(self, grads: Sequence[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """See `ClipRule.apply`."""
        seen, gamma_KN = self.state.values()
        norms_KN = norms.T.contiguous()
        early_K1, finite_K1 = (seen < ADAGC_FIRST)[:, None], torch.isfinite(norm)[:, None]
        x = norms_KN.double()
        own = torch.where(x > 0, (ADAGC_ROOM * gamma_KN / x).clamp(max=1.0), 1.0)
        plain = clip_scale(norm, self.first_threshold_K)
        factors_KN = torch.where(early_K1, plain[:, None], own.float())
        smallest = torch.where(x > 0, torch.minimum(gamma_KN, x), gamma_KN)
        unset = torch.where(x > 0, x, gamma_KN)
        moved = torch.where(torch.isinf(gamma_KN), unset, ADAGC_KEEP * gamma_KN + (1 - ADAGC_KEEP) * own * x)
        gamma_KN.copy_(torch.where(finite_K1, torch.where(early_K1, smallest, moved), gamma_KN))
        seen.add_(finite_K1[:, 0])
        for grad, factor_K in zip(grads, factors_KN.unbind(1), strict=True):
            grad.mul_(beside(factor_K, grad))
        return torch.where((early_K1 | ~finite_K1)[:, 0], plain, _ratio(factors_KN * norms_KN, norms_KN))


class UnitClip:
    """Each output unit by the norm of its weights: a row of a matrix, or a whole vector. Remembers nothing."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = [p.detach() for p in parameters]
        self.state: dict[str, Tensor] = {}

    def apply(self, grads: Sequence[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """See `ClipRule.apply`."""
        before, after = [], []
        for weight, grad in zip(self.parameters, grads, strict=True):
            unit = _unit_norms(grad)
            factor = (AGC_SHARE * _unit_norms(weight).clamp(min=AGC_FLOOR) / unit).clamp(max=1.0)
            grad.mul_(factor)
            before.append(unit.flatten(1))
            after.append((factor * unit).flatten(1))
        return _ratio(torch.cat(after, 1), torch.cat(before, 1))


def clip_rule(configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]) -> ClipRule:
    """The rule of these members, with an empty memory; `named`: the stacked parameters.

    Raises ValueError where the members cannot share one; clip null goes with `norm`.
    """
    kinds = {"norm" if c.optim.clip is None else c.optim.clip_kind for c in configs}
    if len(kinds) > 1:
        raise ValueError(f"optim.clip_kind must be equal within a pack, got {', '.join(sorted(kinds))}")
    thresholds = [torch.inf if c.optim.clip is None else c.optim.clip for c in configs]
    threshold_K = vector(thresholds, named[0][1].device)
    match kinds.pop():
        case "zclip":
            return ZClip(threshold_K)
        case "adagc":
            return AdaGC(threshold_K, len(named))
        case "agc":
            return UnitClip([p for _, p in named])
    return NormClip(threshold_K)


def _scale_all(grads: Sequence[Tensor], factor_K: Tensor) -> Tensor:
    # on a CPU reading a factor is free, and x * 1 need not be computed
    if factor_K.device.type != "cpu" or (factor_K != 1).any():
        scale_(grads, factor_K)
    return factor_K


def _unit_norms(stack: Tensor) -> Tensor:
    """L2 norm of each output unit of each member, in the stack's number of dimensions."""
    dim = tuple(range(2, stack.ndim)) if stack.ndim > 2 else 1
    norms: Tensor = torch.linalg.vector_norm(stack, dim=dim, keepdim=True, dtype=torch.float32)
    return norms


def _ratio(after_KN: Tensor, before_KN: Tensor) -> Tensor:
    """The norm of the one over that of the other, summed alike so that it is exactly 1 where nothing changed."""
    whole = torch.linalg.vector_norm(before_KN, dim=1)
    return torch.where(whole == 0, 1.0, torch.linalg.vector_norm(after_KN, dim=1) / whole)


class SpikeSkip:
    """The last losses and norms of each member. `state` is all it remembers, by the keys of a checkpoint."""

    def __init__(self, members: int, device: torch.device):
        self.state = {
            "spike_skip/seen": torch.zeros(members, dtype=torch.float64, device=device),
            # losses, norms; a ring
            "spike_skip/window": torch.zeros(members, 2, SKIP_WINDOW, dtype=torch.float64, device=device),
        }
        self._places = torch.arange(SKIP_WINDOW, dtype=torch.float64, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1 where this step of a member must be skipped, else 0 (float32 [K]); then it enters the member's window."""
        seen_K, window_K2W = self.state.values()
        seen_K11 = seen_K[:, None, None]
        x_K2 = torch.stack([loss, norm], 1).double()
        finite_K = torch.isfinite(x_K2).all(1)
        filled = self._places < seen_K11
        n_K1 = seen_K[:, None].clamp(min=2, max=SKIP_WINDOW)
        mean_K2 = torch.where(filled, window_K2W, 0.0).sum(2) / n_K1
        sd_K2 = (torch.where(filled, window_K2W - mean_K2[..., None], 0.0).square().sum(2) / (n_K1 - 1)).sqrt()
        out_K2 = (x_K2 > mean_K2 + SKIP_SIGMAS * sd_K2) & (sd_K2 >= SKIP_FLAT)
        entered = (self._places == seen_K11 % SKIP_WINDOW) & finite_K[:, None, None]
        window_K2W.copy_(torch.where(entered, x_K2[..., None], window_K2W))
        spike_K = out_K2.any(1) & finite_K & (seen_K >= SPIKE_SKIP_FROM)
        seen_K.add_(finite_K)
        return spike_K.float()


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
