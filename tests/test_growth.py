"""Growth exponents against the residual stream taken by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lone import AMONG, Lone
from torch import Tensor, nn

from stabstudy.config import OF_FAMILY, DataConfig, ModelConfig, TrainConfig, TrialConfig
from stabstudy.training import families

V, T = 53, 12
WINDOWS = np.random.default_rng(0).integers(0, V, (60, T + 1))
SHAPE = ModelConfig(depth=2, dim=64, n_heads=4)  # gemma's sqrt(dim) is 8, and exact in bf16
MODELS = {"lingua": SHAPE} | {f: dataclasses.replace(SHAPE, family=f, **fixed) for f, fixed in OF_FAMILY.items()}
among = pytest.mark.parametrize("neighbours", AMONG.values(), ids=AMONG)
each_family = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def built(micro: int = 8, precision: str = "fp32", **model: object) -> tuple[TrialConfig, nn.Module]:
    config = TrialConfig(
        model=ModelConfig(**{"depth": 2, "dim": 32, "n_heads": 4, **model}),  # type: ignore[arg-type]
        data=DataConfig(seq_len=T),
        train=TrainConfig(batch_size=8, micro_batch_size=micro, precision=precision),
    )
    decoder: Any = families.build(config.model, V, T, seed=0)
    return config, decoder


def make(micro: int = 8, precision: str = "fp32", neighbours: int = 0, **model: object) -> Lone:
    return Lone(*built(micro, precision, **model), neighbours)


def by_hand(model: Any, cap: float | None, sequences: int, factor: float = 1.0) -> tuple[float, float]:
    """All sequences at once, a multiple of the mean loss, gradients kept by autograd at what the layers put out."""
    tokens, stream = torch.from_numpy(WINDOWS[:sequences]), []

    def keep(module: nn.Module, inputs: object, out: Tensor) -> None:
        out.retain_grad()
        stream.append(out)

    hooks = [layer.register_forward_hook(keep) for layer in model.layers]
    logits = model(tokens[:, :-1]).flatten(0, 1).float()
    for hook in hooks:
        hook.remove()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    (factor * F.cross_entropy(logits, tokens[:, 1:].flatten())).backward()

    def norm(x_BTD: Tensor | None) -> float:
        assert x_BTD is not None
        return float(x_BTD.detach().double().mean((0, 1)).norm())

    first, last = stream[0], stream[-1]
    act, grad = (math.log(norm(b) / norm(a)) / len(stream) for a, b in ((first, last), (first.grad, last.grad)))
    return act, grad


@among
@pytest.mark.parametrize("micro", [1, 4, 8])
@pytest.mark.parametrize("sequences", [6, 50])
@pytest.mark.parametrize("model", [{}, {"norm_placement": "reordered", "logit_softcap": 2.0, "tied": True}])
def test_two_layers_by_hand(micro: int, sequences: int, model: dict[str, object], neighbours: int) -> None:
    stepper = make(micro, neighbours=neighbours, **model)
    given = WINDOWS[:sequences] if sequences < 50 else WINDOWS  # of 60 the first 50 count
    expected = by_hand(stepper.model, stepper.config.model.logit_softcap, sequences)
    assert stepper.growth(given) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@among
@each_family
def test_every_family_by_hand(model: ModelConfig, neighbours: int) -> None:
    settings = dataclasses.asdict(dataclasses.replace(model, depth=3))
    stepper = make(neighbours=neighbours, **settings)
    assert stepper.growth(WINDOWS) == pytest.approx(by_hand(stepper.model, None, 50), rel=1e-4, abs=1e-6)


@among
@each_family
def test_every_family_by_hand_in_bf16_stream(model: ModelConfig, neighbours: int) -> None:
    """A copy whose weights are bf16, the same micro-batch of eight sequences, and the sum of the losses too."""
    stepper = make(precision="bf16_stream", neighbours=neighbours, **dataclasses.asdict(model))
    low = stepper.model
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    act, grad = by_hand(low, None, 8, factor=8 * T)
    measured = stepper.growth(WINDOWS[:8])
    assert measured[0] == pytest.approx(act, rel=1e-6, abs=1e-6)
    assert measured[1] == pytest.approx(grad, abs=2e-3)  # the loss is summed in another order before it is rounded
    in_full = make(**dataclasses.asdict(model)).growth(WINDOWS[:8])
    assert measured[0] != pytest.approx(in_full[0], rel=1e-6, abs=1e-6)


@among
def test_a_stack_that_doubles_has_the_exponent_of_doubling(neighbours: int) -> None:
    """With silent branches and a stream that is kept times k in each of two joins, layer 2 is k^2 times layer 1."""
    config, model = built(depth=3)
    for layer in model.layers:
        layer.keep = math.sqrt(2)
    stepper = Lone(config, model, neighbours)
    for name, weight in stepper.weights.items():
        if name.endswith(("attention.wo.weight", "ffn.w2.weight")):
            weight.zero_()
    act, grad = stepper.growth(WINDOWS)
    assert act == pytest.approx(2 * math.log(2) / 3, rel=1e-5)
    assert grad == pytest.approx(-2 * math.log(2) / 3, rel=1e-5)  # two layers on, half the gradient each


@among
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_stream", "fp16"])
def test_it_changes_nothing_and_draws_nothing(precision: str, neighbours: int) -> None:
    exact, stepper = make().growth(WINDOWS), make(precision=precision, neighbours=neighbours)
    before, state = {n: t.clone() for n, t in stepper.stepper.state().items()}, torch.get_rng_state()
    assert stepper.growth(WINDOWS) == pytest.approx(exact, abs=0.02)
    assert all(torch.equal(before[n], t) for n, t in stepper.stepper.state().items())
    assert stepper.stepper.grads == [] and torch.equal(state, torch.get_rng_state())
    assert all(leaf.grad is None for leaf in stepper.stepper.stack.leaves)
    assert not any(layer._forward_hooks for layer in stepper.inside.layers)


@among
def test_one_layer_has_no_growth_and_dead_or_broken_weights_a_number(neighbours: int) -> None:
    assert make(depth=1, neighbours=neighbours).growth(WINDOWS) == (None, None)
    stepper = make(neighbours=neighbours)
    stepper.weights["embed.weight"].fill_(math.nan)
    assert all(x is not None and math.isnan(x) for x in stepper.growth(WINDOWS))
