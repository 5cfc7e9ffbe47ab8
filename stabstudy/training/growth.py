"""Growth exponents of the initial weights (OLMo 2, arXiv 2501.00656): whether signals grow or vanish with depth.

    growth_act  = log(norm(v_L) / norm(v_1)) / L      v_l: mean over all positions of the residual stream after layer l
    growth_grad = log(norm(u_L) / norm(u_1)) / L      u_l: mean over all positions of the loss's gradient there

Near 0 is good: neither vanishes nor explodes as layers are added. One forward and backward pass over the first
sequences of the evaluation batch, before the first update, in the training's precision. The sum of cross-entropies is
differentiated, not their mean: the ratio is the same, and small gradients survive float16.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.training.hf import Model
from stabstudy.training.step import Stepper, target_sums

SEQUENCES = 50
"""Of the evaluation batch; all of them where it has fewer."""


def growth(stepper: Stepper, windows: NDArray[np.int64]) -> tuple[float | None, float | None]:
    """(growth_act, growth_grad) of the model as it is; (None, None) with a single layer, NaN where not finite.

    Draws no random number and leaves weights and their gradients alone.
    """
    config = stepper.config
    if config.model.depth < 2:
        return None, None
    sums = torch.zeros(4, config.model.dim, dtype=torch.float64, device=stepper.device)  # v_1, v_L, u_1, u_L
    for start in range(0, min(len(windows), SEQUENCES), config.train.micro_batch):
        stop = min(start + config.train.micro_batch, SEQUENCES)
        sums += torch.stack(_first_and_last(stepper, torch.from_numpy(windows[start:stop]).to(stepper.device)))
    v_1, v_L, u_1, u_L = torch.linalg.vector_norm(sums, dim=1)
    ratios = torch.stack([v_L / v_1, u_L / u_1]).log() / config.model.depth
    act, grad = ratios.tolist()
    return act, grad


def _first_and_last(stepper: Stepper, windows: Tensor) -> list[Tensor]:
    """Sums over all positions, [D] each: stream after the first and the last layer, gradient at the first, the last."""

    def stream_and_logits(model: Model) -> tuple[list[Tensor], Tensor]:
        stream = [x_BTD for _, _, x_BTD in model.walk(windows[:, :-1])]
        return stream, model.head(model.norm(stream[-1]))

    stream, logits_BTV = stepper.forward.run(stream_and_logits)
    loss = target_sums(logits_BTV, windows[:, 1:], False, False, stepper.config.model.logit_softcap).cross_entropy
    ends = [stream[0], stream[-1]]
    return [x_BTD.detach().double().sum((0, 1)) for x_BTD in (*ends, *torch.autograd.grad(loss, ends))]
