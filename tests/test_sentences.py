"""The first screen: every sentence on planted studies, word for word, and what must not be stated."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
import tabled
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_recipe import CLIP, DEPTH, LR, ROUGH, UNTRAINED, at, cells, change, rates

from stabstudy.analysis import effects, words
from stabstudy.analysis.elements import Finding
from stabstudy.analysis.report import findings, ingested_page
from stabstudy.analysis.study import Study

STABLE, USE, CHANGED = "What is stable", "What to use", "What the axes changed"
FAILED = {"state": "failed", "verdict": None, "verdict_reason": "failed", "final_loss": None, "final_loss_capped": None}
PENDING = FAILED | {"state": "pending", "verdict_reason": "pending", "n_evaluable": 0}
SHORT = {"verdict": None, "verdict_reason": "too_short"}
Row = dict[str, Any]


def screen(rows: list[Row], about: str, **how: Any) -> list[str]:
    """The sentences under one head."""
    answers = {finding.about: list(finding.sentences) for finding in findings.findings(tabled.study(rows, **how))}
    return answers.get(about, [])


def grid(loss: Callable[[Row], float], seeds: int = 3, rng: int = 0, **axes: tuple[Any, ...]) -> list[Row]:
    """A trial of each seed at each combination of levels; `__` in an axis' name stands for its dot.

    Everything scatters: the loss by .01, roughness by a tenth, flags as counts around four, logits by a fifth.
    """
    draw, names = np.random.default_rng(rng), [name.replace("__", ".") for name in axes]
    rows = []
    for *levels, seed in itertools.product(*axes.values(), range(seeds)):
        row = tabled.trial(seed=seed) | dict(zip(names, levels, strict=True))
        value = loss(row) + 0.02 * seed + 0.01 * draw.standard_normal()
        flags = int(draw.poisson(4))
        row |= {"final_loss": value, "final_loss_capped": value, "n_evaluable": 388, "eval_tokens": 16384}
        row |= {"spike_abs_steps": flags, "spike_abs_rate": flags / 388}
        row |= {"grad_norm_log_sd": math.exp(0.1 * draw.standard_normal() - 1.5)}
        rows.append(row | {"attn_logit_peak": math.exp(0.2 * draw.standard_normal() + 3)})
    return rows


# The headline


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("learning rate 0.1 to 0.3", "Learning rate 0.1 to 0.3"),
        ("model.dim 32", "model.dim 32"),
        ("qk-norm true", "Qk-norm true"),
        ("", ""),
        (" ", " "),
    ],
)
def test_a_sentence_begins_with_a_capital_unless_a_setting_begins_it(text: str, begins: str) -> None:
    assert words.capital(text) == begins


def test_the_headline_counts_every_trial_once() -> None:
    rows = rates(
        (1e-3, 2.5), (3e-3, 2.5, ROUGH), (1e-2, 2.5, ROUGH | {"verdict": "spiky", "sampling_noise": True}),
        (3e-2, 2.5, {"verdict": "diverged"}), (1e-1, 2.5, UNTRAINED), (3e-1, 2.5, SHORT), (1.0, 2.5, FAILED),
        (2.0, 2.5, PENDING),
    )  # fmt: skip
    rows = change(rows, at(3e-3, 0), sampling_noise=True)
    assert findings.headline(tabled.study(rows)) == (
        "Of 12 judged trials: 3 stable, 3 spiky (3 by sampling noise), 3 rough (1 by sampling noise) and 3 diverged; "
        "without a verdict: 3 too short, 3 untrained (the loss never came below the entropy of single tokens), 3 "
        "unfinished and 3 failed."
    )
    assert sum(tabled.study(rows).outcomes.values()) == len(rows) == 24


def test_a_study_without_a_verdict_has_no_findings_to_make_up() -> None:
    assert findings.headline(tabled.study([])) == "The study holds no trial yet."
    waiting = tabled.study(rates((1e-3, 2.5, PENDING), seeds=(0,)))
    assert findings.headline(waiting) == "None of 1 trial has a verdict: 1 unfinished."
    assert findings.findings(waiting) == []
    short = tabled.study(rates((1e-3, 2.5, SHORT)))
    assert findings.headline(short) == "None of 3 trials has a verdict: 3 too short."


# What is stable


def limit(*given: Any, **how: Any) -> str:
    return screen(rates(*given, **how), STABLE)[0]


def test_the_largest_stable_rate_and_what_it_rests_on() -> None:
    assert limit((1e-3, 2.6), (1e-2, 2.5), (1e-1, 2.5)) == (
        "Every trial is stable up to learning rate 0.1; no larger one was tried."
    )
    assert limit((1e-3, 2.6), (1e-2, 2.5), (1e-1, 2.5, ROUGH)) == (
        "Every trial is stable up to learning rate 0.01; at 0.1, 3 of 3 are not."
    )
    assert limit((1e-3, 2.6), (1e-2, 2.5, ROUGH), (1e-1, 2.5)) == (
        "Every trial is stable up to learning rate 1e-3; at 0.01, 3 of 3 are not, although every trial at 0.1 is "
        "stable again."
    )
    assert limit((1e-3, 2.6, ROUGH), (1e-2, 2.5)) == (
        "At no smaller learning rate is every trial stable; at 1e-3, 3 of 3 are not, although every trial at 0.01 is "
        "stable again."
    )
    assert limit((1e-3, 2.6), (1e-2, 2.5, UNTRAINED)) == (
        "Every trial is stable up to learning rate 1e-3; what lies above has no verdict."
    )
    assert limit((1e-3, 2.6, SHORT), (1e-2, 2.5, UNTRAINED)) == (
        "No trial is unstable, and at no learning rate are all stable."
    )


def test_an_unstable_trial_is_counted_and_so_is_sampling_noise() -> None:
    rows = change(rates((1e-3, 2.6), (1e-2, 2.5)), at(1e-2, 1), **ROUGH)
    assert screen(rows, STABLE)[0].endswith("; at 0.01, 1 of 3 is not.")
    noisy = change(rows, at(1e-2, 1), sampling_noise=True)
    assert screen(noisy, STABLE)[0].endswith("; at 0.01, 1 of 3 is not, 1 by sampling noise.")


def test_under_two_hundred_steps_the_sentence_says_how_many() -> None:
    given = ((1e-3, 2.6), (1e-2, 2.5), (1e-1, 2.5, {"verdict": "diverged", "n_evaluable": 7}))
    assert limit(*given, steps=211) == (
        "Every trial is stable up to learning rate 0.01 in 199 evaluable steps (a margin needs 200); at 0.1, 3 of 3 "
        "are not."
    )
    assert limit(*given, steps=212) == "Every trial is stable up to learning rate 0.01; at 0.1, 3 of 3 are not."


def test_a_limit_for_each_depth_and_equal_ones_together() -> None:
    rows = [row | {DEPTH: d} for d in (2, 4, 8) for row in rates((1e-2, 2.5), (3e-2, 2.5), (1e-1, 2.5, ROUGH))]
    rows = change(rows, lambda r: r[DEPTH] == 8 and r[LR] == 3e-2, verdict="spiky")
    assert screen(rows, STABLE)[:3] == [
        "Depth 2 and 4: every trial is stable up to learning rate 0.03; at 0.1, 3 of 3 are not.",
        "Depth 8: every trial is stable up to learning rate 0.01; at 0.03, 3 of 3 are not.",
        "Largest learning rate whose final loss is within 0.2 nat/token of the best of its cell, paired by seed: 0.1, "
        "the largest tried, at depth 2 (best 0.01), 0.1, the largest tried, at depth 4 (best 0.01) and 0.1, the "
        "largest tried, at depth 8 (best 0.01).",
    ]


def widths(hole: bool) -> list[Row]:
    """Narrow models are worse than wide ones; at both a rate of .3 costs .45 nat."""
    levels = itertools.product((64, 256), (2, 6), (0.03, 0.3))
    rows = cells(
        *({"model.dim": w, DEPTH: d, LR: lr, "loss": 3.4 - w / 320 + 0.45 * (lr == 0.3)} for w, d, lr in levels)
    )
    return [row for row in rows if not (hole and row["model.dim"] == 64 and row[LR] == 0.3)]


def test_pooled_means_of_different_cells_name_no_rate() -> None:
    """Without (narrow, .3) the mean loss at .3 is lower than that at .03."""
    table = pd.DataFrame(widths(hole=True)).groupby(LR)["final_loss_capped"].mean()
    assert table[0.3] < table[0.03] + 0.2
    first, *others = screen(widths(hole=True), STABLE)
    assert first == (
        "Depth 2 and 6: no largest stable learning rate is given: the grid has a hole at learning rate 0.3, model.dim "
        "64, seed 0 (no trial)."
    )
    assert not any("0.3" in text for text in others)
    used = screen(widths(hole=True), USE)
    assert len(used) == 4 and all(": use learning rate 0.03:" in text for text in used)
    changed = screen(widths(hole=True), CHANGED)
    assert "Learning rate 0.03 to 0.3: final validation loss +0.450 [" in " ".join(changed)
    whole = screen(widths(hole=False), STABLE)
    assert whole[1] == (
        "Largest learning rate whose final loss is within 0.2 nat/token of the best of its cell, paired by seed, "
        "averaged over model.dim: 0.03 at depth 2 (best 0.03) and 0.03 at depth 6 (best 0.03)."
    )


def test_without_a_learning_rate_cells_are_counted() -> None:
    rows = cells({CLIP: 1.0, "loss": 2.5}, {CLIP: None, "loss": 2.5} | ROUGH, {CLIP: 0.5, "loss": 2.5})
    assert screen(rows, STABLE)[0] == "2 of 3 cells are stable in every trial."
    assert screen(change(rows, lambda r: r[CLIP] == 0.5, **SHORT), STABLE)[0] == (
        "1 of 3 cells is stable in every trial."
    )


def test_stable_is_neither_well_trained_nor_without_a_warning() -> None:
    rows = rates((1e-4, 3.5), (1e-2, 2.5), (1e-1, 2.6, ROUGH))
    rows = change(rows, at(1e-2), warn_attn_logit=40)
    rows = change(rows, at(1e-2, 0), warn_attn_logit_1e3=60)
    rows = change(rows, at(1e-1), warn_attn_entropy=60)  # of a rough trial: no warning any more
    assert screen(rows, STABLE)[-2:] == [
        "3 of 6 stable trials ended over 0.2 nat/token above the best trial of as many tokens: stable does not mean "
        "well trained.",
        "Stable so far, with a warning: of 6 stable trials, in 1 attention logits passed 1,000, in 3 attention logits "
        "passed 100.",
    ]


# What to use


def test_conditions_with_and_without_a_recipe_stand_together() -> None:
    rows = [row | {DEPTH: d} for d in (2, 6) for row in rates((1e-2, 2.5), (3e-2, 2.6))]
    rows = change(rows, lambda r: r[DEPTH] == 6, **ROUGH)
    assert screen(rows, USE) == [
        "For depth 2: use learning rate 0.01: final loss 2.510 ± 0.020 nat/token (3 seeds, 16,384 evaluation tokens); "
        "lower than in the other stable cell; margin: stable at 3 times this learning rate, the most tried; 0.01 is "
        "the smallest learning rate tried.",
        "No recipe for depth 6: no cell is stable with all 3 seeds, each trained to its end.",
    ]


# What the axes changed


def test_a_clear_change_is_stated_and_the_rest_is_answered_with_its_interval() -> None:
    rows = grid(lambda r: 2.5 + 0.2 * (r[LR] == 1e-1), optim__lr=(1e-2, 1e-1), optim__clip=(1.0, None))
    table = effects.effects(pd.DataFrame(rows), [LR, CLIP], effects.REPORTED).set_index(["axis", "metric"])
    row, clip = table.loc[(LR, "final_loss")], table.loc[CLIP]
    assert row["p_holm"] < 1e-6 and (clip["p_holm"] > 0.3).all()
    assert row["estimate"] == pytest.approx(0.2, abs=0.02)
    first, second = screen(rows, CHANGED)
    assert first == "Learning rate 0.01 to 0.1: final validation loss +0.203 [+0.189, +0.217] nat/token."
    assert [f"{v:.3g}" for v in row[["estimate", "low", "high"]]] == ["0.203", "0.189", "0.217"]
    assert second.startswith("Clip threshold 1 to off: no effect found: final validation loss ")
    for metric in ("grad_norm_log_sd", "spike_abs_rate", "attn_logit_peak"):
        assert f"×{clip.loc[metric, 'estimate']:.3g} [{clip.loc[metric, 'low']:.3g}, " in second
    assert second.count(";") == 3 and second.endswith("].")


def test_what_is_only_suggestive_is_not_stated() -> None:
    """p = .01 of one test of eight: Holm's is .09. An uncorrected test would call it a finding."""
    for rng in range(400):
        rows = grid(lambda r: 2.5 + 0.012 * (r[CLIP] is None), rng=rng, optim__lr=(1e-2, 1e-1), optim__clip=(1.0, None))
        table = effects.effects(pd.DataFrame(rows), [LR, CLIP], effects.REPORTED)
        row = table[(table["axis"] == CLIP) & (table["metric"] == "final_loss")].iloc[0]
        if 0.005 < row["p"] < 0.02 and (table["p_holm"] > 0.05).all():
            break
    assert 0.005 < row["p"] < 0.02 < 0.05 < row["p_holm"]
    changed = screen(rows, CHANGED)
    assert len(changed) == 2 and all(": no effect found: " in text for text in changed)


