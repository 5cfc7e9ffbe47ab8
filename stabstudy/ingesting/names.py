"""Column names of logs: those of the step, the loss, the gradient norm and the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stabstudy.ingesting.aliases import ALIASES, place
from stabstudy.ingesting.points import LogError


def match(found: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Ours -> the table's name. `given` (from --columns) goes first. Raises LogError naming what was found."""
    if absent := [theirs for theirs in given.values() if theirs not in found]:
        raise LogError(f"has no column {', '.join(absent)} (it has: {_listed(found)})")
    matched = {ours: name for ours in ALIASES if (name := _best(ours, found)) is not None} | dict(given)
    if "step" not in matched or not matched.keys() & {"loss", "grad_norm"}:
        raise LogError(
            f"has no column known as the step, or none as the loss or gradient norm (it has: {_listed(found)}); "
            "name them, as in --columns step=iter,grad_norm=gnorm,loss=train_loss"
        )
    return matched


def _best(ours: str, found: Sequence[str]) -> str | None:
    placed = [(at, i) for i, name in enumerate(found) if (at := place(ours, name)) is not None]
    return found[min(placed)[1]] if placed else None


def _listed(found: Sequence[str]) -> str:
    shown = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
    return shown or "none"
