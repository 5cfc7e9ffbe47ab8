"""What the axes changed: sums of squares against statsmodels, the error by hand, and every grid that is not whole."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
import statsmodels.formula.api as smf
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.anova import anova_lm

from stabstudy.analysis import effects
from stabstudy.analysis.factors import Family, Model
from stabstudy.analysis.levels import records
from stabstudy.analysis.paired import holm
from stabstudy.analysis.study import Study

LR, DEPTH, CLIP = "optim.lr", "model.depth", "optim.clip"
AXES = [DEPTH, LR, CLIP]


def grid(seeds: int = 3, keep: float = 1.0, rng: int = 0, noise: float = 0.03) -> pd.DataFrame:
    """Trials of 2 depths, 3 rates, clipping on or off; a share of them kept. The rate changes all, clipping nothing."""
    draw = np.random.default_rng(rng)
    cells = itertools.product([2, 6], [1e-3, 1e-2, 1e-1], [1.0, None], range(seeds))
    table = pd.DataFrame(list(cells), columns=[DEPTH, LR, CLIP, "seed"]).astype({CLIP: "float64"})
    table = table[draw.random(len(table)) < keep].reset_index(drop=True)
    n, rate = len(table), np.log10(table[LR])
    seed = 0.05 * table["seed"]
    table["final_loss"] = (
        2.5 + 0.1 * (rate + 2) ** 2 - 0.02 * (table[DEPTH] == 6) + seed + noise * draw.standard_normal(n)
    )
    table["grad_norm_log_sd"] = np.exp(-1.5 + 0.3 * rate + seed + 5 * noise * draw.standard_normal(n))
    table["attn_logit_peak"] = np.exp(5 + 2 * rate + seed + 10 * noise * draw.standard_normal(n))
    table["n_evaluable"] = 188
    table["spike_rate"] = draw.poisson(2, n) / 188
    return table


def reference(table: pd.DataFrame, formula: str) -> pd.DataFrame:
    """statsmodels' analysis of variance, type II."""
    own = table.rename(columns={DEPTH: "depth", LR: "lr", CLIP: "clip"})
    own["clip"] = own["clip"].fillna(-1)
    return anova_lm(smf.ols(formula, own).fit(), typ=2)


ADDITIVE = "C(seed) + C(depth) + C(lr) + C(clip)"


def model(table: pd.DataFrame, y: pd.Series) -> Model:
    codes = [pd.factorize(table[a], sort=True, use_na_sentinel=False) for a in AXES]
    weight = np.ones(len(table))
    return Model(y.to_numpy(float), weight, table["seed"].to_numpy(), [(c, len(levels)) for c, levels in codes])


@pytest.mark.parametrize(("keep", "rng"), [(1.0, 0), (0.8, 1), (0.6, 2), (0.5, 3)])
def test_sums_of_squares_are_type_two(keep: float, rng: int) -> None:
    table = grid(4, keep, rng)
    theirs = reference(table, f"final_loss ~ {ADDITIVE}")
    own = model(table, table["final_loss"])
    for (squares, df), name in zip(own.tests, ("C(depth)", "C(lr)", "C(clip)"), strict=True):
        assert (squares, df) == pytest.approx((theirs.loc[name, "sum_sq"], theirs.loc[name, "df"]))
    assert own.additive == pytest.approx((theirs.loc["Residual", "sum_sq"], theirs.loc["Residual", "df"]))


def test_seed_terms_are_those_of_the_full_model() -> None:
    for keep, rng in ((1.0, 0), (0.85, 1)):
        table = grid(4, keep, rng)
        own = table.rename(columns={DEPTH: "depth", LR: "lr"}).assign(clip=table[CLIP].fillna(-1))
        full = smf.ols("final_loss ~ C(seed) * (C(depth) + C(lr) + C(clip))", own).fit()
        assert model(table, table["final_loss"]).by_seed == pytest.approx((full.ssr, full.df_resid))


