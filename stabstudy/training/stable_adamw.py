"""StableAdamW: AdamW whose update of each tensor is held back while its second moment lags (arXiv 2304.13013, alg. 2).

    RMS_t = sqrt(mean(g^2 / max(v_hat, eps^2)))      about 1 when steady
    eta   = lr_t / max(1, RMS_t)
    w    <- w - eta * wd * w - eta * m_hat / (sqrt(v_hat) + eps)

The decay is held back with the update. The trace's `lr` is lr_t, the scheduled one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.training.decay import decay_of
from stabstudy.training.members import beside, rates, replace, vector
from stabstudy.training.moments import Moments


class StableAdamW:
    """The optimizer of a pack; see `optimizers.Optimizer`."""

    def __init__(self, configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]):
        self.parameters = [p.detach() for _, p in named]
        self.device = self.parameters[0].device
        self.decay_K = [vector([decay_of(c, n, p.ndim - 1) for c in configs], self.device) for n, p in named]
        self.moments = Moments(configs, named)
        self.state = self.moments.state

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: Sequence[float] | Tensor, left_out: Tensor) -> None:
        """See `optimizers.Optimizer.step`."""
        of, lr_K = self.moments, rates(lr, self.device)
        corrections = of.corrections(of.step_K + 1)
        for i, grad in enumerate(grads):
            replace(of.first[i], of.first[i].lerp(grad, beside(1 - of.beta1_K, grad)), left_out)
            squares = grad.square()
            replace(of.second[i], of.second[i].lerp(squares, beside(1 - of.beta2_K, grad)), left_out)
            self._move(i, squares, lr_K, corrections, left_out)
        of.step_K.add_(1 - left_out)

    def _move(
        self, i: int, squares: Tensor, lr_K: Tensor, corrections: tuple[Tensor, Tensor], left_out_K: Tensor
    ) -> None:
        """The update of one tensor from its new moments, in place."""
        weight, of = self.parameters[i], self.moments
        v_hat = of.second[i] / beside(corrections[1], weight)
        eta_K = lr_K / of.lag(squares, v_hat).clamp(min=1)
        update = of.first[i] / beside(corrections[0], weight)
        update.div_(v_hat.sqrt_().add_(beside(of.eps_K, weight))).mul_(beside(eta_K, weight))
        shrunk = weight * beside(1 - eta_K * self.decay_K[i], weight)
        replace(weight, shrunk.sub_(update), left_out_K)

    def update_sizes(self, grads: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """See `Moments.update_sizes`."""
        return self.moments.update_sizes(grads)
