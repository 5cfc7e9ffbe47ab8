"""The group of each parameter in the recorded norms: the embedding, each layer, the head."""

from __future__ import annotations

from collections.abc import Sequence


def layer_of(parameter_name: str) -> str:
    """The group of a parameter in `layer_grad_norm`: embed, 0, 1, ..., or head (which has the final norm too)."""
    parts = parameter_name.split(".")
    return parts[1] if parts[0] == "layers" else "embed" if parts[0] == "embed" else "head"


def layer_index(parameter_names: Sequence[str], depth: int) -> list[int]:
    """For each parameter the index of its group in [embed, layer 0 .. L-1, head]; a tied matrix counts to embed."""
    order = {"embed": 0, "head": depth + 1} | {str(i): i + 1 for i in range(depth)}
    return [order[layer_of(name)] for name in parameter_names]
