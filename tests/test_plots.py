"""Figures: what is drawn is what the tables say, and nothing is left out silently."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import planted
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Text

from stabstudy.analysis import levels, plots
from stabstudy.analysis.figures import labels, layout, style, traces
from stabstudy.analysis.figures.traces import downsample
from stabstudy.analysis.report import html
from stabstudy.analysis.study import Study
from stabstudy.stability.verdict import VERDICTS


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The planted grid, with clipping on and off, one diverged trial at a rate of its own, and a failed one."""
    path = planted.plant_study(tmp_path_factory.mktemp("plots") / "planted", clips=(1.0, None), steps=200)
    diverged = planted.settings(6, 0.5, 1.0, 0, 200)
    planted.plant_trial(
        path, diverged, nonfinite_at=70, steps_done=71, final_loss=math.nan, stop_reason="diverged", logit=9.0
    )
    planted.plant_trial(path, planted.settings(6, 0.5, 1.0, 1, 200), status="failed", steps_done=30)
    return Study.load(path)


def _lines(ax: Axes, kind: str) -> Iterator[Line2D]:
    """`mean`: the named lines; `dots`: the trials; else those with that gid."""
    for line in ax.get_lines():
        named = not str(line.get_label()).startswith("_")
        dots = line.get_linestyle() == "None" and line.get_gid() is None
        if line.get_gid() == kind or (kind == "mean" and named) or (kind == "dots" and dots):
            yield line


def test_lr_curves_draw_the_means_of_each_depth(study: Study) -> None:
    ax = plots.lr_curves(study, by="model.depth")
    drawn = {line.get_label(): line for line in _lines(ax, "mean")}
    assert set(drawn) == {"2", "6"}
    assert list(drawn["2"].get_xdata()) == [1e-3, 1e-2, 1e-1]
    # planted: 2.4 + 0.3 * (lg lr + 2)^2 + 0.02 * seed - 0.01 * depth
    assert list(drawn["2"].get_ydata()) == pytest.approx([2.69, 2.39, 2.69])
    assert list(drawn["6"].get_ydata()) == pytest.approx([2.65, 2.35, 2.65, planted.INIT_LOSS])
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "learning rate"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1e-3", "0.01", "0.1", "0.5"]


def test_no_done_trial_is_missing_and_diverged_ones_lie_at_their_values(study: Study) -> None:
    done = study.trials[study.trials["state"] == "done"]
    (gone,) = done.index[done["verdict"] == "diverged"]
    for metric in ("attn_logit_peak", "grad_norm_log_sd"):
        ax = plots.curves(study, metric)
        (cross,) = _lines(ax, "diverged")
        assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([0.5], [done.loc[gone, metric]])
        assert cross.get_transform() == ax.transData and cross.get_marker() == "x"
        assert ax.get_ylim()[0] < done.loc[gone, metric] < ax.get_ylim()[1]
        dots = sum(len(line.get_xdata()) for line in _lines(ax, "dots"))
        assert dots + 1 == len(done)


def test_a_diverged_loss_does_not_squash_the_others(study: Study) -> None:
    low, high = plots.lr_curves(study).get_ylim()
    assert low < 2.35 and 2.71 < high < 3.1  # the capped loss of the diverged trial is 5.5


def test_a_diverged_trial_enters_no_mean_but_that_of_the_loss(study: Study) -> None:
    drawn = {line.get_label(): line for line in _lines(plots.curves(study, "attn_logit_peak"), "mean")}
    assert math.isnan(drawn["6"].get_ydata()[-1])


