"""The optimizers of `optim.kind`: what training asks of one, and the table of them.

All of them act on a pack: K members of one shape, each parameter one tensor [K, *shape] that is written in place, with
settings of each member's own. Nothing they do waits for the device or depends on its values, so a step can stand in a
CUDA graph where `lr` is a tensor. A new optimizer is one file, one line here and one in `config.OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.training.adamw import AdamW, StableAdamW
from stabstudy.training.lion import Lion
from stabstudy.training.muon import Muon


class Optimizer(Protocol):
    """The optimizer of a pack.

    `state` has all that the next step depends on beside the weights, as tensors [K, ...] written in place under the
    keys of a member's checkpoint: "adam/exp_avg/<parameter>", "muon/<parameter>", ... Row k is member k's, of the
    shape that its checkpoint has. Several keys may share one tensor.
    """

    @property
    def state(self) -> Mapping[str, Tensor]:
        """See the class."""

    def step(self, grads: Sequence[Tensor], lr: Sequence[float] | Tensor, left_out: Tensor) -> None:
        """One update of every member, in place.

        `grads`: of the parameters, in their order, [K, *shape], contiguous, left as they are. `lr`: [K], floats or a
        float32 tensor on the device. `left_out`: float32 [K]; where it is 1 the member has no update and no memory of
        this step, whatever its gradients are.
        """

    def update_sizes(self, grads: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """{"update_rms": [K], "adam_rms_max": [K]} of the last update, whose gradients these are; None: not Adam's."""


Maker = Callable[[Sequence[TrialConfig], Sequence[tuple[str, Tensor]]], Optimizer]

OPTIMIZERS: dict[str, Maker] = {"adamw": AdamW, "stable_adamw": StableAdamW, "muon": Muon, "lion": Lion}


def optimizer(configs: Sequence[TrialConfig], named: Sequence[tuple[str, Tensor]]) -> Optimizer:
    """The optimizer of these members, with an empty memory; `named`: the stacked parameters.

    Raises ValueError where the members cannot share one.
    """
    kinds = {c.optim.kind for c in configs}
    if len(kinds) > 1:
        raise ValueError(f"optim.kind must be equal within a pack, got {', '.join(sorted(kinds))}")
    return OPTIMIZERS[configs[0].optim.kind](configs, named)