def test_adjusted_means_and_their_variance() -> None:
    """Of a grid with holes, against the coefficients of another fit."""
    table = grid(4, 0.6, 2)
    fit = smf.ols(f"y ~ {ADDITIVE}", table.rename(columns={DEPTH: "depth", LR: "lr"}).assign(y=table["final_loss"], clip=table[CLIP].fillna(9))).fit()  # fmt: skip  # noqa: E501
    own = model(table, table["final_loss"])
    rates = fit.params[["C(lr)[T.0.01]", "C(lr)[T.0.1]"]]
    assert own.means(1) == pytest.approx([0.0, *rates])
    assert own.variance(1, 0, 2) == pytest.approx(fit.bse["C(lr)[T.0.1]"] ** 2 / fit.mse_resid)
    assert own.variance(1, 1, 2) == pytest.approx(float((c := np.array([0, 0, 0, 0, 0, -1, 1, 0])) @ fit.cov_params() @ c) / fit.mse_resid)  # fmt: skip  # noqa: E501


def test_no_interaction_is_tested_against_the_residual() -> None:
    table = grid()
    while Family([model(table, table["final_loss"])]).theta > 0:
        table["final_loss"] += 0.02 * np.random.default_rng(1).standard_normal(len(table))
    rows = effects.effects(table, AXES, ["final_loss"]).set_index("axis")
    theirs = reference(table, f"final_loss ~ {ADDITIVE}")
    for axis, name in zip(AXES, ("C(depth)", "C(lr)", "C(clip)"), strict=True):
        assert rows.loc[axis, ["statistic", "p"]].tolist() == pytest.approx(theirs.loc[name, ["F", "PR(>F)"]].tolist())
    assert rows["p_holm"].tolist() == pytest.approx(holm(rows["p"].tolist()))
    # two levels: F is t squared, and the interval that of the coefficient
    fit = smf.ols(f"y ~ {ADDITIVE}", table.rename(columns={DEPTH: "depth", LR: "lr"}).assign(y=table["final_loss"], clip=table[CLIP].fillna(9))).fit()  # fmt: skip  # noqa: E501
    depth = rows.loc[DEPTH]
    assert (depth["a"], depth["b"], depth["scale"]) == (2, 6, "difference")
    assert depth[["low", "high"]].tolist() == pytest.approx(fit.conf_int().loc["C(depth)[T.6]"].tolist())


def test_the_moderated_error_by_hand() -> None:
    """Where all axes have two levels the ratio is one number, the mean of seed x axis over error."""
    draw = np.random.default_rng(4)
    cells = itertools.product([0, 1], [0, 1], range(5), range(3))
    table = pd.DataFrame([c[:3] for c in cells], columns=["a", "b", "seed"])
    by_seed = draw.standard_normal((2, 5, 2))
    for metric in ("final_loss", "growth_act"):
        table[metric] = (
            draw.standard_normal(60) + by_seed[0, table["seed"], table["a"]] + by_seed[1, table["seed"], table["b"]]
        )
    found = effects.effects(table, ["a", "b"], ["final_loss", "growth_act"])
    ratios, parts = [], {}
    for metric in ("final_loss", "growth_act"):
        anova = anova_lm(smf.ols(f"{metric} ~ C(seed) * (C(a) + C(b))", table).fit(), typ=2)
        rest = anova.loc["Residual", "sum_sq"] / anova.loc["Residual", "df"]
        terms = anova.loc[["C(seed):C(a)", "C(seed):C(b)"], "sum_sq"]
        ratios.append(terms / rest * (anova.loc["Residual", "df"] - 2) / anova.loc["Residual", "df"])
        parts[metric] = anova, terms.sum()
    rho = float(np.concatenate(ratios).sum()) / 16  # 2 statistics x 2 axes x (5 - 1) x (2 - 1)
    assert rho > 1.5
    for row in records(found):
        anova, terms = parts[row["metric"]]
        additive_df = anova.loc["Residual", "df"] + 8
        variance = (anova.loc["Residual", "sum_sq"] + terms / rho) / additive_df
        f = anova.loc[f"C({row['axis']})", "sum_sq"] / (variance * rho)
        df = 1 / (1 / additive_df + 1 / 16)
        assert (row["statistic"], row["p"]) == pytest.approx((f, stats.f.sf(f, 1, df)))


