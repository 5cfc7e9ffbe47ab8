"""From flagged steps to spikes: where each begins and ends, how high it is, how long it lasts, what moves with it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability.detectors import Flags
from stabstudy.stability.rules import Rules, Series

SpikeClass = Literal["narrow", "wide", "malignant", "open"]


@dataclass(frozen=True)
class Spike:
    """A maximal stretch of flagged steps at most `merge_gap` apart. All steps are optimizer steps."""

    series: Series
    start: int  # first flagged step
    end: int  # last flagged step
    flag_steps: int
    peak_step: int
    peak: float  # in the unit of the series
    baseline: float  # median of the window at `start`, frozen there; in the unit of the series
    scale: float  # robust standard deviation at `start`; of log grad_norm, or of the loss
    peak_ratio: float | None  # grad only: peak / baseline
    peak_delta: float | None  # loss only: peak - baseline
    duration: int  # steps from `start` until the series is back at the baseline; to the end of the trace if it is not
    recovered: bool
    spike_class: SpikeClass
    in_warmup: bool
    partner: int | None = None  # start of the coupled spike in the other series
    lag: int | None = None  # start of the loss spike - start of the grad spike
    attrib_first: str | None = None  # grad only: part of the model that was flagged first (see `attribution`)
    attrib_peak: str | None = None  # grad only: part with the most energy above its own baseline at the peak
    attrib_peak_share: float | None = None  # its share of all energy above baselines

    def row(self) -> dict[str, Any]:
        """The spike as a row of a table with the columns `SPIKE_COLUMNS`."""
        return dict(zip(SPIKE_COLUMNS, asdict(self).values(), strict=True))


# `class` is a reserved word here, not in a table
SPIKE_COLUMNS = tuple("class" if f.name == "spike_class" else f.name for f in fields(Spike))


def find_spikes(
    values: NDArray[np.float64], flags: Flags, warmup_steps: int, steps_planned: int, rules: Rules, series: Series
) -> list[Spike]:
    """The spikes of one series, in order.

    Args:
        values: The series that `flags` were made from, shape [steps]; NaN where it was not measured.
        flags: Readings of `mad_log` or `mad_lin`.
        warmup_steps: Spikes that start before this step are `in_warmup`.
        steps_planned: Length of the whole trial; sets from which duration on a spike is malignant.
        rules: Those that `flags` were made with.
        series: Which of the two it is.
    """
    usable = np.where(np.isfinite(values) & ((values > 0) | (series == "loss")), values, np.nan)
    listed: list[float] = usable.tolist()
    spikes = []
    for steps in merge(np.flatnonzero(flags.flagged).tolist(), rules.merge_gap):
        start, end = steps[0], steps[-1]
        center, scale = float(flags.center[start]), float(flags.scale[start])
        peak_step = start + int(np.nanargmax(usable[start : end + 1]))
        peak = listed[peak_step]
        back = _recovery(listed, peak_step, _recovered_below(center, scale, rules, series), rules.recovery_steps)
        duration = (len(listed) if back is None else back) - start
        baseline = math.exp(center) if series == "grad" else center
        spikes.append(
            Spike(
                series=series,
                start=start,
                end=end,
                flag_steps=len(steps),
                peak_step=peak_step,
                peak=peak,
                baseline=baseline,
                scale=scale,
                peak_ratio=peak / baseline if series == "grad" else None,
                peak_delta=peak - baseline if series == "loss" else None,
                duration=duration,
                recovered=back is not None,
                spike_class=_classify(duration, back is not None, rules.limit(steps_planned), rules.narrow_steps),
                in_warmup=start < warmup_steps,
            )
        )
    return spikes


def merge(flagged: list[int], gap: int) -> list[list[int]]:
    """Increasing steps in groups: neighbours at most `gap` apart are together."""
    groups: list[list[int]] = []
    for step in flagged:
        if groups and step - groups[-1][-1] <= gap:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


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


def coupling_lift(grad: int, coupled: int, loss: int, evaluable: int, rules: Rules) -> float | None:
    """How much more often loss spikes accompany grad spikes than they would by chance: 1 is chance.

    Args:
        grad: Spikes of grad_norm, summed over the trials of a cell; null under `lift_spikes` of them.
        coupled: Those that have a partner.
        loss: Spikes of the loss; null without any.
        evaluable: Steps at which the loss could be judged.
        rules: Those of the spikes.

    Chance: 1 - (1 - r)^11, that one of the 11 steps around a grad spike starts a loss spike, r their rate.
    """
    if grad < rules.lift_spikes or not loss or not evaluable:
        return None
    places = rules.couple_before + rules.couple_after + 1
    return coupled / grad / -math.expm1(places * math.log1p(-loss / evaluable))


def severity(grad: list[Spike], steps_done: int, rules: Rules) -> float:
    """Sum of log2(peak_ratio) * duration over the spikes of grad_norm, at most 100 steps each, per step of the trial.

    One step at twice the baseline, in every step of the trial, would be 1.
    """
    parts = (math.log2(s.peak_ratio) * min(s.duration, rules.severity_steps) for s in grad if s.peak_ratio)
    return math.fsum(parts) / steps_done


def _answer(loss_spike: Spike, takers: list[Spike]) -> Spike:
    if not takers:
        return loss_spike
    nearest = min(takers, key=lambda spike: abs(loss_spike.start - spike.start))
    return replace(loss_spike, partner=nearest.start, lag=nearest.lag)


def _recovered_below(center: float, scale: float, rules: Rules, series: Series) -> float:
    """The value at or below which the series counts as back at its baseline."""
    if series == "loss":
        return center + rules.recovery_scales * scale
    return math.exp(center + max(math.log(rules.recovery_ratio), rules.recovery_scales * scale))


def _recovery(values: list[float], peak_step: int, below: float, needed: int) -> int | None:
    """First step from the peak on that opens `needed` consecutive values at or below `below`; NaN breaks them."""
    run = 0
    for step in range(peak_step, len(values)):
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
