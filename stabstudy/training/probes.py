"""Measurements besides training: probes, growth of the initial weights, exactness of gradient accumulation.

A probe leaves one vector a member on the device. It draws no random number and changes no value of the training: it
only reads weights, optimizer state and the gradients of the last update.

Growth exponents tell of the initial weights whether signals grow or vanish with depth (OLMo 2, arXiv 2501.00656):

    growth_act  = log(norm(v_L) / norm(v_1)) / L      v_l: mean over all positions of the residual stream after layer l
    growth_grad = log(norm(u_L) / norm(u_1)) / L      u_l: mean over all positions of the loss's gradient there

Near 0 is good: neither vanishes nor explodes as layers are added. One forward and backward pass over the first
sequences of the evaluation batch, before the first update, in the training's precision. The sum of cross-entropies is
differentiated, not their mean: the ratio is the same, and small gradients survive float16.

The pre-flight of a foreign model compares one real batch, whole and in pieces: what such a model does with its inputs
is not ours to know, and a wrong gradient hides well: a mean of micro-batch means has about the right loss, and Adam
hides a constant factor (LLaMA-Factory issue 7743). The targets are masked to very unequal numbers, for equal ones would
hide it all. It runs as a program, in a process of its own, so that its caller needs no torch: see `main`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabstudy import config as cfg
from stabstudy.data.batches import Batches, open_batches
from stabstudy.training import families
from stabstudy.training.clipping import global_norm, tensor_norms
from stabstudy.training.families import Model
from stabstudy.training.model import soft_cap
from stabstudy.training.objective import IGNORE, MINIMISED, inputs_of, target_sums, targets_of, valid
from stabstudy.training.stack import Scalars
from stabstudy.training.step import Stepper

PROBE_SEQUENCES = 4
"""Sequences of the evaluation batch that a probe looks at: explicit attention scores cost B*H*T^2 numbers a layer."""

SCALARS = ("val_loss", "update_rms", "adam_rms_max", "param_norm", "noise_g2", "noise_s", "sized")
"""Of a probe, NaN where not measured; `sized`: 0 where there was no update whose size could be told, see Optimizer."""

OF_LAYERS = ("attn_logit_max", "attn_entropy", "resid_rms")
"""Depth numbers each, behind the scalars."""


def probe(stepper: Stepper, windows_KBT: Tensor, evaluate: bool = False) -> Tensor:
    """The probe of each member, [K, scalars + 3 * depth] float64 on the device; waits for nothing.

    Args:
        stepper: Just after a step, or before the first.
        windows_KBT: The evaluation set, as `Stepper.step` takes windows; only the validation loss needs all of it.
        evaluate: Whether to measure that.
    """
    tokens = inputs_of(stepper.tokens(windows_KBT[:, :PROBE_SEQUENCES]))
    with torch.no_grad():
        layers = stepper.stack.run(lambda model, x: of_layers(model, x, stepper.configs[0].model.attn_softcap), tokens)
        sizes = stepper.optimizer.update_sizes(stepper.grads) if stepper.grads else None
    nan = torch.full((stepper.K,), math.nan, dtype=torch.float64, device=stepper.device)
    noise = stepper.noise
    values = {
        "val_loss": stepper.loss_on(windows_KBT) if evaluate else nan,
        "param_norm": global_norm(tensor_norms(stepper.stack.tensors)),
        "noise_g2": nan if noise is None else noise[:, 0],
        "noise_s": nan if noise is None else noise[:, 1],
        "sized": torch.zeros_like(nan) if sizes is None else 1 - stepper.left_out,
        **(sizes or {"update_rms": nan, "adam_rms_max": nan}),
    }
    scalars = torch.stack([values[name].double() for name in SCALARS], dim=1)
    return torch.cat([scalars, *(layers[name].double() for name in OF_LAYERS)], dim=1)


def width(stepper: Stepper) -> int:
    """Columns of a probe's vector."""
    return len(SCALARS) + len(OF_LAYERS) * stepper.configs[0].model.depth