@given(st.floats(-5, 5), st.floats(0.1, 10), st.integers(0, 99))
def test_only_differences_and_ratios_count(shift: float, factor: float, rng: int) -> None:
    table = grid(rng=rng)
    other = table.assign(final_loss=table["final_loss"] + shift, grad_norm_log_sd=table["grad_norm_log_sd"] * factor)
    metrics = ["final_loss", "grad_norm_log_sd"]
    a, b = (effects.effects(t, AXES, metrics) for t in (table, other))
    names = ["statistic", "p", "estimate", "low", "high"]
    np.testing.assert_allclose(a[names].to_numpy(), b[names].to_numpy(), rtol=1e-6, atol=1e-9)
    shuffled = effects.effects(table.sample(frac=1, random_state=rng), AXES, metrics)
    np.testing.assert_allclose(a[names].to_numpy(), shuffled[names].to_numpy(), rtol=1e-6, atol=1e-9)


def test_ratios_are_told_as_ratios() -> None:
    rows = effects.effects(grid(noise=0.01), AXES, ["attn_logit_peak", "grad_norm_log_sd"])
    logit = rows[(rows["axis"] == LR) & (rows["metric"] == "attn_logit_peak")].iloc[0]
    assert logit["scale"] == "ratio" and (logit["a"], logit["b"]) == (1e-3, 1e-1)
    assert logit["note"] == "last against first of 3 levels"
    assert logit["low"] < math.exp(4) < logit["high"] < 1.3 * logit["low"]  # planted: the square of the rate
    assert logit["p_holm"] < 1e-6


def test_a_null_level_is_a_level() -> None:
    rows = effects.effects(grid(), AXES, ["final_loss"]).set_index("axis")
    assert (rows.loc[CLIP, "a"], rows.loc[CLIP, "b"]) == (1.0, None)
    assert rows.loc[DEPTH, "b"] == 6 and isinstance(rows.loc[DEPTH, "b"], int)
    assert rows.loc[CLIP, "p"] > 0.01


def test_a_u_shape_is_seen() -> None:
    """The two ends are equally bad: first against last says nothing, and the contrasts say it."""
    table = grid(noise=0.01)
    row = effects.effects(table, AXES, ["final_loss"]).set_index("axis").loc[LR]
    assert row["a"] == 1e-2 and row["b"] in (1e-3, 1e-1) and row["note"] == "highest against lowest of 3 levels"
    assert row["low"] < 0.1 < row["high"] and row["p_holm"] < 1e-6
    above = effects.contrasts(table, AXES, ["final_loss"])
    rate = above[above["axis"] == LR]
    assert rate["best"].tolist() == [1e-2, 1e-2] and rate["level"].tolist() == [1e-3, 1e-1]
    assert (rate["p_holm"] < 1e-3).all() and (rate["low"] > 0).all()
    own = model(table, table["final_loss"])
    error = Family([own]).error(own, 1)
    t = rate["estimate"].iloc[0] / math.sqrt(own.variance(1, 0, 1) * error.variance)
    assert rate["p"].iloc[0] == pytest.approx(2 * stats.t.sf(t, error.df))
    half = stats.t.ppf(1 - 0.025 / 2, error.df) * math.sqrt(own.variance(1, 0, 1) * error.variance)
    assert rate["high"].iloc[0] - rate["estimate"].iloc[0] == pytest.approx(half)


def test_a_contrast_is_never_clearer_than_its_axis() -> None:
    """The best of many equal levels was chosen by chance."""
    for rng in range(20):
        table = grid(rng=rng)
        table["final_loss"] = np.random.default_rng(rng).standard_normal(len(table))
        axes = effects.effects(table, AXES, ["final_loss"]).set_index("axis")["p"]
        for row in records(effects.contrasts(table, AXES, ["final_loss"])):
            assert row["p_holm"] >= max(row["p"], axes[row["axis"]]) - 1e-12


def test_an_effect_in_the_middle_is_between_the_lowest_and_the_highest_level() -> None:
    """A hill, whose ends are alike: last against first would call nothing an effect."""
    table = grid()
    table["final_loss"] += 0.3 - 0.3 * (np.log10(table[LR]) + 2) ** 2 - 0.1 * (np.log10(table[LR]) + 2) ** 2
    row = effects.effects(table, AXES, ["final_loss"]).set_index("axis").loc[LR]
    assert row["p_holm"] < 1e-9 and (row["b"], row["note"]) == (1e-2, "highest against lowest of 3 levels")
    assert row["low"] < 0.3 < row["high"] and row["low"] > 0
    flat = effects.effects(
        grid(noise=0.1).assign(final_loss=lambda t: t["seed"] + np.arange(36) % 7), AXES, ["final_loss"]
    )
    assert flat.set_index("axis").loc[LR, "note"] == "last against first of 3 levels"  # nothing to look for


