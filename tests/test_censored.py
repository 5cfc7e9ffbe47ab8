"""Trials that a rule has stopped, in every statistic: censored, counted, never taken for stable or for their end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tabled
from series import learning, lognormal, ones, trace_rows
from statsmodels.duration.survfunc import SurvfuncRight

from stabstudy.analysis import compare, effects, recipe, sensitivity, study_statistics, survival
from stabstudy.analysis.figures.verdict_maps import verdict_map
from stabstudy.analysis.levels import records
from stabstudy.analysis.recipe import NoRecipe, Recipe
from stabstudy.analysis.report import findings, trial_tables
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import TrialFacts, summarise

LR, DEPTH = "optim.lr", "model.depth"
RATES = (1e-3, 3e-3, 1e-2)
STOPPED: dict[str, Any] = {
    **{"state": "stopped", "stop_reason": "hopeless", "verdict": None, "verdict_reason": "stopped"},
    **{"final_loss": None, "final_loss_capped": None, "steps_done": 40, "n_evaluable": 28, "verdict_partial": None},
}
ROUGH_SO_FAR = STOPPED | {"verdict": "rough", "verdict_reason": None, "verdict_partial": True}


def trials(changes: Mapping[tuple[float, int, int], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Three rates, two depths, three seeds; the loss is least at 3e-3. `changes`: by rate, depth and seed."""
    rows = []
    for lr in RATES:
        for depth in (2, 4):
            for seed in range(3):
                loss = 2.5 + 0.1 * abs(math.log10(lr / 3e-3)) + 0.01 * seed + 0.02 * depth + 0.001 * (seed * depth % 3)
                own = {"final_loss": loss, "final_loss_capped": loss, "steps_planned": 100, "eval_tokens": 16384}
                own |= {"spike_abs_rate": 0.01 * (1 + seed) * lr / 1e-3, "grad_norm_log_sd": 0.1 + 0.01 * seed}
                rows.append(tabled.trial(lr, depth, seed) | own | dict(changes.get((lr, depth, seed), {})))
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    return tabled.study(rows).trials


ONE = {(1e-2, 4, 1): STOPPED}
TWO = ONE | {(1e-2, 2, 0): ROUGH_SO_FAR}


# The verdict


def judged(norm: Any, loss: Any, **facts: Any) -> dict[str, Any]:
    whole = TrialFacts(400, 20, 1.0, **({"status": "stopped", "stop_reason": "hopeless"} | facts), init_loss=6.5)
    return summarise(trace_rows(loss, norm), None, whole, Rules()).columns


NAMES = ("verdict", "verdict_reason", "verdict_partial", "stop_reason")


def test_what_is_unstable_by_then_is_and_what_is_not_is_not_stable() -> None:
    calm, rough = lognormal(0.1, 160, 0), lognormal(0.1, 160, 0)
    rough[[40, 60, 80, 100]] = 6
    loss, unigram = learning(160, 1), {"final_loss": None, "unigram_entropy": 3.2}
    assert [judged(rough, loss, **unigram)[n] for n in NAMES] == ["rough", None, True, "hopeless"]
    assert [judged(calm, loss, **unigram)[n] for n in NAMES] == [None, "stopped", None, "hopeless"]
    above = [judged(calm, np.full(160, 3.5), **unigram)[n] for n in NAMES]
    assert above == [None, "stopped", None, "hopeless"], "nor untrained: it might have learned yet"
    short = [judged(calm[:40], loss[:40], **unigram)[n] for n in NAMES]
    assert short == [None, "stopped", None, "hopeless"]
    done = {"status": "done", "stop_reason": "complete", "final_loss": 2.6}
    assert judged(calm, loss, **done)["verdict"] == "stable", "the negative control"


def test_what_only_the_end_can_show_is_not_tested() -> None:
    """A mean far above its best at the last step means no recovery, and in the middle nothing yet."""
    loss = np.concatenate([learning(120, 1), np.linspace(2.9, 4.4, 40)])
    done = judged(ones(160), loss, status="done", stop_reason="complete", final_loss=4.4)
    assert done["verdict_code"] == "no_recovery"
    assert judged(ones(160), loss, final_loss=None)["verdict_reason"] == "stopped"


def test_a_stopped_trial_has_no_loss_and_keeps_its_counts() -> None:
    norm = lognormal(0.1, 160, 0)
    norm[[40, 60, 80, 100]] = 6
    row = judged(norm, learning(160, 1), final_loss=None)
    assert [row[n] for n in ("init_loss", "final_loss", "final_loss_capped", "best_loss")] == [None] * 4
    assert (row["steps_done"], row["steps_planned"], row["spike_events"]) == (160, 400, 4)


# Comparisons


