"""Figures of what the axes did: what is drawn is what the tables say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import planted
import pytest

from stabstudy.analysis import words
from stabstudy.analysis.effects import CLEAR, REPORTED
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import effect_plots, registry, single_axes, study_curves, style
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.levels import records
from stabstudy.analysis.study import Study

BURSTS = [(60, 8.0), (75, 8.0), (90, 8.0), (105, 8.0)]
MAIN = Layout("optim.lr", None, [], [])
X3 = "share of steps at 3x the recent norm"


def figures(study: Study) -> Iterator[Figure | Absent]:
    """The report's figures of effects, in its order."""
    modules = {m.__name__ for m in (effect_plots, study_curves)}
    for family in registry.OVER_SETTINGS:
        if family.__module__ in modules:
            yield from family(study, MAIN)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """2 depths x 3 rates x 3 seeds whose losses and logits scatter; the rate changes both, the depth neither."""
    path, rng = tmp_path_factory.mktemp("effects") / "noisy", np.random.default_rng(0)
    planted.plant_frame(path)
    for depth, lr, seed in itertools.product((2, 6), (1e-3, 1e-2, 1e-1), range(3)):
        loss, log = 2.5 + 0.2 * math.log10(lr / 1e-3), 1.5 * math.log10(lr / 1e-3)
        planted.plant_trial(
            path, planted.settings(depth, lr, seed=seed), spikes=dict(BURSTS[: 2 + seed]) if lr == 0.1 else None,
            final_loss=loss + rng.normal(0, 0.02), logit=4 / depth * math.exp(log + rng.normal(0, 0.2)),
        )  # fmt: skip
    return Study.load(path)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = tmp_path_factory.mktemp("effects") / "planted"
    return Study.load(planted.plant_study(path, seeds=(0, 1, 2), clips=(0.5, 1.0, None)))


@pytest.mark.parametrize("metric", REPORTED)
def test_the_forest_draws_each_effect_and_its_interval(noisy: Study, metric: str) -> None:
    ax = effect_plots.effects(noisy, metric)
    rows = [r for r in records(noisy.effects()) if r["metric"] == metric]
    marks = [line for line in ax.get_lines() if line.get_gid() == "effect"]
    assert len(rows) == 2 and [line.get_xdata()[0] for line in marks] == [r["estimate"] for r in rows]
    bars = [line for line in ax.get_lines() if line.get_gid() is None and len(set(line.get_ydata())) == 1]
    assert [tuple(b.get_xdata()) for b in bars] == [(r["low"], r["high"]) for r in rows]
    filled = [line.get_markerfacecolor() == line.get_markeredgecolor() for line in marks]
    assert filled == [r["p_holm"] < CLEAR for r in rows] == [False, True]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["depth 2 to 6", "learning rate 1e-3 to 0.1"]
    assert ax.get_xscale() == ("linear" if metric == "final_loss" else "log")
    (nothing,) = [set(line.get_xdata()) for line in ax.get_lines() if line.get_gid() is None and line not in bars]
    assert nothing == ({0.0} if metric == "final_loss" else {1.0})


def test_two_seeds_have_their_intervals(noisy: Study) -> None:
    """The error is that of all trials: two seeds leave nine degrees of freedom here."""
    two = noisy.part(set(noisy.trials.index[noisy.trials["seed"] < 2]), noisy.axes)
    rows = [r for r in records(two.effects()) if r["metric"] == "final_loss"]
    bars = [line for line in effect_plots.effects(two).get_lines() if len(set(line.get_ydata())) == 1]
    assert [tuple(b.get_xdata()) for b in bars if b.get_gid() is None] == [(r["low"], r["high"]) for r in rows]


def test_what_is_not_tested_has_its_reason_in_place_of_marks(study: Study, tmp_path: Path) -> None:
    one = Study.load(planted.plant_study(tmp_path / "one", seeds=(0,)))
    for case, metric, reason in ((study, "attn_logit_peak", "nothing scatters"), (one, "grad_norm_log_sd", "one seed")):
        ax = effect_plots.effects(case, metric)
        assert not ax.get_lines() and not ax.axison
        (text,) = (t.get_text().replace("\n", " ") for t in ax.texts)
        assert text.startswith(f"{words.STATISTICS[metric]}: not tested (") and reason in text
        ax.figure.canvas.draw()
    absent = next(iter(figures(one)))
    assert isinstance(absent, Absent) and absent.why.startswith("not tested: one seed")


