"""Maps: what stands in a field, where a row stops being stable, and what the report says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import planted
import pytest
from matplotlib import colors

from stabstudy.analysis import plots
from stabstudy.analysis.elements import Figure
from stabstudy.analysis.figures import maps, style, verdict_maps
from stabstudy.analysis.figures.layout import layout_of
from stabstudy.analysis.study import Study

RATES = (1e-3, 1e-2, 1e-1)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Depth 2 is stable to 0.01, then rough or spiky; depth 6 to the end, where its largest rate never ran; at depth 8
    one seed always diverges."""
    path = tmp_path_factory.mktemp("maps") / "planted"
    planted.plant_frame(path)
    for depth in (2, 6, 8):
        for lr in RATES[: 2 if depth == 6 else 3]:
            for seed in (0, 1):
                diverged = depth == 8 and seed == 0
                unstable = depth == 2 and lr == 1e-1
                planted.plant_trial(
                    path,
                    planted.settings(depth, lr, seed=seed),
                    spikes=dict.fromkeys((planted.LONG, planted.ROUGH)[seed] if unstable else (), 8.0),
                    nonfinite_at=90 if diverged else None,
                    stop_reason="diverged" if diverged else "complete",
                    steps_done=91 if diverged else None,
                    final_loss=None if diverged else 2.5,
                )
    return Study.load(path)


def test_the_planted_verdicts(study: Study) -> None:
    counted = study.trials["verdict"].value_counts().to_dict()
    assert counted == {"stable": 11, "diverged": 3, "spiky": 1, "rough": 1}


def test_the_verdict_map_counts_and_ends_the_stable_levels(study: Study) -> None:
    ax = plots.verdict_map(study)
    texts = {t.get_position(): t.get_text().split("\n") for t in ax.texts}
    assert texts[(0, 0)] == ["● 2 stable"]
    assert texts[(2, 0)] == ["▲ 1 spiky", "◆ 1 rough"]
    assert texts[(1, 2)] == ["● 1 stable", "✕ 1 diverged"]
    assert [p.get_xy() for p in ax.patches if p.get_hatch()] == [(1.5, 0.5)]
    lines = [line for line in ax.get_lines() if line.get_gid() == "limit"]
    assert [(line.get_xdata()[0], line.get_linestyle()) for line in lines] == [(1.5, "-"), (1.5, "--"), (-0.5, "-")]


def test_the_line_of_a_limit_is_seen_on_every_ground(study: Study) -> None:
    """Dark in a light frame, and never exchanged for the dark theme's colours: fields are light in both."""
    lines = plots.verdict_map(study).get_lines()
    frames, cores = lines[::2], lines[1::2]
    limit_colours = verdict_maps.LIMIT_COLOURS
    assert len(cores) == 3 and not set(limit_colours) & set(style.DARK)
    assert [{line.get_color() for line in part} for part in (frames, cores)] == [{c} for c in limit_colours]
    light, dark = (style.luminance(colors.to_rgb(c)) for c in limit_colours)
    for ground in (style.PAPER, *style.VERDICT_GROUNDS.values()):
        assert (style.luminance(colors.to_rgb(ground)) + 0.05) / (dark + 0.05) > 4.5
    assert (light + 0.05) / (style.luminance(colors.to_rgb(style.DARK[style.PAPER])) + 0.05) > 4.5
    for frame, core in zip(frames, cores, strict=True):
        assert frame.get_zorder() < core.get_zorder() and frame.get_linewidth() > core.get_linewidth()


def test_an_axis_without_order_has_no_limit(study: Study) -> None:
    has_order = verdict_maps._has_order
    assert not has_order(["pre", "post"]) and not has_order([False, True])
    assert has_order(RATES) and not has_order([1.0, None])  # clipping off is not a larger clip


def test_the_share_diverged_is_that_of_the_field(study: Study) -> None:
    ax = plots.stability_map(study, value="diverged")
    texts = {t.get_position(): t.get_text().split("\n") for t in ax.texts}
    assert texts[(1, 2)] == ["50 %", "n=2", "1 diverged"] and texts[(1, 0)] == ["0 %", "n=2"]
    assert len([line for line in ax.get_lines() if line.get_marker() == "X"]) == 3