def test_names_have_no_ends() -> None:
    table = grid(noise=0.01)
    table["data"] = np.array(["c4", "dclm", "fineweb"])[(table["seed"] + np.arange(len(table)) // 3) % 3]
    table["final_loss"] += table["data"].map({"c4": 0.0, "dclm": 0.5, "fineweb": 0.2})
    row = effects.effects(table.drop(columns=LR), [DEPTH, "data"], ["final_loss"]).set_index("axis").loc["data"]
    assert (row["a"], row["b"], row["note"]) == ("c4", "dclm", "highest against lowest of 3 levels")
    assert row["low"] < 0.5 < row["high"]
    assert not len(effects.contrasts(table, ["data"], ["final_loss"]))


def test_an_interaction_against_another_fit() -> None:
    table = grid(4, rng=5)
    table["final_loss"] += 0.2 * (table[DEPTH] == 6) * (table[LR] == 1e-1)
    found = effects.interactions(table, AXES, ["final_loss", "spike_rate"])
    theirs = reference(
        table, "final_loss ~ C(seed) * (C(depth) + C(lr) + C(clip)) + C(depth):C(lr) + C(depth):C(clip) + C(lr):C(clip)"
    )
    for row in records(found[found["metric"] == "final_loss"]):
        pair = [{DEPTH: "depth", LR: "lr", CLIP: "clip"}[row[n]] for n in ("axis", "other")]
        name = f"C({pair[0]}):C({pair[1]})"
        assert (row["statistic"], row["p"]) == pytest.approx((theirs.loc[name, "F"], theirs.loc[name, "PR(>F)"]))
    clear = found[found["p_holm"] < 0.05]
    assert clear[["axis", "other", "metric"]].to_numpy().tolist() == [[DEPTH, LR, "final_loss"]]
    few = effects.interactions(grid(1), AXES, ["final_loss"])
    assert few["p"].isna().all() and set(few["note"]) == {"one seed: no scatter between seeds to test against"}


def test_an_interaction_alone_must_be_clearer_than_one_of_a_stated_effect() -> None:
    """It is a second family of tests: with its own correction alone too many studies of noise would state something."""
    axes, seen = [DEPTH, CLIP], set()
    for rng in range(200):
        table = grid(4, rng=rng, noise=0.05)
        table["final_loss"] += 0.03 * ((table[DEPTH] == 6) == table[CLIP].isna())
        table["final_loss"] -= 0.1 * (np.log10(table[LR]) + 2) ** 2
        rows, crossed = (f(table, axes, effects.REPORTED[:1]) for f in (effects.claims, effects.interactions))
        together = holm([*rows["p"], *crossed["p"]])[-1]
        if (rows["p_holm"] < 0.05).any() or crossed["p_holm"].iloc[0] >= 0.05:
            continue
        assert rows["clear"].tolist() == [together < 0.025] * 2
        assert rows["other"].tolist() == ([CLIP, DEPTH] if together < 0.025 else [None, None])
        seen.add(together < 0.025)
    assert seen == {True, False}


def test_a_simple_effect_is_the_paired_test_at_one_level() -> None:
    """Of a ratio: the t-interval of the differences of logarithms, with three seeds and one axis left."""
    table = grid()
    table = table[table[LR] != 1e-2]
    found = effects.simple_effects(
        table[table[DEPTH] == 2].reset_index(drop=True), [LR, CLIP], "attn_logit_peak", LR, (1e-3, 1e-1), CLIP
    )
    assert found[CLIP].tolist()[0] == 1.0 and found[CLIP].tolist()[1] is None
    for row in records(found):
        at = table[(table[DEPTH] == 2) & (table[CLIP].isna() if row[CLIP] is None else table[CLIP] == row[CLIP])]
        logs = np.log(at.pivot(index="seed", columns=LR, values="attn_logit_peak"))
        own = stats.ttest_1samp(logs[1e-1] - logs[1e-3], 0).confidence_interval(0.95)
        assert (row["low"], row["high"]) == pytest.approx((math.exp(own.low), math.exp(own.high)))
        assert row["scale"] == "ratio"
    lost = effects.simple_effects(table, [DEPTH, LR, CLIP], "final_loss", LR, (1e-3, 1e-2), CLIP)
    assert lost["estimate"].isna().all()  # a level that is not there


@pytest.mark.parametrize("rates", [[1e-3, 1e-2, 1e-1], [1e-3, 1e-1]])
def test_noise_is_seldom_taken_for_an_interaction(rates: list[float]) -> None:
    """Where two levels of each axis leave two degrees of freedom for the error, too."""
    draw = np.random.default_rng(0)
    axes, hits = AXES if len(rates) > 2 else [DEPTH, LR], 0
    for rng in range(120):
        table = grid(rng=rng)
        table = table[table[LR].isin(rates) & (table[CLIP].notna() | (len(rates) > 2))].reset_index(drop=True)
        by_seed = draw.standard_normal((3, 3))[table["seed"], (np.log10(table[LR]) + 3).round().astype(int)]
        table["final_loss"] = draw.standard_normal(len(table)) + by_seed
        hits += bool((effects.interactions(table, axes, ["final_loss"])["p_holm"] < 0.05).any())
    assert hits <= 13  # of 120: 6 expected, and 13 is three deviations more


def test_the_error_of_a_small_grid_is_that_of_the_model_without_seed_by_axis() -> None:
    table = grid()
    table = table[(table[LR] != 1e-2) & table[CLIP].notna()]
    (row,) = records(effects.interactions(table, [DEPTH, LR], ["final_loss"]))
    theirs = reference(table, "final_loss ~ C(seed) + C(depth) * C(lr)").loc["C(depth):C(lr)"]
    assert (row["statistic"], row["p"]) == pytest.approx((theirs["F"], theirs["PR(>F)"]))


# Grids that are not whole


def test_what_is_missing_is_counted() -> None:
    table = grid()
    table.loc[[0, 5], "final_loss"] = math.nan
    table.loc[7, "grad_norm_log_sd"] = 0.0  # has no logarithm
    rows = effects.effects(table, AXES, ["final_loss", "grad_norm_log_sd", "attn_logit_peak"])
    notes = rows[rows["axis"] == DEPTH].set_index("metric")["note"]
    assert notes["final_loss"] == "2 of 36 trials without it"
    assert notes["grad_norm_log_sd"] == "1 of 36 trials without it" and pd.isna(notes["attn_logit_peak"])
    assert rows["p"].notna().all()


def test_axes_that_change_together_are_named() -> None:
    table = grid().assign(**{"train.batch_size": lambda t: t[DEPTH] * 4})
    rows = effects.effects(table, [*AXES, "train.batch_size"], ["final_loss"]).set_index("axis")
    assert rows.loc[DEPTH, "note"] == "changes only together with batch size, so their effects are confounded"
    assert rows.loc["train.batch_size", "note"] == "changes only together with depth, so their effects are confounded"
    assert rows.loc[[DEPTH, "train.batch_size"], ["p", "p_holm", "estimate", "low"]].isna().all(axis=None)
    alone = effects.effects(table, AXES, ["final_loss"]).set_index("axis")
    assert rows.loc[LR, "p"] == pytest.approx(alone.loc[LR, "p"])
    assert rows.loc[LR, "p_holm"] < alone.loc[LR, "p_holm"]  # two tests fewer: what has no p is none of the family


def test_a_level_that_only_another_axis_has_is_named() -> None:
    table = grid()
    table.loc[(table[LR] == 1e-1) & (table[DEPTH] == 6), LR] = 1.0
    table["kind"] = np.where(table[LR] == 1.0, "b", "a")
    row = effects.effects(table, [LR, "kind"], ["final_loss"]).set_index("axis").loc[LR]
    assert row["note"] == "highest against lowest of 3 levels; 1 level confounded with other axes"
    assert row["a"] == 1e-2 and row["b"] in (1e-3, 1e-1) and row["p"] < 1e-3


def test_an_axis_of_the_seeds_has_no_test() -> None:
    table = grid().assign(**{"data.seq_len": lambda t: np.where(t["seed"] == 0, 64, 128)})
    row = effects.effects(table, [*AXES, "data.seq_len"], ["final_loss"]).set_index("axis").loc["data.seq_len"]
    assert pd.isna(row["p"]) and "their effects are confounded" in row["note"]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda t: t[t["seed"] == 0], "one seed: no scatter between seeds to test against"),
        (lambda t: t.assign(seed=math.nan), "no seed is known"),
        (lambda t: t.assign(final_loss=math.nan), "no trial has it"),
        (lambda t: t.drop(columns="final_loss"), "the table has no column final_loss"),
        (lambda t: t.assign(final_loss=2.5), "every trial of a seed has the same value"),
        (lambda t: t.assign(final_loss=t[DEPTH] * 1.0), "nothing scatters between trials: no error to test against"),
        (lambda t: t[(t["seed"] < 2) & (t[DEPTH] == 2)].iloc[[0, 3, 4, 7, 8]], "as many terms as trials"),
    ],
)  # fmt: skip
def test_no_test_without_a_reason(change: object, note: str) -> None:
    rows = effects.effects(change(grid()), AXES, ["final_loss"])  # type: ignore[operator]
    assert list(rows["note"]) == [note] * 3
    assert rows[["statistic", "p", "p_holm", "estimate", "low", "high"]].isna().all(axis=None)
    assert list(rows.columns)[:9] == ["axis", "metric", "statistic", "p", "p_holm", "estimate", "low", "high", "scale"]
    assert not len(effects.contrasts(change(grid()), AXES, ["final_loss"]))  # type: ignore[operator]


