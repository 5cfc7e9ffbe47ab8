"""Columns of a trial's row on flags, spikes, the rules of others, probes and scale: by hand, or against a loop."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2
from series import Floats, learning, lognormal, ones, probe_rows, trace_rows

from stabstudy.stability import published
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import Summary, TrialFacts, summarise
from stabstudy.trace import PROBES, Column, Rows, Schema

RULES = Rules()
FACTS = TrialFacts(400, 40, 1.0, "done", "complete", 5.5, 2.5)


def summary(norm: Floats, loss: Floats | None = None, probes: Rows | None = None, **others: Any) -> Summary:
    """Of a trial with these norms; the loss is flat unless given."""
    facts = dataclasses.replace(FACTS, **others.pop("facts", {}))
    flat = np.full(len(norm), 2.5) if loss is None else loss
    return summarise(trace_rows(flat, norm, **others), probes, facts, RULES)


def row(norm: Floats, loss: Floats | None = None, probes: Rows | None = None, **others: Any) -> dict[str, Any]:
    return dict(summary(norm, loss, probes, **others).columns)


# --- flags ---


def test_dips_are_counted() -> None:
    assert row(ones(400, s100=0.01, s200=0.1, s300=9.0))["spike_dip_steps"] == 2
    assert row(ones(400))["spike_dip_steps"] == 0 and row(ones(10))["spike_dip_steps"] is None


def test_both_parts_are_counted() -> None:
    """Two surprises below three times the level, three steps above it."""
    found = row(ones(400, s50=2.5, s100=2.9, s150=3.1, s200=9.0, s201=9.0))
    assert (found["spike_steps"], found["spike_rate"]) == (5, 5 / 388)
    assert (found["spike_abs_steps"], found["spike_abs_rate"]) == (3, 3 / 388)
    assert found["spike_abs_low"] == pytest.approx(chi2.ppf(0.05, 6) / 2 / 388)
    assert row(ones(400))["spike_abs_low"] == 0.0
    assert [row(ones(12))[n] for n in ("spike_steps", "spike_abs_steps", "spike_abs_low", "severity")] == [None] * 4


def test_severity_by_hand() -> None:
    """log2 of 4, of 8, and of 16 over a median that is 2 by then, though the level is 1: 2 + 3 + 3 per 388 steps."""
    norm = np.r_[ones(120, s50=4.0, s90=8.0), np.full(100, 2.0), np.full(5, 1.0), 16.0, np.full(174, 2.0)]
    found = row(norm)
    assert found["spike_abs_steps"] == 3
    assert found["severity"] == pytest.approx(1000 / 388 * (2 + 3 + 3))
    norm[225] = 1.0
    norm[215:220] = 4.0  # and now the level is the larger of the two: 4 of 2
    norm[220] = 32.0
    assert row(norm)["severity"] == pytest.approx(1000 / 388 * (2 + 3 + 3))
    assert row(ones(400, s100=2.9))["severity"] == 0.0  # a surprise is not severe


def test_heights_and_durations_of_spikes() -> None:
    """x4 for one step in the warm-up, x8 for 3 steps, x16 and the end comes before five quiet steps."""
    norm = ones(400, s30=4.0, s100=8.0, s101=8.0, s102=8.0, s397=16.0)
    found = row(norm)
    assert found["spike_events"] == 3
    assert (found["spike_ratio_max"], found["spike_ratio_median"]) == (16.0, 8.0)
    assert (found["spike_duration_median"], found["spike_duration_max"], found["spike_unrecovered"]) == (2.0, 3, 1)
    assert found["spike_warmup_share"] == 1 / 3


def test_without_spikes() -> None:
    found = row(ones(400))
    assert found["severity"] == 0.0
    names = ("warmup_share", "ratio_max", "ratio_median", "duration_median", "duration_max", "unrecovered")
    names += ("coupled_share", "lag_median", "first_layer", "peak_layer", "peak_share")
    assert [found[f"spike_{name}"] for name in names] == [None] * len(names)
    assert [row(ones(10))[f"spike_{name}"] for name in ("events", "narrow", "first_censored")] == [None] * 3


def test_a_trial_whose_only_spike_never_recovered_has_no_duration() -> None:
    found = row(ones(400, s398=9.0))
    assert (found["spike_duration_median"], found["spike_duration_max"], found["spike_unrecovered"]) == (None, None, 1)


def test_coupling() -> None:
    """Three of four spikes are followed by the loss, after 0, 2 and 6 steps."""
    loss = np.full(400, 2.5)
    loss[[100, 152, 206]] = 6.0
    found = row(ones(400, s100=9.0, s150=9.0, s200=9.0, s250=9.0), loss)
    assert (found["spike_coupled_share"], found["spike_lag_median"]) == (0.75, 2.0)
    alone = row(ones(400, s100=9.0))
    assert (alone["spike_coupled_share"], alone["spike_lag_median"]) == (0.0, None)


def test_where_the_highest_spike_came_from() -> None:
    groups = np.ones((400, 4))
    groups[100, 1] = 6.0
    groups[200, 3] = 9.0
    norm = np.sqrt(np.sum(groups**2, axis=1))
    found = summary(norm, layer_grad_norm=groups.tolist())
    named = [found.columns[f"spike_{name}"] for name in ("first_layer", "peak_layer", "peak_share")]
    assert named == ["head", "head", 1.0]
    assert [(s["attrib_first"], s["attrib_peak"]) for s in found.spikes] == [("layer 0", "layer 0"), ("head", "head")]
    assert row(norm)["spike_peak_layer"] is None  # a record without layer norms


# --- the rules of others ---


def test_scores_of_others_are_their_detectors() -> None:
    norm, loss = lognormal(0.5, 400, 3), learning(400, 3)
    norm[[150, 300]] *= 20
    norm[200] = math.nan
    loss[[150, 250]] += 3
    found = row(norm, loss)

    def share(*series: Floats, k: float, window: int, fill: int, two_sided: bool) -> float:
        """Steps k population deviations from the mean of the window before, per step that has one."""
        flagged = known = np.zeros(400, dtype=bool)
        for values in series:
            x = pd.Series(values).dropna()
            windows = x.rolling(window, min_periods=fill)
            z = ((x - windows.mean().shift()) / windows.std(ddof=0).shift()).reindex(range(400)).to_numpy()
            flagged, known = flagged | ((abs(z) if two_sided else z) > k), known | ~np.isnan(z)
        return float(flagged.sum() / known.sum())

    assert found["olmo7_window"] == 40
    for name, values in (("grad", norm), ("loss", loss)):
        assert found[f"spike_olmo7_{name}"] == share(values, k=7, window=40, fill=20, two_sided=True) > 0
    assert found["spike_olmocore"] == share(norm, loss, k=6, window=128, fill=128, two_sided=False) > 0
    clipped = published.zclip(norm, RULES.published)
    assert found["spike_zclip"] == clipped.n_flagged / (399 - 25) > 0.02


def test_gss_and_foundry() -> None:
    loss = np.full(400, 2.5)
    loss[200:210] = 6.0
    found = row(ones(400, s300=1000.0), loss)
    assert found["spike_gss_max"] == pytest.approx(301 * 1000 / 1300)
    assert (found["spike_gss50_steps"], found["spike_foundry_step"]) == (1, 204)
    assert row(ones(400))["spike_foundry_step"] is None and row(np.full(9, math.nan))["spike_gss_max"] is None


@pytest.mark.parametrize(("name", "first"), [("olmo7_grad", 21), ("zclip", 26), ("olmocore", 129)])
def test_a_window_never_filled_is_null(name: str, first: int) -> None:
    assert [row(np.ones(n))[f"spike_{name}"] for n in (first - 1, first)] == [None, 0.0]
    assert [row(np.ones(n))["olmo7_window"] for n in (20, 21)] == [None, 40]


# --- probes and logits ---


def test_attention_entropy_of_the_last_probe() -> None:
    probes = probe_rows([0, 10, 20], attn_entropy=[[0.1, 0.2], [0.9, 0.6], None])
    assert row(ones(400), probes=probes)["attn_entropy_min"] == 0.6
    assert row(ones(400), probes=probe_rows([0], attn_entropy=[[math.nan, 0.5]]))["attn_entropy_min"] is None
    assert row(ones(400))["attn_entropy_min"] is None


def test_output_logits() -> None:
    found = row(ones(4), logz_mean=[3.0, -8.0, math.nan, None], logit_absmax=[5.0, 9.0, math.inf, None])
    assert (found["logz_absmax"], found["logit_absmax_peak"]) == (8.0, 9.0)
    assert row(ones(400))["logz_absmax"] is None


def test_update_sizes() -> None:
    """Adam's second moment is left out of the peak in its first 1 / (1 - beta2) = 20 steps."""
    sizes = {"update_rms": [None, 0.2, 0.3, 0.9], "adam_rms_max": [None, 8.0, 1.0, 1.5]}
    probes = probe_rows([0, 20, 30, 40], **sizes)
    found = row(ones(400), probes=probes, facts={"beta2": 0.95})
    assert (found["update_rms_median"], found["update_rms_peak"], found["adam_rms_peak"]) == (0.3, 0.9, 1.5)
    assert row(ones(400), probes=probes)["adam_rms_peak"] == 8.0
    assert row(ones(400), probes=probes, facts={"beta2": 0.999})["adam_rms_peak"] is None
    assert row(ones(400))["update_rms_peak"] is None


