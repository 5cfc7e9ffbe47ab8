"""Spikes made of flagged steps: start, end, height, length, what they rose from, and the part of the model that leads.

A spike of the gradient norm is attributed to two parts of the model: the one that leads, and the one that dominates.
Every entry of `layer_grad_norm` is judged by `jump` like the norm itself. Which one dominates is a question of energy
*above* its own baseline: the share of the energy alone names the largest part (the head holds 59 % of it in a quiet
step), however small its share of the spike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from stabstudy.stability.detectors import Flags, Floats, Tail, jump_block, stretches, usual, usual_level
from stabstudy.stability.rules import Rules, Series

SpikeClass = Literal["narrow", "wide", "malignant", "open"]
Part = Literal["surprise", "absolute", "both"]


@dataclass(frozen=True)
class Spike:
    """A maximal stretch of flagged steps at most `merge_gap` apart. All steps are optimizer steps."""

    series: Series
    start: int  # first flagged step
    end: int  # last flagged step
    flag_steps: int
    peak_step: int
    peak: float  # in the unit of the series
    level: float  # median of the 5 values before `start`, which the detector compares with; in the unit of the series
    baseline: float  # median of the 64 values before `start`, frozen there; in the unit of the series
    scale: float  # robust standard deviation of those 64; of log grad_norm, or of the loss
    part: Part  # which conditions of the detector its steps fulfil
    peak_ratio: float | None  # grad only: peak / level
    peak_delta: float | None  # loss only: peak - level
    duration: int  # steps from `start` until the series is back (see `find_spikes`), or to the end of the trace
    recovered: bool
    spike_class: SpikeClass
    in_warmup: bool
    partner: int | None = None  # start of the coupled spike in the other series
    lag: int | None = None  # start of the loss spike - start of the grad spike
    attrib_first: str | None = None  # grad only: part of the model that was flagged first (see `attribute`)
    attrib_peak: str | None = None  # grad only: part with the most energy above its own baseline at the peak
    attrib_peak_share: float | None = None  # its share of all energy above baselines

    def row(self) -> dict[str, Any]:
        """The spike as a row of a table with the columns `SPIKE_COLUMNS`."""
        return {column: getattr(self, f.name) for column, f in zip(SPIKE_COLUMNS, fields(self), strict=True)}


# `class` is a reserved word here, not in a table
SPIKE_COLUMNS = tuple("class" if f.name == "spike_class" else f.name for f in fields(Spike))


def find_spikes(
    values: Floats, flags: Flags, warmup_steps: int, steps_planned: int, rules: Rules, series: Series
) -> list[Spike]:
    """The spikes of one series, in order.

    A spike lasts until the first step behind its peak that opens 5 consecutive values at or below m exp max(log 1.2,
    2 s) (norm) or m + 2 s (loss), m the larger of level and baseline and s the scale, all frozen at its start.

    Args:
        values: The series that `flags` were made from, shape [steps]; NaN where it was not measured.
        flags: Those of `jump`.
        warmup_steps: Spikes that start before this step are `in_warmup`.
        steps_planned: Length of the whole trial; sets from which duration on a spike is malignant.
        rules: Those that `flags` were made with.
        series: Which of the two it is.
    """
    usable = np.where(np.isfinite(values) & ((values > 0) | (series == "loss")), values, np.nan)
    listed: list[float] = usable.tolist()
    limit = rules.limit(steps_planned)
    spikes = []
    for start, end in stretches(flags.flagged, rules.merge_gap):
        level = float(flags.level[start])
        center, scale = usual(usable, start, rules, series)
        peak_step = start + int(np.nanargmax(usable[start : end + 1]))
        peak = listed[peak_step]
        baseline = math.exp(center) if series == "grad" else center
        near = _recovered_below(max(level, baseline), scale, rules, series)
        back = _recovery(listed, peak_step, near, rules.recovery_steps)
        duration = (len(listed) if back is None else back) - start
        spikes.append(
            Spike(
                series=series,
                start=start,
                end=end,
                flag_steps=int(flags.flagged[start : end + 1].sum()),
                peak_step=peak_step,
                peak=peak,
                level=level,
                baseline=baseline,
                scale=scale,
                part=_part(flags, slice(start, end + 1)),
                peak_ratio=peak / level if series == "grad" else None,
                peak_delta=peak - level if series == "loss" else None,
                duration=duration,
                recovered=back is not None,
                spike_class=_classify(duration, back is not None, limit, rules.narrow_steps),
                in_warmup=start < warmup_steps,
            )
        )
    return spikes


def couple(grad: list[Spike], loss: list[Spike], rules: Rules) -> tuple[list[Spike], list[Spike]]:
    """Both lists with `partner` and `lag` filled where a grad spike and a loss spike belong together.

    A grad spike at t takes the nearest loss spike that starts in [t - couple_before, t + couple_after], the later one
    of two equally near. A loss spike taken by several names the nearest of them.
    """
    takers: dict[int, list[Spike]] = {}
    coupled = []
    for spike in grad:
        lags = [other.start - spike.start for other in loss]
        near = [lag for lag in lags if -rules.couple_before <= lag <= rules.couple_after]
        if near:
            lag = min(near, key=lambda lag: (abs(lag), -lag))
            spike = replace(spike, partner=spike.start + lag, lag=lag)
            takers.setdefault(spike.start + lag, []).append(spike)
        coupled.append(spike)
    return coupled, [_answer(spike, takers.get(spike.start, [])) for spike in loss]


def _part(flags: Flags, steps: slice) -> Part:
    if not flags.absolute[steps].any():
        return "surprise"
    return "both" if flags.surprise[steps].any() else "absolute"


def _answer(loss_spike: Spike, takers: list[Spike]) -> Spike:
    if not takers:
        return loss_spike
    nearest = min(takers, key=lambda spike: abs(loss_spike.start - spike.start))
    return replace(loss_spike, partner=nearest.start, lag=nearest.lag)


def _recovered_below(usual_value: float, scale: float, rules: Rules, series: Series) -> float:
    """The value at or below which the series counts as back.

    `usual_value` is the larger of level and baseline: the median of five values alone is too noisy to last for the
    many steps that recovery takes (on an H200 it made one batch's loss "wide" in 11 of 24 trials), and on a rise the
    baseline alone would never be reached again.
    """
    if series == "loss":
        return usual_value + rules.recovery_scales * scale
    with np.errstate(over="ignore"):  # a log that swings by hundreds of powers of ten: then every value is near
        return usual_value * float(np.exp(max(math.log(rules.recovery_ratio), rules.recovery_scales * scale)))


def _recovery(values: list[float], peak_step: int, below: float, needed: int) -> int | None:
    """First step behind the peak that opens `needed` consecutive values at or below `below`; NaN breaks them."""
    run = 0
    for step in range(peak_step + 1, len(values)):
        run = run + 1 if values[step] <= below else 0
        if run == needed:
            return step - needed + 1
    return None


def _classify(duration: int, recovered: bool, limit: int, narrow: int) -> SpikeClass:
    if duration > limit:
        return "malignant"
    if not recovered:
        return "open"
    return "narrow" if duration <= narrow else "wide"


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
