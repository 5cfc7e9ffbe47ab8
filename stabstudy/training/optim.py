"""AdamW with explicit decay groups and two meanings of weight decay, on torch's fused kernel.

    coupled      w <- w - lr_t * wd * w            torch's AdamW, Lingua, HF: decay shrinks when lr does
    independent  w <- w - (lr_t / lr) * wd * w     arXiv 2309.14322: decay follows the schedule but not the peak lr

Here lr is the peak that the schedule multiplies, `TrialConfig.peak_lr` (`optim.lr` after `optim.lr_rule`).

`optim.kind` stable_adamw holds back the update of each tensor by its RMS_t (`stable_adamw.py`); moments and groups are
the same. muon takes the matrices of the layers away from AdamW (`muon.py`).

`matrices` decays every parameter with two or more dimensions (embeddings included) and no norm weight;
`matrices_no_embed` leaves out the embedding too, as OLMo 2 does (arXiv 2501.00656), and with it a tied output matrix;
`all` decays everything, as Lingua's single parameter group does. (Decay pulls a norm's weight to 0, which is the
identity for Gemma's norms, that multiply by 1 + weight.)

Why not `torch.optim.AdamW`: making one imports the compiler, 1.8 CPU seconds in every trial's process. The arithmetic
is the same kernel's, so weights equal torch's bit for bit (a test compares them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabstudy.config import OptimConfig
from stabstudy.training.clip import layer_of
from stabstudy.training.stable_adamw import stable_update


@dataclass(frozen=True)
class Moments:
    """What AdamW remembers of one parameter; `step` is a 0-dim float32 tensor of updates made."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class Group:
    """Parameters that share a weight decay."""

    parameters: list[nn.Parameter]
    weight_decay: float


class AdamW:
    """The optimizer of one trial: `step` makes one update from the parameters' gradients."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], config: OptimConfig, peak_lr: float):
        self.config = config
        self.groups = [g for g in _groups(named, config, peak_lr) if g.parameters]
        self.state: dict[nn.Parameter, Moments] = {}
        for _, p in named:
            zeros = torch.zeros_like(p), torch.zeros_like(p)
            self.state[p] = Moments(torch.zeros((), dtype=torch.float32, device=p.device), *zeros)

    def step(self, lr: float, found_inf: Tensor) -> None:
        """One update at this learning rate; none, and no memory of it, where `found_inf` (0-dim float32) is 1."""
        for group in self.groups:
            if self.config.kind == "stable_adamw":
                self._stable_step(group, lr, found_inf)
                continue
            moments = [self.state[p] for p in group.parameters]
            steps = [m.step for m in moments]
            torch._foreach_add_(steps, 1)
            with torch.no_grad():
                torch._fused_adamw_(
                    list[Tensor](group.parameters),
                    [p.grad for p in group.parameters if p.grad is not None],
                    [m.exp_avg for m in moments],
                    [m.exp_avg_sq for m in moments],
                    [],
                    steps,
                    lr=lr,
                    beta1=self.config.beta1,
                    beta2=self.config.beta2,
                    weight_decay=group.weight_decay,
                    eps=self.config.eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=None,
                    found_inf=found_inf,
                )
            torch._foreach_sub_(steps, [found_inf] * len(steps))

    def _stable_step(self, group: Group, lr: float, found_inf: Tensor) -> None:
        for p in group.parameters:
            m = self.state[p]
            stable_update(p, m.step, m.exp_avg, m.exp_avg_sq, self.config, group.weight_decay, lr, found_inf)


def decay_rate(config: OptimConfig, peak_lr: float) -> float:
    """What an update multiplies by lr_t and the weight; divided by the peak lr it follows lr_t / lr instead."""
    return config.weight_decay / peak_lr if config.decay_mode == "independent" else config.weight_decay


def _groups(named: Sequence[tuple[str, nn.Parameter]], config: OptimConfig, peak_lr: float) -> Iterator[Group]:
    decayed = [_decays(name, p, config.decay_params) for name, p in named]
    yield Group([p for (_, p), yes in zip(named, decayed, strict=True) if yes], decay_rate(config, peak_lr))
    yield Group([p for (_, p), yes in zip(named, decayed, strict=True) if not yes], 0.0)


def _decays(name: str, parameter: nn.Parameter, which: str) -> bool:
    if which == "all":
        return True
    return parameter.ndim >= 2 and not (which == "matrices_no_embed" and layer_of(name) == "embed")


def update_sizes(optimizer: AdamW) -> tuple[Tensor, Tensor]:
    """(update_rms, adam_rms_max) of the last update, 0-dim tensors; needs the gradients that it used.

    update_rms: RMS over all elements of m_hat / (sqrt(v_hat) + eps), the update divided by the learning rate, decay
    left out. adam_rms_max: the largest over tensors of sqrt(mean(g^2 / max(v_hat, eps^2))) (arXiv 2304.13013's RMS_t:
    about 1 when steady; large when the second moment has not caught up with the gradient).
    """
    beta1, beta2, eps = optimizer.config.beta1, optimizer.config.beta2, optimizer.config.eps
    squares, count, ratios = [], 0, []
    for parameter, of in optimizer.state.items():
        assert parameter.grad is not None
        v_hat = of.exp_avg_sq / (1 - beta2**of.step)
        update = (of.exp_avg / (1 - beta1**of.step)) / (v_hat.sqrt() + eps)
        squares.append(update.square().sum(dtype=torch.float64))
        count += update.numel()
        ratios.append((parameter.grad.square() / v_hat.clamp(min=eps**2)).mean().sqrt())
    return (torch.stack(squares).sum() / count).sqrt(), torch.stack(ratios).max()