def test_levels_count_the_stopped_and_pair_the_others() -> None:
    """The difference is that of the table without them, and no value is made up for them."""
    rows = trials(TWO)
    done = [row for row in rows if row["state"] == "done"]
    axes = [DEPTH, LR]
    for axis, expected in ((LR, {(1e-3, 1e-2): (0, 2), (1e-3, 3e-3): (0, 0)}), (DEPTH, {(2, 4): (1, 1)})):
        got, without = (records(compare.levels(table(r), axes, axis, "final_loss")) for r in (rows, done))
        counts = {(row["a"], row["b"]): (row["stopped_a"], row["stopped_b"]) for row in got}
        assert expected.items() <= counts.items()
        for row, other in zip(got, without, strict=True):
            names = [n for n in row if not n.startswith("stopped")]
            assert [row[n] for n in names] == [other[n] for n in names]
            assert (other["stopped_a"], other["stopped_b"]) == (0, 0)


def test_effects_are_those_of_the_others_and_say_how_many_are_missing() -> None:
    rows = trials(TWO)
    claimed, without = tabled.study(rows).claims(), tabled.study([r for r in rows if r["state"] == "done"]).claims()
    numbers = ["axis", "metric", "p", "p_holm", "estimate", "low", "high"]
    pd.testing.assert_frame_equal(claimed[numbers], without[numbers])
    measured = claimed[claimed["metric"] == "final_loss"]
    assert measured["note"].str.contains("2 of 18 trials without it, 2 of them stopped early").all()
    assert not without["note"].fillna("").str.contains("stopped").any()
    contrasts = effects.contrasts(*tabled.study(rows).tested(["final_loss"]))
    assert contrasts["p"].notna().all()


def test_a_rate_that_was_seen_for_a_while_is_no_rate_of_the_whole() -> None:
    """Ten times the rate in a stopped trial moves no effect: it is the rate of other steps than the others'."""
    calm, wild = (trials({(1e-2, 4, 1): STOPPED | {"spike_abs_rate": rate}}) for rate in (0.1, 1.0))
    names = ["axis", "estimate", "p"]
    a, b = (tabled.study(rows).effects(["spike_abs_rate"])[names] for rows in (calm, wild))
    pd.testing.assert_frame_equal(a, b)


def test_importance_and_cells_are_of_done_trials() -> None:
    rows = trials(TWO)
    study = tabled.study(rows)
    cells = study.cells
    assert (cells["n_done"].sum(), cells["n"].sum()) == (16, 18)
    assert cells[["stable", "spiky", "rough", "diverged"]].sum().tolist() == [16, 0, 0, 0]
    assert study_statistics.importance(study.trials, [DEPTH, LR])["trials"].max() == 16
    assert study.underperform.isna().sum() == 2


# What holds


def test_a_level_with_a_stopped_trial_holds_nowhere() -> None:
    for changes in (ONE, TWO):
        (row,) = records(compare.limits(table(trials(changes)), [DEPTH, LR], LR, None))
        assert (row["all_stable"], row["first_unstable"], row["reason"]) == (3e-3, 1e-2, None)
        assert (row["n_unstable"], row["n_stopped"], row["n_there"]) == (len(changes), len(changes), 6)
        assert (row["best"], row["works_to"]) == (3e-3, 3e-3)
    (whole,) = records(compare.limits(table(trials({})), [DEPTH, LR], LR, None))
    assert (whole["all_stable"], whole["works_to"], whole["n_stopped"]) == (1e-2, 1e-2, None)


def test_a_stopped_trial_at_the_best_level_makes_it_none() -> None:
    (row,) = records(compare.limits(table(trials({(3e-3, 2, 2): STOPPED})), [DEPTH, LR], LR, None))
    assert (row["all_stable"], row["first_unstable"]) == (1e-3, 3e-3)
    assert row["best"] in (1e-3, 1e-2) and row["works_to"] != 3e-3


def test_noise_of_the_batches_makes_no_stopped_trial_stable() -> None:
    noisy = ROUGH_SO_FAR | {"sampling_noise": True}
    (row,) = records(compare.limits(table(trials({(1e-2, 2, 0): noisy})), [DEPTH, LR], LR, None))
    assert (row["all_stable"], row["n_noise"], row["n_stopped"]) == (3e-3, 0, 1)


def test_a_cell_with_a_stopped_seed_is_no_candidate() -> None:
    best = {(3e-3, depth, 1): STOPPED for depth in (2, 4)}
    answers = recipe.answers(tabled.study(trials(best)))
    assert all(isinstance(a, Recipe) for a in answers)
    assert [(a.levels[LR] != 3e-3, a.candidates, a.incomplete) for a in answers if isinstance(a, Recipe)] == [
        (True, 2, 0),
        (True, 2, 0),
    ]
    (whole, _) = recipe.answers(tabled.study(trials({})))
    assert isinstance(whole, Recipe) and whole.candidates == 3
    noisy = {(lr, d, 0): ROUGH_SO_FAR | {"sampling_noise": True} for lr in RATES for d in (2, 4)}
    assert all(isinstance(a, NoRecipe) for a in recipe.answers(tabled.study(trials(noisy))))


def test_a_margin_ends_before_a_stopped_trial() -> None:
    longer = {(lr, d, s): {"n_evaluable": 388} for lr in RATES for d in (2, 4) for s in range(3)}
    (first, _) = recipe.answers(tabled.study(trials(longer | {(1e-2, 2, 1): STOPPED})))
    assert isinstance(first, Recipe) and first.margin is not None
    assert (first.margin.stable_to, first.margin.unstable_at, first.margin.unstable) == (3e-3, 1e-2, (1, 3))