def test_a_u_shape_is_given_from_its_lowest_to_its_highest_level() -> None:
    rows = grid(lambda r: 2.5 + 0.1 * math.log10(r[LR] / 1e-2) ** 2, rng=1, optim__lr=(1e-3, 1e-2, 1e-1))
    (changed, *rest) = screen(rows, CHANGED)
    assert (
        changed.startswith("Learning rate 0.01 to ")
        and " (lowest to highest value): final validation loss +0.1" in changed
    )
    assert not rest


def test_statistics_of_different_levels_are_never_given_as_of_the_same() -> None:
    """The loss is U-shaped, the logits rise: each names its own two levels."""
    rows = grid(lambda r: 2.5 + 0.1 * math.log10(r[LR] / 1e-2) ** 2, rng=1, optim__lr=(1e-3, 1e-2, 1e-1))
    rows = [row | {"attn_logit_peak": row["attn_logit_peak"] * row[LR]} for row in rows]
    loss, logit = screen(rows, CHANGED)
    assert loss.startswith("Learning rate 0.01 to ") and "logit" not in loss
    assert logit.startswith("Learning rate 1e-3 to 0.1: largest attention logit ×") and "loss" not in logit


def test_an_effect_that_depends_on_another_axis_is_given_at_each_of_its_levels() -> None:
    rows = grid(
        lambda r: 2.5 + 0.3 * (r[LR] == 1e-1) * (1 - r["model.qk_norm"]),
        model__qk_norm=(False, True), optim__lr=(1e-2, 1e-1),
    )  # fmt: skip
    qk, rate = screen(rows, CHANGED)[:2]
    assert qk.startswith("Qk-norm false to true, depending on learning rate: final validation loss ")
    assert rate.startswith("Learning rate 0.01 to 0.1, depending on qk-norm: final validation loss +0.3")
    table = pd.DataFrame(rows)
    parts = []
    for on, name in ((False, "false"), (True, "true")):  # by hand: a paired t-interval of three seeds
        own = table[table["model.qk_norm"] == on].pivot(index="seed", columns=LR, values="final_loss")
        difference = own[1e-1] - own[1e-2]
        half = stats.t.ppf(0.975, 2) * difference.std(ddof=1) / math.sqrt(3)
        mean, low, high = difference.mean(), difference.mean() - half, difference.mean() + half
        parts.append(f"{words._signed(mean)} [{words._signed(low)}, {words._signed(high)}]")
        assert f"{parts[-1]}{' nat/token' if on else ''} at {name}" in rate


