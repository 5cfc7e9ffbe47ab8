"""Statistics of a whole study against values by hand and other implementations: sensitivity, rates, times, axes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
from test_sensitivity import GRID, OFF, ON

from stabstudy import config as cfg
from stabstudy.analysis import compare, sensitivity, sentences
from stabstudy.analysis.levels import records
from stabstudy.analysis.study import Study


def trial(
    lr: float = 3e-3, depth: int = 2, seed: int = 0, clip: float | None = 1.0, model: Any = None, **columns: Any
) -> dict[str, Any]:
    """A done trial's row as trials.parquet has it, as far as these statistics read it."""
    config = cfg.from_dict(cfg.to_dict(planted.settings(depth, lr, clip, seed)))
    row = {
        "state": "done", "verdict": "stable", "verdict_code": "ok", "verdict_step": None, "eval_hash": "e",
        "final_loss_capped": 2.5, "attn_logit_peak": 4.0, "steps_done": 100, "n_evaluable": 84, "detector_id": "mad-1",
        "spike_events": 0, "spike_first_step": None, "data_fingerprint": "f",
    }  # fmt: skip
    return cfg.flat(config) | {f"model.{k}": v for k, v in (model or {}).items()} | row | columns


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
        ("spike_rate", {}, 1),
        ("spike_rate", {"detector_id": ("mad-1", "mad-2")}, 0),
        ("grad_norm_log_sd", {"detector_id": ("mad-1", "mad-2")}, 1),
        ("grad_norm_log_sd", {"log_stride": (1, 10)}, 0),
        ("spike_rate", {"log_stride": (10, 10)}, 1),
        ("final_loss", {"log_stride": (1, 10)}, 1),
        ("final_loss", {"eval_hash": ("e", "other")}, 0),
        ("spike_rate", {"eval_hash": ("e", "other")}, 1),
        ("spike_rate", {"data_fingerprint": ("f", "other")}, 0),
    ],
)
def test_only_what_is_alike_is_paired_or_averaged(metric: str, differs: dict[str, Any], pairs: int) -> None:
    table = pair(spike_rate=(0.01, 0.02), grad_norm_log_sd=(0.2, 0.3), **differs)
    (row,) = records(compare.levels(table, ["optim.lr"], "optim.lr", metric))
    assert row["pairs"] == pairs
    assert (row["difference"] is None) == (pairs == 0)
    if "data_fingerprint" not in differs:
        assert math.isfinite(compare.mean(table, metric).mean) == bool(pairs)


def test_other_data_are_compared_along_the_axis_of_the_data() -> None:
    table = pair(data_fingerprint=("f", "other"), spike_rate=(0.01, 0.02)).assign(**{"data.seq_len": [64, 128]})
    (row,) = records(compare.levels(table, ["data.seq_len"], "data.seq_len", "spike_rate"))
    assert (row["pairs"], row["positive"], row["p"]) == (1, 1.0, 1.0)


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
    (said,) = [s for s in sentences.warnings(study) if "Logged" in s]
    assert said.startswith("Logged every 1 and 10 steps: statistics of records with different strides are never")
