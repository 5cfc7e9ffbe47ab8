"""The stacked model of a pack, in the number format of `train.precision`, and vectors of one number per member.

A pack is K trials of one shape: every parameter, gradient and memory of it is one tensor [K, *shape] whose row k is
member k's. The suffix K of a name says that a tensor has one number per member. `Stack` is the one place of every
forward pass: a function of the model and one member's inputs is run for all members at once by `vmap`, so there is no
second model; with one member it is called as it is. Members share arithmetic and nothing else: one that turns to NaN
changes no bit of the others.

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

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from stabstudy.training.families import Model

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

Scalars = dict[str, Tensor]
"""What a function of a model returns: named tensors, of one member or [K, ...] of all."""


class Stack:
    """The weights of K members, and the functions of their model. `tensors` are [K, ...], in the order of `names`."""

    def __init__(self, models: Iterable[Model], count: int, precision: str, device: torch.device):
        """`models`: one with its initial weights for each of `count` members, taken one after another."""
        self.K, self.precision, self.device = count, precision, device
        for k, model in enumerate(models):
            named = dict(model.named_parameters())
            if k == 0:
                self.names = list(named)
                place = {id(p): i for i, p in enumerate(named.values())}
                every = model.named_parameters(remove_duplicate=False)  # a tied matrix under both of its names
                self._places = [(f"model.{name}", place[id(p)]) for name, p in every]
                self._host = _Host(model).to(device)
                self.tensors = [torch.empty((count, *p.shape), device=device) for p in named.values()]
            for row, p in zip(self.tensors, named.values(), strict=True):
                row[k].copy_(p.detach())
        # one member is its own model, whose weights then need not be replaced at each call: .2 ms of a small one's
        self._plain = count == 1 and precision != "bf16_stream"
        # gradients are taken of these; the optimizer writes the same memory through `tensors`
        self.leaves = [t[0].requires_grad_() if count == 1 else t.detach().requires_grad_() for t in self.tensors]
        if self._plain:
            own = dict(self._host.model.named_parameters())
            for name, tensor in zip(self.names, self.tensors, strict=True):
                own[name].data = tensor[0]
            self.leaves = [own[name] for name in self.names]

    def run(self, function: Callable[..., Scalars], *inputs: Tensor) -> Scalars:
        """function(model, *inputs) of every member; inputs and results are [K, ...]."""
        return self.call(function, self.leaves, *inputs)

    def call(self, function: Callable[..., Scalars], leaves: Sequence[Tensor], *inputs: Tensor) -> Scalars:
        """As `run`, the weights given: what the compiler is handed."""
        low = AUTOCAST.get(self.precision, torch.bfloat16)
        with torch.autocast(self.device.type, dtype=low, enabled=self.precision in AUTOCAST):
            if self._plain:
                return {name: x[None] for name, x in function(self._host.model, *(x[0] for x in inputs)).items()}
            weights = {name: self._cast(name, leaves[i]) for name, i in self._places}

            def of_one(weights: dict[str, Tensor], *inputs: Tensor) -> Scalars:
                out: Scalars = functional_call(self._host, weights, (function, *inputs), tie_weights=False)
                return out

            if self.K == 1:
                return {name: x[None] for name, x in of_one(weights, *(x[0] for x in inputs)).items()}
            with warnings.catch_warnings():
                # attention on a CPU has no batching rule and becomes a loop over the members: slower, and right
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                stacked: Scalars = vmap(of_one)(weights, *inputs)
            return stacked

    def gradients(self, minimised: Tensor) -> list[Tensor]:
        """Of a 0-dim tensor by the weights, [K, ...] each. A weight without one raises: a zero would hide a bug."""
        grads = [g.contiguous() for g in torch.autograd.grad(minimised, self.leaves)]
        return [g[None] for g in grads] if self.K == 1 else grads

    def _cast(self, name: str, weight: Tensor) -> Tensor:
        return _in_stream(name.removeprefix("model."), weight) if self.precision == "bf16_stream" else weight


def frozen(model: Model, precision: str, device: torch.device) -> Model:
    """A copy without gradients, whose weights are cast as those of a stack: for a function of a stack to call."""
    copied = copy.deepcopy(cast(nn.Module, model)).to(device).requires_grad_(False)
    if precision == "bf16_stream":
        for name, weight in list(copied.named_parameters(remove_duplicate=False)):
            holder, _, own = name.rpartition(".")
            setattr(copied.get_submodule(holder), own, nn.Parameter(_in_stream(name, weight), requires_grad=False))
    return cast(Model, copied)


def _in_stream(name: str, weight: Tensor) -> Tensor:
    return weight if name == "embed.weight" else weight.bfloat16()


class _Host(nn.Module):
    """A module around the model: `functional_call` replaces the weights of a module while it is called."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = cast(nn.Module, model)

    def forward(self, function: Callable[..., Scalars], *inputs: Tensor) -> Scalars:
        return function(self.model, *inputs)


def vector(values: Sequence[float], device: torch.device) -> Tensor:
    """The numbers of the members, float64, shape [K]."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def rates(lr: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Learning rates as `Optimizer.step` takes them, as a float64 vector [K]."""
    return lr.double() if isinstance(lr, Tensor) else vector(lr, device)


def beside(vector_K: Tensor, tensor: Tensor) -> Tensor:
    """The vector in the tensor's precision and number of dimensions, [K, 1, ...], so that each row meets its number."""
    return vector_K.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))


def rows(tensor: Tensor) -> Sequence[Tensor]:
    """The members' rows as views. A pack of one is its own row: a leading 1 changes no value, and a view costs time."""
    return [tensor] if len(tensor) == 1 else tensor.unbind()


def replace(tensor: Tensor, new: Tensor, left_out_K: Tensor) -> None:
    """Write `new` in place, but not for the members left out: chosen, as a product with 0 would let a NaN through."""
    if tensor.device.type == "cpu":  # where reading a number is free, and torch.where takes as long as seven copies
        _copy_rows(tensor, new, left_out_K)
    else:
        _choose(tensor, new, left_out_K)


def _copy_rows(tensor: Tensor, new: Tensor, left_out_K: Tensor) -> None:
    for row, new_row, left_out in zip(rows(tensor), rows(new), left_out_K.tolist(), strict=True):
        if not left_out:
            row.copy_(new_row)


def _choose(tensor: Tensor, new: Tensor, left_out_K: Tensor) -> None:
    old = (left_out_K > 0).view(-1, *[1] * (tensor.ndim - 1))
    torch.where(old, tensor, new, out=tensor)