def test_an_effect_that_changes_its_sign_is_not_called_none() -> None:
    """On average clipping does nothing; without qk-norm it costs .1 nat, with it it saves as much."""
    rows = grid(
        lambda r: 2.5 + 0.05 * (-1 if r["model.qk_norm"] == (r[CLIP] is None) else 1),
        model__qk_norm=(False, True), optim__clip=(1.0, None),
    )  # fmt: skip
    pooled = effects.effects(pd.DataFrame(rows), [CLIP], ["final_loss"])
    assert pooled["p"].iloc[0] > 0.1
    changed = screen(rows, CHANGED)
    clip = next(text for text in changed if text.startswith("Clip threshold"))
    assert clip.startswith("Clip threshold 1 to off, depending on qk-norm: final validation loss +0.")
    assert "no effect found" not in clip


def test_of_many_levels_the_ends_are_given() -> None:
    levels = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    rows = grid(
        lambda r: 2.5 + 0.2 * (r[CLIP] is None) * levels.index(r[LR]) / 4, optim__lr=levels, optim__clip=(1.0, None)
    )
    clip = next(text for text in screen(rows, CHANGED) if text.startswith("Clip threshold"))
    assert clip.count(" at ") == 2 and " at 1e-3 and " in clip and clip.endswith(" nat/token at 0.1.")


