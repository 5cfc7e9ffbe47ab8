"""AdamW and StableAdamW for a pack: decay groups, moments, updates and their sizes.

AdamW runs on torch's fused kernel. Each member has its own launches on its rows, so it is independent of the others by
construction and equals torch's AdamW bit for bit (a test compares them). That costs less than vectors of settings
would: at 1.3 M parameters and 128 members, 256 launches in a CUDA graph take less time than nine passes over the
memory. Why not `torch.optim.AdamW`: making one imports the compiler, 1.8 CPU seconds in every trial's process.

StableAdamW holds an update of a tensor back while its second moment lags (arXiv 2304.13013, algorithm 2), and the decay
with it; the trace's `lr` is lr_t, the scheduled one:

    RMS_t = sqrt(mean(g^2 / max(v_hat, eps^2)))      about 1 when steady
    eta   = lr_t / max(1, RMS_t)
    w    <- w - eta * wd * w - eta * m_hat / (sqrt(v_hat) + eps)

Weight decay has two meanings (`optim.decay_mode`); lr is the peak that the schedule multiplies, `TrialConfig.peak_lr`:

    coupled      w <- w - lr_t * wd * w            torch's AdamW, Lingua, HF: decay shrinks when lr does
    independent  w <- w - (lr_t / lr) * wd * w     arXiv 2309.14322: decay follows the schedule but not the peak lr

and three groups (`optim.decay_params`): `matrices` decays every parameter with two or more dimensions (embeddings
included) and no norm weight; `matrices_no_embed` leaves out the embedding too, as OLMo 2 does (arXiv 2501.00656), and
with it a tied output matrix; `all` decays everything, as Lingua's single parameter group does. (Decay pulls a norm's
weight to 0, which is the identity for Gemma's norms, that multiply by 1 + weight.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabstudy.config import OptimConfig, TrialConfig
from stabstudy.training.model import layer_of
from stabstudy.training.stack import beside, rates, replace, rows, vector


def decay_rate(config: OptimConfig, peak_lr: float) -> float:
    """What an update multiplies by lr_t and the weight; divided by the peak lr it follows lr_t / lr instead."""
    return config.weight_decay / peak_lr if config.decay_mode == "independent" else config.weight_decay


def decays(config: OptimConfig, name: str, ndim: int) -> bool:
    """Whether a parameter of so many dimensions (of one member) is in the group that decays."""
    if config.decay_params == "all":
        return True
    return ndim >= 2 and not (config.decay_params == "matrices_no_embed" and layer_of(name) == "embed")


def decay_rates(configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """[K] for each of the stacked parameters: every member's `decay_rate`, 0 where its group does not decay."""

    def of(config: TrialConfig, name: str, ndim: int) -> float:
        return decay_rate(config.optim, config.peak_lr) if decays(config.optim, name, ndim) else 0.0

    return [vector([of(c, name, p.ndim - 1) for c in configs], p.device) for name, p in named]


TINY = torch.finfo(torch.float32).tiny  # the square of a small eps is 0 in float32, and 0 / 0 would be NaN


class Moments:
    """Updates made [K] and both moments of stacked parameters [K, *shape], with each member's betas and eps.

    One counter serves all parameters of a member: it is every `adam/step/<parameter>` of its checkpoint.
    """

    def __init__(self, configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]):
        device = named[0][1].device
        self.step_K = torch.zeros(len(configs), dtype=torch.float32, device=device)
        self.first = [torch.zeros_like(p) for _, p in named]
        self.second = [torch.zeros_like(p) for _, p in named]
        self.beta1_K = vector([c.optim.beta1 for c in configs], device)
        self.beta2_K = vector([c.optim.beta2 for c in configs], device)
        self.eps_K = vector([c.optim.eps for c in configs], device)
        self.state: dict[str, Tensor] = {}
        for (name, _), first, second in zip(named, self.first, self.second, strict=True):
            self.state |= {f"adam/step/{name}": self.step_K}
            self.state |= {f"adam/exp_avg/{name}": first, f"adam/exp_avg_sq/{name}": second}

    def corrections(self, step_K: Tensor) -> tuple[Tensor, Tensor]:
        """1 - beta^step of both moments, float64 [K]."""
        return 1 - self.beta1_K**step_K, 1 - self.beta2_K**step_K

    def lag(self, squares: Tensor, v_hat: Tensor) -> Tensor:
        """sqrt(mean(g^2 / max(v_hat, eps^2))) of one tensor, [K], from its g^2 (arXiv 2304.13013's RMS_t).

        About 1 when steady; large when the second moment has not caught up with the gradient.
        """
        floor = beside(self.eps_K.square().clamp(min=TINY), v_hat)
        return (squares / torch.maximum(v_hat, floor)).flatten(1).mean(1).sqrt()

    @torch.no_grad()
    def update_sizes(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """{"update_rms": [K], "adam_rms_max": [K]} of the last update, whose gradients these are.

        update_rms: RMS over all elements of m_hat / (sqrt(v_hat) + eps), the update divided by the learning rate, decay
        left out. adam_rms_max: the largest over tensors of `lag`. Means nothing for a member that the last step left
        out, and is NaN before its first update.
        """
        first_K, second_K = self.corrections(self.step_K)
        squares, count, lags = [], 0, []
        for grad, m, v in zip(grads, self.first, self.second, strict=True):
            v_hat = v / beside(second_K, v)
            update = m / beside(first_K, m) / (v_hat.sqrt() + beside(self.eps_K, v))
            squares.append(update.square().flatten(1).sum(1, dtype=torch.float64))
            count += update[0].numel()
            lags.append(self.lag(grad.square(), v_hat))
        return {
            "update_rms": (torch.stack(squares, dim=1).sum(1) / count).sqrt(),
            "adam_rms_max": torch.stack(lags).amax(0),
        }


@dataclass(frozen=True)
class Group:
    """Parameters of one member that share a weight decay: their places among all, and views of the member's rows."""

    member: int
    places: list[int]
    weights: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]  # one counter, repeated
    weight_decay: float