def of_layers(model: Model, tokens_BT: Tensor, attn_softcap: float | None) -> Scalars:
    """OF_LAYERS of one member, [depth] each."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for q_BHTK, k_BGTK, x_BTD in model.walk(tokens_BT):
        largest, entropy = attention_statistics(q_BHTK, k_BGTK, attn_softcap)
        rows.append((largest, entropy, x_BTD.float().square().mean().sqrt()))
    return dict(zip(OF_LAYERS, (torch.stack(column) for column in zip(*rows, strict=True)), strict=True))


def attention_statistics(q_BHTK: Tensor, k_BGTK: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """(largest unmasked q.k/sqrt(K), mean over rows i >= 1 of entropy / log(i + 1)) of one layer, in float32.

    With a soft cap the largest score is that before it, the entropy that of the weights which attention really uses.
    """
    B, H, T, K = q_BHTK.shape
    k_BHTK = (k_BGTK if k_BGTK.shape[1] == H else k_BGTK.repeat_interleave(H // k_BGTK.shape[1], dim=1)).float()
    scores_BHTT = (q_BHTK.float() / math.sqrt(K)) @ k_BHTK.transpose(-1, -2)
    hidden_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).triu(1)
    largest = scores_BHTT.masked_fill_(hidden_TT, -math.inf).amax()
    if cap is not None:
        scores_BHTT = soft_cap(scores_BHTT, cap).masked_fill_(hidden_TT, -math.inf)
    # entropy of softmax(s) = log sum e^s - sum softmax(s) s, the row's maximum taken out: few passes over T^2 numbers
    shifted_BHTT = scores_BHTT - scores_BHTT.amax(-1, keepdim=True)
    weights_BHTT = shifted_BHTT.exp()
    total_BHT = weights_BHTT.sum(-1)
    mean_BHT = (weights_BHTT * shifted_BHTT.masked_fill_(hidden_TT, 0.0)).sum(-1) / total_BHT
    entropy_BHT = total_BHT.log() - mean_BHT
    positions = torch.arange(2, T + 1, device=q_BHTK.device).float()
    return largest, (entropy_BHT[..., 1:] / positions.log()).mean()


GROWTH_SEQUENCES = 50
"""Of the evaluation batch; all of them where it has fewer."""


def growth_exponents(stepper: Stepper, windows_KBT: Tensor) -> list[tuple[float | None, float | None]]:
    """(growth_act, growth_grad) of each member as it is; (None, None) with a single layer, NaN where not finite.

    Draws no random number and leaves weights and their gradients alone. The loss is cross-entropy, for `kto` too.
    """
    model = stepper.configs[0].model
    if model.depth < 2:
        return [(None, None)] * stepper.K
    sums = torch.zeros(4, stepper.K, model.dim, dtype=torch.float64, device=stepper.device)  # v_1, v_L, u_1, u_L
    for part in torch.split(stepper.tokens(windows_KBT[:, :GROWTH_SEQUENCES]), stepper.micro_batch, dim=1):
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

    of_all = stepper.stack.run(of_one, inputs_of(windows_KBT), targets_of(windows_KBT), *zeros)
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


PREFLIGHT_SEQUENCES = 8
"""Of the trial's first batch, at most; more would take longer and show nothing else."""


def accumulation_differences(config: cfg.TrialConfig, cache_dir: Path, device: torch.device) -> tuple[float, float]:
    """(of the loss, of the gradient norm): relative difference between the whole batch and one sequence at a time.

    At the initial weights, in fp32, on the first sequences of the trial's own data. NaN where one is not finite. For
    `kto`, which is not the same in other micro-batches, the cross-entropy of completions: the model is what is tested.
    """
    count = min(max(2, config.train.batch_size), PREFLIGHT_SEQUENCES)
    train = replace(config.train, batch_size=count, micro_batch_size=count, precision="fp32", compile="off")
    whole = replace(config, train=train)
    batches = open_batches(whole, cache_dir)
    masked = _first_with_targets(batches) if batches.masked else unequal(batches.batch(0))
    if config.objective.kind == "kto":
        whole = replace(whole, objective=replace(config.objective, kind="sft"))
        masked = masked[:, : config.data.seq_len + 1]
    split = replace(whole, train=replace(train, micro_batch_size=1))
    (loss, norm), (split_loss, split_norm) = (_measured(c, batches, masked, device) for c in (whole, split))
    return abs(split_loss / loss - 1), abs(split_norm / norm - 1)


def _first_with_targets(batches: Batches) -> NDArray[np.int64]:
    """The first batch of examples that has a completion in it; their lengths are unequal by themselves."""
    return next(
        batch for batch in map(batches.batch, itertools.count()) if (batch[:, 1 : batches.seq_len + 1] >= 0).any()
    )


def unequal(windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The windows [B, T+1] with about T/B, 2T/B, ... T targets left in them."""
    masked = windows.copy()
    B, T = masked.shape[0], masked.shape[1] - 1
    for row in range(B):
        masked[row, 1 + max(1, T * (row + 1) // B) :] = IGNORE
    return masked


def _measured(
    config: cfg.TrialConfig, batches: Batches, windows: NDArray[np.int64], device: torch.device
) -> tuple[float, float]:
    """Loss and gradient norm of the batch in the micro-batches of the config, at the initial weights."""
    model = families.build(config.model, batches.corpus.vocab_size, config.data.seq_len, config.seed)
    stepper = Stepper([config], [model], device)
    of_pack = torch.from_numpy(windows)[None].to(device)
    scalars = stepper.accumulate(of_pack, valid(of_pack).float(), masked=True)
    return scalars["loss"].item(), global_norm(tensor_norms(stepper.grads)).item()


def main() -> None:
    """Read {cache_dir, device, threads, configs} as JSON, print [loss difference, norm difference] for each config."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    cache_dir, device = Path(request["cache_dir"]), torch.device(request["device"])
    for values in request["configs"]:
        print(json.dumps(accumulation_differences(cfg.from_dict(values), cache_dir, device)), flush=True)


if __name__ == "__main__":
    main()
