"""Lion: the sign of an interpolated momentum (arXiv 2302.06675, algorithm 2).

    c  = beta1 m + (1 - beta1) g
    w <- w - lr_t * (sign(c) + wd * w)               decay groups and their two meanings as in `adamw.py`
    m <- beta2 m + (1 - beta2) g

Every element moves by lr_t, so its learning rate is a third to a tenth of AdamW's and its decay as much larger (the
paper's section 5); the paper's betas are .9 and .99. eps has no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.training.adamw import decay_rates
from stabstudy.training.stack import beside, rates, replace, vector


class Lion:
    """The optimizer of a pack; see `optimizers.Optimizer`."""

    def __init__(self, configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]):
        self.parameters = [p.detach() for _, p in named]
        self.device = self.parameters[0].device
        self.decay_K = decay_rates(configs, named)
        self.beta1_K = vector([c.optim.beta1 for c in configs], self.device)
        self.beta2_K = vector([c.optim.beta2 for c in configs], self.device)
        self.state = {f"lion/{name}": torch.zeros_like(p) for (name, _), p in zip(named, self.parameters, strict=True)}

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: Sequence[float] | Tensor, left_out: Tensor) -> None:
        """See `optimizers.Optimizer.step`."""
        lr_K = rates(lr, self.device)
        for w, m, g, decay_K in zip(self.parameters, self.state.values(), grads, self.decay_K, strict=True):
            direction = m.lerp(g, beside(1 - self.beta1_K, g)).sign_()
            new = (w * beside(1 - lr_K * decay_K, w)).sub_(direction.mul_(beside(lr_K, w)))
            replace(w, new, left_out)
            replace(m, m.lerp(g, beside(1 - self.beta2_K, g)), left_out)

    def update_sizes(self, grads: Sequence[Tensor]) -> None:
        """None: they are Adam's."""
