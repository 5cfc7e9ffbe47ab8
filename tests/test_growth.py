"""Growth exponents against the residual stream taken by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stabstudy.config import DataConfig, ModelConfig, TrainConfig, TrialConfig
from stabstudy.training.growth import growth
from stabstudy.training.model import Decoder, initialise
from stabstudy.training.step import Stepper

V, T = 53, 12
WINDOWS = np.random.default_rng(0).integers(0, V, (60, T + 1))


def make(micro: int = 8, precision: str = "fp32", **model: object) -> Stepper:
    config = TrialConfig(
        model=ModelConfig(**{"depth": 2, "dim": 32, "n_heads": 4, **model}),  # type: ignore[arg-type]
        data=DataConfig(seq_len=T),
        train=TrainConfig(batch_size=8, micro_batch_size=micro, precision=precision),
    )
    decoder = Decoder(config.model, V, T)
    initialise(decoder, config.model, seed=0)
    return Stepper(config, decoder, torch.device("cpu"))


def by_hand(stepper: Stepper, sequences: int) -> tuple[float, float]:
    """Two layers, all sequences at once, the mean loss, gradients kept by autograd."""
    model, tokens = stepper.model, torch.from_numpy(WINDOWS[:sequences])
    first = model.layers[0](model.embedded(tokens[:, :-1]), model.rotation_TK)
    last = model.layers[1](first, model.rotation_TK)
    first.retain_grad(), last.retain_grad()
    logits = model.head(model.norm(last)).flatten(0, 1)
    if (cap := stepper.config.model.logit_softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    stepper.model.zero_grad()
    assert first.grad is not None and last.grad is not None

    def norm(x_BTD: torch.Tensor) -> float:
        return float(x_BTD.detach().double().mean((0, 1)).norm())

    return math.log(norm(last) / norm(first)) / 2, math.log(norm(last.grad) / norm(first.grad)) / 2


@pytest.mark.parametrize("micro", [1, 4, 8])
@pytest.mark.parametrize("sequences", [6, 50])
@pytest.mark.parametrize("model", [{}, {"norm_placement": "reordered", "logit_softcap": 2.0, "tied": True}])
def test_two_layers_by_hand(micro: int, sequences: int, model: dict[str, object]) -> None:
    stepper = make(micro, **model)
    given = WINDOWS[:sequences] if sequences < 50 else WINDOWS  # of 60 the first 50 count
    assert growth(stepper, given) == pytest.approx(by_hand(stepper, sequences), rel=1e-4, abs=1e-6)


def test_a_stack_that_doubles_has_the_exponent_of_doubling() -> None:
    """With silent branches and a stream that is kept times k in each of two joins, layer 2 is k^2 times layer 1."""
    stepper = make(depth=3)
    for layer in stepper.model.layers:
        layer.keep = math.sqrt(2)
        torch.nn.init.zeros_(layer.attention.wo.weight)
        torch.nn.init.zeros_(layer.ffn.w2.weight)
    act, grad = growth(stepper, WINDOWS)
    assert act == pytest.approx(2 * math.log(2) / 3, rel=1e-5)
    assert grad == pytest.approx(-2 * math.log(2) / 3, rel=1e-5)  # two layers on, half the gradient each


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_stream", "fp16"])
def test_it_changes_nothing_and_draws_nothing(precision: str) -> None:
    exact, stepper = growth(make(), WINDOWS), make(precision=precision)
    weights, state = [p.detach().clone() for p in stepper.parameters], torch.get_rng_state()
    assert growth(stepper, WINDOWS) == pytest.approx(exact, abs=0.02)
    assert all(torch.equal(a, b) for a, b in zip(weights, stepper.parameters, strict=True))
    assert all(p.grad is None for p in stepper.parameters) and torch.equal(state, torch.get_rng_state())


def test_one_layer_has_no_growth_and_dead_or_broken_weights_a_number() -> None:
    assert growth(make(depth=1), WINDOWS) == (None, None)
    stepper = make()
    torch.nn.init.constant_(stepper.model.embed.weight, math.nan)
    assert all(x is not None and math.isnan(x) for x in growth(stepper, WINDOWS))