def test_on_a_log_axis_the_mean_is_geometric_and_its_band_stays_above_zero(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for seed, logit in enumerate((1.0, 10.0, 100.0)):  # the t-interval of the plain mean reaches from -99 to 173
        planted.plant_trial(tmp_path / "s", planted.settings(2, 0.1, seed=seed), logit=logit)
    ax = plots.curves(Study.load(tmp_path / "s"), "attn_logit_peak", by=None, log_y=True)
    peaks = [2 * 121 / 120 * logit for logit in (1.0, 10.0, 100.0)]
    half = 4.302653 * math.log(10) / math.sqrt(3)
    mean = next(line for line in ax.get_lines() if line.get_linestyle() != "None")
    assert list(mean.get_ydata()) == pytest.approx([peaks[1]])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((peaks[1] * math.exp(-half), peaks[1] * math.exp(half)))


@pytest.mark.parametrize(("logit", "lines"), [(5e5, [300.0, 1e4]), (50.0, [300.0])])
def test_the_logits_from_which_harm_begins_are_in_view(tmp_path: Path, logit: float, lines: list[float]) -> None:
    planted.plant_frame(tmp_path / "s")
    for seed, level in enumerate((4.0, logit)):
        planted.plant_trial(tmp_path / "s", planted.settings(2, 0.1, seed=seed), logit=level)
    study = Study.load(tmp_path / "s")
    ax = plots.curves(study, "attn_logit_peak", by=None, log_y=True)
    whole = [line.get_ydata()[0] for line in ax.get_lines() if line.get_transform() == ax.get_yaxis_transform()]
    assert whole == lines and [t.get_text().partition(":")[0] for t in ax.texts] == ["300", "1e4"][: len(lines)]
    peaks = study.trials["attn_logit_peak"]
    assert ax.get_ylim()[0] < peaks.min() and ax.get_ylim()[1] > max(300, peaks.max())
    linear = plots.curves(study, "attn_logit_peak", by=None)  # where it would flatten all else
    assert not [line for line in linear.get_lines() if line.get_transform() == linear.get_yaxis_transform()]


def test_a_loss_that_explodes_hides_no_other(tmp_path: Path, study: Study) -> None:
    """The common scale ends at twice the largest first loss, and the panel of the other says how far it went."""
    figure = style.new_figure(6, 3, columns=2)
    calm, wild = figure.axes
    calm.plot([0, 1, 2], [6.0, 4.0, 3.0])
    wild.plot([0, 1, 2], [6.1, 300.0, math.inf])
    for ax in figure.axes:
        ax.set_ylim(0, 320)
    traces._cut_losses(figure.axes)
    assert {ax.get_ylim() for ax in figure.axes} == {(0.0, 12.2)}
    assert [[t.get_text() for t in ax.texts] for ax in figure.axes] == [[], ["up to 300"]]
    calm.set_ylim(2, 7)
    wild.set_ylim(2, 7)
    traces._cut_losses([calm])  # nothing to cut
    assert calm.get_ylim() == (2, 7) and not calm.texts


def test_a_loss_has_the_unit_that_its_objective_gives_it(study: Study) -> None:
    """In every figure of it: nat/token of a language model, none of kto."""
    trials = study.trials.assign(**{"objective.kind": "kto"})
    assert plots.lr_curves(study).get_ylabel() == "final validation loss (nat/token)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "trials", property(lambda self: trials))
        assert plots.lr_curves(study).get_ylabel() == "final validation loss"
    assert labels.statistic("attn_logit_peak", trials) == "largest attention logit (nat)"  # a logit is one in both


def test_a_band_needs_three_trials(study: Study) -> None:
    assert len(plots.lr_curves(study).collections) == 2  # four trials to a point: clipping is pooled
    assert not plots.lr_curves(study.where({"optim.clip": 1.0})).collections
    assert {str(band.get_gid()).split()[0] for band in plots.lr_curves(study).collections} == {"band"}


def test_curves_take_the_axes_that_there_are(study: Study) -> None:
    ax = plots.curves(study, x="optim.clip", by="optim.lr")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "off"]
    assert {line.get_label() for line in _lines(ax, "mean")} == {"1e-3", "0.01", "0.1", "0.5"}
    ax = plots.curves(study.where({"model.depth": 2}), by="model.depth")
    assert [str(line.get_label())[0] for line in _lines(ax, "mean")] == ["_"]  # one line needs no name
    assert ax.get_legend() is None


def test_map_writes_value_and_n_in_every_field(study: Study) -> None:
    ax = plots.stability_map(study.where({"optim.clip": 1.0}))
    texts = {(t.get_position()): t.get_text().split("\n") for t in ax.texts}
    rough = study.where({"optim.clip": 1.0, "optim.lr": 1e-1, "model.depth": 2}).trials
    rate = float(rough["spike_abs_rate"].mean())
    assert texts[(0, 0)] == ["0 %", "n=2"]
    assert texts[(2, 0)] == [f"{100 * rate:.1f} %", "n=2", "2 rough"]
    assert texts[(3, 1)] == ["0 %", "n=1", "1 diverged"]
    assert [line.get_xdata() for line in ax.get_lines() if line.get_marker() == "X"] == [[3.4]]
    hatched = [p.get_xy() for p in ax.patches if p.get_hatch()]
    assert hatched == [(2.5, -0.5)]  # depth 2 never ran at the largest rate
    assert len(texts) + len(hatched) == 4 * 2