def test_an_interval_without_end_leaves_a_ratio_readable() -> None:
    row = {"scale": "ratio", "estimate": 2.0, "low": 0.0, "high": math.inf}
    assert effect_plots._interval(row) == [2e-6, 2e6]
    assert effect_plots._interval(row | {"low": 0.5, "high": 8.0}) == [0.5, 8.0]
    assert effect_plots._interval({"scale": "difference", "estimate": 0.1, "low": -1.0, "high": 1.2}) == [-1.0, 1.2]


def test_clipping_draws_every_trial_that_clips_by_the_norm(study: Study) -> None:
    ax = effect_plots.clipping(study)
    dots = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
    drawn = sorted((x, y) for line in dots for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))
    kept = study.trials[study.trials["optim.clip"].notna()]
    assert drawn == sorted(zip(kept["optim.clip"], kept["grad_norm_median"], strict=True))


def test_a_vanished_gradient_has_no_place_on_a_logarithmic_axis(study: Study) -> None:
    """Without a warning (an error here), and with the range of the others."""
    trials = study.trials.copy()
    first = effect_plots.clipped_trials(study).index[0]
    trials.loc[first, "grad_norm_median"] = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "trials", property(lambda self: trials))
        low, high = effect_plots.clipping(study).get_ylim()
    assert 0 < low < trials["grad_norm_median"].max() < high