def test_sensitivity_is_refused_with_the_reason() -> None:
    shallow, deep = records(sensitivity.by_recipe(table(trials(ONE)), [DEPTH, LR], [DEPTH]))
    assert shallow["reason"] is None
    assert (deep["lrs"], deep["reason"]) == (None, "the grid has a hole at learning rate 0.01, seed 1 (stopped)")


# Times and rates


def test_survival_censors_at_the_steps_that_were_made() -> None:
    """Against statsmodels, with the stopped ones censored at 40; without a spike until then, or after one."""
    rows = trials({(1e-2, 2, 1): STOPPED, (1e-2, 4, 2): STOPPED | {"spike_first_step": 25, "spike_events": 1}})
    rows[0] |= {"spike_first_step": 60, "spike_events": 2}
    rows[-1] |= {"spike_first_step": 25, "spike_events": 1}
    got = survival.first_spikes(table(rows), LR, [DEPTH, LR])
    high = [row for row in rows if row[LR] == 1e-2]
    time = np.array([row["spike_first_step"] or row["steps_done"] for row in high], dtype=float)
    event = np.array([row["spike_first_step"] is not None for row in high])
    assert sorted(time.tolist()) == [25, 40, 100, 100, 100, 100]
    reference = SurvfuncRight(time, event)
    curve = records(got.curves[got.curves["level"] == 1e-2])
    for step, free in zip(reference.surv_times, reference.surv_prob, strict=True):
        assert [row["free"] for row in curve if row["step"] == step] == [pytest.approx(free)]
    assert [row["at_risk"] for row in curve if row["step"] == 40] == [5]
    (level,) = [row for row in records(got.levels) if row["level"] == 1e-2]
    assert [level[n] for n in ("trials", "spiked", "censored")] == [6, 1, 5]
    assert (got.stopped, got.unseen) == (1, 0)
    assert any("1 trial stopped early before a first spike" in line for line in survival.caveats(LR, got))


def test_spike_rates_count_the_steps_that_were_made() -> None:
    """A stopped trial is one of its own length: as a done trial of 28 evaluable steps."""
    rng = np.random.default_rng(0)
    spikes = {
        (lr, d, s): {"spike_events": int(rng.poisson(30 * lr / 1e-3))} for lr in RATES for d in (2, 4) for s in range(3)
    }
    end = {(1e-2, 4, 1): STOPPED | {"spike_events": 120}}
    stopped, short = trials(spikes | end), trials(spikes | {(1e-2, 4, 1): {"n_evaluable": 28, "spike_events": 120}})
    a, b = (survival.rate_model(table(rows), [DEPTH, LR]) for rows in (stopped, short))
    assert a.reason is None and a.trials == 18
    pd.testing.assert_frame_equal(a.ratios, b.ratios)
    without = survival.rate_model(table([r for r in stopped if r["state"] == "done"]), [DEPTH, LR])
    assert without.trials == 17 and without.ratios["ratio"].iloc[1] < a.ratios["ratio"].iloc[1]


# What a report says


def test_the_page_says_who_was_ended_when_and_what_that_saved() -> None:
    study = tabled.study(trials(TWO | {(1e-2, 4, 0): STOPPED | {"steps_done": 20}}))
    assert findings.headline(study) == "Of 15 judged trials: 15 stable; without a verdict: 3 stopped early."
    (sentence,) = [line for line in findings.warnings(study) if "ended early" in line]
    saved = (60 + 60 + 80) / 1800
    assert sentence.startswith(
        "3 of 18 trials were ended early by the rule hopeless (at 20-40 % of their steps): "
        f"{100 * saved:.0f} % of the planned steps saved."
    )
    assert sentence.endswith("counts as not stable; as far as they ran, 1 rough.")
    (row,) = [study.row(t) for t in study.trials.index if study.row(t)["verdict"] == "rough"]
    assert trial_tables.ended(row) == "stopped (rough as far as it ran)"
    assert study_statistics.outcome(row) == "stopped"
    limit = findings.findings(study)[0].sentences[0]
    assert "3 of 6 are not, 3 stopped early" in limit or "stopped early" in limit


def test_a_study_without_them_says_nothing_of_them() -> None:
    study = tabled.study(trials({}))
    assert not any("stopped" in line or "ended early" in line for line in findings.warnings(study))
    assert "stopped" not in findings.headline(study)


def test_the_map_of_verdicts_counts_them_and_is_green_nowhere_with_one() -> None:
    ax = verdict_map(tabled.study(trials(TWO)))
    texts = sorted(text.get_text() for text in ax.texts if text.get_gid() == "field")
    assert texts == ["● 2 stable\n⊘ 1 stopped"] * 2 + ["● 3 stable"] * 4
    grounds = [patch.get_facecolor() for patch in ax.patches]
    assert len(set(grounds)) == 2 and sorted(map(grounds.count, set(grounds))) == [2, 4]
