"""AdamW with explicit decay groups and two meanings of weight decay.

    coupled      w <- w - lr_t * wd * w            torch's AdamW, Lingua, HF: decay shrinks when lr does
    independent  w <- w - (lr_t / lr) * wd * w     arXiv 2309.14322: decay follows the schedule but not the peak lr

`matrices` decays every parameter with two or more dimensions (embeddings included) and no norm weight; `all` decays
everything, as Lingua's single parameter group does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stabstudy.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over one group with decay and one without (empty groups left out)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if config.decay_params == "all" or parameter.ndim >= 2 else plain).append(parameter)
    # torch multiplies the decay by lr_t; divided by the peak lr it follows lr_t / lr instead
    decay = config.weight_decay / config.lr if config.decay_mode == "independent" else config.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next update, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def update_sizes(optimizer: torch.optim.AdamW) -> tuple[Tensor, Tensor]:
    """(update_rms, adam_rms_max) of the last update, 0-dim tensors; needs the gradients that it used.

    update_rms: RMS over all elements of m_hat / (sqrt(v_hat) + eps), the update divided by the learning rate, decay
    left out. adam_rms_max: the largest over tensors of sqrt(mean(g^2 / max(v_hat, eps^2))) (arXiv 2304.13013's RMS_t:
    about 1 when steady; large when the second moment has not caught up with the gradient).
    """
    squares, count, ratios = [], 0, []
    for group in optimizer.param_groups:
        (beta1, beta2), eps = group["betas"], group["eps"]
        for parameter, m, v, steps in _moments(optimizer, group["params"]):
            v_hat = v / (1 - beta2**steps)
            update = (m / (1 - beta1**steps)) / (v_hat.sqrt() + eps)
            squares.append(update.square().sum(dtype=torch.float64))
            count += update.numel()
            assert parameter.grad is not None
            ratios.append((parameter.grad.square() / v_hat.clamp(min=eps**2)).mean().sqrt())
    return (torch.stack(squares).sum() / count).sqrt(), torch.stack(ratios).max()


def _moments(
    optimizer: torch.optim.AdamW, parameters: Iterable[nn.Parameter]
) -> Iterable[tuple[nn.Parameter, Tensor, Tensor, Tensor]]:
    for parameter in parameters:
        state = optimizer.state[parameter]
        yield parameter, state["exp_avg"], state["exp_avg_sq"], state["step"]
