"""Muon for the matrices of the layers: momentum, made orthogonal (kellerjordan.github.io/posts/muon).

    B  <- mu B + (1 - mu) g                     mu = optim.muon_momentum
    O  = NS((1 - mu) g + mu B)                  five Newton-Schulz steps in bfloat16: near the U V^T of the SVD
    w <- w - lr_t * decay * w - lr_t * a O      decay coupled or independent, as in `optim.py`

For a matrix of A rows and B columns a is (`optim.muon_adjust_lr`)

    match_rms_adamw  0.2 sqrt(max(A, B))        RMS of a O is about 0.2, as AdamW's update: one lr does for both groups
                                                (arXiv 2502.16982)
    original         sqrt(max(1, A / B))        its author's, which wants a larger lr than AdamW: `optim.muon_lr`

lr_t is the schedule times `optim.muon_lr` (null: `optim.lr`); the trace's `lr` is AdamW's.

Embeddings, output matrix and norms stay with AdamW. A fused matrix (`wqkv`, `w13`) is several: each is made orthogonal
by itself, with its own a. The steps of `torch.optim.Muon`, whose Newton-Schulz this is; the class itself imports the
compiler and must know on the host whether a step is left out.

NS forgets the size of its argument, so clipping acts on how much a step weighs in the momentum and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stabstudy.config import OptimConfig
from stabstudy.training.clip import layer_of


class Muon:
    """The optimizer of the layers' matrices; `state` has their momentum by name, written in place."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        fused: dict[str, list[int]],
        config: OptimConfig,
        weight_decay: float,
    ):
        """`fused`: rows of each part, for modules that hold several matrices; `weight_decay`: lr_t multiplies it."""
        self.config, self.weight_decay = config, weight_decay
        self.matrices = {name: p for name, p in named if p.ndim == 2 and layer_of(name).isdigit()}
        self.rows = {name: fused.get(name.split(".")[-2], [len(p)]) for name, p in self.matrices.items()}
        self.state = {name: torch.zeros_like(p) for name, p in self.matrices.items()}

    @torch.no_grad()
    def step(self, lr: float, found_inf: Tensor) -> None:
        """One update where AdamW's has this rate; none, and no memory of it, where `found_inf` (0-dim float32) is 1."""
        lr = lr * self.config.matrix_lr_ratio
        keep, mu = 1 - found_inf, self.config.muon_momentum
        for name, parameter in self.matrices.items():
            assert parameter.grad is not None
            grad = torch.where(found_inf > 0, 0.0, parameter.grad)  # 0 * NaN would be NaN
            self.state[name].lerp_(grad, (1 - mu) * keep)
            update = grad.lerp(self.state[name], mu)
            parameter.mul_(1 - keep.double() * lr * self.weight_decay)
            rows = self.rows[name]
            for w, part in zip(torch.split(parameter, rows), torch.split(update, rows), strict=True):
                w.sub_(orthogonal(part) * (keep.double() * lr * self._adjusted(*part.shape)))

    def _adjusted(self, rows: int, columns: int) -> float:
        if self.config.muon_adjust_lr == "original":
            return math.sqrt(max(1, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def orthogonal(matrix: Tensor) -> Tensor:
    """Near the nearest matrix whose singular values are all 1 (they come out between about 0.7 and 1.2), float32."""
    # private to torch: imported where Muon is used, so that without it nothing depends on it
    from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz

    coefficients = DEFAULT_A, DEFAULT_B, DEFAULT_C
    return _zeropower_via_newtonschulz(matrix, coefficients, DEFAULT_NS_STEPS, EPS).float()
