"""Soft caps: cap * tanh(x / cap), near x where |x| is far below the cap and never beyond it (Gemma 2, 2408.00118)."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """x, any shape, bent to within +-cap; computed and returned in float32."""
    return cap * torch.tanh(x.float() / cap)