def test_map_colours_share_a_scale(study: Study) -> None:
    part = study.where({"optim.clip": 1.0})
    own, doubled = (plots.stability_map(part, highest=h).patches[2 * 2].get_facecolor() for h in (None, 1.0))
    assert own != doubled


def test_panels_have_common_scales_and_one_legend(study: Study) -> None:
    figure = plots.panels(study, lambda part, ax: plots.lr_curves(part, ax=ax), ["optim.clip"])
    first, second = figure.axes
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == ["clip threshold 1", "clip threshold off"]
    assert first.get_ylim() == second.get_ylim()
    assert first.get_legend() is None and len(figure.legends) == 1
    assert plots.panels(study, lambda part, ax: plots.lr_curves(part, ax=ax), []).axes[0].get_legend() is not None


def test_panels_stay_few_and_keep_data_apart(study: Study) -> None:
    assert layout.panel_axes(study, ["optim.lr", "model.depth"]) == ["optim.clip"]
    assert layout.panel_axes(study, [], limit=6) == ["model.depth", "optim.clip"]
    many = Study(study.folder, study.tables, {"data.seq_len": [128, 256], "optim.lr": study.axes["optim.lr"]})
    assert layout.panel_axes(many, [], limit=3) == ["data.seq_len"]


def test_trace_shows_threshold_warmup_and_spikes(study: Study) -> None:
    trial_id = study.spikes["trial_id"].iloc[0]
    clipped = study.trials.loc[trial_id, "optim.clip"] == 1.0
    norm, loss = plots.trial(study, trial_id).axes
    rows, spikes = study.trace(trial_id), study.spikes[study.spikes["trial_id"] == trial_id]
    assert norm.get_yscale() == "log" and "before clipping" in norm.get_ylabel()
    assert np.array_equal(norm.get_lines()[0].get_ydata(), rows["grad_norm"])
    assert np.array_equal(loss.get_lines()[0].get_ydata(), rows["loss"])
    spans = sorted((p.get_x(), p.get_x() + p.get_width()) for p in norm.patches)
    assert spans == [(s - 0.5, e + 0.5) for s, e in zip(spikes["start"], spikes["end"], strict=True)]
    (marks,) = _lines(norm, "spikes")
    assert list(marks.get_xdata()) == list(spikes["peak_step"])
    assert (1.0 in [line.get_ydata()[0] for line in norm.get_lines() if len(line.get_ydata()) == 2]) == clipped
    assert 10 in [line.get_xdata()[0] for line in norm.get_lines() if len(line.get_xdata()) == 2]
    (rings,) = _lines(norm, "absolute")
    assert set(spikes["peak_step"]) <= set(rings.get_xdata())  # planted at eight times the level


def test_a_trial_that_ended_early_is_drawn_over_its_own_steps(tmp_path: Path) -> None:
    """Of 120 planned steps 3, 21 and 91 were done, ten of them warmup; the first two would be a stroke at the left."""
    planted.plant_frame(tmp_path / "s")
    for seed, steps in enumerate((3, 21, 91)):
        planted.plant_trial(tmp_path / "s", planted.settings(seed=seed), status="failed", steps_done=steps)
    study = Study.load(tmp_path / "s")
    for trial_id, row in study.trials.iterrows():
        norm, loss = plots.trial(study, str(trial_id)).axes
        done, texts = row["steps_done"], [t.get_text() for ax in (norm, loss) for t in ax.texts]
        assert norm.get_xlim()[1] == pytest.approx(1.02 * (done - 1))
        assert loss.get_xlabel() == f"optimizer step (ended at step {done - 1} of 120 planned)"
        assert ("warmup ends" in texts) == (done > 10)  # nothing is named that lies outside
        style.draw(norm.figure)  # type: ignore[arg-type]


