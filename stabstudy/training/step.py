"""One optimizer step of a pack: micro-batches, one normaliser, one norm measurement, one decision, one update.

The loss of a step is the sum of cross-entropies over ALL its micro-batches divided by N, the valid targets of the whole
step (`kto`: the sum over sequences by their number), so neither loss nor gradient depends on `micro_batch_size` (the
mean of micro-batch means does, and its gradient norm is off by up to 1.9 where its loss looks right: LLaMA-Factory
issue 7743). `kto` compares the sequences of a micro-batch, so there it does.

Nothing here waits for the device, and every tensor that outlives a step is written in place, so that a step can be
captured once and replayed. What follows from a non-finite norm (skip the update, or freeze the weights because the
trial ends here) is decided on the device, for each of the K members by itself.

Every micro-batch of a pack has one shape, so a compiled step compiles once. Evaluation and probes, whose shapes differ,
are always eager: a loss is measured the same way whatever trained the weights.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.training import clipping
from stabstudy.training.clipping import MicroBatches, SpikeSkip, clip_rule
from stabstudy.training.families import Model
from stabstudy.training.kto import Kto
from stabstudy.training.model import layer_index
from stabstudy.training.objective import IGNORE, MINIMISED, NextToken, Objective, valid
from stabstudy.training.optimizers import optimizer
from stabstudy.training.stack import Scalars, Stack

T = TypeVar("T")

SCALE_START, SCALE_GROWTH_STEPS = 2.0**16, 2000
"""fp16 loss scaling: the first scale, and the good steps after which it doubles (torch.amp.GradScaler's values)."""

OF_STEP = ("grad_norm", "clip_scale", "loss_scale", "spike", "targets")
"""Scalars of every step, beside the objective's; `targets` counts the valid ones, `spike` is 1 where it is skipped."""


class Stepper:
    """Weights, optimizer and policies of K members of one shape. `step` makes one update of each.

    A step's vector is [K, C + tensors]: the scalars named by `columns` (C of them), then each tensor's gradient norm.
    """

    def __init__(
        self, configs: Sequence[TrialConfig], models: Iterable[Model], device: torch.device, compile_loss: bool = False
    ):
        """`models`: of each member, with its initial weights. The configs must agree in their `shape.shape`."""
        config = configs[0]
        self.configs, self.device, self.K = tuple(configs), device, len(configs)
        self.micro_batch = config.train.micro_batch
        self.micro_batches = config.train.batch_size // self.micro_batch
        first, models = _with_first(models)
        self.objective = _objective(configs, first, device)
        self.stack = Stack(models, self.K, config.train.precision, device)
        named = list(zip(self.stack.names, self.stack.tensors, strict=True))
        if config.objective.kind == "kto" and any((t != t[:1]).any() for t in self.stack.tensors):
            raise ValueError("members of a pack have one reference, so they must begin with the same weights")
        self.layer_index = np.array(layer_index(self.stack.names, config.model.depth))
        self.columns = (*self.objective.columns, *OF_STEP)
        self.optimizer = optimizer(configs, named)
        self.clip_rule = clip_rule(configs, named)
        self.spike_skip = SpikeSkip(self.K, device) if config.train.skip_spikes else None
        self.scaled = config.train.precision == "fp16"
        ends = [not self.scaled and not c.train.skip_nonfinite for c in configs]
        self.ends_at_nonfinite = torch.tensor(ends, dtype=torch.float32, device=device)
        self.loss_scale = torch.full((self.K,), SCALE_START if self.scaled else 1.0, device=device)
        self.good_steps = torch.zeros(self.K, device=device)
        self.halted = torch.zeros(self.K, device=device)  # 1 from the non-finite step that ends the trial on
        self.left_out = torch.ones(self.K, device=device)  # 1 where the last step made no update, and before the first
        self.grads: list[Tensor] = []  # of the last step, [K, ...], clipped
        self.noise: Tensor | None = None  # [K, 2] of the last step, see clipping.py; None: not measured
        # of what a whole run is made: with masks in every batch, or in none
        self.masked = config.objective.kind != "lm"
        whole = partial(self.objective, masked=True) if self.masked else self.objective
        self._compiled = compiled(partial(self.stack.call, whole)) if compile_loss else None

    def step(
        self,
        windows_KBT: Tensor,
        lr: Sequence[float] | Tensor,
        live: Tensor,
        masked: bool = False,
        measure_noise: bool = False,
    ) -> Tensor:
        """One update on windows [K, B, T+1] of the device (with labels T+2): numbers of `data.layouts`.

        Args:
            windows_KBT: int64; targets are the next tokens. A member without a valid one makes no update.
            lr: [K]; a float64 tensor where the step is captured.
            live: [K] float32; 0 where a member has ended, which makes no update any more.
            masked: whether any target may be IGNORE.
            measure_noise: whether to compare the micro-batches, see clipping.py.
        """
        targets = valid(self.tokens(windows_KBT)).float()
        divisor = self.objective.divisor(windows_KBT).float()
        scalars = self.accumulate(windows_KBT, divisor, masked, measure_noise)
        if self.scaled:
            clipping.scale_(self.grads, 1.0 / self.loss_scale)
        norms = clipping.tensor_norms(self.grads)
        # without a target there is no gradient to speak of: not 0, which would enter the memory of a rule
        norm = torch.where(divisor > 0, clipping.global_norm(norms), torch.nan)
        used_scale = self.loss_scale.clone()
        factor = self.clip_rule.apply(self.grads, norms, norm)
        loss = scalars["loss"]
        spike = torch.zeros_like(norm) if self.spike_skip is None else self.spike_skip.judge(loss, norm)
        self._update(norm, loss, divisor, lr, spike, live)
        scalars |= dict(zip(OF_STEP, (norm, factor, used_scale, spike, targets), strict=True))
        return torch.cat([torch.stack([scalars[name] for name in self.columns], dim=1), norms.T], dim=1)

    def tokens(self, windows_KBT: Tensor) -> Tensor:
        """[K, n, T+1]: the windows without what else the objective reads."""
        flags = self.objective.flags
        return windows_KBT[..., :-flags] if flags else windows_KBT

    def accumulate(self, windows_KBT: Tensor, divisor: Tensor, masked: bool, measure_noise: bool = False) -> Scalars:
        """Gradients of the whole step into `grads`, its noise into `noise`. Returns the objective's columns [K].

        `divisor` [K]: the objective's, of each member's step. The loss of a member where it is 0 is NaN.
        """
        self.grads, self.noise = [], None
        totals: Scalars = {}
        watched = self._watched(windows_KBT) if measure_noise else None
        for inputs in self._micro_batches(windows_KBT):
            terms = self._terms(inputs, masked)
            minimised = terms.pop(MINIMISED) / divisor
            new = self.stack.gradients((minimised * self.loss_scale if self.scaled else minimised).sum())
            if self.grads:
                torch._foreach_add_(self.grads, new)
            else:
                self.grads = new
            if watched is not None:
                watched.add(self.grads)
            for name, value in terms.items():
                value = value / divisor if name in self.objective.divided else value
                join = torch.maximum if name in self.objective.largest else torch.add
                totals[name] = join(totals[name], value) if name in totals else value
        if watched is not None:
            self.noise = watched.terms(self.grads) / self.loss_scale.double().square()[:, None]
        return self.objective.record(totals)

    def loss_on(self, windows_KBT: Tensor) -> Tensor:
        """Mean loss on fixed windows, [K] float64, no gradient; targets may be IGNORE.

        In the micro-batches of training, on which it depends where an objective compares the rows of one (`kto`).
        """
        total = torch.zeros(self.K, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for inputs in self._micro_batches(windows_KBT):
                total += self.stack.run(self.objective, *inputs, *self.objective.settings)["loss"].double()
        return total / self.objective.divisor(windows_KBT)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, [K, ...], by its name in a checkpoint; written in place."""
        return {
            "scaler/loss_scale": self.loss_scale,
            "scaler/good_steps": self.good_steps,
            "halted": self.halted,
            **self.clip_rule.state,
            **(self.spike_skip.state if self.spike_skip else {}),
            **{f"model/{name}": x for name, x in zip(self.stack.names, self.stack.tensors, strict=True)},
            **self.optimizer.state,
        }

    def _terms(self, inputs: Sequence[Tensor], masked: bool) -> Scalars:
        """The objective of one micro-batch of every member."""
        if self._compiled is not None and masked == self.masked:  # another kind would be compiled again
            return dict(self._compiled(self.stack.leaves, *inputs, *self.objective.settings))
        return self.stack.run(partial(self.objective, masked=masked), *inputs, *self.objective.settings)

    def _micro_batches(self, windows_KBT: Tensor) -> Iterator[tuple[Tensor, ...]]:
        for part in torch.split(windows_KBT, self.micro_batch, dim=1):
            yield self.objective.inputs(part)

    def _watched(self, windows_KBT: Tensor) -> MicroBatches | None:
        """What measures the noise of a step, where there is more than one micro-batch to compare."""
        parts = torch.split(windows_KBT, self.micro_batch, dim=1)
        return MicroBatches(torch.stack([self.objective.divisor(p) for p in parts])) if len(parts) > 1 else None

    def _update(
        self, norm: Tensor, loss: Tensor, divisor: Tensor, lr: Sequence[float] | Tensor, spike: Tensor, live: Tensor
    ) -> None:
        """The optimizer's step, which it leaves out by itself, on the device, for members where `left_out` is 1."""
        empty = divisor == 0
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss)) & ~empty).float()
        self.halted.copy_(torch.maximum(self.halted, bad * self.ends_at_nonfinite * live))
        out = torch.stack([bad, spike, self.halted, empty.float(), 1 - live]).amax(0)
        self.left_out.copy_(out)
        self.optimizer.step(self.grads, lr, self.left_out)
        if self.scaled:
            self._rescale(bad, empty)

    def _rescale(self, bad: Tensor, empty: Tensor) -> None:
        grow = (self.good_steps + 1 >= SCALE_GROWTH_STEPS).float() * (1 - bad)
        scale, good = self.loss_scale * (1 + grow) * (1 - 0.5 * bad), (self.good_steps + 1) * (1 - bad) * (1 - grow)
        self.loss_scale.copy_(torch.where(empty, self.loss_scale, scale))
        self.good_steps.copy_(torch.where(empty, self.good_steps, good))


