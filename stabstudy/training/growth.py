"""Growth exponents of the initial weights (OLMo 2, arXiv 2501.00656): whether signals grow or vanish with depth.

    growth_act  = log(norm(v_L) / norm(v_1)) / L      v_l: mean over all positions of the residual stream after layer l
    growth_grad = log(norm(u_L) / norm(u_1)) / L      u_l: mean over all positions of the loss's gradient there

Near 0 is good: neither vanishes nor explodes as layers are added. One forward and backward pass over the first
sequences of the evaluation batch, before the first update, in the training's precision. The sum of cross-entropies is
differentiated, not their mean: the ratio is the same, and small gradients survive float16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stabstudy.training.families import Model
from stabstudy.training.objective import MINIMISED, target_sums
from stabstudy.training.stack import Scalars
from stabstudy.training.step import Stepper

SEQUENCES = 50
"""Of the evaluation batch; all of them where it has fewer."""


def growth(stepper: Stepper, windows_KBT: Tensor) -> list[tuple[float | None, float | None]]:
    """(growth_act, growth_grad) of each member as it is; (None, None) with a single layer, NaN where not finite.

    Draws no random number and leaves weights and their gradients alone.
    """
    model = stepper.configs[0].model
    if model.depth < 2:
        return [(None, None)] * stepper.K
    sums = torch.zeros(4, stepper.K, model.dim, dtype=torch.float64, device=stepper.device)  # v_1, v_L, u_1, u_L
    for part in torch.split(windows_KBT[:, :SEQUENCES], stepper.micro_batch, dim=1):
        sums += torch.stack(_sums(stepper, part))
    v_1, v_L, u_1, u_L = torch.linalg.vector_norm(sums, dim=2)
    exponents = torch.stack([v_L / v_1, u_L / u_1], dim=1).log() / model.depth
    return [(act, grad) for act, grad in exponents.tolist()]


def _sums(stepper: Stepper, windows_KBT: Tensor) -> list[Tensor]:
    """Sums over all positions, [K,D] each: stream after the first and the last layer, gradient at the first, the last.

    The gradient is that of a tensor of zeros which is added to the stream there.
    """
    config = stepper.configs[0].model
    K, B, T = windows_KBT[..., 1:].shape
    zeros = [torch.zeros(K, B, T, config.dim, device=stepper.device, requires_grad=True) for _ in range(2)]

    def of_one(model: Model, inputs: Tensor, targets: Tensor, first: Tensor, last: Tensor) -> Scalars:
        with _added(model.layers[0], first), _added(model.layers[-1], last):
            stream = [x_BTD for _, _, x_BTD in model.walk(inputs)]
        loss = target_sums(model.readout(stream[-1]), targets, False, config.logit_softcap)[MINIMISED]
        v_1, v_L = (x_BTD.detach().double().sum((0, 1)) for x_BTD in (stream[0], stream[-1]))
        return {"loss": loss, "v_1": v_1, "v_L": v_L}

    of_all = stepper.stack.run(of_one, windows_KBT[..., :-1], windows_KBT[..., 1:], *zeros)
    gradients = torch.autograd.grad(of_all["loss"].sum(), zeros)
    return [of_all["v_1"], of_all["v_L"], *(g.double().sum((1, 2)) for g in gradients)]


@contextlib.contextmanager
def _added(layer: nn.Module, summand: Tensor) -> Iterator[None]:
    """While this lasts, the layer's output is larger by the summand."""
    hook = layer.register_forward_hook(lambda module, inputs, output: output + summand.to(output.dtype))
    try:
        yield
    finally:
        hook.remove()
