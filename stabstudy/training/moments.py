"""The memory of Adam for a pack, and the sizes of its updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.training.members import beside, vector

TINY = torch.finfo(torch.float32).tiny  # the square of a small eps is 0 in float32, and 0 / 0 would be NaN


class Moments:
    """Updates made [K] and both moments of stacked parameters [K, *shape], with each member's betas and eps.

    One counter serves all parameters of a member: it is every `adam/step/<parameter>` of its checkpoint.
    """

    def __init__(self, configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]):
        device = named[0][1].device
        self.step_K = torch.zeros(len(configs), dtype=torch.float32, device=device)
        self.first = [torch.zeros_like(p) for _, p in named]
        self.second = [torch.zeros_like(p) for _, p in named]
        self.beta1_K = vector([c.optim.beta1 for c in configs], device)
        self.beta2_K = vector([c.optim.beta2 for c in configs], device)
        self.eps_K = vector([c.optim.eps for c in configs], device)
        self.state: dict[str, Tensor] = {}
        for (name, _), first, second in zip(named, self.first, self.second, strict=True):
            self.state |= {f"adam/step/{name}": self.step_K}
            self.state |= {f"adam/exp_avg/{name}": first, f"adam/exp_avg_sq/{name}": second}

    def corrections(self, step_K: Tensor) -> tuple[Tensor, Tensor]:
        """1 - beta^step of both moments, float64 [K]."""
        return 1 - self.beta1_K**step_K, 1 - self.beta2_K**step_K

    def lag(self, squares: Tensor, v_hat: Tensor) -> Tensor:
        """sqrt(mean(g^2 / max(v_hat, eps^2))) of one tensor, [K], from its g^2 (arXiv 2304.13013's RMS_t).

        About 1 when steady; large when the second moment has not caught up with the gradient.
        """
        floor = beside(self.eps_K.square().clamp(min=TINY), v_hat)
        return (squares / torch.maximum(v_hat, floor)).flatten(1).mean(1).sqrt()

    @torch.no_grad()
    def update_sizes(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """{"update_rms": [K], "adam_rms_max": [K]} of the last update, whose gradients these are.

        update_rms: RMS over all elements of m_hat / (sqrt(v_hat) + eps), the update divided by the learning rate, decay
        left out. adam_rms_max: the largest over tensors of `lag`. Means nothing for a member that the last step left
        out, and is NaN before its first update.
        """
        first_K, second_K = self.corrections(self.step_K)
        squares, count, lags = [], 0, []
        for grad, m, v in zip(grads, self.first, self.second, strict=True):
            v_hat = v / beside(second_K, v)
            update = m / beside(first_K, m) / (v_hat.sqrt() + beside(self.eps_K, v))
            squares.append(update.square().flatten(1).sum(1, dtype=torch.float64))
            count += update[0].numel()
            lags.append(self.lag(grad.square(), v_hat))
        return {
            "update_rms": (torch.stack(squares, dim=1).sum(1) / count).sqrt(),
            "adam_rms_max": torch.stack(lags).amax(0),
        }