def test_traces_of_several_trials_have_common_scales(study: Study) -> None:
    rough = study.roughest(3)
    assert len(rough) == 3 and rough[0] == study.worst()
    assert len({study.row(t)["cell_id"] for t in rough}) == 3
    assert all(study.row(t)["verdict"] != "stable" for t in rough)
    figure = plots.traces(study, dict.fromkeys(rough, "x"))
    norms, losses = ([ax for i, ax in enumerate(figure.axes) if i // 2 % 2 == part] for part in (0, 1))
    assert [ax.get_visible() for ax in norms] == [ax.get_visible() for ax in losses] == [True, True, True, False]
    for row in (norms[:3], losses[:3]):
        assert len({ax.get_ylim() for ax in row}) == 1
    for trial_id, ax in zip(rough, norms, strict=False):
        drawn = max(float(np.nanmax(line.get_ydata())) for line in ax.get_lines() if len(line.get_xdata()) > 50)
        known = study.trace(trial_id)["grad_norm"]
        assert drawn == known[np.isfinite(known)].max()


def test_trace_shows_where_the_norm_was_not_finite(study: Study) -> None:
    trial_id = study.worst()
    assert trial_id is not None
    (cross,) = _lines(plots.trial(study, trial_id).axes[0], "nonfinite")
    assert list(cross.get_xdata()) == [70] and list(cross.get_ydata()) == [1.0]


def test_trace_needs_nothing_but_rows(study: Study) -> None:
    norm, loss = plots.trace(study.trace(str(study.typical()))).axes
    assert len(norm.get_lines()) == 1 and len(loss.get_lines()) == 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=30, max_size=300), st.integers(2, 10))
def test_downsampling_keeps_every_extreme(values: list[float], buckets: int) -> None:
    y = np.array(values)
    kept_x, kept_y = downsample(np.arange(len(y)), y, buckets)
    assert len(kept_x) <= max(2 * buckets, 0) and np.all(np.diff(kept_x) > 0)
    assert np.array_equal(y[kept_x], kept_y)
    for part in np.array_split(np.arange(len(y)), buckets):
        kept = kept_y[np.isin(kept_x, part)]
        assert kept.max() == y[part].max() and kept.min() == y[part].min()


def test_downsampling_passes_over_what_is_not_finite() -> None:
    y = np.full(100, np.nan)
    y[50] = 7.0
    assert [a.tolist() for a in downsample(np.arange(100), y, 4)] == [[50], [7.0]]


# Looks


@pytest.mark.parametrize("ends", [(0.98, 1.45), (1.1, 1.9), (0.21, 0.6), (3.1, 12.0), (0.7, 90.0), (1e-3, 4e4)])
def test_a_log_axis_has_several_numbers_that_keep_apart(ends: tuple[float, float]) -> None:
    ax = style.new_figure().axes[0]
    ax.set(yscale="log", ylim=ends)
    style.log_ticks(ax)
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_yticklabels() if t.get_text()]
    shown = sorted((b for b in boxes if ax.bbox.y0 <= (b.y0 + b.y1) / 2 <= ax.bbox.y1), key=lambda b: b.y0)
    assert 2 <= len(shown) <= 9 and all(a.y1 < b.y0 for a, b in zip(shown, shown[1:], strict=False))


def test_svg_is_the_same_every_time(study: Study) -> None:
    first, second = (style.to_svg(plots.lr_curves(study).figure) for _ in range(2))  # type: ignore[arg-type]
    assert first == second
    assert "<dc:date>" not in first and "Matplotlib" not in first


def test_svg_asks_for_nothing(study: Study) -> None:
    svg = style.to_svg(plots.stability_map(study).figure)  # type: ignore[arg-type]
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', svg)
    assert links and all(target.startswith("#") for pair in links for target in pair if target)
    assert "<script" not in svg


def test_every_known_colour_has_a_counterpart_on_black(study: Study) -> None:
    svg = style.to_svg(plots.lr_curves(study).figure)  # type: ignore[arg-type]
    used = {c for c in re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg.partition("</style>")[2]) if c in style.DARK}
    assert {style.INK, style.PAPER} <= used
    for colour in used:
        assert f'[style*="fill: {colour}"]{{fill:{style.DARK[colour]} !important}}' in svg
        assert f'[style*="stroke: {colour}"]{{stroke:{style.DARK[colour]} !important}}' in svg


