"""AdamW for a pack, on torch's fused kernel, with the decay groups of `decay.py`.

Each member has its own launches on its rows, so a member is independent of the others by construction and equals
torch's AdamW bit for bit (a test compares them). That costs less than vectors of settings would: at 1.3 M parameters
and 128 members, 256 launches in a CUDA graph take less time than nine passes over the memory.

Why not `torch.optim.AdamW`: making one imports the compiler, 1.8 CPU seconds in every trial's process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.training.decay import decay_rate, decays
from stabstudy.training.members import rows
from stabstudy.training.moments import Moments


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
        rates = lr.unbind() if isinstance(lr, Tensor) else lr
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
