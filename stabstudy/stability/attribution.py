"""The part of the model that a spike of the gradient norm comes from: the one that leads, and the one that dominates.

Every entry of `layer_grad_norm` is judged by `jump` like the norm itself. Which group dominates is a question of
energy *above* the group's own baseline: the share of the energy alone names the largest group (the head holds 59 % of
it in a quiet step), however small its part in the spike.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.detectors import Flags, Tail, jump_block, usual_level
from stabstudy.stability.events import Spike
from stabstudy.stability.rules import Rules

Floats = NDArray[np.float64]


def attribute(spikes: list[Spike], groups: Floats, rules: Rules) -> list[Spike]:
    """The spikes of grad_norm with `attrib_*` filled, where the answer is known.

    Args:
        spikes: Of grad_norm. Where there are none nothing is computed.
        groups: `layer_grad_norm`, shape [steps, groups]; NaN where it was not measured.
        rules: Those of the spikes.
    """
    if not spikes or not groups.size:
        return spikes
    begin = _begin(spikes[0], groups, rules)
    near = groups[begin : spikes[-1].start + 1]
    flags, _ = jump_block(near.T, Tail.empty(groups.shape[1], rules), rules, "grad")
    attributed = []
    for spike in spikes:
        peak, share = _peak(spike, groups, rules)
        first = _first(spike.start - begin, flags, rules)
        attributed.append(replace(spike, attrib_first=first, attrib_peak=peak, attrib_peak_share=share))
    return attributed


def group_name(index: int, count: int) -> str:
    """Entry of `layer_grad_norm` in words: embed, layer 0 .. layer L-1, head."""
    return {0: "embed", count - 1: "head"}.get(index, f"layer {index - 1}")


def _begin(spike: Spike, groups: Floats, rules: Rules) -> int:
    """The step from which on the flags before a spike are those that a detector from step 0 on would give.

    It needs the values of both windows, and as many as it takes to begin; where there are gaps among them, all steps.
    """
    first = max(0, spike.start - rules.attrib_before)
    begin = max(0, first - max(rules.window + rules.level, rules.fill))
    before = groups[begin:first]
    return begin if (np.isfinite(before) & (before > 0)).all() else 0


def _first(start: int, flags: Flags, rules: Rules) -> str | None:
    """The group flagged earliest in the steps up to the start; of several in one step that with the largest z."""
    begin = max(0, start - rules.attrib_before)
    near = flags.flagged[:, begin : start + 1]
    if not near.any():
        return None
    step = begin + int(np.argmax(near.any(axis=0)))
    leading = int(np.argmax(np.where(flags.flagged[:, step], flags.z[:, step], -math.inf)))
    return group_name(leading, len(near))


def _peak(spike: Spike, groups: Floats, rules: Rules) -> tuple[str | None, float | None]:
    """The group with the largest energy above its baseline at the peak, and its share of all that is above."""
    center = np.array([usual_level(column, spike.start, rules, "grad") for column in groups.T])
    with np.errstate(over="ignore", invalid="ignore"):
        excess = groups[spike.peak_step] ** 2 - np.exp(2 * center)
    above = np.where(np.isfinite(excess) & (excess > 0), excess, 0.0)
    if not above.any():
        return None, None
    largest = int(np.argmax(above))
    return group_name(largest, len(above)), float(above[largest]) / math.fsum(above.tolist())
