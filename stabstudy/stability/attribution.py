"""Which part of the model a spike of the gradient norm comes from: the one that leads, and the one that dominates.

Every entry of `layer_grad_norm` is judged by `mad_log` like the norm itself. Which group dominates is a question of
energy *above* the group's own baseline: the share of the energy alone names the largest group (the head holds 59 % of
it in a quiet step), however small its part in the spike.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.calm import mad_outliers
from stabstudy.stability.detectors import Flags
from stabstudy.stability.events import Spike
from stabstudy.stability.rules import Rules

Floats = NDArray[np.float64]


def attribute(spikes: list[Spike], groups: Floats, rules: Rules) -> list[Spike]:
    """The spikes of grad_norm with `attrib_*` filled, where that can be said.

    Args:
        spikes: Of grad_norm. Where there are none nothing is computed.
        groups: `layer_grad_norm`, shape [steps, groups]; NaN where it was not measured.
        rules: Those of the spikes.
    """
    if not spikes or not groups.size:
        return spikes
    starts = [spike.start for spike in spikes]
    flags = [mad_outliers(np.ascontiguousarray(column), rules, "grad", starts) for column in groups.T]
    found = []
    for spike in spikes:
        peak, share = _peak(spike, flags, groups[spike.peak_step])
        first = _first(spike, flags, rules)
        found.append(replace(spike, attrib_first=first, attrib_peak=peak, attrib_peak_share=share))
    return found


def group_name(index: int, count: int) -> str:
    """Entry of `layer_grad_norm` in words: embed, layer 0 .. layer L-1, head."""
    return {0: "embed", count - 1: "head"}.get(index, f"layer {index - 1}")


def _first(spike: Spike, flags: list[Flags], rules: Rules) -> str | None:
    """The group flagged earliest in the steps up to the start; of several in one step that with the largest z."""
    begin = max(0, spike.start - rules.attrib_before)
    found = []
    for index, group in enumerate(flags):
        ahead = np.flatnonzero(group.flagged[begin : spike.start + 1])
        if len(ahead):
            step = begin + int(ahead[0])
            found.append((step, -float(group.z[step]), index))
    return group_name(min(found)[2], len(flags)) if found else None


def _peak(spike: Spike, flags: list[Flags], norms: Floats) -> tuple[str | None, float | None]:
    """The group with the largest energy above its baseline at the peak, and its share of all that is above."""
    excess = [
        float(norm) ** 2 - math.exp(2 * float(group.center[spike.start]))
        for group, norm in zip(flags, norms, strict=True)
    ]
    above = [x if math.isfinite(x) and x > 0 else 0.0 for x in excess]
    if not any(above):
        return None, None
    largest = int(np.argmax(above))
    return group_name(largest, len(flags)), above[largest] / math.fsum(above)