def test_the_shares_clipped_are_joined_within_a_cell(study: Study) -> None:
    """A contrast for each cell, as pandas has it; no mean pools what differs in more than the threshold."""
    lines = effect_plots.clip_shares(study).get_lines()
    joined = [line for line in lines if line.get_linestyle() != "None"]
    kept = study.trials[study.trials["optim.clip"].notna()]
    cells = kept.groupby(["model.depth", "optim.lr"])
    expected = [cell.groupby("optim.clip")["clip_share"].mean() for _, cell in cells]
    assert len(joined) == len(expected) > 1
    for line, means in zip(joined, expected, strict=True):
        assert list(line.get_xdata()) == list(means.index) and list(line.get_ydata()) == pytest.approx(list(means))
    dots = [line for line in lines if line.get_linestyle() == "None"]
    drawn = sorted((x, y) for line in dots for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert drawn == sorted(zip(kept["optim.clip"], kept["clip_share"], strict=True))


def test_a_threshold_tried_in_another_cell_alone_is_in_no_contrast(tmp_path: Path) -> None:
    """A case clips at 0.2 at the middle rate: pooled, its 100 % would look like an effect of that rate."""
    planted.plant_frame(tmp_path / "s")
    for lr in (1e-3, 1e-2, 1e-1):
        for clip in (1.0, 10.0):
            planted.plant_trial(tmp_path / "s", planted.settings(2, lr, clip))
    case = planted.settings(2, 1e-2, 0.01)
    planted.plant_trial(tmp_path / "s", case, case="tight_clip")
    study = Study.load(tmp_path / "s")
    contrasts = effect_plots.clip_contrasts(study)
    assert len(contrasts) == 3 and {tuple(means) for means in contrasts.values()} == {(1.0, 10.0)}
    assert 0.01 in set(effect_plots.clipped_trials(study)["optim.clip"])  # it is drawn, as a trial


def test_only_figures_with_data_appear(tmp_path: Path, study: Study) -> None:
    drawn = ["effects", "clipping", "lr-sensitivity", "first-spikes"]
    assert [b.name for b in figures(study)] == drawn
    off = Study.load(planted.plant_study(tmp_path / "off", depths=(2,), clips=(None,)))
    names = [getattr(b, "name", "") or (b.what, b.why) for b in figures(off)]
    assert names == [
        "effects",
        ("Clip threshold against the norms", "no done trial clips by the norm"),
        ("LR sensitivity", "it takes several learning rates and another axis"),
        "first-spikes",
    ]


def test_warmup_and_batch_get_figures_of_their_own(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for lr in (0.01, 0.1):
        for warmup in (5, 20):
            for batch in (8, 16):
                config = planted.settings(2, lr, warmup=warmup, batch_size=batch)
                planted.plant_trial(tmp_path / "s", config, final_loss=2.0 + lr + warmup / 100 + batch / 1000)
    blocks = list(single_axes.axis_figures(Study.load(tmp_path / "s"), MAIN))
    assert [getattr(b, "name", "") for b in blocks[:2]] == ["against-optim-warmup-steps", "against-train-batch-size"]
    assert blocks[2:] == [Absent("Effect of weight decay and dataset", "they do not vary")]
    losses = [row[1:4] for row in blocks[0].table.rows if row[0].startswith("final")]
    assert losses == [("0.01", "5", "2.07"), ("0.01", "20", "2.22"), ("0.1", "5", "2.16"), ("0.1", "20", "2.31")]
    assert {row[0] for row in blocks[0].table.rows} == {"final validation loss (nat/token)", "max / median", X3}


def test_the_loss_on_each_dataset_has_a_panel(tmp_path: Path) -> None:
    """A mean over two evaluation batches says nothing; the effect of another axis is seen on each."""
    planted.plant_frame(tmp_path / "s")
    for name, loss in (("pysrc", 2.0), ("synthetic", 5.0)):
        for lr in (1e-3, 1e-2):
            for warmup in (5, 20):
                config = planted.settings(lr=lr, warmup=warmup, data={"source": name})
                planted.plant_trial(
                    tmp_path / "s", config, choices={"data": name}, eval_hash=name, fingerprint=name * 2,
                    final_loss=loss + warmup / 100,
                )  # fmt: skip
    study = Study.load(tmp_path / "s")
    figure = next(single_axes.axis_figures(study, MAIN))
    losses = {(row[0], *row[1:4]) for row in figure.table.rows if "loss" in row[0]}
    name = "final validation loss (nat/token), dataset"
    assert losses == {
        (f"{name} {data}", lr, warmup, words.number(loss + int(warmup) / 100))
        for data, loss in (("pysrc", 2.0), ("synthetic", 5.0)) for lr in ("1e-3", "0.01") for warmup in ("5", "20")
    }  # fmt: skip
    assert "losses never over datasets" in figure.caption and "left out" not in figure.caption
    planted.plant_trial(  # a batch that differs for no reason that the settings name: no mean, no panel
        tmp_path / "s", planted.settings(lr=1e-3, warmup=5, seed=1, data={"source": "pysrc"}),
        choices={"data": "pysrc"}, eval_hash="other", fingerprint="pysrc" * 2,
    )  # fmt: skip
    figure = next(single_axes.axis_figures(Study.load(tmp_path / "s"), MAIN))
    assert not any("loss" in row[0] for row in figure.table.rows) and "evaluated on different sets" in figure.caption


def test_a_crowded_legend_lies_beside_the_lines(study: Study, tmp_path: Path) -> None:
    few = study_curves.sensitivity(study)
    assert few.get_legend().get_window_extent().x0 < few.get_window_extent().x1
    crowd = Study.load(planted.plant_study(tmp_path / "s", clips=(0.1, 1.0, 10.0, None), seeds=(0,)))
    many = study_curves.sensitivity(crowd)
    many.figure.canvas.draw()
    assert many.get_legend().get_window_extent().x0 > many.get_window_extent().x1


def test_numbers_below_a_forest_keep_apart(noisy: Study) -> None:
    for metric in REPORTED:
        ax = effect_plots.effects(noisy, metric)
        ax.figure.canvas.draw()
        boxes = [t.get_window_extent() for t in ax.get_xticklabels() if t.get_text()]
        inside = sorted((b for b in boxes if b.x1 > ax.bbox.x0 and b.x0 < ax.bbox.x1), key=lambda b: b.x0)
        assert len(inside) > 1 and all(a.x1 < b.x0 for a, b in zip(inside, inside[1:], strict=False)), metric
    wide = effect_plots.effects(noisy, "attn_logit_peak")
    wide.set_xlim(1e-2, 1e8)
    style.log_ticks(wide, across=True)
    wide.figure.canvas.draw()
    assert "1e6" in [t.get_text() for t in wide.get_xticklabels()]
    assert not wide.xaxis.get_offset_text().get_text()  # a factor in the corner would lie on the axis' name


def test_datasets_are_compared_without_their_losses(tmp_path: Path) -> None:
    """Each has an evaluation batch of its own, so their losses say nothing about each other."""
    planted.plant_frame(tmp_path / "s")
    for name in ("pysrc", "synthetic"):
        for lr in (1e-3, 1e-2):
            config = planted.settings(lr=lr, data={"source": name})
            planted.plant_trial(tmp_path / "s", config, choices={"data": name}, eval_hash=name, fingerprint=name * 2)
    figure, _ = single_axes.axis_figures(Study.load(tmp_path / "s"), MAIN)
    assert figure.name == "against-data" and "evaluated on different sets" in figure.caption
    assert {row[0] for row in figure.table.rows} == {"max / median", X3}
