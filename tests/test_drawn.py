"""How many trials each figure draws: its caption and its table say it, and count apart those that diverged."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import planted
import pytest
from matplotlib import colors

from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import effect_plots, maps, single_axes, study_curves, style, traces
from stabstudy.analysis.figures.layout import Layout, layout_of
from stabstudy.analysis.figures.registry import OF_TRIALS, OVER_SETTINGS
from stabstudy.analysis.figures.verdict_maps import LIMIT_COLOURS
from stabstudy.analysis.report import comparison_page
from stabstudy.analysis.study import Study

MAIN = Layout("optim.lr", None, [], [])

ENDED = {0: 21, 1: 9, 2: 91}
"""Seed -> steps of the trials that diverged: before there are twenty settled ones, before any is judged, and late."""


def diverge(path: Path, depth: int, lr: float, seed: int, warmup: int = 10) -> None:
    config = planted.settings(depth, lr, seed=seed, warmup=warmup)
    steps = ENDED[seed]
    values = {"nonfinite_at": steps - 1, "final_loss": math.nan, "stop_reason": "diverged"}
    planted.plant_trial(path, config, steps_done=steps, **values)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """2 depths x 3 rates x 3 seeds, all done; at depth 6 and rate 0.5 all three diverged, at depth 2 one failed."""
    path = planted.plant_study(tmp_path_factory.mktemp("drawn") / "planted", seeds=(0, 1, 2))
    for seed in ENDED:
        diverge(path, 6, 0.5, seed)
    planted.plant_trial(path, planted.settings(2, 0.5), status="failed", steps_done=30)
    return Study.load(path)


@pytest.fixture(scope="module")
def blocks(study: Study) -> dict[str, Figure]:
    layout = layout_of(study)
    assert layout is not None
    drawn = [block for family in OVER_SETTINGS for block in family(study, layout)]
    drawn += [block for family in OF_TRIALS for block in family(study)]
    return {b.name: b for b in drawn if isinstance(b, Figure)}


def trials_drawn(figure: Figure, which: str) -> list[str]:
    """The ids of the trials that are marks of the picture: `trained`, `cross` (diverged, at a value) or `triangle`."""
    kinds = {"diverged, no value": "triangle"}
    return [
        t
        for s in json.loads(figure.drawing.marks)
        for t, value in zip(s.get("trials", []), s["b"], strict="trials" in s)
        if which == kinds.get(value, "cross" if ", diverged" in value else "trained")
    ]


def column(figure: Figure, name: str) -> list[str]:
    at = figure.table.columns.index(name)
    return [row[at] for row in figure.table.rows]


def test_the_planted_trials_lack_what_they_should(study: Study) -> None:
    gone = study.trials[study.trials["verdict"] == "diverged"].sort_values("seed")
    assert len(gone) == 3 and (study.trials["state"] == "done").sum() == 21
    assert gone["grad_norm_log_sd"].isna().tolist() == [True, True, False]
    assert gone["spike_abs_rate"].isna().tolist() == [False, True, False]
    assert gone["grad_norm_median"].isna().tolist() == [True, True, False]  # none of 21 steps is settled
    assert set(gone["final_loss_capped"]) == {planted.INIT_LOSS}


@pytest.mark.parametrize(
    ("name", "crosses", "triangles"), [("final-loss", 3, 0), ("grad-norm-log-sd", 1, 2), ("attn-logit-peak", 3, 0)]
)
def test_curves(blocks: dict[str, Figure], name: str, crosses: int, triangles: int) -> None:
    """A diverged trial lies at its value where it has one; the caption counts what is drawn."""
    figure = blocks[name]
    drawn = [len(trials_drawn(figure, which)) for which in ("trained", "cross", "triangle")]
    assert drawn == [18, crosses, triangles]
    assert f"Small marks: 18 done trials; crosses: {crosses} diverged" in figure.caption
    on_edge = f"open triangles on the upper edge: {triangles} diverged without a value, in no mean"
    assert (on_edge in figure.caption) == (triangles > 0)
    assert "left out: 1 trial without a value." in figure.caption
    in_means = sum(map(int, column(figure, "n in the mean")))
    assert in_means == (21 if name == "final-loss" else 18) and sum(map(int, column(figure, "diverged"))) == 3
    said = "all of them outside the frame, with the loss of the untrained model, as in the means"
    assert f"{crosses} diverged, {said if in_means == 21 else 'in no mean'}" in figure.caption


@pytest.mark.parametrize(
    ("name", "n", "lacking"),
    [
        ("spike-abs-rate-map", 20, "; 1 diverged without it."),
        ("grad-norm-max-over-median-map", 19, "; 2 diverged without it."),
        ("diverged-map", 21, "."),
    ],
)
def test_maps(blocks: dict[str, Figure], name: str, n: int, lacking: str) -> None:
    figure = blocks[name]
    assert f"{n} in all{lacking}" in figure.caption
    assert sum(map(int, column(figure, "n"))) == n and sum(map(int, column(figure, "without it"))) == 21 - n
    *_, fields = json.loads(figure.drawing.marks)
    values = [v.split(", ") for v in fields["b"] if "diverged" in v]
    written = "n=3" if n == 21 else f"n={n - 18} of 3"
    assert [(v[1], v[-1]) for v in values] == [(written, "3 diverged")]
    assert sum(int(re.match(r"n=(\d+)", v.split(", ")[1])[1]) for v in fields["b"]) == n  # type: ignore[index]


def test_verdicts(blocks: dict[str, Figure]) -> None:
    figure = blocks["stability-map"]
    assert sum(map(int, column(figure, "n"))) == 21 and sum(map(int, column(figure, "diverged"))) == 3


def test_maps_of_other_pairs(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", seeds=(0,), clips=(1.0, None))
    diverge(path, 6, 0.5, 1)
    study = Study.load(path)
    layout = layout_of(study)
    assert layout is not None
    (figure,) = (b for b in maps.figures(study, layout) if getattr(b, "name", "") == "spike-abs-rate-pairs")
    assert "every other axis pooled; 1 diverged without it." in figure.caption  # type: ignore[union-attr]
    for pair in (("learning rate", "clip threshold"), ("depth (layers)", "clip threshold")):
        own = [row for row in figure.table.rows if (row[0], row[2]) == pair]  # type: ignore[union-attr]
        assert (sum(int(r[5]) for r in own), sum(int(r[6]) for r in own)) == (12, 1)


def test_first_spikes(blocks: dict[str, Figure], study: Study) -> None:
    caption = blocks["first-spikes"].caption
    assert "21 trials, 3 of which diverged before a spike." in caption
    # the failed trial alone makes 0.5 a rate of depth 6: its curve is of deep models only
    assert "Not every learning rate was tried equally often with all else equal" in caption
    assert sum(study.time_to_first_spike("optim.lr").levels["trials"]) == 21
    at_risk = {r[0]: int(r[2]) for r in reversed(blocks["first-spikes"].table.rows)}
    assert sum(at_risk.values()) == 21  # at the first end of each level nobody is gone


def test_the_forest_names_what_is_left_out(blocks: dict[str, Figure], study: Study) -> None:
    figure = blocks["effects"]
    tested = int(study.effects()["p_holm"].notna().sum())
    assert f"Holm's correction for {tested} tests" in figure.caption and len(figure.table.rows) == tested > 0
    lacking = figure.caption.split("Left out: ")[1]
    assert "2 diverged without roughness" in lacking and "final validation loss" not in lacking


def test_clipping(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", seeds=(0, 1, 2), clips=(0.5, 1.0))
    for seed in ENDED:
        diverge(path, 6, 0.5, seed)
    study = Study.load(path)
    (figure,) = effect_plots.clipping_figures(study, MAIN)
    assert isinstance(figure, Figure)
    assert figure.caption.startswith(
        "37 done trials that clip by the norm, 2 more (2 diverged) without a settled step."
    )
    assert "a line for each of 6 cells joins its means" in figure.caption
    assert sum(map(int, column(figure, "trials"))) == 37
    assert len(trials_drawn(figure, "trained")) == 2 * 37  # two panels


def test_one_threshold_is_no_figure(study: Study) -> None:
    assert list(effect_plots.clipping_figures(study, MAIN)) == [
        Absent("Clip threshold against the norms", "one threshold: 1")
    ]


def test_traces_that_are_read(blocks: dict[str, Figure]) -> None:
    said = re.search(r"From (\d+) traces \((\d+) diverged\)", blocks["norm-ratios"].caption)
    assert said is not None
    # four of the six trials at each of three rates; at 0.5 the one that ended after its first nine steps has no ratio
    assert (int(said[1]), int(said[2])) == (3 * 4 + 2, 2)
    assert "Without such a step: 1 trace (1 diverged) more." in blocks["norm-ratios"].caption


def test_the_cells_whose_roughest_trial_is_drawn(study: Study) -> None:
    (figure,) = traces.figures(study)
    # rate 0.1 at both depths, depth 6 at 0.01 and at 0.5; a typical one beside them
    assert "one trial of each cell that is not stable, 3 of 4 such cells." in figure.caption
    assert len(figure.table.rows) == 3 + 1


def test_sensitivity_counts_the_untrained(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", seeds=(0, 1, 2), lrs=(1e-3, 1e-2, 1e-1))
    for depth in (2, 6):
        for seed in ENDED:
            diverge(path, depth, 0.5, seed)
    blocks = {b.name: b for b in study_curves.sensitivity_figures(Study.load(path), MAIN) if isinstance(b, Figure)}
    caption = blocks["lr-sensitivity"].caption
    assert "of 2 of 2 recipes" in caption
    assert "Diverged trials (6 in the grid) count with the loss of the untrained model." in caption


def test_single_axes(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for lr in (1e-2, 0.5):
        for warmup in (5, 20):
            for seed in ENDED:
                if lr == 0.5 and warmup == 5:
                    diverge(tmp_path / "s", 2, lr, seed, warmup)
                else:
                    planted.plant_trial(tmp_path / "s", planted.settings(2, lr, seed=seed, warmup=warmup))
    figure = next(iter(single_axes.axis_figures(Study.load(tmp_path / "s"), MAIN)))
    assert isinstance(figure, Figure)
    assert "Small marks: 9 done trials; crosses: diverged (3 of final validation loss, 1 of max / median and 2 of " in (
        figure.caption
    )
    assert "in the means of the loss alone, as untrained; open triangles on the upper edge: diverged (0 of " in (
        figure.caption
    )
    drawn = [len(trials_drawn(figure, which)) for which in ("trained", "cross", "triangle")]
    assert drawn == [3 * 9, 3 + 1 + 2, 0 + 2 + 1]  # three panels
    n = {row[0].partition(" (")[0]: [] for row in figure.table.rows}
    for row in figure.table.rows:
        n[row[0].partition(" (")[0]].append(row[-2:])
    assert n["final validation loss"] == [("3", "0"), ("3", "0"), ("3", "3"), ("3", "0")]
    assert n["max / median"] == [("3", "0"), ("3", "0"), ("0", "3"), ("3", "0")]


def test_studies_beside_each_other(tmp_path: Path, study: Study) -> None:
    """Only cells that both studies have are drawn: the rate of 0.5 is tried at depth 6 alone in each, 1e-4 in one."""
    path = planted.plant_study(tmp_path / "other", seeds=(0, 1, 2))
    diverge(path, 6, 0.5, 2)
    planted.plant_trial(path, planted.settings(2, 1e-4))
    report = comparison_page.report([study, Study.load(path)])
    figures = {b.name: b for s in report.sections for b in s.blocks if isinstance(b, Figure)}
    for name, in_means in (("studies-final-loss", 40), ("studies-grad-norm-log-sd", 36)):
        figure = figures[name]
        assert "Over the 7 cells that both studies hold. Small marks: 36 done trials; crosses: " in figure.caption
        assert figure.caption.endswith(" Left out: 1 done trial of cells that not all of them have.")
        assert sum(map(int, column(figure, "n in the mean"))) == in_means
        assert sum(map(int, column(figure, "diverged"))) == 4
        crosses = 4 if name == "studies-final-loss" else 2
        drawn = [len(trials_drawn(figure, which)) for which in ("trained", "cross", "triangle")]
        assert drawn == [36, crosses, 4 - crosses]
        assert set(column(figure, "learning rate")) == {"1e-3", "0.01", "0.1", "0.5"}


# every figure


def unreadable(svg: str) -> list[str]:
    """The texts of a drawing that do not read on white or on black: each needs a colour of its own."""
    fills = re.findall(r"<text style=\"([^\"]*)\"[^>]*>([^<]*)", svg)
    dark = dict(re.findall(r'\[style\*="fill: (#[0-9a-f]{6})"\]\{fill:(#[0-9a-f]{6}) !important', svg))
    bad = []
    for look, text in fills:
        colour = re.search(r"fill: (#[0-9a-f]{6})", look)
        if colour is None:
            bad.append(text)
        elif colour[1] not in ("#010101", "#fefefe"):  # those of fields, whose ground stays as it is
            on_black = dark.get(colour[1], colour[1])
            if contrast(colour[1], "#ffffff") < 3 or contrast(on_black, "#0d1117") < 3:
                bad.append(text)
    return bad


def contrast(one: str, other: str) -> float:
    high, low = sorted((style.luminance(colors.to_rgb(c)) for c in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_text_reads_on_white_and_on_black(blocks: dict[str, Figure]) -> None:
    assert {"final-loss", "stability-map", "effects", "first-spikes", "traces", "layers"} <= set(blocks)
    for name, figure in blocks.items():
        assert figure.drawing.svg.count("<text") > 5 and not unreadable(figure.drawing.svg), name


def test_a_text_without_a_colour_is_seen() -> None:
    figure = style.new_figure()
    figure.axes[0].annotate("nobody gave it a colour", (0.5, 0.5), color="black")
    figure.axes[0].annotate("too pale", (0.5, 0.2), color="#f7e7b6")
    assert unreadable(style.to_svg(figure)) == ["nobody gave it a colour", "too pale"]


def test_every_line_has_a_colour_on_black(blocks: dict[str, Figure]) -> None:
    """What no rule of the dark style exchanges is drawn on a field of a map, or is a colour of both."""
    for name, figure in blocks.items():
        strokes = set(re.findall(r"stroke: (#[0-9a-f]{6})", figure.drawing.svg.partition("</style>")[2]))
        fixed = strokes - set(style.DARK) - {"#010101", "#fefefe", *LIMIT_COLOURS}
        own = {c for c in fixed if contrast(c, "#0d1117") < 1.5}  # shades of a colour bar, edges of fields
        assert not own or name.endswith("-map") or name == "spike-abs-rate-pairs", (name, own)


def test_every_number_of_a_mark_has_a_name(blocks: dict[str, Figure]) -> None:
    for name, figure in blocks.items():
        series = json.loads(figure.drawing.marks)
        assert series, name
        for one in series:
            assert one["x"], (name, one["name"])
            alone = (
                not one["y"] and one["b"][0] != "its runs"
            )  # entries of a legend follow its title; what follows names itself: `depth (layers) 6, 2 stable`
            assert not alone or all(re.search("[a-z]", text) for text in (*one["a"], *one["b"])), (name, one)
            assert not re.fullmatch(r"[-0-9.e, ]*", one["name"]) or one["name"] == "", (name, one["name"])
            for key in ("trials", "filter", "b"):
                assert len(one.get(key, one["a"])) == len(one["a"]) == len(one["at"]) / 2, (name, key)


def test_a_filter_finds_the_trials_that_a_mark_is(blocks: dict[str, Figure], study: Study) -> None:
    """By hand: the settings in the filter of a mark are those of its trial."""
    named = {"depth": "model.depth", "lr": "optim.lr", "clip": "optim.clip"}
    checked = 0
    for figure in blocks.values():
        for series in (s for s in json.loads(figure.drawing.marks) if "trials" in s and "filter" in s):
            for trial, condition in zip(series["trials"], series["filter"], strict=True):
                row = study.row(trial)
                for term in condition.split():
                    name, _, level = term.partition("=")
                    assert float(level) == row[named[name]], (figure.name, term)
                    checked += 1
    assert checked > 3 * 21


def test_figures_have_one_of_two_widths(blocks: dict[str, Figure]) -> None:
    for name, figure in blocks.items():
        width = float(re.search(r'width="([\d.]+)pt"', figure.drawing.svg)[1]) / 72  # type: ignore[index]
        assert width == pytest.approx(style.HALF) or width == pytest.approx(style.FULL), name


def test_two_maps_of_one_statistic_have_one_scale(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", seeds=(0,), clips=(1.0, None))
    study = Study.load(path)
    layout = layout_of(study)
    assert layout is not None
    drawn = {b.name: b for b in maps.figures(study, layout) if isinstance(b, Figure)}
    first, second = (
        re.search(r"Colours run from \S+(?: %)? \(dark\) to (.*?) \(light\)", drawn[name].caption)[1]  # type: ignore[index]
        for name in ("spike-abs-rate-map", "spike-abs-rate-pairs")
    )
    assert first == second
