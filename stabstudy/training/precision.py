"""Number formats of the forward pass, `train.precision`: the one place that every forward pass goes through.

    fp32         all of it
    bf16, fp16   autocast: products in 16 bits; the residual stream and what its norms put out stay in fp32
    bf16_stream  every weight is cast, so embedding, stream, norms' output, q, k, v and logits are bf16: what FSDP's
                 `param_dtype=bf16` runs (Lingua, torchtitan). Inside, norms compute in fp32; so does our RoPE, while
                 transformers' rounds cos and sin to the stream's dtype, as it does everywhere

In all of them weights, gradients and the optimizer's state are fp32, and the loss is computed in fp32 from the logits.

Gradients of cast weights reach the fp32 ones rounded to bf16 once per micro-batch. The embedding is looked up in fp32
and its output cast, because a CPU would add up its gradient in bf16, where a sum of ones ends at 256. The values
are the same, but for Gemma's factor sqrt(dim), which transformers rounds to bf16 and which is exact here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.func import functional_call

from stabstudy.training.hf import Model

T = TypeVar("T")

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Forward(nn.Module):
    """The forward passes of one model in one precision."""

    def __init__(self, model: Model, precision: str, device: torch.device):
        super().__init__()
        self.model, self.precision, self.kind = model, precision, device.type

    def run(self, function: Callable[[Model], T]) -> T:
        """function(model), all that the model computes in it being in the settings' precision."""
        low = AUTOCAST.get(self.precision, torch.bfloat16)
        with torch.autocast(self.kind, dtype=low, enabled=self.precision in AUTOCAST):
            if self.precision != "bf16_stream":
                return function(self.model)
            weights = self.model.named_parameters(remove_duplicate=False)  # a tied matrix under both of its names
            cast = {f"model.{name}": p.bfloat16() for name, p in weights if name != "embed.weight"}
            result: T = functional_call(self, cast, (function,), tie_weights=False)
            return result

    def forward(self, function: Callable[[Model], T]) -> T:
        """For `functional_call`, which replaces the weights of a module while this runs."""
        return function(self.model)
