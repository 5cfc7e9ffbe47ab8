"""Vectors of one number per member of a pack, and how they meet stacked tensors.

A pack is K trials of one shape; every parameter, gradient and memory of it is one tensor [K, *shape] whose row k is
member k's. The suffix K of a name says that a tensor has one number per member.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