class AdamW:
    """The optimizer of a pack; see `optimizers.Optimizer`. The parameters must keep their storage."""

    def __init__(self, configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]):
        self.settings = [c.optim for c in configs]
        self.moments = Moments(configs, named)
        self.state = self.moments.state
        self.groups = _groups(configs, named, self.moments)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: Sequence[float] | Tensor, left_out: Tensor) -> None:
        """See `optimizers.Optimizer.step`. The kernel itself skips a member whose `found_inf` is 1."""
        grad_rows = [rows(g) for g in grads]
        rates = _for_kernel(lr).unbind() if isinstance(lr, Tensor) else lr
        skipped = left_out.unbind()
        self.moments.step_K.add_(1)
        for group in self.groups:
            optim = self.settings[group.member]
            torch._fused_adamw_(
                group.weights,
                [grad_rows[i][group.member] for i in group.places],
                group.first,
                group.second,
                [],
                group.steps,
                lr=rates[group.member],  # a float or a 0-dim tensor
                beta1=optim.beta1,
                beta2=optim.beta2,
                weight_decay=group.weight_decay,
                eps=optim.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=skipped[group.member],
            )
        self.moments.step_K.sub_(left_out)

    def update_sizes(self, grads: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """See `Moments.update_sizes`."""
        return self.moments.update_sizes(grads)


def _for_kernel(lr_K: Tensor) -> Tensor:
    """Rates in the precision that the fused kernel reads: float32 on CUDA."""
    return lr_K.float() if lr_K.device.type == "cuda" else lr_K


def _groups(configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]], moments: Moments) -> list[Group]:
    weights = [rows(p.detach()) for _, p in named]
    first, second = [rows(m) for m in moments.first], [rows(v) for v in moments.second]
    steps = moments.step_K.unbind()
    groups = []
    for k, config in enumerate(configs):
        decayed = [decays(config.optim, name, p.ndim - 1) for name, p in named]
        for rate, which in ((decay_rate(config.optim, config.peak_lr), True), (0.0, False)):
            places = [i for i, yes in enumerate(decayed) if yes is which]
            w, m, v = ([tensors[i][k] for i in places] for tensors in (weights, first, second))
            groups.append(Group(k, places, w, m, v, [steps[k]] * len(places), rate))
    return [group for group in groups if group.places]


class StableAdamW:
    """The optimizer of a pack; see `optimizers.Optimizer`."""

    def __init__(self, configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]):
        self.parameters = [p.detach() for _, p in named]
        self.device = self.parameters[0].device
        self.decay_K = decay_rates(configs, named)
        self.moments = Moments(configs, named)
        self.state = self.moments.state

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: Sequence[float] | Tensor, left_out: Tensor) -> None:
        """See `optimizers.Optimizer.step`."""
        of, lr_K = self.moments, rates(lr, self.device)
        corrections = of.corrections(of.step_K + 1)
        for i, grad in enumerate(grads):
            replace(of.first[i], of.first[i].lerp(grad, beside(1 - of.beta1_K, grad)), left_out)
            squares = grad.square()
            replace(of.second[i], of.second[i].lerp(squares, beside(1 - of.beta2_K, grad)), left_out)
            self._move(i, squares, lr_K, corrections, left_out)
        of.step_K.add_(1 - left_out)

    def _move(
        self, i: int, squares: Tensor, lr_K: Tensor, corrections: tuple[Tensor, Tensor], left_out_K: Tensor
    ) -> None:
        """The update of one tensor from its new moments, in place."""
        weight, of = self.parameters[i], self.moments
        v_hat = of.second[i] / beside(corrections[1], weight)
        eta_K = lr_K / of.lag(squares, v_hat).clamp(min=1)
        update = of.first[i] / beside(corrections[0], weight)
        update.div_(v_hat.sqrt_().add_(beside(of.eps_K, weight))).mul_(beside(eta_K, weight))
        shrunk = weight * beside(1 - eta_K * self.decay_K[i], weight)
        replace(weight, shrunk.sub_(update), left_out_K)

    def update_sizes(self, grads: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """See `Moments.update_sizes`."""
        return self.moments.update_sizes(grads)
