"""Columns of a trial's row that go beyond our own two rules: each by hand, or against a loop."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from series import Floats, learning, lognormal, probe_rows, trace_rows

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


def ones(n: int = 400, **at: float) -> Floats:
    values = np.ones(n)
    for step, value in at.items():
        values[int(step[1:])] = value
    return values


# --- our rules ---


def test_dips_are_counted() -> None:
    assert row(ones(s100=0.01, s200=0.1, s300=9.0))["spike_dip_steps"] == 2
    assert row(ones())["spike_dip_steps"] == 0 and row(ones(10))["spike_dip_steps"] is None


def test_heights_and_durations_of_spikes() -> None:
    """x4 for one step in the warm-up, x8 for 3 steps, x16 and the end comes before five quiet steps."""
    norm = ones(s30=4.0, s100=8.0, s101=8.0, s102=8.0, s397=16.0)
    found = row(norm)
    assert found["spike_events"] == 3
    assert (found["spike_ratio_max"], found["spike_ratio_median"]) == (16.0, 8.0)
    assert (found["spike_duration_median"], found["spike_duration_max"], found["spike_unrecovered"]) == (2.0, 3, 1)
    assert found["spike_warmup_share"] == 1 / 3
    assert found["spike_severity"] == (2 * 1 + 3 * 3 + 4 * 3) / 400


def test_without_spikes() -> None:
    found = row(ones())
    assert found["spike_severity"] == 0.0
    names = ("warmup_share", "ratio_max", "ratio_median", "duration_median", "duration_max", "unrecovered")
    names += ("coupled_share", "lag_median", "first_layer", "peak_layer", "peak_share")
    assert [found[f"spike_{name}"] for name in names] == [None] * len(names)
    assert row(ones(10))["spike_severity"] is None


def test_a_trial_whose_only_spike_never_recovered_has_no_duration() -> None:
    found = row(ones(s398=9.0))
    assert (found["spike_duration_median"], found["spike_duration_max"], found["spike_unrecovered"]) == (None, None, 1)


def test_coupling() -> None:
    """Three of four spikes are followed by the loss, after 0, 2 and 6 steps."""
    loss = np.full(400, 2.5)
    loss[[100, 152, 206]] = 6.0
    found = row(ones(s100=9.0, s150=9.0, s200=9.0, s250=9.0), loss)
    assert (found["spike_coupled_share"], found["spike_lag_median"]) == (0.75, 2.0)
    alone = row(ones(s100=9.0))
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
    found = row(ones(s300=1000.0), loss)
    assert found["spike_gss_max"] == pytest.approx(301 * 1000 / 1300)
    assert (found["spike_gss50_steps"], found["spike_foundry_step"]) == (1, 204)
    assert row(ones())["spike_foundry_step"] is None and row(np.full(9, math.nan))["spike_gss_max"] is None


@pytest.mark.parametrize(("name", "first"), [("olmo7_grad", 21), ("zclip", 26), ("olmocore", 129)])
def test_a_window_never_filled_is_null(name: str, first: int) -> None:
    assert [row(np.ones(n))[f"spike_{name}"] for n in (first - 1, first)] == [None, 0.0]
    assert [row(np.ones(n))["olmo7_window"] for n in (20, 21)] == [None, 40]


# --- probes and logits ---


def test_attention_entropy_of_the_last_probe() -> None:
    probes = probe_rows([0, 10, 20], attn_entropy=[[0.1, 0.2], [0.9, 0.6], None])
    assert row(ones(), probes=probes)["attn_entropy_min"] == 0.6
    assert row(ones(), probes=probe_rows([0], attn_entropy=[[math.nan, 0.5]]))["attn_entropy_min"] is None
    assert row(ones())["attn_entropy_min"] is None


def test_output_logits() -> None:
    found = row(ones(4), logz_mean=[3.0, -8.0, math.nan, None], logit_absmax=[5.0, 9.0, math.inf, None])
    assert (found["logz_absmax"], found["logit_absmax_peak"]) == (8.0, 9.0)
    assert row(ones())["logz_absmax"] is None


def test_update_sizes() -> None:
    """Adam's second moment is left out of the peak in its first 1 / (1 - beta2) = 20 steps."""
    sizes = {"update_rms": [None, 0.2, 0.3, 0.9], "adam_rms_max": [None, 8.0, 1.0, 1.5]}
    probes = probe_rows([0, 20, 30, 40], **sizes)
    found = row(ones(), probes=probes, facts={"beta2": 0.95})
    assert (found["update_rms_median"], found["update_rms_peak"], found["adam_rms_peak"]) == (0.3, 0.9, 1.5)
    assert row(ones(), probes=probes)["adam_rms_peak"] == 8.0
    assert row(ones(), probes=probes, facts={"beta2": 0.999})["adam_rms_peak"] is None
    assert row(ones())["update_rms_peak"] is None


def test_noise_scale_where_the_record_has_it() -> None:
    known = PROBES.names
    more = tuple(Column(n, "float", "", "", True) for n in ("noise_scale", "noise_g2") if n not in known)
    schema = Schema("probes", (*PROBES.columns, *more), False)
    columns = {"noise_scale": [None, 100.0, 300.0, None], "noise_g2": [None, 2.0, 1.0, -0.5]}
    plain = probe_rows([0, 10, 20, 30])
    arrays = {n: np.array([math.nan if v is None else v for v in c]) for n, c in columns.items()}
    nulls = {n: np.array([v is None for v in c]) for n, c in columns.items()}
    found = row(ones(), probes=Rows(schema, {**plain.columns, **arrays}, {**plain.nulls, **nulls}))
    assert (found["noise_scale_median"], found["noise_scale_neg_share"]) == (200.0, 1 / 3)
    found = row(ones(), probes=plain)
    assert (found["noise_scale_median"], found["noise_scale_neg_share"]) == (None, None)
