"""StableAdamW: AdamW whose update of each tensor is held back while its second moment lags (arXiv 2304.13013, alg. 2).

    RMS_t = sqrt(mean(g^2 / max(v_hat, eps^2)))      about 1 when steady
    eta   = lr_t / max(1, RMS_t)
    w    <- w - eta * wd * w - eta * m_hat / (sqrt(v_hat) + eps)

The decay is held back with the update. The trace's `lr` is lr_t, the scheduled one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stabstudy.config import OptimConfig

TINY = torch.finfo(torch.float32).tiny  # the square of a small eps is 0 in float32, and 0 / 0 would be NaN


@torch.no_grad()
def stable_update(
    parameter: nn.Parameter,
    step: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    config: OptimConfig,
    weight_decay: float,
    lr: float,
    found_inf: Tensor,
) -> None:
    """One update of one tensor and its moments, in place; none of either where `found_inf` (0-dim float32) is 1."""
    assert parameter.grad is not None
    keep = 1 - found_inf
    grad = torch.where(found_inf > 0, 0.0, parameter.grad)  # 0 * NaN would be NaN
    exp_avg.lerp_(grad, (1 - config.beta1) * keep)
    exp_avg_sq.lerp_(grad.square(), (1 - config.beta2) * keep)
    now = (step + 1).double()
    v_hat = exp_avg_sq / (1 - config.beta2**now)
    rms = (grad.square() / v_hat.clamp(min=max(config.eps**2, TINY))).mean().sqrt()
    eta = keep * lr / rms.clamp(min=1)
    update = exp_avg / (1 - config.beta1**now) / (v_hat.sqrt() + config.eps)
    parameter.mul_(1 - eta * weight_decay).sub_(eta * update)
    step.add_(keep)
