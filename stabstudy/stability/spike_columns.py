"""Counts of outliers and spikes in a trial's row: by our rules, and by the published ones.

Rates are fractions of the steps that could be judged: each rule has its own.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from stabstudy.stability import published
from stabstudy.stability.columns import Value
from stabstudy.stability.detectors import Flags, usual_level
from stabstudy.stability.events import Spike
from stabstudy.stability.published import Known, Marks
from stabstudy.stability.rules import Rules
from stabstudy.stability.verdict import lowest_rate

Floats = NDArray[np.float64]


def flags_of_norm(norm: Floats, flags: Flags, rules: Rules) -> dict[str, Value]:
    """Counts and rates of the flags of `jump` on grad_norm [steps]: all, absolute ones, dips, and the severity."""
    n, known = flags.n_absolute, flags.n_evaluable
    names = ("spike_steps", "spike_rate", "spike_abs_steps", "spike_abs_rate", "spike_abs_low", "spike_dip_steps")
    if not known:
        return dict.fromkeys((*names, "severity"))
    low = lowest_rate(n, known, rules.tail_probability)
    values = (flags.n_flagged, flags.n_flagged / known, n, n / known, low, int(flags.dip.sum()))
    return {**dict(zip(names, values, strict=True)), "severity": severity(norm, flags, rules)}


def severity(norm: Floats, flags: Flags, rules: Rules) -> float:
    """1000 / n_evaluable * sum over absolute flags of log2(x / max(exp m5, exp m64)): orders trials (ours).

    One step in a thousand at twice the larger of its two references would be 1.
    """
    above = [_octaves(norm, flags, int(step), rules) for step in np.flatnonzero(flags.absolute)]
    return 1000 * float(np.sum(above)) / flags.n_evaluable


def _octaves(norm: Floats, flags: Flags, step: int, rules: Rules) -> float:
    m64 = usual_level(norm, step, rules, "grad")
    return float(np.log2(norm[step]) - max(np.log2(flags.level[step]), m64 / np.log(2)))


def grad_spikes(spikes: list[Spike], evaluable: int) -> dict[str, Value]:
    """Spikes of the gradient norm: how many of which class, where, how high, how long."""
    classes = Counter(spike.spike_class for spike in spikes)
    counts: dict[str, Value] = {
        "spike_events": len(spikes),
        "spike_events_per_1k": 1000 * len(spikes) / max(evaluable, 1),
        "spike_narrow": classes["narrow"],
        "spike_wide": classes["wide"],
        "spike_malignant": classes["malignant"],
        "spike_open": classes["open"],
        "spike_first_censored": not spikes,
    }
    recovered = [spike.duration for spike in spikes if spike.recovered]
    ratios = [spike.peak_ratio for spike in spikes if spike.peak_ratio is not None]
    return {
        **(counts if evaluable else dict.fromkeys(counts)),
        "spike_first_step": spikes[0].start if spikes else None,
        "spike_warmup_share": _share([spike.in_warmup for spike in spikes]),
        "spike_ratio_max": max(ratios, default=None),
        "spike_ratio_median": _median(ratios),
        "spike_duration_median": _median(recovered),
        "spike_duration_max": max(recovered, default=None),
        "spike_unrecovered": len(spikes) - len(recovered) if spikes else None,
        **_coupling(spikes),
        **_attribution(spikes),
    }


def loss_spikes(spikes: list[Spike], evaluable: int) -> dict[str, Value]:
    """Spikes of the loss."""
    return {
        "spike_loss_events": len(spikes) if evaluable else None,
        "spike_loss_per_1k": 1000 * len(spikes) / evaluable if evaluable else None,
        "spike_loss_delta_max": max((s.peak_delta for s in spikes if s.peak_delta is not None), default=None),
    }


def by_published_rules(norm: Floats, loss: Floats, steps_planned: int, rules: Rules) -> dict[str, Value]:
    """Counts by the rules of others: `ratio3`, `olmo7`, `olmo_core`, `zclip`, `gss`, `foundry_kill`."""
    p = rules.published
    ratio3 = published.ratio3(norm, p)
    rule, core_rule, size = published.olmo7(p, steps_planned), published.olmo_core(p), p.foundry_window(steps_planned)
    known = Known.of([norm, loss], {rule.window, core_rule.window, size})
    olmo_grad, olmo_loss = (published.outliers(series, rule).share for series in known)
    core = [published.outliers(series, core_rule) for series in known]
    ratio = published.gss_ratio(norm)
    above = ratio[~np.isnan(ratio)]
    stops = np.flatnonzero(published.stops(known[1], p, size).flagged)
    return {
        "spike_ratio3_steps": ratio3.n_flagged if ratio3.n_evaluable else None,
        "spike_ratio3_rate": ratio3.share,
        "spike_olmo7_grad": olmo_grad,
        "spike_olmo7_loss": olmo_loss,
        "olmo7_window": rule.window if (olmo_grad, olmo_loss) != (None, None) else None,
        "spike_olmocore": _either(*core).share,
        "spike_zclip": published.zclip(norm, p).share,
        "spike_gss_max": float(above.max()) if len(above) else None,
        "spike_gss50_steps": int((above > p.gss_ratio).sum()) if len(above) else None,
        "spike_foundry_step": int(stops[0]) if len(stops) else None,
    }


def _either(a: Marks, b: Marks) -> Marks:
    """A step is flagged where one of two series is, and evaluable where one is."""
    return Marks(a.flagged | b.flagged, a.evaluable | b.evaluable)


def _coupling(spikes: list[Spike]) -> dict[str, Value]:
    return {
        "spike_coupled_share": _share([spike.partner is not None for spike in spikes]),
        "spike_lag_median": _median([spike.lag for spike in spikes if spike.lag is not None]),
    }


def _attribution(spikes: list[Spike]) -> dict[str, Value]:
    """Where the highest spike came from."""
    top = max(spikes, key=lambda spike: spike.peak_ratio or 0.0, default=None)
    return {
        "spike_first_layer": top.attrib_first if top else None,
        "spike_peak_layer": top.attrib_peak if top else None,
        "spike_peak_share": top.attrib_peak_share if top else None,
    }


def _median(values: list[int] | list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _share(holds: list[bool]) -> float | None:
    return sum(holds) / len(holds) if holds else None