@pytest.mark.parametrize(
    ("value", "highest", "ends"),
    [
        ("spike_abs_rate", 0.0023, (0.0, 0.01)),
        ("spike_abs_rate", 0.2, (0.0, 0.2)),
        ("grad_norm_max_over_median", 2.5, (1.0, 10.0)),
        ("diverged", 0.5, (0.0, 1.0)),
        ("grad_norm_log_sd", 0.0, (0.0, 1.0)),
    ],
)
def test_next_to_nothing_stays_dark(value: str, highest: float, ends: tuple[float, float]) -> None:
    assert maps.scale(value, highest) == ends


def test_the_report_names_each_limit(study: Study) -> None:
    layout = layout_of(study)
    assert layout is not None
    drawn = [*verdict_maps.figures(study, layout), *maps.figures(study, layout)]
    blocks = {b.name: b for b in drawn if isinstance(b, Figure)}
    assert list(blocks) == ["stability-map", "spike-abs-rate-map", "grad-norm-max-over-median-map", "diverged-map"]
    caption = blocks["stability-map"].caption
    assert "Stable up to 0.01, first unstable at 0.1 (2 of 2): depth 2." in caption
    assert "Stable up to 0.01, no larger one was unstable: depth 6." in caption
    assert "Not all stable at the smallest, first unstable at 1e-3 (1 of 2): depth 8." in caption
    assert blocks["stability-map"].table.rows[-1] == ("8", "0.1", "1", "0", "0", "1", "2")
    assert blocks["diverged-map"].table.rows[-1] == ("8", "0.1", "50 %", "2", "0", "1")


def test_rows_of_one_limit_are_named_together(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", depths=tuple(range(2, 9)), lrs=(1e-3, 1e-2), seeds=(0,)))
    layout = layout_of(study)
    assert layout is not None
    said = next(verdict_maps.figures(study, layout)).caption
    assert "first unstable at 0.01 (1 of 1): depth 2; depth 3; depth 4; depth 5; and 3 more rows." in said


def test_other_pairs_of_axes_have_a_map_that_pools_the_rest(tmp_path: Path) -> None:
    whole = Study.load(planted.plant_study(tmp_path / "s", seeds=(0,), clips=(1.0, None)))
    layout = layout_of(whole)
    assert layout is not None
    found = [b for b in maps.figures(whole, layout) if isinstance(b, Figure) and b.name == "spike-abs-rate-pairs"]
    (pairs,) = found
    assert {(r[0], r[2]) for r in pairs.table.rows} == {
        ("depth (layers)", "clip threshold"), ("learning rate", "clip threshold"),
    }  # fmt: skip
    for depth in ("2", "6"):
        row = next(r for r in pairs.table.rows if r[1] == depth and r[3] == "1")
        members = whole.where({"model.depth": int(depth), "optim.clip": 1.0}).trials
        assert row[5] == str((members["state"] == "done").sum())


def test_the_colour_bar_is_that_of_the_fields(study: Study) -> None:
    ax = plots.stability_map(study, value="grad_norm_max_over_median")
    _, bar = ax.figure.axes
    low, high = bar.get_ylim()
    means = [maps.mean(trials, "grad_norm_max_over_median") for trials in maps.Sheet(
        study, "optim.lr", "model.depth", "grad_norm_max_over_median").fields.values()]  # fmt: skip
    assert (low, high) == (1.0, pytest.approx(max(10.0, *(m for m in means if m == m))))
    assert bar.get_ylabel() == "max / median" and bar.yaxis.label.get_color() == style.INK
    (drawn,) = (c for c in bar.collections if c.get_array() is not None)
    shades = [colors.to_hex(c) for c in drawn.cmap(np.linspace(0, 1, maps.SHADES))]
    assert shades == [style.field_colour((i + 0.5) / maps.SHADES) for i in range(maps.SHADES)]
    assert not set(shades) & set(style.DARK)  # the dark style would change a shade, not the field beside it
    assert len(plots.stability_map(study, bar=False).figure.axes) == 1
