"""Statistics of a whole study against values by hand and other implementations: sensitivity, rates, times, axes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
import tabled
from scipy import stats
from statsmodels.duration.survfunc import SurvfuncRight, survdiff
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from tabled import trial
from test_sensitivity import GRID, OFF, ON

from stabstudy import config as cfg
from stabstudy.analysis import compare, effects, matched_cells, sensitivity, study_statistics, survival
from stabstudy.analysis.levels import records
from stabstudy.analysis.report import findings
from stabstudy.analysis.study import Study


def qk_norm(seeds: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    """The measured curves of four layers, at two seeds that differ by 0.02 everywhere."""
    return pd.DataFrame(
        trial(lr, 4, seed, model={"qk_norm": on}, final_loss_capped=loss + 0.02 * seed, attn_logit_peak=1e3 * lr**power)
        for on, losses, power in ((False, OFF, 2.4), (True, ON, 0.5))
        for lr, loss in zip(GRID, losses, strict=True)
        for seed in seeds
    )


QK = ["model.qk_norm", "optim.lr"]


# LR sensitivity


def test_a_row_for_each_recipe_gives_the_check_values() -> None:
    off, on = records(sensitivity.by_recipe(qk_norm(), QK, ["model.qk_norm"]))
    assert (off["model.qk_norm"], on["model.qk_norm"]) == (False, True)
    assert (off["lrs"], on["lrs"]) == pytest.approx((0.365, 0.271), abs=5e-4)
    assert (off["max_stable_lr"], on["max_stable_lr"]) == (1e-2, 3e-2)
    assert (off["attn_logit_lr_exponent"], on["attn_logit_lr_exponent"]) == pytest.approx((2.4, 0.5))
    assert (off["seeds"], off["grid"], off["reason"]) == (2, tuple(GRID), None)
    assert off["lrs_se"] == pytest.approx(0.0, abs=1e-12)  # the seeds' curves are parallel


def test_sensitivity_has_an_interval_of_student() -> None:
    table = qk_norm((0, 1, 2))
    table["final_loss_capped"] += 0.05 * table["seed"] * np.log10(table["optim.lr"])
    off, on = records(sensitivity.by_recipe(table, QK, ["model.qk_norm"]))
    for row in (off, on):
        assert row["lrs_high"] - row["lrs"] == pytest.approx(4.302653 * row["lrs_se"], rel=1e-6)
        assert row["lrs_low"] == pytest.approx(max(0.0, 2 * row["lrs"] - row["lrs_high"]))
    one = records(sensitivity.by_recipe(qk_norm((0,)), QK, ["model.qk_norm"]))[0]
    assert (one["lrs_low"], one["lrs_high"]) == (None, None)


def test_the_difference_of_two_recipes_is_paired_by_seed() -> None:
    """What both share with a seed cancels; against it two intervals of their own say nothing."""
    table = qk_norm((0, 1, 2))
    table.loc[table["optim.lr"] == 0.1, "final_loss_capped"] += 0.3 * table["seed"]
    table.loc[(table["seed"] == 2) & table["model.qk_norm"] & (table["optim.lr"] == 0.3), "final_loss_capped"] += 0.01
    (row,) = records(sensitivity.differences(table, QK, "model.qk_norm", []))
    off, on = records(sensitivity.by_recipe(table, QK, ["model.qk_norm"]))
    assert (row["a"], row["b"], row["seeds"], row["reason"]) == (False, True, 3, None)
    assert row["difference"] == pytest.approx(on["lrs"] - off["lrs"])
    own = []  # by hand: the difference without each seed
    for seed in range(3):
        a, b = records(sensitivity.by_recipe(table[table["seed"] != seed], QK, ["model.qk_norm"]))
        own.append(b["lrs"] - a["lrs"])
    half = 4.302653 * math.sqrt(2 / 3 * sum((d - np.mean(own)) ** 2 for d in own))
    assert (row["low"], row["high"]) == pytest.approx((row["difference"] - half, row["difference"] + half), rel=1e-6)
    assert row["high"] - row["low"] < 0.3 * (on["lrs_high"] - on["lrs_low"])


def test_a_difference_needs_both_curves_whole() -> None:
    table = qk_norm()
    hole = table[~((table["optim.lr"] == 0.3) & table["model.qk_norm"] & (table["seed"] == 1))]
    (row,) = records(sensitivity.differences(hole, QK, "model.qk_norm", []))
    assert (row["difference"], row["seeds"]) == (None, 2)
    assert row["reason"] == "the grid has a hole at learning rate 0.3, qk-norm true, seed 1 (no trial)"
    apart = table[table["seed"] == table["model.qk_norm"]]
    assert records(sensitivity.differences(apart, QK, "model.qk_norm", []))[0]["reason"] == "no seed is at both levels"
    table["optim.kind"] = np.where(table["model.qk_norm"], "adamw", "stable_adamw")
    (kind,) = records(sensitivity.differences(table, ["optim.kind", "optim.lr"], "optim.kind", []))
    assert kind["reason"] == "optim.kind changes what a learning rate means"


def test_other_axes_are_averaged_before_the_minimum() -> None:
    (both,) = records(sensitivity.by_recipe(qk_norm(), QK, []))
    mean = (np.array(OFF) + np.array(ON)) / 2
    assert both["lrs"] == pytest.approx(np.mean(mean - mean.min()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "oom", "final_loss_capped": None}, "the grid has a hole at learning rate 0.03, seed 1 (oom)"),
        ({"final_loss_capped": None}, "the grid has a hole at learning rate 0.03, seed 1 (no final loss)"),
        ({"optim.lr": 0.031}, "the grid has a hole at learning rate 0.03, seed 1 (no trial)"),
        ({"eval_hash": "other"}, "its losses are on different evaluation batches"),
    ],
)
def test_a_grid_with_a_hole_is_refused_and_the_others_are_not(change: dict[str, Any], reason: str) -> None:
    table = qk_norm()
    hole = (table["optim.lr"] == 0.03) & (table["seed"] == 1) & ~table["model.qk_norm"]
    for name, value in change.items():
        table.loc[hole, name] = math.nan if value is None else value
    table = table[table["optim.lr"] != 0.031]
    off, on = records(sensitivity.by_recipe(table, QK, ["model.qk_norm"]))
    assert (off["reason"], off["lrs"], off["max_stable_lr"]) == (reason, None, None)
    assert on["reason"] is None and on["lrs"] == pytest.approx(0.271, abs=5e-4)


def test_what_changes_the_meaning_of_a_rate_is_never_averaged_over() -> None:
    table = qk_norm()
    table["optim.kind"] = np.where(table["model.qk_norm"], "adamw", "stable_adamw")
    (row,) = records(sensitivity.by_recipe(table, ["optim.kind", "optim.lr"], []))
    assert (row["lrs"], row["reason"]) == (None, "optim.kind changes what a learning rate means")


def test_a_diverged_trial_enters_with_the_untrained_loss(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for lr, loss in ((1e-3, 2.5), (1e-2, 2.0)):
        planted.plant_trial(tmp_path / "s", planted.settings(lr=lr), final_loss=loss)
    nan = {"nonfinite_at": 80, "final_loss": math.nan, "stop_reason": "diverged"}
    planted.plant_trial(tmp_path / "s", planted.settings(lr=1e-1), **nan)
    planted.plant_trial(tmp_path / "s", planted.settings(lr=1.0), case="wild", final_loss=0.1)
    study = Study.load(tmp_path / "s")
    (row,) = records(study.sensitivity())
    assert row["lrs"] == pytest.approx((0.5 + 0.0 + planted.INIT_LOSS - 2.0) / 3)
    assert (row["max_stable_lr"], row["grid"]) == (1e-2, (1e-3, 1e-2, 1e-1))  # the named case is no part of the grid
    with pytest.raises(KeyError, match="no axis beside the learning rate"):
        study.sensitivity(by="optim.lr")


# Growth of attention logits


def test_depth_exponent_and_predicted_size() -> None:
    table = pd.DataFrame(
        trial(lr, depth, seed, attn_logit_peak=50 * depth**1.5 * (2.0 if seed else 0.5))
        for lr in (1e-2, 1e-1)
        for depth in (2, 4, 8)
        for seed in (0, 1)
    )
    rows = records(sensitivity.growth(table, ["model.depth", "optim.lr"]))
    assert [row["optim.lr"] for row in rows] == [1e-2, 1e-1]
    assert rows[0]["attn_logit_depth_exponent"] == pytest.approx(1.5)
    sizes = [cfg.ModelConfig(depth=d).parameters(0) for d in (2, 4, 8, 34)]
    assert (rows[0]["sizes"], rows[0]["largest"], rows[0]["reason"]) == (3, sizes[2], None)
    # parameters are about linear in depth: 1e4 = 50 * 34.2^1.5
    assert rows[0]["predicted_unstable"] == pytest.approx(sizes[3], rel=0.01)


def test_growth_says_why_not() -> None:
    two = pd.DataFrame(trial(1e-2, depth) for depth in (2, 4))
    axes = ["model.depth", "optim.lr"]
    assert records(sensitivity.growth(two, axes))[0]["reason"] == "under 3 sizes"
    two.loc[0, "attn_logit_peak"] = None
    assert records(sensitivity.growth(two, axes))[0]["reason"] == "the attention logits were not probed"
    two.loc[0, "state"] = "failed"
    assert records(sensitivity.growth(two, axes))[0]["reason"] == "not every trial is done"
    unknown = two.assign(**{"model.dim": None})
    assert records(sensitivity.growth(unknown, axes))[0]["reason"] == "the size of the model is not known"


# Underperforming trials


def test_underperform_is_against_the_best_at_an_equal_budget() -> None:
    losses = (2.0, 2.1875, 2.25, None, 5.5)
    table = pd.DataFrame(trial(lr, final_loss_capped=v) for lr, v in zip(GRID, losses, strict=False))
    assert compare.underperform(table).tolist() == [False, False, True, pd.NA, True]
    table.loc[0, "train.steps"] = 5000  # a longer trial is no measure for the others
    assert compare.underperform(table).tolist() == [False, False, False, pd.NA, True]
    table.loc[4, "eval_hash"] = "other"
    assert compare.underperform(table).tolist() == [False, False, False, pd.NA, False]


# What is paired and pooled


def pair(**differs: tuple[Any, Any]) -> pd.DataFrame:
    """Two trials that differ in the learning rate and in these columns."""
    columns = [{name: values[i] for name, values in differs.items()} for i in (0, 1)]
    return pd.DataFrame([trial(lr, **own) for lr, own in zip((1e-3, 1e-2), columns, strict=True)])


@pytest.mark.parametrize(
    ("metric", "differs", "pairs"),
    [
        ("spike_abs_rate", {}, 1),
        ("spike_abs_rate", {"detector_id": ("jump-1", "jump-2")}, 0),
        ("severity", {"detector_id": ("jump-1", "jump-2")}, 0),
        ("warn_attn_logit", {"detector_id": ("jump-1", "jump-2")}, 0),
        ("attn_logit_peak", {"detector_id": ("jump-1", "jump-2")}, 1),
        ("grad_norm_log_sd", {"detector_id": ("jump-1", "jump-2")}, 1),
        ("grad_norm_log_sd", {"log_stride": (1, 10)}, 0),
        ("spike_abs_rate", {"log_stride": (10, 10)}, 1),
        ("final_loss", {"log_stride": (1, 10)}, 1),
        ("final_loss", {"eval_hash": ("e", "other")}, 0),
        ("spike_abs_rate", {"eval_hash": ("e", "other")}, 1),
        ("spike_abs_rate", {"data_fingerprint": ("f", "other")}, 0),
    ],
)
def test_only_what_is_alike_is_paired_or_averaged(metric: str, differs: dict[str, Any], pairs: int) -> None:
    judged = {"severity": (1.0, 2.0), "warn_attn_logit": (30, 40)}
    table = pair(spike_abs_rate=(0.01, 0.02), grad_norm_log_sd=(0.2, 0.3), **judged, **differs)
    (row,) = records(compare.levels(table, ["optim.lr"], "optim.lr", metric))
    assert row["pairs"] == pairs
    assert (row["difference"] is None) == (pairs == 0)
    if "data_fingerprint" not in differs:
        assert math.isfinite(compare.mean(table, metric).mean) == bool(pairs)


@pytest.mark.parametrize("metric", ["spike_abs_rate", "severity"])
def test_statistics_of_different_rules_are_no_effect(metric: str) -> None:
    rows = [
        trial(lr, seed=seed, detector_id=f"jump-{1 + (lr > 1e-3)}", severity=lr, spike_abs_rate=lr)
        for lr in (1e-3, 1e-2) for seed in (0, 1)
    ]  # fmt: skip
    (row,) = records(effects.effects(pd.DataFrame(rows), ["optim.lr"], [metric]))
    assert (row["p"], row["note"]) == (None, "its levels were judged by different rules")


def test_other_data_are_compared_along_the_axis_of_the_data() -> None:
    table = pair(data_fingerprint=("f", "other"), spike_abs_rate=(0.01, 0.02)).assign(**{"data.seq_len": [64, 128]})
    (row,) = records(compare.levels(table, ["data.seq_len"], "data.seq_len", "spike_abs_rate"))
    assert (row["pairs"], row["positive"], row["p"]) == (1, 1.0, None)


def test_counts_are_compared_as_rates(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", depths=(2,), seeds=(0,)))
    with pytest.raises(ValueError, match="spike_events is a count, and counts are compared as rates: spike_rate, "):
        study.compare("optim.lr", "spike_events")
    assert not compare.counted("spike_first_step") and not compare.counted("steps_done")
    with pytest.raises(KeyError, match="'verdict' is no statistic"):
        study.compare("optim.lr", "verdict")


def test_records_of_different_strides_are_warned_about(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", depths=(2,), seeds=(0,)))
    study.trials["log_stride"] = [1, 10, 10]
    (said,) = [s for s in findings.warnings(study) if "Logged" in s]
    assert said.startswith("Logged every 1 and 10 steps: statistics of records with different strides are never")


# Rates


def counts(
    spikes: dict[tuple[float, float | None], list[int]], n_evaluable: tuple[int, ...] = (100, 150, 250)
) -> pd.DataFrame:
    """Trials with these numbers of spikes at (lr, clip), a seed each; the seeds differ in length."""
    return pd.DataFrame(
        trial(lr, 2, seed, clip, spike_events=n, n_evaluable=n_evaluable[seed])
        for (lr, clip), own in spikes.items()
        for seed, n in enumerate(own)
    )


def test_a_ratio_of_two_levels_by_hand() -> None:
    model = survival.rate_model(counts({(3e-3, 1.0): [2, 3, 5], (3e-3, None): [5, 9, 16]}), ["optim.clip"])
    (row,) = records(model.ratios)
    assert (row["axis"], row["change"], model.reason) == ("optim.clip", "1 → off", None)
    assert (model.trials, model.seeds, model.spikes) == (6, 3, 40)
    assert row["ratio"] == pytest.approx(30 / 10)
    # expected at 10/500 and 30/500 per step: 2, 3, 5 and 6, 9, 15; chi2 = 1/6 + 0 + 1/15, over 6 - 2
    assert model.dispersion == pytest.approx((1 / 6 + 1 / 15) / 4)
    half = 2.7764451 * math.sqrt((1 / 6 + 1 / 15) / 4 * (1 / 10 + 1 / 30))  # t .975 at 4; var log ratio = 1/10 + 1/30
    assert (row["low"], row["high"]) == pytest.approx((3 * math.exp(-half), 3 * math.exp(half)), rel=1e-6)


def scored(design: np.ndarray, y: np.ndarray, exposure: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Another quasi-Poisson fit: Newton's method on the score. Coefficients, standard errors, dispersion."""
    beta = np.zeros(design.shape[1])
    beta[0] = math.log(y.sum() / exposure.sum())
    for _ in range(50):
        mean = exposure * np.exp(design @ beta)
        information = design.T @ (design * mean[:, None])
        beta = beta + np.linalg.solve(information, design.T @ (y - mean))
    dispersion = float(np.sum((y - mean) ** 2 / mean) / (len(y) - len(beta)))
    return beta, np.sqrt(dispersion * np.diag(np.linalg.inv(information))), dispersion


