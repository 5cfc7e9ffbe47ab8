"""Column names of logs: those of the step, the loss, the gradient norm and the learning rate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stabstudy.ingesting.points import LogError

KNOWN = {
    "step": (
        *("step", "global_step", "steps", "iter", "iteration", "iterations", "current_steps", "update", "num_updates"),
        *("optimizer_step", "training_step", "it", "trainer_global_step"),
    ),
    "loss": (
        "loss",
        "training_loss",
        "loss_mean",
        "lm_loss",
        "ce_loss",
        "loss_out",
        "cross_entropy",
        "cross_entropy_loss",
    ),
    "grad_norm": (
        *("grad_norm", "gradnorm", "gnorm", "gradient_norm", "grad_norm_total", "total_grad_norm", "global_grad_norm"),
        *("optim_grad_norm", "optim_total_grad_norm", "norm_grad", "total_norm"),
    ),
    "lr": ("lr", "learning_rate", "optim_lr", "optim_learning_rate"),
}
"""Names that are recognised by themselves, best first; capitals and punctuation do not count, nor a leading `train`."""


def match(found: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Ours -> the table's name. `given` (from --columns) goes first. Raises LogError naming what was found."""
    if absent := [theirs for theirs in given.values() if theirs not in found]:
        raise LogError(f"has no column {', '.join(absent)} (it has: {_listed(found)})")
    plain = {_plain(name): name for name in reversed(found)}
    names = {ours: next((plain[k] for k in known if k in plain), None) for ours, known in KNOWN.items()}
    matched = {ours: name for ours, name in names.items() if name is not None} | dict(given)
    if "step" not in matched or not matched.keys() & {"loss", "grad_norm"}:
        raise LogError(
            f"has no column known as the step, or none as the loss or gradient norm (it has: {_listed(found)}); "
            "name them, as in --columns step=iter,grad_norm=gnorm,loss=train_loss"
        )
    return matched


def _plain(name: str) -> str:
    text = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return text.removeprefix("train_") if text != "train_step" else "step"


def _listed(found: Sequence[str]) -> str:
    shown = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
    return shown or "none"
