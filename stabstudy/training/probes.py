"""Probes: the costly quantities, every `train.probe_every` steps, on the fixed evaluation batch.

A probe draws no random number and changes no value of the training: it only reads weights, optimizer state and the
gradients of the last update.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.training.hf import Model
from stabstudy.training.optim import update_sizes
from stabstudy.training.softcap import soft_cap
from stabstudy.training.step import Stepper

PROBE_SEQUENCES = 4
"""Sequences of the evaluation batch that a probe looks at: explicit attention scores cost B*H*T^2 numbers a layer."""


def probe(stepper: Stepper, windows: NDArray[np.int64], step: int) -> dict[str, Any]:
    """One row of the probes record, validation loss and noise aside.

    `update_rms` and `adam_rms_max` are None where the last step made no update to be measured.
    """
    tokens_BT = torch.from_numpy(windows[:PROBE_SEQUENCES, :-1]).to(stepper.device)
    cap = stepper.config.model.attn_softcap

    def per_layer(model: Model) -> Tensor:
        rows = []
        for q_BHTK, k_BGTK, x_BTD in model.walk(tokens_BT):
            largest, entropy = attention_statistics(q_BHTK, k_BGTK, cap)
            rows.append(torch.stack([largest, entropy, x_BTD.float().square().mean().sqrt()]))
        return torch.stack(rows)

    with torch.no_grad():
        layers = stepper.forward.run(per_layer).tolist()
        norm = torch.linalg.vector_norm(weight_norms(stepper))
        measurable = stepper.muon is None and not stepper.left_out  # sizes of Adam's update of every tensor
        sizes = torch.stack([s.float() for s in update_sizes(stepper.optimizer)]) if measurable else None
    rms, ratio = sizes.tolist() if sizes is not None else (None, None)
    return {
        "step": step,
        "val_loss": None,
        "update_rms": rms,
        "adam_rms_max": ratio,
        "attn_logit_max": [row[0] for row in layers],
        "attn_entropy": [row[1] for row in layers],
        "resid_rms": [row[2] for row in layers],
        "param_norm": norm.item(),
    }


def weight_norms(stepper: Stepper) -> Tensor:
    """L2 norm of every weight tensor."""
    return torch.stack(torch._foreach_norm([p.detach() for p in stepper.parameters], 2))


def attention_statistics(q_BHTK: Tensor, k_BGTK: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """(largest unmasked q.k/sqrt(K), mean over rows i >= 1 of entropy / log(i + 1)) of one layer, in float32.

    With a soft cap the largest score is that before it, the entropy that of the weights which attention really uses.
    """
    B, H, T, K = q_BHTK.shape
    k_BHTK = (k_BGTK if k_BGTK.shape[1] == H else k_BGTK.repeat_interleave(H // k_BGTK.shape[1], dim=1)).float()
    scores_BHTT = (q_BHTK.float() / math.sqrt(K)) @ k_BHTK.transpose(-1, -2)
    hidden_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).triu(1)
    largest = scores_BHTT.masked_fill_(hidden_TT, -math.inf).amax()
    if cap is not None:
        scores_BHTT = soft_cap(scores_BHTT, cap).masked_fill_(hidden_TT, -math.inf)
    # entropy of softmax(s) = log sum e^s - sum softmax(s) s, the row's maximum taken out: few passes over T^2 numbers
    shifted_BHTT = scores_BHTT - scores_BHTT.amax(-1, keepdim=True)
    weights_BHTT = shifted_BHTT.exp()
    total_BHT = weights_BHTT.sum(-1)
    mean_BHT = (weights_BHTT * shifted_BHTT.masked_fill_(hidden_TT, 0.0)).sum(-1) / total_BHT
    entropy_BHT = total_BHT.log() - mean_BHT
    positions = torch.arange(2, T + 1, device=q_BHTK.device).float()
    return largest, (entropy_BHT[..., 1:] / positions.log()).mean()
