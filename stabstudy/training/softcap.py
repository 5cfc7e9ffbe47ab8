"""Soft caps: cap * tanh(x / cap), near x where |x| is far below the cap and never beyond it (Gemma 2, 2408.00118)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """x, any shape, bent to within +-cap; computed and returned in float32."""
    return cap * torch.tanh(x.float() / cap)


def capped_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, cap: float) -> Tensor:
    """Causal attention [B,H,T,K] whose scores q.k/sqrt(K) are capped before the softmax; scores and softmax in float32.

    Explicit, for torch's fused attention has no cap: it holds B*H*T^2 scores a layer.
    """
    groups, T = q_BHTK.shape[1] // k_BGTK.shape[1], q_BHTK.shape[2]
    k_BHTK, v_BHTK = (x.repeat_interleave(groups, dim=1) for x in (k_BGTK, v_BGTK))
    scores_BHTT = soft_cap(q_BHTK @ k_BHTK.transpose(-1, -2) / math.sqrt(q_BHTK.shape[3]), cap)
    hidden_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).triu(1)
    weights_BHTT = scores_BHTT.masked_fill(hidden_TT, -math.inf).softmax(dim=-1)
    return weights_BHTT.to(v_BHTK.dtype) @ v_BHTK