def test_one_seed_tests_nothing() -> None:
    rows = grid(lambda r: 2.5 + r[LR], seeds=1, optim__lr=(1e-2, 1e-1), optim__clip=(1.0, None))
    assert screen(rows, CHANGED) == [
        "Learning rate and clip threshold: not tested (one seed: no scatter between seeds to test against)."
    ]
    assert "One seed: no interval and no test is possible; a difference may be chance." in findings.warnings(
        tabled.study(rows)
    )


def test_what_cannot_be_tested_says_why() -> None:
    """Batch size and steps change together; of calm trials there is no rate; losses differ in their evaluation sets."""
    rows = grid(lambda r: 2.5, optim__lr=(1e-2, 1e-1), train__batch_size=(8, 32))
    rows = [row | {"train.steps": 3200 // row["train.batch_size"], "spike_abs_rate": 0.0} for row in rows]
    *_, steps, batch, idle = screen(rows, CHANGED)
    assert steps == "train.steps: not tested (changes only together with batch size, so their effects are confounded)."
    assert batch == "Batch size: not tested (changes only together with train.steps, so their effects are confounded)."
    assert idle == (
        "Along no axis: not tested: share of steps at 3x the recent norm (every trial of a seed has the same value)."
    )


def test_losses_on_different_sets_are_no_effect_and_the_rest_is_tested() -> None:
    rows = grid(lambda r: 2.5, data__seq_len=(64, 128), optim__lr=(1e-2, 1e-1))
    rows = change(rows, lambda r: r["data.seq_len"] == 64, eval_hash="other")
    length = next(text for text in screen(rows, CHANGED) if text.startswith("data.seq_len"))
    assert "no effect found: share of steps" in length
    assert length.endswith("; not tested: final validation loss (its levels were evaluated on different batches).")


def test_a_named_case_is_no_evidence_of_an_axis() -> None:
    rows = grid(lambda r: 2.5, optim__lr=(1e-2, 1e-1))
    case = [row | {"case": "odd", "optim.weight_decay": 1.0, "final_loss_capped": 9.0} for row in rows[:3]]
    changed = screen([*rows, *case], CHANGED)
    assert len(changed) == 1 and changed[0].startswith("Learning rate 0.01 to 0.1: no effect found")


@settings(max_examples=8)  # an example takes a second
@given(st.integers(0, 10**6), st.floats(0.3, 1.0), st.integers(1, 3))
def test_every_axis_is_answered_whatever_is_missing(rng: int, keep: float, seeds: int) -> None:
    draw = np.random.default_rng(rng)
    rows = grid(
        lambda r: 2.5 + 0.05 * (r[CLIP] is None), seeds, rng, optim__lr=(1e-3, 1e-2, 1e-1), optim__clip=(1.0, None)
    )
    kinds: list[Row] = [{}, {}, {}, ROUGH, UNTRAINED, FAILED, SHORT, {"verdict": "diverged", "n_evaluable": 9}]
    rows = [row | kinds[draw.integers(len(kinds))] for row in rows if draw.random() < keep]
    study = tabled.study(rows)
    answers = {finding.about: list(finding.sentences) for finding in findings.findings(study)}
    texts = [*itertools.chain(*answers.values()), findings.headline(study), *findings.warnings(study)]
    assert all(text.endswith(".") and not re.search(r"None(?! of)|\bnan\b", text) for text in texts)
    changed = " ".join(answers.get(CHANGED, [])).lower()
    assert not answers or all(axis in changed for axis in _varied(study))


def _varied(study: Study) -> list[str]:
    return [{LR: "learning rate", CLIP: "clip threshold"}[axis] for axis in study.grid.axes]


# Caveats


def test_what_limits_the_numbers() -> None:
    rows = rates((1e-3, 2.6), (1e-2, 2.5), (1e-1, 2.5), steps=160)
    rows = change(rows, at(1e-1, 2), **FAILED)
    rows = change(rows, at(1e-1, 0), verdict="diverged", n_evaluable=6, epochs=2.5)
    rows = [row for row in rows if not at(1e-2, 2)(row)]
    assert findings.warnings(tabled.study(rows)) == [
        "Trials in no mean: 1 failed (see Runs).",
        "1 of 3 cells lacks seeds that others have (3).",
        "3 seeds: intervals are wide, and a small effect can be missed.",
        "Stable trials have as few as 148 evaluable steps: what is stable in them may be unstable in longer ones "
        "(margins are stated from 200 on).",
        "The training part was read up to 2.50 times (epochs).",
    ]
    few = "3 seeds: intervals are wide, and a small effect can be missed."
    assert findings.warnings(tabled.study(rates((1e-3, 2.6), (1e-2, 2.5)))) == [few]


# Runs of other trainers


def test_ingested_runs_have_their_own_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingested_page, "findings", lambda study: Finding("The runs", ["a sentence"]))
    monkeypatch.setattr(ingested_page, "warnings", lambda study: ["a caveat"])
    rows = change(rates((1e-3, 2.6), (1e-2, 2.5)), lambda r: True, log_format="hf", seed=None)
    study = tabled.study(rows)
    assert findings.findings(study) == [Finding("The runs", ["a sentence"])]
    assert findings.warnings(study)[-1] == "a caveat"


def test_a_run_of_zeros_is_not_one_without_a_gradient_norm() -> None:
    """Its loss was not judged either: the caveat counts what the table of verdicts counts under that name."""
    rows = change(rates((1e-3, 2.6), (1e-2, 2.5)), lambda r: True, log_format="hf", verdict=None, grad_norm_max=1.0)
    blind = change(rows, at(1e-3, 0), grad_norm_max=None, verdict_reason="no_gradient_norm")
    blind = change(blind, at(1e-3, 1), grad_norm_max=None, verdict="diverged")
    rows = change(blind, at(1e-2, 0), grad_norm_max=None, verdict_reason="all_zero")
    study = tabled.study(rows)
    study.log = lambda trial_id: None  # type: ignore[method-assign]
    assert ingested_page.warnings(study) == ["2 runs without a gradient norm: only the loss was judged."]


# A study on disk


def test_a_planted_study_reads_as_it_was_planted(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", seeds=(0, 1, 2), steps=300))
    assert findings.headline(study) == "Of 18 judged trials: 11 stable, 1 spiky and 6 rough."
    answers = {finding.about: finding.sentences for finding in findings.findings(study)}
    assert answers[STABLE][:2] == [
        "Depth 2: every trial is stable up to learning rate 0.01; at 0.1, 3 of 3 are not.",
        "Depth 6: every trial is stable up to learning rate 1e-3; at 0.01, 1 of 3 is not.",
    ]
    assert [text.partition(": final")[0] for text in answers[USE]] == [
        "For depth 2: use learning rate 0.01",
        "For depth 6: use learning rate 1e-3",
    ]
    assert len(answers[CHANGED]) >= 2
