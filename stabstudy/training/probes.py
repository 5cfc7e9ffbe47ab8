"""Probes: the costly quantities, every `train.probe_every` steps, on the fixed evaluation batch.

A probe draws no random number and changes no value of the training: it only reads weights, optimizer state and the
gradients of the last update. It leaves one vector a member on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabstudy.training.clipping import global_norm, tensor_norms
from stabstudy.training.families import Model
from stabstudy.training.softcap import soft_cap
from stabstudy.training.stack import Scalars
from stabstudy.training.step import Stepper

PROBE_SEQUENCES = 4
"""Sequences of the evaluation batch that a probe looks at: explicit attention scores cost B*H*T^2 numbers a layer."""

SCALARS = ("val_loss", "update_rms", "adam_rms_max", "param_norm", "noise_g2", "noise_s", "sized")
"""Of a probe, NaN where not measured; `sized`: 0 where there was no update whose size could be told, see Optimizer."""

OF_LAYERS = ("attn_logit_max", "attn_entropy", "resid_rms")
"""Depth numbers each, behind the scalars."""


def probe(stepper: Stepper, windows_KBT: Tensor, evaluate: bool = False) -> Tensor:
    """The probe of each member, [K, scalars + 3 * depth] float64 on the device; waits for nothing.

    Args:
        stepper: Just after a step, or before the first.
        windows_KBT: The evaluation set, [K, n, T+1]; only the validation loss (`evaluate`) needs all of it.
        evaluate: Whether to measure that.
    """
    tokens = windows_KBT[:, :PROBE_SEQUENCES, :-1]
    with torch.no_grad():
        layers = stepper.stack.run(lambda model, x: of_layers(model, x, stepper.configs[0].model.attn_softcap), tokens)
        sizes = stepper.optimizer.update_sizes(stepper.grads) if stepper.grads else None
    nan = torch.full((stepper.K,), math.nan, dtype=torch.float64, device=stepper.device)
    noise = stepper.noise
    values = {
        "val_loss": stepper.loss_on(windows_KBT) if evaluate else nan,
        "param_norm": global_norm(tensor_norms(stepper.stack.tensors)),
        "noise_g2": nan if noise is None else noise[:, 0],
        "noise_s": nan if noise is None else noise[:, 1],
        "sized": torch.zeros_like(nan) if sizes is None else 1 - stepper.left_out,
        **(sizes or {"update_rms": nan, "adam_rms_max": nan}),
    }
    scalars = torch.stack([values[name].double() for name in SCALARS], dim=1)
    return torch.cat([scalars, *(layers[name].double() for name in OF_LAYERS)], dim=1)


def width(stepper: Stepper) -> int:
    """Columns of a probe's vector."""
    return len(SCALARS) + len(OF_LAYERS) * stepper.configs[0].model.depth


def of_layers(model: Model, tokens_BT: Tensor, attn_softcap: float | None) -> Scalars:
    """OF_LAYERS of one member, [depth] each."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for q_BHTK, k_BGTK, x_BTD in model.walk(tokens_BT):
        largest, entropy = attention_statistics(q_BHTK, k_BGTK, attn_softcap)
        rows.append((largest, entropy, x_BTD.float().square().mean().sqrt()))
    return dict(zip(OF_LAYERS, (torch.stack(column) for column in zip(*rows, strict=True)), strict=True))


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