def _with_first(models: Iterable[Model]) -> tuple[Model, Iterator[Model]]:
    """The first of them, and all."""
    rest = iter(models)
    first = next(rest)
    return first, itertools.chain([first], rest)


def _objective(configs: Sequence[TrialConfig], initial: Model, device: torch.device) -> Objective:
    """That of a pack's members. Which targets count is the data's, so `sft` is `lm`."""
    return Kto(configs, initial, device) if configs[0].objective.kind == "kto" else NextToken(configs, device)


def stacked(windows: Sequence[NDArray[np.int64]], device: torch.device) -> Tensor:
    """Each member's windows [n, T+1] as one tensor [K, n, T+1] of the device; short ones are padded with IGNORE."""
    most = max(len(w) for w in windows)
    if all(w is windows[0] for w in windows):
        return torch.from_numpy(windows[0]).to(device).expand(len(windows), -1, -1)
    parts = np.full((len(windows), most, windows[0].shape[1]), IGNORE, np.int64)
    for row, w in zip(parts, windows, strict=True):
        row[: len(w)] = w
    return torch.from_numpy(parts).to(device)


FOLDER = "compiled"
"""Below the cache folder: compiled kernels, of which trials of equal shape make use together."""


COMPILE_THREADS = 4
"""Of a process that has a GPU to itself."""


def keep_compiled(cache_dir: Path, device: torch.device) -> None:
    """Keep kernels in the cache folder, unless the user's environment names another. Call before the first compile."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir / FOLDER))
    # by default a process for each core; on a CPU there is such a trial for each core already
    threads = 1 if device.type == "cpu" else COMPILE_THREADS
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function compiled for the shapes that it is called with.

    What a process compiled before is forgotten: packs of other shapes would count as recompilations, at whose limit
    the compiler runs the function eagerly without a word. Reaching it is an error.
    """
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    fast: Callable[..., T] = torch.compile(function, dynamic=False)
    return fast
