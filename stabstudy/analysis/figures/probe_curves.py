"""Figures of what was probed in a trial: attention logits and entropy, residuals, updates, weights, over its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis.figures import style
from stabstudy.trace import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Probe:
    """A column of the probes as a panel: its name, its scale, which layer stands for all, a level to mark."""

    column: str
    name: str
    log: bool = False
    pick: np.ufunc | None = None  # of a list over layers; None: one number per probe
    warn: float | None = None

    @property
    def short(self) -> str:
        """Its name where one curve stands for all layers."""
        if self.pick is None:
            return self.name
        return f"{self.name}, {'largest' if self.pick is np.fmax else 'smallest'}"


PROBES = (
    Probe("attn_logit_max", "attention logit (nat)", log=True, pick=np.fmax, warn=100.0),
    Probe("attn_entropy", "attention entropy", pick=np.fmin, warn=0.02),
    Probe("resid_rms", "residual RMS", log=True, pick=np.fmax),
    Probe("val_loss", "validation loss (nat/token)"),
    Probe("update_rms", "update RMS"),
    Probe("adam_rms_max", "Adam RMS, largest tensor"),
    Probe("param_norm", "norm of the weights"),
    Probe("noise_scale", "gradient noise scale (token)", log=True),
)
"""In the order of their panels."""


def extremes(probes: Rows) -> Mapping[str, NDArray[np.float64]]:
    """Each probed quantity by its name, shape [probes]; of layers the largest or the smallest. NaN: not measured."""
    return {probe.short: _one_curve(probes, probe) for probe in PROBES}


def probe_panels(probes: Rows) -> Figure | None:
    """A panel for each quantity that was probed twice or more, a line per layer; None where there is none.

    Dashed: the level from which a trial's page warns, where the curves come near it.
    """
    shown = [p for p in PROBES if np.isfinite(_one_curve(probes, p)).sum() > 1]
    if not shown:
        return None
    columns = 2 if len(shown) > 1 else 1
    bands = -(-len(shown) // columns)
    figure = style.new_panels(len(shown), 5.3 * columns, 1.9 * bands, columns=columns)
    for i, (ax, probe) in enumerate(zip(figure.axes, shown, strict=False)):
        _panel(ax, probes, probe)
        if i >= len(shown) - columns:
            ax.set_xlabel("optimizer step")
    _name_layers(figure, probes)
    return figure


def _panel(ax: Axes, probes: Rows, probe: Probe) -> None:
    from matplotlib.ticker import MaxNLocator

    values = probes[probe.column]
    curves = values.T if values.ndim == 2 else values[None]
    colours = style.ordered_colours(len(curves)) if len(curves) > 1 else [style.BLUE]
    positive = bool(np.nanmin(curves[np.isfinite(curves)]) > 0)
    if probe.log and positive:
        ax.set_yscale("log")
    for curve, colour in zip(curves, colours, strict=True):
        there = np.isfinite(curve)
        ax.plot(probes["step"][there], curve[there], color=colour, linewidth=1.1, marker=".", markersize=3)
    if probe.warn is not None and ax.get_ylim()[0] <= probe.warn <= ax.get_ylim()[1]:
        ax.axhline(probe.warn, color=style.VERMILLION, linewidth=1.0, linestyle=(0, (5, 2)))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if probe.log and positive:
        style.log_ticks(ax)
    style.title(ax, probe.name)


def _name_layers(figure: Figure, probes: Rows) -> None:
    """A key to the colours of the layers, the first, the last and some between."""
    from matplotlib.lines import Line2D

    n = probes["attn_logit_max"].shape[1]
    if n < 2:
        return
    colours = style.ordered_colours(n)
    named = sorted({round(i) for i in np.linspace(0, n - 1, min(n, 7))})
    handles: list[Any] = [Line2D([], [], color=colours[i], linewidth=1.6) for i in named]
    names = [f"layer {i}" for i in named]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), labelcolor=style.INK, frameon=False)


def _one_curve(probes: Rows, probe: Probe) -> NDArray[np.float64]:
    values = probes[probe.column]
    if probe.pick is None:
        return np.asarray(values)
    return np.asarray(probe.pick.reduce(values, axis=1)) if values.shape[1] else np.full(len(probes), np.nan)
