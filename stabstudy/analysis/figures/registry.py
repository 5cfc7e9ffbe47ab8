"""The table of all figures of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stabstudy.analysis import adaptive, study_statistics
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import (
    curves,
    effect_plots,
    forecast_plot,
    frontier_plot,
    layers,
    maps,
    norms,
    search_plots,
    single_axes,
    study_curves,
    traces,
    verdict_maps,
)
from stabstudy.analysis.figures.layout import Layout, layout_of
from stabstudy.analysis.study import Study

OVER_SETTINGS: tuple[Callable[[Study, Layout], Iterator[Figure | Absent]], ...] = (
    search_plots.search_figures,
    curves.curve_figures,
    verdict_maps.figures,
    maps.figures,
    single_axes.axis_figures,
    effect_plots.effect_figures,
    effect_plots.clipping_figures,
    study_curves.sensitivity_figures,
    study_curves.first_spike_figures,
    norms.ratio_figures,
    norms.accumulation_figures,
)
"""Figures over the settings that vary, in the order of the report: in place of one that a study lacks, the reason."""

OVER_GRIDS = (
    verdict_maps.figures,
    maps.figures,
    single_axes.axis_figures,
    effect_plots.effect_figures,
    study_curves.sensitivity_figures,
    study_curves.first_spike_figures,
    norms.ratio_figures,
)
"""Those of them that pool trials over values of what a sweep searched, or show a field for each."""

OF_SEARCHES: tuple[Callable[[Study], Iterator[Figure | Absent]], ...] = (frontier_plot.figures, forecast_plot.figures)
"""Figures of what a sweep searched; they have a section of their own."""

OF_TRIALS: tuple[Callable[[Study], Iterator[Figure | Absent]], ...] = (traces.figures, layers.figures)
"""Figures of single trials."""

ALL_OVER_SETTINGS = "Every figure over settings"


def figures(study: Study) -> Iterator[Figure | Absent]:
    """Every figure that the study allows; in place of one that it does not, the reason."""
    layout = layout_of(study.grid)
    if not (study.trials["state"] == "done").any():
        yield Absent("Every figure", "no trial is done yet: there is nothing to draw")
        return
    if study.ingested and not study_statistics.one_stride(study.trials):
        yield Absent(ALL_OVER_SETTINGS, "the runs were logged at different strides, so their statistics differ")
    elif layout is None:
        reason = "no setting is known to differ" if study.ingested else "nothing varies but the seed"
        yield Absent(ALL_OVER_SETTINGS, reason)
    else:
        bias = adaptive.why_biased(study)
        for family in OVER_SETTINGS:
            if bias is None or family not in OVER_GRIDS:
                yield from family(study, layout)
    yield from (absent for absent in search_figures(study) if isinstance(absent, Absent))
    if (bias := adaptive.why_biased(study)) is not None:
        yield Absent("Maps, effects, LR sensitivity, first spikes", bias)
    for family_of_trials in OF_TRIALS:
        yield from family_of_trials(study)


def search_figures(study: Study) -> Iterator[Figure | Absent]:
    """The figures of what the sweep searched, or why there are none; nothing of runs trained elsewhere."""
    if not study.ingested:
        for family in OF_SEARCHES:
            yield from family(study)
