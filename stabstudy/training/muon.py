"""Muon for the matrices of the layers: momentum, made orthogonal (kellerjordan.github.io/posts/muon).

    B  <- mu B + (1 - mu) g                     mu = optim.muon_momentum
    O  = NS((1 - mu) g + mu B)                  five Newton-Schulz steps in bfloat16: near the U V^T of the SVD
    w <- w - lr_t * decay * w - lr_t * a O      decay coupled or independent, as in `adamw.py`

For a matrix of A rows and B columns a is (`optim.muon_adjust_lr`)

    match_rms_adamw  0.2 sqrt(max(A, B))        RMS of a O is about 0.2, as AdamW's update: one lr does for both groups
                                                (arXiv 2502.16982)
    original         sqrt(max(1, A / B))        its author's, which wants a larger lr than AdamW: `optim.muon_lr`

lr_t is the schedule times `optim.muon_lr` (null: `optim.lr`); the trace's `lr` is AdamW's.

Embeddings, output matrix and norms stay with AdamW. A fused matrix (`wqkv`, `w13`) is several: each is made orthogonal
by itself, with its own a. The steps of `torch.optim.Muon`; the class itself imports the compiler, takes no stack of
matrices, and must know on the host whether a step is left out.

NS forgets the size of its argument, so clipping acts on how much a step weighs in the momentum and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.training.adamw import AdamW, decay_rate
from stabstudy.training.model import fused_rows, layer_of
from stabstudy.training.stack import beside, rates, replace, vector

NS_A, NS_B, NS_C, NS_STEPS, NS_EPS = 3.4445, -4.775, 2.0315, 5, 1e-7
"""Keller Jordan's quintic and steps (github.com/KellerJordan/Muon, `muon.py`), and torch.optim.Muon's defaults."""


class Muon:
    """The optimizer of a pack, see `optimizers.Optimizer`: the layers' matrices here, all else in `adamw`.

    `compute_dtype` is that of Newton-Schulz. Momentum's factor and the adjustment of lr are equal within a pack.
    """

    compute_dtype = torch.bfloat16  # of the Newton-Schulz steps

    def __init__(self, configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]):
        self.optim = configs[0].optim
        if len({(c.optim.muon_momentum, c.optim.muon_adjust_lr) for c in configs}) > 1:
            raise ValueError("optim.muon_momentum and optim.muon_adjust_lr must be equal within a pack")
        mine = [p.ndim == 3 and layer_of(name).isdigit() for name, p in named]
        self.places = [i for i, yes in enumerate(mine) if yes]
        self.rest = [i for i, yes in enumerate(mine) if not yes]
        self.matrices = {named[i][0]: named[i][1].detach() for i in self.places}
        fused = fused_rows(configs[0].model)
        self.rows = {n: fused.get(n.split(".")[-2], [p.shape[1]]) for n, p in self.matrices.items()}
        self.device = named[0][1].device
        self.ratio_K = vector([c.optim.matrix_lr_ratio for c in configs], self.device)
        self.decay_K = vector([decay_rate(c.optim, c.peak_matrix_lr) for c in configs], self.device)
        self.adamw = AdamW(configs, [named[i] for i in self.rest])
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.state = {**self.adamw.state, **{f"muon/{n}": m for n, m in self.momentum.items()}}

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: Sequence[float] | Tensor, left_out: Tensor) -> None:
        """See `optimizers.Optimizer.step`; `lr` is AdamW's."""
        self.adamw.step([grads[i] for i in self.rest], lr, left_out)
        lr_K, mu = rates(lr, self.device) * self.ratio_K, self.optim.muon_momentum
        for i, (name, weight) in zip(self.places, self.matrices.items(), strict=True):
            momentum, grad = self.momentum[name], grads[i]
            replace(momentum, momentum.lerp(grad, 1 - mu), left_out)
            new = weight * beside(1 - lr_K * self.decay_K, weight)
            parts = (torch.split(x, self.rows[name], dim=1) for x in (new, grad.lerp(momentum, mu)))
            for part, update in zip(*parts, strict=True):
                size_K = lr_K * self._adjusted(*part.shape[1:])
                part.sub_(orthogonal(update, self.compute_dtype).mul_(beside(size_K, part)))
            replace(weight, new, left_out)

    def update_sizes(self, grads: Sequence[Tensor]) -> None:
        """None: those of AdamW would leave out most of the weights."""

    def _adjusted(self, rows: int, columns: int) -> float:
        if self.optim.muon_adjust_lr == "original":
            return math.sqrt(max(1, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def orthogonal(stack: Tensor, compute_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Near the nearest matrices whose singular values are all 1 (they come out between about 0.7 and 1.2).

    `stack`: [K, rows, columns]; the result, a new tensor, has its dtype. Each matrix by itself, five Newton-Schulz
    steps in `compute_dtype`. A singular value s of a matrix of Frobenius norm 1 becomes p(p(p(p(p(s))))), with
    p(s) = NS_A s + NS_B s^3 + NS_C s^5.
    """
    x = stack.to(compute_dtype)
    tall = stack.shape[1] > stack.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=NS_EPS)
    for _ in range(NS_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=NS_B, alpha=NS_C), x, beta=NS_A)
    # a copy even where the dtype is the same: the caller scales it in place
    return (x.mT if tall else x).to(stack.dtype, copy=True)