def test_noise_scale_where_the_record_has_it() -> None:
    known = PROBES.names
    more = tuple(Column(n, "float", "", "", True) for n in ("noise_scale", "noise_g2") if n not in known)
    schema = Schema("probes", (*PROBES.columns, *more), False)
    columns = {"noise_scale": [None, 100.0, 300.0, None], "noise_g2": [None, 2.0, 1.0, -0.5]}
    plain = probe_rows([0, 10, 20, 30])
    arrays = {n: np.array([math.nan if v is None else v for v in c]) for n, c in columns.items()}
    nulls = {n: np.array([v is None for v in c]) for n, c in columns.items()}
    found = row(ones(400), probes=Rows(schema, {**plain.columns, **arrays}, {**plain.nulls, **nulls}))
    assert (found["noise_scale_median"], found["noise_scale_neg_share"]) == (200.0, 1 / 3)
    found = row(ones(400), probes=plain)
    assert (found["noise_scale_median"], found["noise_scale_neg_share"]) == (None, None)


# --- warnings ---

WARNINGS = ("warn_attn_logit", "warn_attn_logit_1e3", "warn_attn_entropy", "warn_resid_rms", "warn_logit")


def warned(probes: Rows | None, logit: list[float | None] | None = None) -> list[int | None]:
    found = row(ones(60), probes=probes, logit_absmax=logit or [None] * 60)
    return [found[name] for name in WARNINGS]