def test_no_axis_and_no_trial_are_no_error() -> None:
    assert not len(effects.effects(grid(), [], ["final_loss"]))
    assert effects.effects(grid().iloc[:0], AXES, ["final_loss"])["note"].tolist() == ["no seed is known"] * 3
    assert not len(effects.interactions(grid(), [DEPTH], ["final_loss"]))


@given(st.integers(0, 10_000), st.floats(0.15, 1.0), st.integers(1, 4))
def test_any_grid_with_holes_has_an_answer(rng: int, keep: float, seeds: int) -> None:
    table = grid(seeds, keep, rng)
    metrics = ["final_loss", "grad_norm_log_sd", "spike_rate"]
    rows = effects.effects(table, AXES, metrics)
    assert len(rows) == 9 and (rows["p"].notna() | rows["note"].notna()).all()
    known = rows[rows["p"].notna()]
    assert known["p"].between(0, 1).all() and (known["statistic"] >= 0).all()
    assert ((known["low"] <= known["estimate"]) & (known["estimate"] <= known["high"])).all()
    effects.contrasts(table, AXES, metrics)
    effects.interactions(table, AXES, metrics)


# Rates


def test_a_rate_is_a_ratio_of_rates() -> None:
    table = grid(5)
    table["spike_rate"] = np.random.default_rng(3).poisson(np.where(table[CLIP].isna(), 60, 20)) / 188
    row = effects.effects(table, AXES, ["spike_rate"]).set_index("axis").loc[CLIP]
    assert row["scale"] == "rate ratio" and row["low"] < 3 < row["high"] < 1.5 * row["low"]
    counts = table.assign(spike_events=(table["spike_rate"] * 188).round().astype("Int64"))
    same = effects.effects(counts, AXES, ["spike_events"]).set_index("axis").loc[CLIP]
    assert same[["estimate", "p"]].tolist() == pytest.approx(row[["estimate", "p"]].tolist())