def test_rates_over_all_axes_against_another_fit() -> None:
    rng = np.random.default_rng(0)
    rows = [
        trial(lr, depth, seed, clip, n_evaluable=(n := 400 + 100 * seed),
              spike_events=int(rng.negative_binomial(8, 1 / (1 + n * (lr / 1e-3) ** 0.3 * (2 if clip else 1) / 400))))
        for lr in (1e-3, 1e-2, 1e-1) for depth in (2, 4, 8) for clip in (0.5, 1.0, None) for seed in (0, 1, 2)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    model = survival.rate_model(table, ["model.depth", "optim.lr", "optim.clip"])
    changes = [(row["axis"], row["change"]) for row in records(model.ratios)]
    assert changes == [
        ("model.depth", "per doubling"),
        ("optim.lr", "per doubling"),
        ("optim.clip", "0.5 → 1"),
        ("optim.clip", "0.5 → off"),
    ]
    log = [np.log2(table[name].to_numpy(float)) for name in ("model.depth", "optim.lr")]
    levels = [(table["optim.clip"] == 1).to_numpy(float), table["optim.clip"].isna().to_numpy(float)]
    design = np.column_stack([np.ones(len(table)), *log, *levels])
    beta, error, dispersion = scored(
        design, table["spike_events"].to_numpy(float), table["n_evaluable"].to_numpy(float)
    )
    half = 1.9921 * error  # t .975 at 81 - 5
    assert model.dispersion == pytest.approx(dispersion) and dispersion > 1.2
    assert model.ratios["ratio"].tolist() == pytest.approx(np.exp(beta[1:]).tolist(), rel=1e-6)
    assert model.ratios["low"].tolist() == pytest.approx(np.exp(beta - half)[1:].tolist(), rel=1e-3)
    assert model.ratios["high"].tolist() == pytest.approx(np.exp(beta + half)[1:].tolist(), rel=1e-3)
    truth = (1.0, 2**0.3, 1.0, 0.5)
    assert all(row["low"] < t < row["high"] for row, t in zip(records(model.ratios), truth, strict=True))


@pytest.mark.parametrize(
    ("spikes", "axes", "reason"),
    [
        ({(1e-3, 1.0): [9, 9], (1e-3, None): [9, 9]}, ["optim.clip"], "2 seeds, and it needs 3"),
        ({(1e-3, 1.0): [1, 1, 1], (1e-3, None): [2, 2, 2]}, ["optim.clip"], "9 spikes for 1 term, and it needs 10"),
        ({(1e-3, 1.0): [0, 0, 0], (1e-3, None): [9, 9, 9]}, ["optim.clip"], "no spike at clip threshold 1: the ratio"),
        ({(1e-3, 1.0): [9, 9, 9], (1e-2, None): [9, 9, 9]}, ["optim.lr", "optim.clip"], "always change together"),
        ({(1e-3, 1.0): [0, 0, 0], (1e-2, 1.0): [0, 0, 0], (1e-1, 1.0): [9, 9, 9]}, ["optim.lr"], "no spike at"),
        ({(1e-3, 1.0): [9, 9, 9]}, ["optim.lr"], "nothing varies but the seed"),
    ],
)  # fmt: skip
def test_a_rate_model_that_says_more_than_the_data_is_refused(spikes: Any, axes: list[str], reason: str) -> None:
    model = survival.rate_model(counts(spikes), axes)
    assert reason in (model.reason or "")
    assert model.dispersion is None and not len(model.ratios)


def test_spikes_of_different_rules_make_no_rate() -> None:
    table = counts({(1e-3, 1.0): [9, 9, 9], (1e-3, None): [9, 9, 9]})
    table.loc[0, "detector_id"] = "jump-2"
    assert "not comparable" in (survival.rate_model(table, ["optim.clip"]).reason or "")


# Times

EVENTS, CENSORED = [6, 6, 6, 7, 10, 13, 16, 22, 23], [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
"""Weeks in remission under 6-MP (Freireich et al. 1963), and under placebo."""
PLACEBO = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]


def remission() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Time, event, group of both."""
    time = np.array([*EVENTS, *CENSORED, *PLACEBO], dtype=float)
    event = np.array([True] * len(EVENTS) + [False] * len(CENSORED) + [True] * len(PLACEBO))
    return time, event, np.repeat([0, 1], [21, 21])


def at(curve: pd.DataFrame, step: float, name: str = "free") -> float:
    return float(curve.loc[curve["step"] <= step, name].iloc[-1])


def test_kaplan_meier_check_values() -> None:
    time, event, _ = remission()
    curve = survival.kaplan_meier(time[:21], event[:21])
    assert [at(curve, t) for t in (6, 10, 23)] == pytest.approx([0.8571, 0.7529, 0.4482], abs=5e-5)
    assert [at(curve, t, "at_risk") for t in (6, 7, 10, 35)] == [21, 17, 15, 1]


def test_log_rank_check_value() -> None:
    chi2, p = survival.log_rank(*remission())
    assert chi2 == pytest.approx(16.793, abs=5e-4)
    assert p == pytest.approx(math.erfc(math.sqrt(chi2 / 2))) and p == pytest.approx(4.17e-5, rel=1e-2)


def test_curve_and_interval_against_other_implementations() -> None:
    rng = np.random.default_rng(1)
    time, event = rng.integers(1, 30, 60).astype(float), rng.random(60) < 0.6
    curve = survival.kaplan_meier(time, event)
    free, greenwood = 1.0, 0.0
    for step, at_risk, found, low, high in curve.itertuples(index=False):
        deaths, there = np.sum((time == step) & event), np.sum(time >= step)
        free, greenwood = (
            free * (1 - deaths / there),
            greenwood + (deaths / (there * (there - deaths)) if deaths else 0.0),
        )
        assert (at_risk, found) == (there, pytest.approx(free))
        if 0 < free < 1:
            width = 1.959964 * math.sqrt(greenwood) / abs(math.log(free))
            assert (low, high) == pytest.approx((free ** math.exp(width), free ** math.exp(-width)), abs=1e-6)
    theirs = SurvfuncRight(time, event.astype(int))
    assert [at(curve, t) for t in theirs.surv_times] == pytest.approx(theirs.surv_prob.tolist())


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_log_rank_against_other_implementations(groups: int) -> None:
    rng = np.random.default_rng(groups)
    group = rng.integers(0, groups, 80)
    time, event = np.ceil(rng.exponential(10 + 4 * group)), rng.random(80) < 0.7
    chi2, p = survival.log_rank(time, event, group)
    assert chi2 == pytest.approx(survdiff(time, event.astype(int), group)[0])
    if groups == 2:
        x, y = (
            stats.CensoredData(uncensored=time[own & event], right=time[own & ~event])
            for own in (group == 0, group == 1)
        )
        assert chi2 == pytest.approx(stats.logrank(x, y).statistic ** 2)
    else:
        assert p == pytest.approx(stats.chi2.sf(chi2, groups - 1), abs=0.03)
    assert survival.log_rank(time, event, group) == (chi2, p)


def test_permutations_keep_their_level() -> None:
    rng = np.random.default_rng(5)
    p = [
        survival.log_rank(rng.exponential(10, 24).round(), rng.random(24) < 0.5, np.arange(24) % 3)[1]
        for _ in range(60)
    ]
    assert 0.3 < np.mean(p) < 0.7 and min(p) >= 1 / 1000


def test_first_spikes_of_trials() -> None:
    rows = [
        trial(1e-3, seed=0, steps_done=100),  # no spike in 100 steps
        trial(1e-3, seed=1, steps_done=40),  # the log ends here
        trial(1e-1, seed=0, spike_first_step=30),
        trial(1e-1, seed=1, spike_first_step=80, verdict="diverged", verdict_step=60),
        trial(1e-1, seed=2, spike_first_step=20, verdict="diverged", verdict_step=60),
        trial(1e-1, seed=3, state="failed", spike_first_step=1),  # no result
        trial(1e-1, seed=4, steps_done=10, n_evaluable=0),  # never at risk
    ]
    first = survival.first_spikes(pd.DataFrame(rows), "optim.lr")
    low, high = records(first.levels)
    assert (low["level"], low["trials"], low["spiked"], low["diverged"], low["censored"]) == (1e-3, 2, 0, 0, 2)
    assert (high["trials"], high["spiked"], high["diverged"], high["censored"]) == (3, 2, 1, 0)
    assert (low["free"], low["high"], low["median_step"]) == (1.0, 1.0, None)
    assert low["low"] == pytest.approx(0.025)  # Clopper-Pearson of 1 of 1: the other was not seen to the horizon
    assert (high["free"], high["low"], high["median_step"], first.horizon) == (0.0, 0.0, 30.0, 100.0)
    assert high["high"] == pytest.approx(stats.binomtest(0, 3).proportion_ci(method="exact").high)
    assert (first.unseen, first.balanced) == (1, False)
    assert first.curves.groupby("level")["step"].agg(list).tolist() == [[40, 100], [20, 30, 60]]
    assert first.reason is None and first.p is not None


@pytest.mark.parametrize(("n", "events"), [(6, 0), (6, 6), (2, 2), (1, 0)])
def test_where_all_or_none_had_an_event_the_interval_is_exact(n: int, events: int) -> None:
    rows = [trial(1e-2, seed=i, spike_first_step=40 + i if i < events else None) for i in range(n)]
    (level,) = records(survival.first_spikes(pd.DataFrame(rows), "optim.lr").levels)
    exact = stats.binomtest(n - events, n).proportion_ci(0.95, method="exact")
    assert (level["low"], level["high"]) == pytest.approx((exact.low, exact.high))
    if (n, events) == (6, 0):
        assert level["low"] == pytest.approx(0.54, abs=5e-3)


def test_a_level_that_was_not_seen_as_far_is_judged_where_all_were() -> None:
    rows = [trial(1e-2, seed=i, steps_done=100) for i in range(3)] + [trial(1e-1, seed=0, steps_done=60)]
    first = survival.first_spikes(pd.DataFrame([*rows, trial(1e-1, seed=1, spike_first_step=30)]), "optim.lr")
    low, high = records(first.levels)
    assert (first.horizon, low["free"], high["free"]) == (60.0, 1.0, 0.5)
    assert low["low"] == pytest.approx(stats.binomtest(3, 3).proportion_ci(method="exact").low)


def test_levels_are_compared_among_trials_that_are_equal_otherwise() -> None:
    """Depth 8 spikes, depth 2 does not, and the rate changes nothing; but at depth 8 only the larger rate was tried."""
    rows = [
        trial(lr, depth, seed, spike_first_step=40 + seed if depth == 8 and seed % 4 else None)
        for lr, depth, seeds in ((1e-2, 2, 8), (1e-1, 2, 8), (1e-1, 8, 16))
        for seed in range(seeds)
    ]
    table = pd.DataFrame(rows)
    pooled = survival.first_spikes(table, "optim.lr")
    assert pooled.p is not None and pooled.p < 0.05 and not pooled.balanced  # what pooling would say
    axes = ["model.depth", "optim.lr"]
    strict = survival.first_spikes(table, "optim.lr", axes)
    assert not strict.balanced and strict.p == 1.0
    depth = survival.first_spikes(table[table["optim.lr"] == 0.1], "model.depth", axes)
    assert depth.balanced is False and depth.p is not None and depth.p < 0.05
    apart = table[(table["optim.lr"] == 0.1) == (table["model.depth"] == 8)]
    assert survival.first_spikes(apart, "optim.lr", axes).reason == (
        "no two levels were tried at equal levels of the other axes"
    )


@pytest.mark.parametrize("groups", [2, 3])
def test_a_stratified_log_rank_against_statsmodels(groups: int) -> None:
    rng = np.random.default_rng(7 + groups)
    group, stratum = rng.integers(0, groups, 90), rng.integers(0, 4, 90)
    time, event = np.ceil(rng.exponential(8 + 3 * group + 20 * stratum)), rng.random(90) < 0.7
    chi2, p = survival.log_rank(time, event, group, stratum)
    theirs, their_p = survdiff(time, event.astype(int), group, strata=stratum)
    assert chi2 == pytest.approx(theirs) and p == pytest.approx(their_p, abs=0.03)
    assert survival.log_rank(time, event, group)[0] != pytest.approx(theirs)  # the strata matter


@pytest.mark.slow
@pytest.mark.parametrize("levels", [2, 3])
def test_a_stratified_test_keeps_its_level_where_the_grid_has_holes(levels: int) -> None:
    """400 null studies of 12 strata whose rates differ tenfold, a third of the trials missing at random."""
    rng = np.random.default_rng(11)
    p = []
    for _ in range(400):
        stratum, group = (a.ravel() for a in np.mgrid[:12, :levels])
        stratum, group = np.repeat(stratum, 3), np.repeat(group, 3)
        time = np.minimum(np.ceil(rng.exponential(np.geomspace(30, 300, 12)[stratum])), 100)
        kept = rng.random(len(time)) < np.where(group == stratum % levels, 0.95, 0.5)
        p.append(survival.log_rank(time[kept], time[kept] < 100, group[kept], stratum[kept])[1])
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.085


def test_a_test_without_an_event_or_a_second_level_is_refused() -> None:
    calm = pd.DataFrame([trial(1e-3), trial(1e-1)])
    assert survival.first_spikes(calm, "optim.lr").reason == "no trial spiked or diverged"
    assert survival.first_spikes(calm, "model.depth").reason == "fewer than two levels"
    nothing = survival.first_spikes(calm.assign(state="failed"), "optim.lr")
    assert (nothing.horizon, len(nothing.levels), nothing.p) == (None, 0, None)
    assert "different rules" in (survival.first_spikes(calm.assign(log_stride=[1, 10]), "optim.lr").reason or "")


# Importance


def full_grid(seeds: int = 3) -> pd.DataFrame:
    """Loss: 3 parts from the rate, 1 from clipping, a little from the seed; x3 rate: chance alone."""
    rng = np.random.default_rng(4)
    return pd.DataFrame(
        trial(
            lr, depth, seed, clip,
            final_loss_capped=2 + 0.5 * (lr == 1e-2) + 0.2 * (clip is None) + 0.02 * seed + rng.normal(0, 0.02),
            spike_abs_rate=rng.random(), grad_norm_log_sd=math.exp(depth), attn_logit_peak=7.0,
        )
        for lr in (1e-3, 1e-2, 1e-1) for depth in (2, 6) for clip in (1.0, None) for seed in range(seeds)
    )  # fmt: skip


AXES = ["model.depth", "optim.lr", "optim.clip"]


def variance_shares(table: pd.DataFrame, values: pd.Series, names: list[str]) -> list[float]:
    """Sums of squares between levels over the total: exact on a full grid."""
    whole = np.sum((values - values.mean()) ** 2)
    groups = [table.groupby(name, dropna=False).indices.values() for name in names]
    return [sum(len(i) * (values.iloc[i].mean() - values.mean()) ** 2 for i in own) / whole for own in groups]


def test_shares_are_those_of_an_analysis_of_variance() -> None:
    table = full_grid()
    found = study_statistics.importance(table, AXES)
    loss, rate, rough, logit = records(found)
    names = [*AXES, "seed"]
    expected = variance_shares(table, table["final_loss_capped"], names)
    assert [loss[n] for n in names] == pytest.approx(expected, abs=0.05)
    assert (loss["trials"], loss["warning"], loss["reason"]) == (36, None, None) and loss["p"] < 1e-6
    assert loss["optim.lr"] > 0.7 and rough["model.depth"] == pytest.approx(1.0, abs=0.02)
    assert rate["optim.lr"] is None and rate["reason"].startswith("what the axes explain may be chance (p ")
    assert (logit["optim.lr"], logit["reason"]) == (None, "every trial has the same value")
    pd.testing.assert_frame_equal(study_statistics.importance(table, AXES), found)


@pytest.mark.parametrize("missing", [0, 9])
def test_the_analysis_of_variance_against_statsmodels(missing: int) -> None:
    """Full, and with holes, where the order of factors would matter to type I."""
    rng = np.random.default_rng(missing)
    a, b, c = (grid.ravel() for grid in np.mgrid[:3, :2, :4])
    kept = np.sort(rng.permutation(len(a))[missing:])
    levels = {"a": a[kept], "b": b[kept], "c": c[kept]}
    y = 0.4 * a[kept] + 0.3 * b[kept] * (a[kept] == 1) + rng.normal(0, 0.5, len(kept))
    shares, p = study_statistics.analysis_of_variance(levels, y, ["a", "b"])
    table = pd.DataFrame(levels | {"y": y})
    full, null = ols("y ~ C(a) + C(b) + C(c)", table).fit(), ols("y ~ C(c)", table).fit()
    theirs = anova_lm(full, typ=2)["sum_sq"]
    total = np.sum((y - y.mean()) ** 2)
    assert [shares[n] for n in "abc"] == pytest.approx([theirs[f"C({n})"] / total for n in "abc"])
    assert p == pytest.approx(anova_lm(null, full)["Pr(>F)"].iloc[1])


def test_chance_is_not_explained() -> None:
    """300 null studies of 36 trials: in about one of twenty any statistic has shares at all."""
    rng = np.random.default_rng(5)
    frame = full_grid()
    told = 0
    for _ in range(300):
        seeds = rng.normal(0, 1, 3)[frame["seed"]]  # trials of a seed read the same data
        noise = {name: seeds + rng.normal(0, 1, len(frame)) for name in study_statistics.OBJECTIVES}
        columns = {compare.column(n): np.exp(0.1 * x) for n, x in noise.items()}
        told += study_statistics.importance(frame.assign(**columns), AXES)["reason"].isna().any()
    assert 0 < told <= 0.08 * 300


def test_shares_on_which_the_forest_and_the_analysis_of_variance_disagree_are_not_given() -> None:
    """Deep models were trained at large rates only: which of the two costs the loss, the forest divides at will."""
    table = full_grid(seeds=4)
    loss = 2 + 0.2 * (table["model.depth"] == 6) + 0.3 * (table["optim.lr"] == 1e-1) + 0.01 * table["seed"]
    table = table.assign(final_loss_capped=loss + np.random.default_rng(0).normal(0, 0.02, len(table)))
    lopsided = table[(table["model.depth"] == 6) == (table["optim.lr"] == 1e-1) | (table["seed"] == 0)]
    whole, part = (records(study_statistics.importance(t, AXES))[0] for t in (table, lopsided))
    assert whole["reason"] is None and whole["optim.lr"] > 0.5
    assert part["optim.lr"] is None
    found = re.fullmatch(r"the forest and the analysis of variance disagree: (.*)", part["reason"])
    assert found and re.search(r"\d+ % against \d+ % for learning rate", found[1])


def test_too_few_trials_are_warned_about() -> None:
    table = full_grid(seeds=2)
    loss, *_ = records(study_statistics.importance(table, AXES))
    assert loss["warning"] == "24 trials for 3 axes, and it needs 10 for each: mostly chance"
    assert loss["optim.lr"] > 0.5
    one = records(study_statistics.importance(table[:3], AXES))[0]
    assert (one["optim.lr"], one["reason"]) == (None, "3 trials, and it needs 4")
    single = records(study_statistics.importance(table[:4].assign(**{"optim.lr": [1.0, 2.0, 3.0, 4.0]}), AXES))[0]
    assert (single["optim.lr"], single["reason"]) == (None, "as many levels as trials")
    followed = table.assign(**{"optim.lr": 1.0 + table["seed"], "model.depth": 2, "optim.clip": 1.0})
    assert (
        records(study_statistics.importance(followed, ["optim.lr"]))[0]["reason"]
        == "the axes change with the seed alone"
    )


def test_shares_of_losses_on_different_batches_are_refused() -> None:
    table = full_grid()
    table.loc[0, "eval_hash"] = "other"
    loss, _, rough, _ = records(study_statistics.importance(table, AXES))
    assert loss["reason"] == "eval_hash differs between trials: they are not comparable" and rough["reason"] is None


def test_a_study_answers_all_of_it(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", seeds=(0, 1, 2, 3), steps=200))
    assert study.sensitivity()["reason"].isna().all() and len(study.sensitivity()) == 2
    change = study.sensitivity_difference("model.depth")
    assert (change["seeds"].tolist(), change["reason"].tolist()) == ([4], [None])
    assert len(study.logit_growth()) == 3 and study.underperform.sum() == 16
    model = study.rate_model()
    assert model.ratios["axis"].tolist() == ["model.depth", "optim.lr"] and model.ratios["low"].iloc[1] > 1
    first = study.time_to_first_spike("optim.lr")
    assert first.levels["spiked"].tolist() == [0, 1, 8] and first.p is not None and first.p < 0.01
    assert study.importance().set_index("metric").loc["attn_logit_peak", "optim.lr"] > 0.9
    with pytest.raises(KeyError, match="no axis"):
        study.time_to_first_spike("seed")


# Outcomes, ranks, and what two studies share


def test_outcomes_count_every_trial_once() -> None:
    judged = [trial(verdict=v) for v in ("stable", "stable", "rough", "diverged", None)]
    others = [trial(state=s, verdict=None) for s in ("failed", "oom", "timeout", "disk_full", "running", "pending")]
    others += [trial(state="stopped", verdict=v) for v in (None, "rough")]
    assert study_statistics.outcomes([*judged, *others], damaged=2) == {
        **{"stable": 2, "spiky": 0, "rough": 1, "diverged": 1, "not judged": 1},
        **{"stopped": 2, "unfinished": 2, "failed": 4, "damaged": 2},
    }


def test_claims_on_verdicts_count_the_trials_they_are_of() -> None:
    rows = [
        *(trial(seed=i, verdict=None, verdict_reason=r) for i, r in enumerate(("untrained", "too_short", "untrained"))),
        trial(seed=3, verdict=None),
        trial(seed=4, state="running", verdict=None, verdict_reason="running"),
        *(trial(seed=5 + i, verdict="rough", sampling_noise=noise) for i, noise in enumerate((True, False, None))),
        trial(seed=8, verdict="spiky", sampling_noise=True),
        trial(seed=9, warn_attn_logit=12, warn_logit=0),
        trial(seed=10, warn_attn_logit=3),
        trial(seed=11, verdict="diverged", warn_attn_logit=3),
    ]
    trials = tabled.study(rows).trials
    assert list(study_statistics.without_verdict(trials).items()) == [
        ("not judged", 1), ("too_short", 1), ("untrained", 2),
    ]  # fmt: skip
    assert study_statistics.verdicts_by_noise(trials) == {"rough": 1, "spiky": 1}
    assert {k: n for k, n in study_statistics.warned(trials).items() if n} == {"warn_attn_logit": 2, "warn_logit": 1}


def ranked(**rows: tuple[str, str | None, float | None]) -> dict[str, dict[str, Any]]:
    """Done trials, each by its cell, its verdict and its largest norm over the median."""
    names = ("cell_id", "verdict", "grad_norm_max_over_median")
    return {t: dict(zip(names, values, strict=True)) for t, values in rows.items()}


def test_trials_rank_by_verdict_then_by_norm() -> None:
    done = ranked(
        a=("A", "stable", 5.0), b=("A", "rough", 3.0), c=("B", "diverged", None), d=("C", None, 9.0),
        e=("D", "stable", 5.0), f=("D", "stable", 7.0), g=("A", "rough", 4.0),
    )  # fmt: skip
    assert study_statistics.by_roughness(done) == ["c", "g", "b", "f", "a", "e", "d"]
    assert study_statistics.roughest(done, 3) == ["c", "g"]  # one of each cell that is not stable
    assert study_statistics.roughest(done, 1) == ["c"]
    assert study_statistics.typical(done) == "a"  # of 3, 4, 5, 5, 7, 9: B, where the roughest is, is left out
    calm = ranked(a=("A", "stable", 2.0), b=("A", "stable", 3.0))
    assert study_statistics.roughest(calm, 3) == ["b"] and study_statistics.typical(calm) is None
    assert study_statistics.typical({}) is None


def test_statistics_of_different_rules_or_strides_are_not_put_together() -> None:
    trials = pd.DataFrame([trial(seed=0, log_stride=1), trial(seed=1, log_stride=1)])
    assert study_statistics.one_stride(trials)
    assert study_statistics.comparable(trials) == list(effects.REPORTED)
    rest = [m for m in effects.REPORTED if m != "spike_abs_rate"]
    assert study_statistics.comparable(trials.assign(detector_id=["jump-1", "jump-2"])) == rest
    apart = trials.assign(log_stride=[1, 10])
    assert not study_statistics.one_stride(apart) and study_statistics.comparable(apart) == rest


def two_studies() -> pd.DataFrame:
    """Study z with rates 1e-3 and 1e-2, study b with 1e-2 and 1e-1; two seeds each, clipping off at 1e-2."""
    losses = {("z", 1e-3): (3.0, 3.1), ("z", 1e-2): (2.0, 2.1), ("b", 1e-2): (2.5, 2.7), ("b", 1e-1): (2.2, 2.2)}
    rows = [
        trial(lr, seed=seed, clip=None if lr == 1e-2 else 1.0, final_loss_capped=loss, study=name, log_stride=1)
        | {"train.batch_size": 8 if name == "z" else 16, "cell": f"{name}, {lr:g}"}
        for (name, lr), own in losses.items()
        for seed, loss in enumerate(own)
    ]
    return pd.DataFrame(rows, index=[f"{row['cell']}, {row['seed']}" for row in rows])


OF_STUDIES: dict[str, list[Any]] = {"study": ["z", "b"], "optim.lr": [1e-3, 1e-2, 1e-1], "optim.clip": [1.0, None]}


def test_cells_that_two_studies_hold() -> None:
    trials = two_studies()
    shared = {"z, 0.01, 0", "z, 0.01, 1", "b, 0.01, 0", "b, 0.01, 1"}
    assert matched_cells.matched(trials, OF_STUDIES) == (shared, ["z", "b"])
    trials.loc["b, 0.01, 0", "state"] = "failed"
    assert matched_cells.matched(trials, OF_STUDIES) == (shared - {"b, 0.01, 0"}, ["z", "b"])
    trials.loc["b, 0.01, 1", "state"] = "failed"
    assert matched_cells.matched(trials, OF_STUDIES) == (set(), [])


def test_of_three_studies_only_the_cells_of_all_are_matched() -> None:
    """z and b share the rate 1e-2, b and y share 1e-1 too: a mean of y over both would not be that of the cell of z."""
    trials = two_studies()
    more = trials[trials["study"] == "b"].assign(study="y")
    more.index = more.index.str.replace("b,", "y,")
    whole, axes = pd.concat([trials, more]), OF_STUDIES | {"study": ["z", "b", "y"]}
    cell = {f"{name}, 0.01, {seed}" for name in "zby" for seed in (0, 1)}
    assert matched_cells.matched(whole, axes) == (cell, ["z", "b", "y"])
    apart = whole[~((whole["study"] == "z") & (whole["optim.lr"] == 1e-2))]  # z shares nothing now
    ids, names = matched_cells.matched(apart, axes)
    assert names == ["b", "y"] and len(ids) == 8


def test_settings_that_tell_two_studies_apart() -> None:
    names = ["train.batch_size", "train.steps", "optim.lr"]
    assert study_statistics.settings_apart(two_studies(), ["z", "b"], names) == {"train.batch_size": [8, 16]}
    assert study_statistics.settings_apart(two_studies(), ["b", "z"], names) == {"train.batch_size": [16, 8]}


def test_differences_start_at_the_first_study() -> None:
    """The names say the other order: b before z."""
    trials = two_studies()
    trials.loc["b, 0.01, 0", "verdict"] = "diverged"
    (row,) = study_statistics.paired_differences(trials, OF_STUDIES, ["final_loss"])
    assert (row["a"], row["b"], row["pairs"], row["positive"]) == ("z", "b", 2, 1.0)
    assert (row["mean_a"], row["mean_b"], row["difference"]) == pytest.approx((2.05, 2.6, 0.55))
    half = 12.7062 * 0.05  # Student's t of one degree of freedom, and half the distance of 0.5 and 0.6
    assert (row["low"], row["high"]) == pytest.approx((0.55 - half, 0.55 + half), rel=1e-4)
    assert (row["diverged_a"], row["diverged_b"]) == (0, 1)


def test_changes_within_a_cell_are_paired_by_seed_and_data() -> None:
    trials = two_studies()
    (cell,) = study_statistics.cell_changes(trials, OF_STUDIES, ["final_loss"])
    assert (cell.levels, cell.first, cell.other, cell.seeds) == ((1e-2, None), "z", "b", 2)
    assert cell.changes["final_loss"] is not None and cell.changes["final_loss"].mean == pytest.approx(0.55)
    trials.loc["b, 0.01, 1", "data_fingerprint"] = "other"
    (cell,) = study_statistics.cell_changes(trials, OF_STUDIES, ["final_loss"])
    assert cell.changes["final_loss"] is not None and cell.seeds == 1
    assert cell.changes["final_loss"].mean == pytest.approx(0.5)
    trials.loc["b, 0.01, 0", "eval_hash"] = "other"
    (cell,) = study_statistics.cell_changes(trials, OF_STUDIES, ["final_loss"])
    assert cell.changes == {"final_loss": None}
