"""The clipping rules of `optim.clip_kind`. Each scales the gradients in place and returns what it applied.

    norm    g <- g * min(1, clip / (|g| + 1e-6)), |g| the global norm (torch's form)
    zclip   as `norm`, and from the 25th step on lower where a moving mean and variance of |g| say so (arXiv 2504.02507)
    adagc   the first 100 steps as `norm`; then each tensor has its own moving threshold (arXiv 2502.11034)
    agc     each output unit u is held to |g_u| <= 0.01 * max(|w_u|, 1e-3) (arXiv 2102.06171); `clip` has no part in it

`optim.clip` is the threshold of `norm`, the cap of `zclip` and the threshold of the first steps of `adagc`; null is no
clipping, whatever the kind. The other numbers of `zclip` and `adagc` are those published. What is applied is recorded
as `clip_scale`: norm after / norm before, 1 where nothing was clipped.

A norm that is not finite enters no memory, so it blinds no rule (in the published ZClip one NaN lets every later spike
pass). The step that had it is left out or ends the trial, so what its gradients become does not matter; its
`clip_scale` is that of `norm`, or NaN. Memory lives on the device in float64 and nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stabstudy.config import OptimConfig
from stabstudy.training import clip

Z_FIRST, Z_LIMIT, Z_KEEP, Z_EPS = 25, 2.5, 0.97, 1e-6
ADAGC_FIRST, ADAGC_ROOM, ADAGC_KEEP = 100, 1.05, 0.98
AGC_SHARE, AGC_FLOOR = 0.01, 1e-3


class NormClip:
    """By the global norm, at a fixed threshold. Remembers nothing."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.state: dict[str, Tensor] = {}

    def apply(self, grads: Sequence[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """Scale `grads` (their norms, and the norm of those) in place; returns norm after / norm before."""
        return _scale_all(grads, clip.clip_scale(norm, self.threshold))


class ZClip:
    """By the global norm, where it stands out: z = (|g| - mean) / (sd + 1e-6) > 2.5.

    Such a norm is allowed mean + 2.5 * sd / (z / 2.5), and the moving mean and variance (factor .97, the variance about
    the new mean) see that value instead. As published, the rule is not monotone: the larger the spike, the smaller the
    norm it is allowed, down to the mean.

    No norm is ever allowed more than `cap`, which the mean and variance do not see: what its authors' code does by
    default, with a cap (`max_grad_norm`) of 1. A cap far above every norm leaves the rule alone, as their None does.
    """

    def __init__(self, cap: float, device: torch.device):
        self.cap = cap
        self.state = {k: torch.zeros((), dtype=torch.float64, device=device) for k in ("seen", "mean", "var")}

    def apply(self, grads: Sequence[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """See `NormClip.apply`."""
        seen, mean, sd = self.state["seen"], self.state["mean"], self.state["var"].sqrt()
        x = norm.double()
        z = (x - mean) / (sd + Z_EPS)
        early = seen < Z_FIRST
        outlier = ~early & (z > Z_LIMIT)
        allowed = torch.where(outlier, mean + Z_LIMIT * sd / (z / Z_LIMIT), x)
        factor = clip.clip_scale(norm, self.cap)
        adaptive = (allowed / (x + clip.CLIP_EPS)).float()
        factor = torch.where(outlier & torch.isfinite(norm), torch.minimum(factor, adaptive), factor)
        self._remember(allowed, torch.isfinite(norm), early)
        return _scale_all(grads, factor)

    def _remember(self, x: Tensor, admitted: Tensor, early: Tensor) -> None:
        """Mean and population variance of the first 25 norms, then moving ones."""
        seen, mean, var = self.state["seen"], self.state["mean"], self.state["var"]
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

    def __init__(self, first_threshold: float, tensors: int, device: torch.device):
        self.first_threshold = first_threshold
        self.state = {
            "seen": torch.zeros((), dtype=torch.float64, device=device),
            "gamma": torch.full((tensors,), torch.inf, dtype=torch.float64, device=device),
        }

    def apply(self, grads: Sequence[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """See `NormClip.apply`."""
        seen, gamma = self.state["seen"], self.state["gamma"]
        early, x = seen < ADAGC_FIRST, norms.double()
        own = torch.where(x > 0, (ADAGC_ROOM * gamma / x).clamp(max=1.0), 1.0)
        plain = clip.clip_scale(norm, self.first_threshold)
        factors = torch.where(early, plain.expand_as(norms), own.float())
        smallest = torch.where(x > 0, torch.minimum(gamma, x), gamma)
        unset = torch.where(x > 0, x, gamma)
        moved = torch.where(torch.isinf(gamma), unset, ADAGC_KEEP * gamma + (1 - ADAGC_KEEP) * own * x)
        finite = torch.isfinite(norm)
        gamma.copy_(torch.where(finite, torch.where(early, smallest, moved), gamma))
        seen.add_(finite)
        torch._foreach_mul_(list(grads), list(factors.unbind()))
        return torch.where(early | ~finite, plain, _ratio(factors * norms, norms))


class UnitClip:
    """Each output unit by the norm of its weights: a row of a matrix, or a whole vector. Remembers nothing."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self.state: dict[str, Tensor] = {}

    def apply(self, grads: Sequence[Tensor], norms: Tensor, norm: Tensor) -> Tensor:
        """See `NormClip.apply`."""
        before = [_unit_norms(g) for g in grads]
        bounds = [AGC_SHARE * _unit_norms(p.detach()).clamp(min=AGC_FLOOR) for p in self.parameters]
        factors = [(bound / unit).clamp(max=1.0) for bound, unit in zip(bounds, before, strict=True)]
        torch._foreach_mul_(list(grads), factors)
        after = [f * unit for f, unit in zip(factors, before, strict=True)]
        return _ratio(torch.cat([x.flatten() for x in after]), torch.cat([x.flatten() for x in before]))


ClipRule = NormClip | ZClip | AdaGC | UnitClip


def clip_rule(optim: OptimConfig, parameters: Sequence[nn.Parameter]) -> ClipRule | None:
    """The rule of these settings, with an empty memory; None where clipping is off."""
    if optim.clip is None:
        return None
    device = parameters[0].device
    if optim.clip_kind == "zclip":
        return ZClip(optim.clip, device)
    if optim.clip_kind == "adagc":
        return AdaGC(optim.clip, len(parameters), device)
    return UnitClip(parameters) if optim.clip_kind == "agc" else NormClip(optim.clip)


def _scale_all(grads: Sequence[Tensor], factor: Tensor) -> Tensor:
    if factor.device.type != "cpu" or factor < 1:  # on a CPU reading it is free, and x * 1 need not be computed
        clip.scale_(grads, factor)
    return factor


def _unit_norms(tensor: Tensor) -> Tensor:
    """L2 norm of each output unit, in the tensor's number of dimensions."""
    dim = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True, dtype=torch.float32)
    return norms


def _ratio(after: Tensor, before: Tensor) -> Tensor:
    """The norm of the one over that of the other, summed alike so that it is exactly 1 where nothing changed."""
    whole = torch.linalg.vector_norm(before)
    return torch.where(whole == 0, torch.ones_like(whole), torch.linalg.vector_norm(after) / whole)
