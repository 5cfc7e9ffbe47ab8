"""Every figure of a report as a function.

Each takes a Study (or one trial's Rows) and draws on the given Axes `ax`, or on new ones, which it returns. Those of
several Axes (`trace`, `traces`, `trial`, `panels`) return the Figure.

    plots.lr_curves(study, by="model.depth").figure
    plots.stability_map(study, x="optim.lr", y="model.depth").figure
    plots.trial(study, study.worst())

For a paper: inside `with plots.paper():` figures are 3.3 or 6.8 inches wide with type of at least 7 points, and
`plots.save(drawn, "loss.pdf")` writes PDF, SVG or PNG with text as text.

No trial is left out silently: a diverged one is a cross at its value or a mark on the edge, a missing cell is hatched.
"""

from stabstudy.analysis.figures.curves import curves, lr_curves
from stabstudy.analysis.figures.effect_plots import clip_shares, clipping, effects
from stabstudy.analysis.figures.frontier_plot import frontier
from stabstudy.analysis.figures.layers import layer_map
from stabstudy.analysis.figures.layout import panels
from stabstudy.analysis.figures.looks import paper
from stabstudy.analysis.figures.maps import stability_map
from stabstudy.analysis.figures.norms import accumulation, norm_ratios
from stabstudy.analysis.figures.saving import save
from stabstudy.analysis.figures.study_curves import first_spikes, sensitivity
from stabstudy.analysis.figures.traces import trace, traces, trial
from stabstudy.analysis.figures.verdict_maps import verdict_map

__all__ = [
    "accumulation", "clip_shares", "clipping", "curves", "effects", "first_spikes", "frontier", "layer_map",
    "lr_curves", "norm_ratios", "panels", "paper", "save", "sensitivity", "stability_map", "trace",
    "traces", "trial", "verdict_map",
]  # fmt: skip