def test_warnings_name_the_step_of_the_first_crossing() -> None:
    """Each level is crossed in another probe, in one layer of two; the output logit in a step between probes."""
    probes = probe_rows(
        [0, 10, 20, 30, 40],
        attn_logit_max=[[1.0, 99.9], [1.0, 100.0], [999.0, 2.0], [1000.0, 2.0], [1.0, 1.0]],
        attn_entropy=[[0.9, 0.02], [0.9, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.0199]],
        resid_rms=[[1.0, 3.0], [100.0, 9.0], [101.0, 9.0], [5.0, 301.0], [1.0, 1.0]],
    )
    assert warned(probes, [5.0] * 47 + [100.0] + [5.0] * 12) == [10, 30, 40, 20, 47]


def test_a_layer_is_set_beside_its_own_start() -> None:
    probes = probe_rows([0, 10], resid_rms=[[0.1, 50.0], [11.0, 51.0]])
    assert warned(probes)[3] == 10
    assert warned(probe_rows([0, 10], resid_rms=[[0.1, 50.0], [9.0, 5000.0]]))[3] is None
    assert warned(probe_rows([10, 20], resid_rms=[[0.1, 50.0], [11.0, 51.0]]))[3] is None  # the start is not known


@pytest.mark.parametrize("probes", [None, probe_rows([]), probe_rows([0, 10])])
def test_what_was_not_measured_warns_of_nothing(probes: Rows | None) -> None:
    assert warned(probes) == [None] * 5
    assert (
        warned(probe_rows([0], attn_logit_max=[[math.nan]], attn_entropy=[[math.nan]]), [math.nan] * 60) == [None] * 5
    )
    assert warned(probe_rows([0], attn_logit_max=[[math.inf]]))[:2] == [0, 0]


def test_a_learning_rate_of_one_is_untrained_and_warned_of() -> None:
    """60 steps: attention logits of 3,750 at step 10, a loss that stays above H1; a norm that is not rough yet."""
    loss = 5.4 + 0.1 * np.random.default_rng(0).standard_normal(60)
    probes = probe_rows(range(0, 60, 10), attn_logit_max=[[0.5, 0.6]] + [[3750.0, 40.0]] * 5)
    facts = {"steps_planned": 60, "warmup_steps": 5, "unigram_entropy": 3.3, "final_loss": 5.4}
    found = row(lognormal(0.2, 62, 1), np.r_[loss, 5.4, 5.4], probes, facts=facts)
    assert (found["verdict"], found["verdict_reason"]) == (None, "untrained")
    assert (found["warn_attn_logit"], found["warn_attn_logit_1e3"]) == (10, 10)
    assert found["loss_over_unigram"] == pytest.approx(2.1)


# --- scale ---


def test_epochs_timescale_and_tokens_per_parameter() -> None:
    """400 steps of 256 tokens over 20,480 and 51,200; lr 1e-3 and decay .1 forget in 10,000 steps, 25 runs."""
    tokens = [256 * (step + 1) for step in range(400)]
    facts = {"train_tokens": 20_480, "parameters": 51_200, "timescale": 1 / (1e-3 * 0.1), "unigram_entropy": 3.25}
    found = row(ones(400), tokens=tokens, facts=facts)
    assert (found["epochs"], found["tokens_per_parameter"]) == (5.0, 2.0)
    assert found["adamw_timescale"] == pytest.approx(25.0)
    assert found["loss_over_unigram"] == -0.75
    names = ("epochs", "tokens_per_parameter", "adamw_timescale", "loss_over_unigram")
    assert [row(ones(400))[n] for n in names] == [None] * 4
    assert row(ones(400), tokens=[None] * 400, facts=facts)["epochs"] is None
    assert row(ones(200), tokens=tokens[:200], facts=facts)["epochs"] == 2.5
