"""One member of a pack seen through numpy: alone, or as the middle one of three whose neighbours are unlike it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabstudy.config import TrialConfig
from stabstudy.training import probes
from stabstudy.training.objective import IGNORE
from stabstudy.training.step import Stepper

Windows = NDArray[np.int64]

CPU = torch.device("cpu")
AMONG = {"alone": 0, "of three": 2}
"""Neighbours, by the name of the case; see `pytest.mark.parametrize` in the tests."""


class Lone:
    """A member with its stepper. What a test reads and writes here is the member's row and no other's."""

    def __init__(self, config: TrialConfig, model: nn.Module, neighbours: int = 0, compiled: bool = False):
        """`neighbours`: 0 or 2, with other weights, settings and windows."""
        assert neighbours in (0, 2)
        self.config, self.row = config, neighbours // 2
        self.vocab = model.embed.weight.shape[0]
        self._model = copy.deepcopy(model)
        configs = [unlike(config, i) if i != self.row else config for i in range(neighbours + 1)]
        models = [disturbed(model, i) if i != self.row else model for i in range(neighbours + 1)]
        self.stepper = Stepper(configs, models, CPU, compiled)
        self.names = self.stepper.stack.names
        self.tensor_norms = np.array([])  # of the last step, by tensor

    @property
    def inside(self) -> nn.Module:
        """The module that runs for all members: for hooks."""
        return self.stepper.stack._host.model

    @property
    def model(self) -> Any:
        """A plain copy of the member's model, with its weights as they are now."""
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                p.copy_(self.weights[name])
                p.grad = None
        return self._model

    @property
    def weights(self) -> dict[str, Tensor]:
        """Views: writing into one changes the member."""
        return {n: t[self.row] for n, t in zip(self.names, self.stepper.stack.tensors, strict=True)}

    @property
    def grads(self) -> dict[str, Tensor]:
        """Of the last step, after clipping."""
        return {n: t[self.row] for n, t in zip(self.names, self.stepper.grads, strict=True)}

    @property
    def memory(self) -> dict[str, Tensor]:
        """Views of all that the next step depends on, by its key in a checkpoint."""
        return {n: t[self.row] for n, t in self.stepper.state().items()}

    @property
    def noise(self) -> list[float] | None:
        """G2 and S of the last step; None: not measured."""
        return None if self.stepper.noise is None else list(self.stepper.noise[self.row].tolist())

    def step(self, windows: Windows, lr: float, noise: bool = False, live: bool = True) -> dict[str, float]:
        """One update of all; the member's scalars by name."""
        tokens, rates = self.all_windows(windows), [lr if i == self.row else 0.7 * lr for i in range(self.stepper.K)]
        going = torch.tensor([float(live or i != self.row) for i in range(self.stepper.K)])
        vector = self.stepper.step(tokens, rates, going, bool((tokens == IGNORE).any()), noise)[self.row]
        count = len(self.stepper.columns)
        self.tensor_norms = vector[count:].double().numpy()
        return dict(zip(self.stepper.columns, vector[:count].tolist(), strict=True))

    def accumulate(self, windows: Windows) -> dict[str, float]:
        """The gradients of a step without its update; the objective's scalars."""
        tokens = self.all_windows(windows)
        targets = (tokens[..., 1:] != IGNORE).sum((1, 2)).float()
        scalars = self.stepper.accumulate(tokens, targets, bool((tokens == IGNORE).any()))
        return {name: x[self.row].item() for name, x in scalars.items()}

    def loss_on(self, windows: Windows) -> float:
        """Mean cross-entropy."""
        tokens = self.all_windows(windows)
        return self.stepper.loss_on(tokens)[self.row].item()

    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(model, *inputs) in the number format of the training; every member gets the same inputs."""
        stacked = [x.expand(self.stepper.K, *x.shape) for x in inputs]
        return self.stepper.stack.run(lambda model, *of: {"out": function(model, *of)}, *stacked)["out"][self.row]

    def probe(self, windows: Windows, evaluate: bool = False) -> dict[str, Any]:
        """The member's probe: floats, a list of floats by layer, None for sizes of an update that was none."""
        vector = probes.probe(self.stepper, self.all_windows(windows), evaluate)[self.row].tolist()
        count, depth = len(probes.SCALARS), self.config.model.depth
        row: dict[str, Any] = dict(zip(probes.SCALARS, vector, strict=False))
        if not row.pop("sized"):
            row |= {"update_rms": None, "adam_rms_max": None}
        layers = {n: vector[count + i * depth : count + (i + 1) * depth] for i, n in enumerate(probes.OF_LAYERS)}
        return row | layers

    def growth(self, windows: Windows) -> tuple[float | None, float | None]:
        """growth_act and growth_grad."""
        return probes.growth_exponents(self.stepper, self.all_windows(windows))[self.row]

    @contextlib.contextmanager
    def changed_gradient(self, place: int | str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While this lasts, the gradient of one of the member's weights, by place or name, is changed."""
        at = place if isinstance(place, int) else self.names.index(place)

        def hook(grad: Tensor) -> Tensor:
            if self.stepper.K == 1:
                return change(grad)
            return torch.stack([change(g) if k == self.row else g for k, g in enumerate(grad)])

        handle = self.stepper.stack.leaves[at].register_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def all_windows(self, windows: Windows) -> Tensor:
        """[K, B, T+1]: the neighbours have other tokens, the last one its padding in other rows, the first one none."""
        if self.stepper.K == 1:
            return torch.from_numpy(windows)[None]
        others = [np.random.default_rng(100 + i).integers(0, self.vocab, windows.shape) for i in (0, 1)]
        others[1] = np.where(np.roll(windows, 1, axis=0) == IGNORE, IGNORE, others[1])
        return torch.from_numpy(np.stack([others[0], windows, others[1]]))


def unlike(config: TrialConfig, place: int) -> TrialConfig:
    """Settings of a neighbour: other numbers wherever members of a pack may differ."""
    optim, train = config.optim, config.train
    optim = dataclasses.replace(
        optim,
        lr=2 * optim.lr if place else optim.lr / 3,
        weight_decay=0.07,
        decay_mode="independent" if optim.decay_mode == "coupled" else "coupled",
        decay_params="matrices" if optim.decay_params == "all" else "all",
        beta2=0.9,
        clip=None if optim.clip is None else 0.3 * optim.clip,
    )
    train = dataclasses.replace(train, z_loss=3 * train.z_loss, skip_nonfinite=not train.skip_nonfinite)
    return dataclasses.replace(config, optim=optim, train=train, seed=config.seed + 1 + place)


def disturbed(model: nn.Module, place: int) -> nn.Module:
    """A copy with weights of its own."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(10 + place)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 0.5 * torch.rand(p.shape, generator=generator)).add_(
                0.02 * torch.randn(p.shape, generator=generator)
            )
    return other