def _contrast(one: str, other: str) -> float:
    high, low = sorted((style.luminance(colors.to_rgb(c)) for c in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_hold_on_white_and_on_black() -> None:
    for light, dark in style.DARK.items():
        if light in (style.PAPER, style.GRID):
            continue
        least = 4.5 if light in (style.INK, style.MUTED) else 3.0  # text, graphics
        assert _contrast(light, style.PAPER) >= least, light
        assert _contrast(dark, style.DARK[style.PAPER]) >= least, dark


EYES = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
"""Linear RGB as seen (Machado, Oliveira & Fernandes 2009, severity 1)."""


def _apart(one: str, other: str, eyes: str) -> float:
    """Distance of two colours in Oklab (Ottosson 2020), in hundredths of black to white."""

    def lab(colour: str) -> np.ndarray:
        rgb = np.array(colors.to_rgb(colour))
        seen = EYES[eyes] @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        cones = [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ] @ np.clip(seen, 0, 1)
        return [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ] @ np.cbrt(cones)

    return 100 * float(np.linalg.norm(lab(one) - lab(other)))


def test_the_measure_of_colours_knows_what_is_alike() -> None:
    assert _apart("#000000", "#ffffff", "normal") == pytest.approx(100, abs=0.1)
    assert _apart("#b27b00", "#d55e00", "deuteranopia") < 1 < 8 < _apart("#b27b00", "#d55e00", "normal")


@pytest.mark.parametrize("eyes", EYES)
def test_verdicts_differ_as_fields_and_on_the_page(eyes: str) -> None:
    """Each from each other, and `rough` from its neighbours most of all: they lie side by side on a map."""
    assert list(style.VERDICT_GROUNDS) == list(style.VERDICT_SIGNS) == list(VERDICTS)
    assert len(set(style.VERDICT_SIGNS.values())) == 4
    css = (html.TEMPLATES / "style.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in css.split("@media screen", 1))
    dark = light | dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", css.split("@media screen", 1)[1].split("}")[0]))
    sets = {
        "fields": style.VERDICT_GROUNDS,
        "page": {verdict: light[verdict] for verdict in VERDICTS},
        "dark page": {verdict: dark[verdict] for verdict in VERDICTS},
    }
    for name, of in sets.items():
        for one, other in itertools.combinations(VERDICTS, 2):
            least = 4 if name == "fields" else 6
            assert _apart(of[one], of[other], eyes) > least, (name, one, other)
        assert _apart(of["rough"], of["spiky"], eyes) > 8, name
    for page, paper in ((light, "#f6f8fa"), (dark, "#151b23")):
        assert all(_contrast(page[verdict], paper) >= 4.5 for verdict in VERDICTS)
    assert all(_contrast("#010101", ground) > 10 for ground in style.VERDICT_GROUNDS.values())


def test_text_reads_on_every_field_of_a_map() -> None:
    for share in np.linspace(0, 1, 101):
        ground = style.field_colour(share)
        assert _contrast(style.field_text_colour(ground), ground) >= 4.5


def test_a_field_of_a_map_keeps_its_colour_in_the_dark() -> None:
    shares = np.linspace(0, 1, 2001)
    meant = [matplotlib.colormaps["viridis"](0.12 + 0.83 * share)[:3] for share in shares]
    drawn = [style.field_colour(share) for share in shares]
    scale = {colors.to_hex(rgb) for rgb in matplotlib.colormaps["viridis"](range(256))}
    assert len(scale) > 200 and style.field_colour(math.nan) not in scale  # what is not known has no colour of a value
    assert {colors.to_hex(rgb) for rgb in meant} & set(style.DARK)  # the lines' colours are viridis', too
    fixed = {"#010101", "#fefefe", *style.VERDICT_GROUNDS.values()}
    assert not {*drawn, *fixed, *map(style.field_colour, (math.nan, -1.0, 2.0))} & set(style.DARK)
    assert np.abs(np.subtract([colors.to_rgb(c) for c in drawn], meant)).max() <= 1.5 / 255


def test_lines_differ_by_more_than_hue() -> None:
    looks = [(style.MARKERS[i % len(style.MARKERS)], str(style.DASHES[i % len(style.DASHES)])) for i in range(7)]
    assert len(set(looks)) == 7 and len(set(style.ordered_colours(7))) == 7
    assert style.colours(["a", "b"]) == list(style.CATEGORIES[:2])


def test_dollars_are_no_mathematics(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for name in (r"$\frac{a", "plain"):
        choices = {"data": name, "model": "tiny"}
        planted.plant_trial(tmp_path / "s", planted.settings(data={"seq_len": 32 + len(name)}), choices=choices)
    study = Study.load(tmp_path / "s")
    ax = plots.curves(study, x="data", by=None)
    assert ax.get_xticklabels()[0].get_text() == r"\$\frac{a"
    assert levels.levels_of(study.trials["data"])[0] == r"$\frac{a"
    style.to_svg(ax.figure)  # type: ignore[arg-type]


def test_drawing_leaves_no_global_state_behind(study: Study) -> None:
    code = (
        "import sys; from stabstudy.analysis import plots; from stabstudy.analysis.figures import style\n"
        "from stabstudy.analysis.study import Study\n"
        "assert 'matplotlib' not in sys.modules, 'importing the figures must not wait for matplotlib'\n"
        "import matplotlib; before = dict(matplotlib.rcParams)\n"
        f"style.to_svg(plots.lr_curves(Study.load({str(study.folder.path)!r})).figure)\n"
        "assert 'matplotlib.pyplot' not in sys.modules and dict(matplotlib.rcParams) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_figure_of_a_report_is_a_function_of_plots(study: Study) -> None:
    """What stands in the page can be drawn in a notebook from one module, on new axes or on those given."""
    by_axis = {"first_spikes": "optim.lr"}
    for name in (
        "accumulation", "clip_shares", "clipping", "curves", "effects", "first_spikes", "norm_ratios", "sensitivity",
         "stability_map", "verdict_map",
    ):  # fmt: skip
        given = style.new_figure().axes[0]
        arguments = [by_axis[name]] if name in by_axis else []
        draw = getattr(plots, name)
        assert draw(study, *arguments, ax=given) is given and isinstance(draw(study, *arguments), Axes), name
        for text in given.figure.findobj(Text):
            # what has none of the known colours stays as it is on black; those of fields stand on a colour of their own
            assert not text.get_text() or colors.to_hex(text.get_color()) in {*style.DARK, "#010101", "#fefefe"}, name


def _shown(axis: Any) -> list[Text]:
    """The labels of the ticks that are drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = [t for t in axis.get_major_ticks() if low - 1e-9 <= t.get_loc() <= high + 1e-9]
    labels = [label for t in ticks for label in (t.label1, t.label2)]
    return [label for label in labels if label.get_visible() and label.get_text()]


@pytest.mark.slow
@pytest.mark.parametrize("width", ["page", "paper"])
def test_no_text_leaves_a_figure_and_no_tick_hides_another(study: Study, width: str) -> None:
    """Of every function of `plots` that draws a study by itself, on new axes of its own choosing."""
    by_axis = {"first_spikes": "optim.lr"}
    with plots.paper() if width == "paper" else contextlib.nullcontext():
        for name in (
            "accumulation", "clip_shares", "clipping", "curves", "effects", "first_spikes", "norm_ratios",
            "sensitivity", "stability_map", "verdict_map",
        ):  # fmt: skip
            figure = getattr(plots, name)(study, *([by_axis[name]] if name in by_axis else [])).figure
            style.draw(figure)
            assert figure.get_size_inches()[0] in (3.3, pytest.approx(6.8, abs=0.01), style.HALF, style.FULL), name
            figure.set_dpi(288)
            figure.draw_without_rendering()
            axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
            texts = [t for ax in figure.axes for t in (ax.xaxis.label, ax.yaxis.label, *ax.texts)]
            for text in [t for t in texts if t.get_visible()] + [t for axis in axes for t in _shown(axis)]:
                if text.get_text() and text.get_gid() != "field":
                    box = text.get_window_extent()
                    assert box.x0 >= -3 and box.x1 <= figure.bbox.width + 3, (name, text.get_text())
                    assert width == "page" or text.get_fontsize() >= 7, (name, text.get_text())
            for axis in axes:
                boxes = [t.get_window_extent() for t in _shown(axis)]
                ends = sorted((b.x0, b.x1) if axis.axis_name == "x" else (b.y0, b.y1) for b in boxes)
                assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False)), (name, axis.axis_name)
