"""Gradient norms, measured once per step before anything touches the gradients, and clipping by the global norm.

Why not torch's `clip_grad_norm_`: it multiplies by c/norm even when the norm is Inf or NaN, and one bad entry then
turns every gradient into 0 or NaN without an error. Here the norm is measured, recorded, tested, and only then used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CLIP_EPS = 1e-6
"""torch adds it to the norm (`clip_grads_with_norm_`); kept so that clip_scale equals torch's."""


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients, in the parameters' order. A parameter without one raises: a silent zero would hide a bug."""
    found = [p.grad for p in parameters if p.grad is not None]
    if len(found) != len(parameters):
        raise RuntimeError(f"{len(parameters) - len(found)} parameters have no gradient")
    return found


def tensor_norms(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of each gradient, float32, shape [len(grads)]."""
    return torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32))


def clip_scale(norm: Tensor, threshold: float) -> Tensor:
    """min(1, threshold / (norm + 1e-6)), the factor torch uses; a 0-dim tensor on the norm's device."""
    return torch.clamp(threshold / (norm + CLIP_EPS), max=1.0)


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every gradient in place by a 0-dim tensor."""
    torch._foreach_mul_(list(grads), factor)


def layer_of(parameter_name: str) -> str:
    """The group of a parameter in `layer_grad_norm`: embed, 0, 1, ..., or head (which has the final norm too)."""
    parts = parameter_name.split(".")
    return parts[1] if parts[0] == "layers" else "embed" if parts[0] == "embed" else "head"


def layer_index(parameter_names: Sequence[str], depth: int) -> list[int]:
    """For each parameter the index of its group in [embed, layer 0 .. L-1, head]; a tied matrix counts to embed."""
    order = {"embed": 0, "head": depth + 1} | {str(i): i + 1 for i in range(depth)}
    return [order[layer_of(name)] for name in parameter_names]
