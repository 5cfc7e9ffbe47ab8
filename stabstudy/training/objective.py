"""Training objectives: what a micro-batch contributes to the loss and to the record.

An objective is a function of a model and one member's batch. It returns named scalars, each a sum over the micro-batch
(or the largest over it, see `largest`); whoever adds up the micro-batches of a step divides them by what the whole step
has of what is counted (`divisor`): valid targets, or sequences. `minimised` is the sum whose gradient trains; the
others, once the step is over, become what is recorded (`record`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.data.layouts import IGNORE as IGNORE
from stabstudy.training.families import Model
from stabstudy.training.model import soft_cap

MINIMISED = "minimised"


class Objective(Protocol):
    """What the members of a pack minimise. The pack calls it for all of them at once (`Stack.run`)."""

    @property
    def scalars(self) -> tuple[str, ...]:
        """What a call returns, beside MINIMISED; `loss` is one of them."""

    @property
    def largest(self) -> tuple[str, ...]:
        """Those of `scalars` that are a maximum, and no sum."""

    @property
    def divided(self) -> tuple[str, ...]:
        """Those that are divided by the step's `divisor` as they come; `record` makes means of the others."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What a step records of it; `loss` is one of them."""

    @property
    def flags(self) -> int:
        """Numbers of a window behind its tokens, see `layouts.flag`."""

    @property
    def settings(self) -> tuple[Tensor, ...]:
        """Numbers that differ between the members, [K] each; a call gets one member's."""

    def divisor(self, windows_KBT: Tensor) -> Tensor:
        """[K] int64: what these windows have of what a mean is taken over. Without any there is no update."""

    def inputs(self, windows_KBT: Tensor) -> tuple[Tensor, ...]:
        """What a call gets of a micro-batch, [K, B, ...] each."""

    def __call__(self, model: Model, *inputs: Tensor, masked: bool = False) -> dict[str, Tensor]:
        """MINIMISED and `scalars` of one micro-batch, 0-dim. `masked`: some targets are IGNORE.

        `inputs`: those of `inputs`, then `settings`, of one member.
        """

    def record(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`columns` of a step, [K] each, of the totals of its micro-batches."""


def inputs_of(windows: Tensor) -> Tensor:
    """[..., T] the tokens that a model reads; 0 where there is none."""
    numbers = windows[..., :-1]
    return torch.maximum(numbers, IGNORE - 1 - numbers).clamp(min=0)


def targets_of(windows: Tensor) -> Tensor:
    """[..., T] the next tokens, IGNORE for those that count for nothing."""
    return windows[..., 1:].clamp(min=IGNORE)


def valid(windows_KBT: Tensor) -> Tensor:
    """[K] targets that count."""
    return (windows_KBT[..., 1:] >= 0).sum((1, 2))


class NextToken:
    """Cross-entropy of the next token, and `z_loss` times the square of logsumexp, which is never in the record.

    The loss and logsumexp are those of the capped logits where there is a soft cap; `logit_absmax` is before it.
    """

    scalars: tuple[str, ...] = ("loss", "logz_mean", "logit_absmax")
    largest: tuple[str, ...] = ("logit_absmax",)
    divided: tuple[str, ...] = ("loss", "logz_mean")
    columns = scalars
    flags = 0

    def __init__(self, configs: Sequence[TrialConfig], device: torch.device):
        self.cap = configs[0].model.logit_softcap
        weights = [c.train.z_loss for c in configs]
        # all members of a pack have a z-loss, or none has: 0 times what is not finite would be NaN
        self.settings: tuple[Tensor, ...] = (torch.tensor(weights, device=device),) if weights[0] else ()

    def divisor(self, windows_KBT: Tensor) -> Tensor:
        """Valid targets."""
        return valid(windows_KBT)

    def inputs(self, windows_KBT: Tensor) -> tuple[Tensor, ...]:
        """Tokens and their targets, [K, B, T] each."""
        return inputs_of(windows_KBT), targets_of(windows_KBT)

    def __call__(self, model: Model, *inputs: Tensor, masked: bool = False) -> dict[str, Tensor]:
        inputs_BT, targets_BT, *settings = inputs
        return target_sums(model(inputs_BT), targets_BT, masked, self.cap, *settings)

    def record(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The totals: they are means already."""
        return dict(totals)


def target_sums(
    logits_BTV: Tensor, targets_BT: Tensor, masked: bool, cap: float | None = None, z_loss: Tensor | None = None
) -> dict[str, Tensor]:
    """Cross-entropy and logit statistics in float32. logsumexp is cross-entropy plus the target's own logit.

    No shape depends on the values: targets that are IGNORE weigh 0.
    """
    logits_NV = logits_BTV.flatten(0, 1).float()
    targets_N = targets_BT.flatten()
    raw_NV = logits_NV.detach()
    if cap is not None:
        logits_NV = soft_cap(logits_NV, cap)
    ce_N = F.cross_entropy(logits_NV, targets_N, reduction="none", ignore_index=IGNORE)
    with torch.set_grad_enabled(z_loss is not None and torch.is_grad_enabled()):
        own_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None]).squeeze(1)
        logz_N = ce_N + own_N
        if masked:
            valid_N = targets_N != IGNORE
            logz_N = torch.where(valid_N, logz_N, 0.0)
            raw_NV = torch.where(valid_N[:, None], raw_NV, 0.0)
    loss = ce_N.sum()
    minimised = loss if z_loss is None else loss + z_loss * logz_N.square().sum()
    low, high = raw_NV.amin(), raw_NV.amax()
    return {
        MINIMISED: minimised,
        "loss": loss.detach().clone(),  # where it is minimised too, the compiler cannot return views of one tensor
        "logz_mean": logz_N.detach().sum(),
        "logit_absmax": torch.maximum(-low, high),
    }
