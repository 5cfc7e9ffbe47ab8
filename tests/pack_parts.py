"""Stacked parameters, gradients and settings of a small pack, for the tests of optimizers and clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from stabstudy.config import ModelConfig, OptimConfig, TrialConfig
from stabstudy.training.clipping import ClipRule, clip_rule, global_norm, tensor_norms
from stabstudy.training.optimizers import OPTIMIZERS, Optimizer, optimizer

K, STEPS = 5, 12
MODEL = ModelConfig(depth=1, dim=8, n_heads=2, n_kv_heads=1, multiple_of=4)
SHAPES = {
    "embed.weight": (11, 8),
    "layers.0.attention.wqkv.weight": (16, 8),
    "layers.0.attention.wo.weight": (8, 8),
    "layers.0.ffn.w2.weight": (8, 20),
    "layers.0.ffn_norm.weight": (8,),
    "head.weight": (11, 8),
}
PARTS = {"layers.0.attention.wqkv.weight": [8, 4, 4]}
"""Rows of q, k and v, by hand: 2 query heads and 1 key head of 4."""
LR = (3e-3, 0.02, 1e-3, 0.01, 5e-3)  # peaks
RULES = ("norm", "zclip", "adagc", "agc")
KINDS = tuple(OPTIMIZERS)


def configs(kind: str, rule: str = "norm") -> list[TrialConfig]:
    """Five members that differ in every setting of an optimizer that may differ; one of `norm` without a clip."""
    clips = {"norm": (0.3, None, 1.0, 0.5, 2.0), "agc": (1.0,) * 5}.get(rule, (0.3, 0.6, 1.0, 0.5, 2.0))
    optims = [
        OptimConfig(
            kind=kind,
            lr=LR[k],
            weight_decay=(0.1, 0.0, 0.3, 0.02, 0.5)[k],
            decay_mode="independent" if k == 3 else "coupled",
            decay_params=("matrices", "all", "matrices_no_embed", "all", "matrices")[k],
            beta1=(0.9, 0.8, 0.95, 0.9, 0.0)[k],
            beta2=(0.95, 0.99, 0.9, 0.999, 0.98)[k],
            eps=1e-8 if kind == "lion" else (1e-8, 1e-6, 1e-10, 1e-5, 1e-8)[k],
            muon_lr=(None, 0.05, None, 0.02, 0.01)[k] if kind == "muon" else None,
            clip=clips[k],
            clip_kind=rule,
        )
        for k in range(K)
    ]
    return [TrialConfig(model=MODEL, optim=optim) for optim in optims]


def weights(seed: int = 0) -> list[tuple[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(K, *shape, generator=draw) / 3) for name, shape in SHAPES.items()]


def gradients(step: int) -> list[Tensor]:
    """Of another size for each member, tensor and step, with a spike of every member at step 8."""
    draw = torch.Generator().manual_seed(1000 + step)
    sizes = torch.rand(len(SHAPES), K, generator=draw) * (20 if step == 8 else 1)
    stacks = [torch.randn(K, *shape, generator=draw) for shape in SHAPES.values()]
    return [(g.transpose(0, -1) * s).transpose(0, -1).contiguous() for g, s in zip(stacks, sizes, strict=True)]


def rates(step: int) -> list[float]:
    return [lr * (0.4, 1.0, 0.7)[step % 3] for lr in LR]


class Pack:
    """Parameters, optimizer and clipping rule of some of the members."""

    def __init__(self, kind: str, rule: str = "norm", members: range = range(K)):
        self.members = members
        chosen = [configs(kind, rule)[k] for k in members]
        self.named = [(name, w[list(members)].clone()) for name, w in weights()]
        self.optimizer: Optimizer = optimizer(chosen, self.named)
        self.rule: ClipRule = clip_rule(chosen, self.named)
        self.factors: list[Tensor] = []

    def step(self, t: int, left_out: Tensor | None = None, stacks: list[Tensor] | None = None) -> list[Tensor]:
        """One clipped update; returns the gradients as the optimizer saw them."""
        mine = list(self.members)
        grads = [g[mine].clone() for g in (gradients(t) if stacks is None else stacks)]
        norms = tensor_norms(grads)
        self.factors.append(self.rule.apply(grads, norms, global_norm(norms)))
        out = torch.zeros(K) if left_out is None else left_out
        self.optimizer.step(grads, [rates(t)[k] for k in mine], out[mine])
        return grads

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name: copies."""
        state = {**self.optimizer.state, **self.rule.state, **dict(self.named)}
        return {name: tensor.clone() for name, tensor in state.items()}

    def load(self, row: dict[str, Tensor]) -> None:
        """Every tensor from a member's own, without the leading dimension: into a pack of one."""
        for name, tensor in {**self.optimizer.state, **self.rule.state, **dict(self.named)}.items():
            tensor.copy_(row[name][None])
