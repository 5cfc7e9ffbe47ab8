"""Each column of a trial's row, from records whose answers are known by hand."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from series import Floats, learning, lognormal, probe_rows, trace_rows

from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.detectors import Block, LiveSpikes
from stabstudy.stability.rules import Rules
from stabstudy.stability.spikes import SPIKE_COLUMNS
from stabstudy.stability.summary import Summary, TrialFacts, Value, summarise
from stabstudy.trace import Rows

RULES = Rules()
FACTS = TrialFacts(
    steps_planned=400, warmup_steps=40, clip=1.0, status="done", stop_reason="complete", init_loss=5.5, final_loss=2.5
)


def columns(
    norm: Sequence[float | None] | Floats,
    loss: Sequence[float | None] | Floats | None = None,
    facts: TrialFacts = FACTS,
    skip: dict[int, str] | None = None,
    probes: Rows | None = None,
) -> dict[str, Value]:
    """The row of a trial; the loss is flat unless given."""
    flat = [2.5] * len(norm) if loss is None else loss
    return summarise(trace_rows(flat, norm, skip), probes, facts, RULES).columns


def with_facts(**changes: object) -> TrialFacts:
    return dataclasses.replace(FACTS, **changes)  # type: ignore[arg-type]


# --- the row as a whole ---


def test_the_row_has_exactly_the_defined_columns() -> None:
    assert list(columns(lognormal(0.2, 400, 0))) == list(COLUMNS)


def test_every_definition_says_something() -> None:
    for name, definition in COLUMNS.items():
        assert definition.meaning and definition.null_when and definition.label, name
        assert len(definition.label) <= 20, name
    assert len({d.label for d in COLUMNS.values()}) == len(COLUMNS)


NEVER_NULL = {name for name, definition in COLUMNS.items() if definition.null_when == "never"}


@pytest.mark.parametrize(
    "norm", [[], [1.0], [math.nan], [math.nan] * 300, [None] * 300, [0.0] * 300, [math.inf] * 300, [1.0] * 10]
)
def test_what_cannot_be_measured_is_null_and_not_zero_or_nan(norm: list[float | None]) -> None:
    row = columns(norm, [None] * len(norm))
    assert row["n_evaluable"] == 0
    finite = sum(x is not None and math.isfinite(x) for x in norm)
    needs = {"gss_max": 1, "gss50_steps": 1, "zclip": 26, "olmo7_grad": 21, "olmocore": 129}  # zero is a value to them
    known = {f"spike_{name}" for name, fewest in needs.items() if finite >= fewest}
    for name, value in row.items():
        assert name in known or not name.startswith(("spike_", "severity", "warn_")) or value is None, name
        assert not (isinstance(value, float) and math.isnan(value)), name
    assert all(row[name] is not None for name in NEVER_NULL)


@given(
    st.lists(
        st.sampled_from([1.0, 1.1, 0.9, 8.0, 0.0, -1.0, 5e-324, 1e-300, 1e300, math.nan, math.inf, None]), max_size=90
    ),
    st.lists(st.sampled_from([2.0, 2.1, 9.0, 1e308, -1e308, math.nan, -math.inf, None]), max_size=90),
    st.sampled_from([0, 3, 40, 400]),
    st.sampled_from([None, 0.5]),
    st.sampled_from([None, 2.0, math.nan]),
)
def test_no_record_raises_and_no_null_is_nan(
    norm: list[float | None], loss: list[float | None], warmup: int, clip: float | None, end: float | None
) -> None:
    n = min(len(norm), len(loss))
    facts = with_facts(warmup_steps=warmup, clip=clip, init_loss=end, final_loss=end)
    row = columns(norm[:n], loss[:n], facts, {t: "amp" for t in range(0, n, 7)})
    assert list(row) == list(COLUMNS)
    measured = {"init_loss", "final_loss", "final_loss_capped"}  # NaN there is an answer
    for name, value in row.items():
        assert type(value) in (int, float, str, bool, type(None)), name
        assert name in measured or not (isinstance(value, float) and math.isnan(value)), name
    assert all(row[name] is not None for name in NEVER_NULL)


def test_equal_records_give_equal_rows() -> None:
    norm, loss = lognormal(0.3, 400, 1), learning(400, 1)
    assert columns(norm, loss) == columns(norm.copy(), loss.copy())


def test_identity_and_provenance() -> None:
    row = columns(lognormal(0.2, 300, 0), facts=with_facts(approximate=True))
    assert (row["steps_done"], row["steps_planned"], row["stop_reason"]) == (300, 400, "complete")
    assert (row["detector_id"], row["approximate"]) == (RULES.detector_id, True)
    assert row["n_evaluable"] == 300 - 12


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [("done", "diverged", "diverged"), ("done", "log_ended", "log_ended"), ("done", None, "complete")]
    + [("failed", None, "failed"), ("oom", "complete", "oom")],
)
def test_stop_reason_is_the_state_of_a_trial_not_done(status: str, reason: str | None, expected: str) -> None:
    assert columns([1.0] * 60, facts=with_facts(status=status, stop_reason=reason))["stop_reason"] == expected


# --- the norm ---


def test_norm_statistics_by_hand() -> None:
    """Warm-up of 40 steps at 9, then 1 .. 100."""
    row = columns([9.0] * 40 + [float(v) for v in range(1, 101)])
    assert row["grad_norm_median"] == 50.5
    assert row["grad_norm_p99"] == pytest.approx(99.01)
    assert (row["grad_norm_max"], row["grad_norm_argmax"]) == (100.0, 139)
    assert row["grad_norm_max_over_median"] == pytest.approx(100 / 50.5)
    assert row["grad_norm_warmup_max"] == 9.0


def test_the_largest_norm_may_lie_in_the_warmup_and_is_not_settled() -> None:
    row = columns([500.0] + [1.0] * 139)
    assert (row["grad_norm_max"], row["grad_norm_argmax"], row["grad_norm_warmup_max"]) == (500.0, 0, 500.0)
    assert row["grad_norm_max_over_median"] == 1.0


def test_settled_begins_at_25_without_a_warmup() -> None:
    row = columns([100.0] * 25 + [1.0] * 25, facts=with_facts(warmup_steps=0))
    assert row["grad_norm_median"] == 1.0 and row["grad_norm_warmup_max"] is None


def test_a_spread_needs_twenty_settled_steps() -> None:
    for n, known in ((19, False), (20, True)):
        row = columns([1.0] * (40 + n))
        assert (row["grad_norm_log_sd"] is not None) is known
        assert (row["grad_norm_max_over_median"] is not None) is known
        assert row["grad_norm_median"] == 1.0


def test_log_sd_against_a_loop() -> None:
    norm = lognormal(0.4, 150, 3)
    norm[[60, 61, 149]] = math.nan
    settled = norm[40:].tolist()
    residues = []
    for i, x in enumerate(settled):
        near = [math.log(v) for v in settled[max(0, i - 4) : i + 5] if not math.isnan(v)]
        if not math.isnan(x):
            residues.append(math.log(x) - statistics.fmean(near))
    assert columns(norm)["grad_norm_log_sd"] == pytest.approx(statistics.pstdev(residues), rel=1e-12)


def test_log_sd_does_not_see_a_slow_decay() -> None:
    decay = np.exp(-np.arange(400) / 100)
    assert columns(decay)["grad_norm_log_sd"] == pytest.approx(0, abs=5e-3)
    rough = columns(decay * lognormal(0.3, 400, 0))["grad_norm_log_sd"]
    assert isinstance(rough, float) and 0.25 < rough < 0.3


def test_tail_slope_is_per_thousand_steps_of_the_last_half() -> None:
    norm = np.concatenate([np.full(200, 7.0), np.exp(0.002 * np.arange(200))])
    assert columns(norm)["grad_norm_tail_slope"] == pytest.approx(2.0)
    assert columns([1.0] * 39)["grad_norm_tail_slope"] is None
    assert columns([1.0] * 40)["grad_norm_tail_slope"] == 0.0


# --- clipping ---


def test_clip_shares_by_hand() -> None:
    norm = [2.0] * 30 + [0.5] * 10 + [2.0] * 15 + [1.0] * 44 + [math.nan]
    row = columns(norm, [2.5] * 99 + [2.5])
    assert row["clip_share"] == pytest.approx(45 / 99)
    assert row["clip_share_warmup"] == 0.75
    assert row["clip_share_after"] == pytest.approx(15 / 59)


def test_clip_scale_of_finite_steps() -> None:
    rows = trace_rows([2.5] * 4, [1.0, 4.0, math.nan, 2.0], clip_scale=[1.0, 0.25, math.nan, 0.5])
    row = summarise(rows, None, FACTS, RULES).columns
    assert row["clip_scale_mean"] == pytest.approx(1.75 / 3) and row["clip_scale_min"] == 0.25


def test_clipping_off_is_null() -> None:
    row = columns([5.0] * 100, facts=with_facts(clip=None))
    assert {name: v for name, v in row.items() if name.startswith("clip_")} == dict.fromkeys(
        ["clip_share", "clip_share_warmup", "clip_share_after", "clip_scale_mean", "clip_scale_min"]
    )


# --- spikes ---


def test_spikes_by_hand() -> None:
    """Narrow at 50 and at 100 (two flags), wide from 200 on (15 steps, three flags), open at the end."""
    norm = np.ones(400)
    norm[[50, 100, 105]] = 9.0
    norm[200:215] = 4.0
    norm[398:] = 2.5
    row = columns(norm)
    assert (row["spike_events"], row["spike_steps"], row["spike_abs_steps"]) == (4, 8, 6)
    assert [row[f"spike_{c}"] for c in ("narrow", "wide", "malignant", "open")] == [2, 1, 0, 1]
    assert row["spike_rate"] == 8 / 388 and row["spike_events_per_1k"] == 4000 / 388
    assert (row["spike_ratio3_steps"], row["spike_ratio3_rate"]) == (18, 18 / 384)
    assert (row["spike_first_step"], row["spike_first_censored"]) == (50, False)


def test_no_spike_is_zero_where_it_could_be_measured() -> None:
    row = columns([1.0] * 100)
    assert (row["spike_events"], row["spike_rate"], row["spike_abs_rate"]) == (0, 0.0, 0.0)
    assert (row["spike_first_step"], row["spike_first_censored"]) == (None, True)
    assert (row["spike_loss_events"], row["spike_loss_per_1k"], row["spike_loss_delta_max"]) == (0, 0.0, None)


def test_loss_spikes_by_hand() -> None:
    loss = np.full(400, 2.5)
    loss[[100, 300]] = [4.0, 5.0]
    row = columns([1.0] * 400, loss)
    assert row["spike_loss_events"] == 2 and row["spike_loss_delta_max"] == 2.5
    assert row["spike_loss_per_1k"] == 2000 / 388


def test_spike_rows_are_coupled_and_named() -> None:
    norm, loss = np.ones(400), np.full(400, 2.5)
    norm[100], loss[103] = 9.0, 6.0
    found = summarise(trace_rows(loss, norm), None, FACTS, RULES)
    assert [tuple(row) for row in found.spikes] == [(*SPIKE_COLUMNS, "detector_id")] * 2
    links = [(row["series"], row["start"], row["partner"], row["lag"]) for row in found.spikes]
    assert links == [("grad", 100, 103, 3), ("loss", 103, 100, 3)]
    assert {row["detector_id"] for row in found.spikes} == {RULES.detector_id}


def test_a_spike_open_where_the_log_ends_is_censored() -> None:
    """A level that has risen is flagged until the median of five has followed; one that still rises at every step."""
    facts = with_facts(stop_reason="log_ended")
    for end, flags, verdict in (([6.0] * 6, 3, ("stable", None)), ([6.0 * 4**i for i in range(6)], 6, ("spiky", "R1"))):
        found = summarise(trace_rows([2.5] * 126, [1.0] * 120 + end), None, facts, RULES)
        (spike,) = found.spikes
        assert (spike["class"], spike["recovered"], spike["duration"]) == ("open", False, 6)
        assert (spike["flag_steps"], found.columns["spike_open"], found.columns["spike_unrecovered"]) == (flags, 1, 1)
        assert found.columns["verdict_partial"] is True
        assert (found.columns["verdict"], found.columns["verdict_rule"]) == verdict


def test_a_spike_right_after_a_value_that_is_not_finite_is_counted() -> None:
    for odd in (0, 200, 398):
        norm = np.ones(400)
        norm[odd], norm[odd + 1] = math.inf, 9.0
        row = columns(norm)
        assert row["spike_events"] == (1 if odd else 0)
        assert row["nonfinite_steps"] == 1


# --- skipped steps ---


def test_fp16_overflows_at_the_start_are_skips_and_no_divergence() -> None:
    norm = [math.inf] * 10 + [1.0] * 390
    row = columns(norm, skip=dict.fromkeys(range(10), "amp"))
    assert (row["amp_skips"], row["nonfinite_steps"], row["verdict"]) == (10, 0, "stable")
    assert row["n_evaluable"] == 390 - 12 and row["spike_events"] == 0


def test_a_skipped_step_is_in_no_window_and_no_spike() -> None:
    norm, loss = np.ones(400), np.full(400, 2.5)
    norm[100], loss[100] = 50.0, 9.0
    row = columns(norm, loss, skip={100: "nonfinite"})
    assert row["spike_events"] == row["spike_loss_events"] == 0
    assert row["grad_norm_max"] == 1.0


def test_a_spike_whose_update_was_skipped_is_a_spike() -> None:
    norm, loss = np.ones(400), np.full(400, 2.5)
    norm[100], loss[100] = 50.0, 9.0
    row = columns(norm, loss, skip={100: "spike"})
    assert row["spike_events"] == row["spike_loss_events"] == 1 and row["nonfinite_steps"] == 0
    assert row == columns(norm, loss)


def test_counters() -> None:
    norm, loss = [1.0] * 100, [2.5] * 100
    norm[3] = norm[4] = loss[4] = loss[50] = math.nan
    norm[60] = math.inf
    row = columns(norm, loss, skip={60: "amp", 3: "nonfinite"})
    assert (row["nonfinite_steps"], row["amp_skips"]) == (3, 1)
    null = columns([None] * 100, [None] * 100, skip=dict.fromkeys(range(100), "no_targets"))
    assert (null["nonfinite_steps"], null["amp_skips"]) == (0, 0)


# --- probes ---


def test_attention_logits() -> None:
    logits = [None, [1.0, 2.0, 3.0], [4.0, 30.0, 5.0], [6.0, 8.0, 7.0]]
    row = columns([1.0] * 100, probes=probe_rows([0, 10, 20, 30], attn_logit_max=logits))
    assert (row["attn_logit_final"], row["attn_logit_peak"], row["attn_logit_layer"]) == (8.0, 30.0, 1)


def test_attention_logits_that_overflowed() -> None:
    logits = [[1.0, 9.0], [math.inf, 2.0], [math.nan, math.nan]]
    row = columns([1.0] * 100, probes=probe_rows([0, 10, 20], attn_logit_max=logits))
    assert (row["attn_logit_final"], row["attn_logit_peak"], row["attn_logit_layer"]) == (None, 9.0, 1)


@pytest.mark.parametrize("probes", [None, probe_rows([]), probe_rows([0, 10])])
def test_without_probes_attention_logits_are_null(probes: Rows | None) -> None:
    row = columns([1.0] * 100, probes=probes)
    assert [row[f"attn_logit_{c}"] for c in ("final", "peak", "layer")] == [None, None, None]


def test_a_probe_with_lost_weights_is_divergence() -> None:
    row = columns([1.0] * 100, probes=probe_rows([50], param_norm=[math.nan]))
    assert (row["verdict_code"], row["verdict_step"]) == ("nonfinite", 49)


# --- losses and verdict ---


@pytest.mark.parametrize(
    ("init", "final", "capped"),
    [(5.5, 2.5, 2.5), (5.5, 7.0, 5.5), (5.5, math.nan, 5.5), (5.5, math.inf, 5.5), (5.5, None, None), (None, 2.5, 2.5)],
)
def test_final_loss_capped(init: float | None, final: float | None, capped: float | None) -> None:
    assert columns([1.0] * 100, facts=with_facts(init_loss=init, final_loss=final))["final_loss_capped"] == capped


def test_best_loss_is_the_smallest_moving_mean() -> None:
    loss = [3.0] * 100 + [1.0] * 10 + [3.0] * 90
    assert columns([1.0] * 200, loss)["best_loss"] == pytest.approx(1 + 2 * (19 / 21) ** 10)
    assert columns([1.0] * 20, [3.0] * 20)["best_loss"] is None
    assert columns([1.0] * 21, [3.0] * 21)["best_loss"] == 3.0


def test_a_trial_not_done_has_counts_but_no_losses_and_no_verdict() -> None:
    norm = np.ones(100)
    norm[60] = 9.0
    row = columns(norm, facts=with_facts(status="failed", stop_reason=None))
    assert row["spike_events"] == 1
    assert (row["verdict"], row["verdict_reason"], row["verdict_code"]) == (None, "failed", None)
    assert [row[f"{c}_loss"] for c in ("init", "best", "final")] == [None, None, None]


def test_verdict_columns_of_a_diverged_trial() -> None:
    loss = [2.5] * 100 + [math.nan]
    row = columns([1.0] * 101, loss, with_facts(stop_reason="diverged", final_loss=math.nan))
    found = {name.removeprefix("verdict_"): v for name, v in row.items() if name.startswith("verdict")}
    expected = {"verdict": "diverged", "rule": "nonfinite", "reason": None, "partial": False}
    assert found == {**expected, "code": "nonfinite", "step": 100}
    assert math.isnan(float(row["final_loss"] or 0)) and row["final_loss_capped"] == 5.5


# --- live and recorded ---


def test_the_live_count_is_the_recorded_count() -> None:
    norm, loss = lognormal(0.3, 400, 5), learning(400, 5)
    norm[[90, 95, 200, 380]] *= 30
    live = LiveSpikes(RULES)
    block = Block.of(trace_rows(loss, norm))
    alarms = [live.update(Block(*(x[:, i : i + 1] for x in (block.loss, block.norm, block.skip)))) for i in range(400)]
    row = columns(norm, loss)
    assert live.spike_events.tolist() == [row["spike_events"]] == [3]
    assert sum(alarms) >= int(row["spike_steps"] or 0) > 0


def recorded(norm: Floats, loss: Floats) -> Summary:
    return summarise(trace_rows(loss, norm), None, FACTS, RULES)


def test_scaling_the_norm_scales_only_what_is_in_its_unit() -> None:
    norm, loss = lognormal(0.3, 400, 5), learning(400, 5)
    norm[[90, 200]] *= 30
    plain, scaled = recorded(norm, loss).columns, recorded(norm * 1024, loss).columns
    in_its_unit = {name for name, definition in COLUMNS.items() if definition.unit == "gradient"}
    differ = {name for name in plain if plain[name] != pytest.approx(scaled[name])}
    assert differ == in_its_unit | {"clip_share", "clip_share_warmup", "clip_share_after"}


def test_growth_is_the_states_and_null_where_nobody_measured_it() -> None:
    row = columns([1.0] * 50, facts=with_facts(growth_act=0.25, growth_grad=-0.5))
    assert (row["growth_act"], row["growth_grad"]) == (0.25, -0.5)
    assert columns([1.0] * 50)["growth_act"] is None