def test_no_event_is_no_error() -> None:
    rows = effects.effects(grid().assign(spike_rate=0.0), AXES, ["spike_rate"])
    assert set(rows["note"]) == {"every trial of a seed has the same value"}
    alone = effects.effects(grid().drop(columns="n_evaluable"), AXES, ["spike_rate"])
    assert alone["p"].notna().all()  # steps not known: all trials count alike


def found_by_length(steps: tuple[int, int], rate: float, studies: int) -> float:
    """Share of studies that find a difference in rate between two lengths of training of the same rate."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(studies):
        cells = itertools.product(steps, [1e-3, 3e-3, 1e-2], [0, 1], range(3))
        table = pd.DataFrame(list(cells), columns=["train.steps", LR, "x", "seed"])
        table["n_evaluable"] = table["train.steps"] - 12
        table["spike_rate"] = draw.poisson(rate * table["n_evaluable"]) / table["n_evaluable"]
        hits += effects.effects(table, ["train.steps", LR, "x"], ["spike_rate"])["p"].iloc[0] < 0.05
    return hits / studies


def test_trials_of_different_length_have_the_same_rate() -> None:
    assert found_by_length((200, 2000), 0.01, 150) <= 0.12  # .06; half an event alone would give .15


def test_a_trial_that_diverged_at_once_is_not_free_of_spikes() -> None:
    """At the last rate half of the trials end after 8 steps, without a spike: that lowers no rate."""
    draw = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        table = grid()
        gone = (table[LR] == 1e-1) & (draw.random(len(table)) < 0.5)
        table["n_evaluable"] = np.where(gone, 8, 188)
        table["spike_rate"] = draw.poisson(0.01 * table["n_evaluable"]) / table["n_evaluable"]
        hits += effects.effects(table, AXES, ["spike_rate"]).set_index("axis").loc[LR, "p"] < 0.05
    assert hits <= 12


# Studies


def test_the_example_shows_what_is_known_of_it() -> None:
    """At clip 1: qk-norm acts on loss, roughness and attention logits, and the learning rate with it."""
    study = Study.load(ROOT / "results" / "example")
    rows = study.effects(["final_loss", "grad_norm_log_sd", "attn_logit_peak", "spike_rate"]).set_index(
        ["axis", "metric"]
    )
    qk = rows.loc["model.qk_norm"]
    assert (qk["p_holm"][["final_loss", "grad_norm_log_sd", "attn_logit_peak"]] < [0.006, 0.015, 0.001]).all()
    assert qk.loc["final_loss", "estimate"] < 0 and qk.loc["grad_norm_log_sd", "high"] < 1
    assert qk.loc["attn_logit_peak", "high"] < 0.2
    assert (rows.loc[LR]["p_holm"][["final_loss", "grad_norm_log_sd", "attn_logit_peak"]] < 0.001).all()
    pairs = effects.interactions(*study.tested(["attn_logit_peak"]))
    assert pairs["p_holm"].iloc[0] < 0.001  # qk-norm holds the logits down where the rate is high
    names = set(study.effects()["metric"])
    assert len(names) == 4 and names > {"final_loss", "grad_norm_log_sd", "attn_logit_peak"}


def test_losses_on_different_batches_are_no_effect_of_the_data(tmp_path: Path) -> None:
    """Within each dataset the other axes are compared."""
    planted.plant_frame(tmp_path / "s")
    draw = np.random.default_rng(0)
    for name, lr, seed in itertools.product(("pysrc", "synthetic"), (1e-3, 1e-2), range(3)):
        planted.plant_trial(
            tmp_path / "s", planted.settings(lr=lr, seed=seed, data={"source": name}), choices={"data": name},
            eval_hash=name, final_loss=2.0 + 3 * (name == "pysrc") + 40 * lr + 0.01 * draw.standard_normal(),
        )  # fmt: skip
    rows = Study.load(tmp_path / "s").effects(["final_loss", "grad_norm_log_sd"]).set_index(["axis", "metric"])
    data, rate = rows.loc[("data", "final_loss")], rows.loc[("optim.lr", "final_loss")]
    assert pd.isna(data["p"]) and data["note"] == "its levels were evaluated on different batches"
    assert rate["p_holm"] < 1e-4 and rate["estimate"] == pytest.approx(0.36, abs=0.03)
    assert not pd.isna(rows.loc[("data", "grad_norm_log_sd"), "p"])


def test_unknown_statistics_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", depths=(2,), seeds=(0,)))
    with pytest.raises(KeyError, match="'verdict' is no statistic"):
        study.effects(["verdict"])


def test_a_thousand_trials_take_no_second() -> None:
    cells = itertools.product([2, 6], [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], range(100))
    table = pd.DataFrame(list(cells), columns=[DEPTH, LR, "seed"])
    draw = np.random.default_rng(0)
    for metric in ("final_loss", "grad_norm_log_sd", "attn_logit_peak"):
        table[metric] = np.exp(draw.standard_normal(1000))
    table["spike_rate"], table["n_evaluable"] = draw.poisson(2, 1000) / 1000, 1000
    metrics = ["final_loss", "grad_norm_log_sd", "attn_logit_peak", "spike_rate"]
    start = time.process_time()
    effects.effects(table, [DEPTH, LR], metrics)
    assert time.process_time() - start < 1
