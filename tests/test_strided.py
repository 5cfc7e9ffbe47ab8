"""Logs that leave steps out: steps are those of the source, and what takes every step is null."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from series import Floats, learning, lognormal, trace_rows

from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import NEED_EVERY_STEP, SPIKES_NEED_EVERY_STEP, Summary, TrialFacts, summarise

RULES = Rules()
EVERY = TrialFacts(600, 30, 1.0, "done", "complete", 6.5, 2.5)
TENTH = dataclasses.replace(EVERY, steps_planned=6000, warmup_steps=310, stride=10, first_step=10)


def spiky(n: int = 600) -> tuple[Floats, Floats]:
    norm, loss = lognormal(0.2, n, 0), learning(n, 0)
    norm[[150, 300, 301]] *= 30
    loss[152] += 3
    return norm, loss


def summary(facts: TrialFacts, norm: Floats, loss: Floats) -> Summary:
    groups = np.repeat(norm[:, None] / 2, 4, axis=1)
    return summarise(trace_rows(loss, norm, layer_grad_norm=groups.tolist()), None, facts, RULES)


def test_stride_one_from_step_zero_is_the_default() -> None:
    same = dataclasses.replace(EVERY, stride=1, first_step=0)
    assert summary(same, *spiky()) == summary(EVERY, *spiky())
    assert summary(EVERY, *spiky()).columns["approximate"] is False


def test_a_log_that_begins_late_is_only_shifted() -> None:
    """Every step from 100 on: what is a step moves, and the warm-up has fewer rows left."""
    late = dataclasses.replace(EVERY, first_step=100, steps_planned=700, warmup_steps=130)
    here, there = summary(EVERY, *spiky()), summary(late, *spiky())
    differ = {n for n in COLUMNS if here.columns[n] != there.columns[n]}
    assert differ == {"steps_done", "steps_planned", "grad_norm_argmax", "spike_first_step"}
    assert there.columns["spike_first_step"] == 100 + int(here.columns["spike_first_step"] or 0)
    for a, b in zip(here.spikes, there.spikes, strict=True):
        moved = {n for n in a if a[n] != b[n]}
        assert moved <= {"start", "end", "peak_step", "partner"} and b["start"] == a["start"] + 100
        assert b["duration"] == a["duration"] and b["class"] == a["class"]


def test_every_tenth_step() -> None:
    """The same rows: counts and rates over rows stay, steps are those of the source, spans are null."""
    here, there = summary(EVERY, *spiky()), summary(TENTH, *spiky())
    row = there.columns
    assert row["approximate"] is True
    assert (row["spike_first_step"], row["grad_norm_argmax"]) == (1510, 10 + 10 * int(np.argmax(spiky()[0])))
    assert (row["steps_done"], row["steps_planned"]) == (6000, 6000)
    for name in ("n_evaluable", "spike_rate", "spike_events", "clip_share_warmup", "grad_norm_median", "spike_zclip"):
        assert row[name] == here.columns[name] is not None, name
    slope = here.columns["grad_norm_tail_slope"]
    assert isinstance(slope, float) and row["grad_norm_tail_slope"] == slope / 10
    assert {n for n in COLUMNS if row[n] is None and here.columns[n] is not None} <= {*NEED_EVERY_STEP, "verdict",
        "verdict_partial", "verdict_code"}  # fmt: skip
    assert all(row[name] is None for name in NEED_EVERY_STEP)
    assert [(s["series"], s["start"], s["end"], s["peak_step"]) for s in there.spikes] == [
        (s["series"], 10 + 10 * s["start"], 10 + 10 * s["end"], 10 + 10 * s["peak_step"]) for s in here.spikes
    ]
    assert all(spike[name] is None for spike in there.spikes for name in SPIKES_NEED_EVERY_STEP)
    assert any(spike["attrib_peak"] for spike in there.spikes)


def test_what_is_null_without_stride_is_a_column() -> None:
    assert set(NEED_EVERY_STEP) <= set(COLUMNS)
    text = (Path(__file__).parent.parent / "results" / "README.md").read_text()
    paragraph = text[text.index("**Logs that leave steps out**") :].split("\n\n")[0]
    assert all(f"`{name}`" in paragraph for name in (*NEED_EVERY_STEP, *SPIKES_NEED_EVERY_STEP))


def test_warmup_is_counted_in_steps_of_the_source() -> None:
    norm = np.array([9.0] * 30 + [1.0] * 570)
    assert summary(TENTH, norm, np.full(600, 2.5)).columns["grad_norm_warmup_max"] == 9.0
    facts = dataclasses.replace(TENTH, warmup_steps=10)  # row 0 is step 10
    assert summary(facts, norm, np.full(600, 2.5)).columns["grad_norm_warmup_max"] is None
    assert [facts.rows_before(step) for step in (0, 10, 11, 20, 21)] == [0, 0, 1, 1, 2]


def verdict(facts: TrialFacts, norm: Floats, loss: Floats) -> tuple[Any, ...]:
    row = summary(facts, norm, loss).columns
    return tuple(row[f"verdict{name}"] for name in ("", "_rule", "_reason", "_code", "_step"))


def test_it_is_never_called_stable() -> None:
    norm, loss = lognormal(0.2, 600, 1), learning(600, 1)
    assert verdict(EVERY, norm, loss) == ("stable", None, None, "ok", None)
    assert verdict(TENTH, norm, loss) == (None, None, "strided", None, None)


def test_it_may_be_rough_or_spiky_by_the_rules_of_rates() -> None:
    loss = learning(600, 1)
    assert verdict(TENTH, lognormal(0.6, 600, 1), loss) == ("rough", "rough", None, None, None)
    norm = lognormal(0.1, 600, 1)
    norm[[200, 300, 400]] *= 20
    assert verdict(TENTH, norm, loss)[:2] == ("spiky", "R2")
    norm = lognormal(0.1, 600, 1)
    norm[200:213] *= 2.9  # wide by its rows, but how long it was in steps nobody saw
    high = loss.copy()
    high[200:213] += 1
    assert verdict(EVERY, norm, high)[:2] == ("spiky", "R1")
    assert verdict(TENTH, norm, high)[2] == "strided"


def test_it_may_have_diverged() -> None:
    norm, loss = lognormal(0.2, 600, 1), learning(600, 1)
    lost = loss.copy()
    lost[300] = math.nan
    assert verdict(TENTH, norm, lost) == ("diverged", "nonfinite", None, "nonfinite", 3010)
    high = loss.copy()
    high[300:] = 8.0
    assert verdict(TENTH, norm, high)[:2] == ("diverged", "above_init")
    rise = loss.copy()
    rise[300:340] = 5.3
    assert verdict(EVERY, norm, rise)[1] == "persistent"
    assert verdict(TENTH, norm, rise)[2] == "strided"


def test_nothing_logged() -> None:
    row = summary(TENTH, np.empty(0), np.empty(0)).columns
    assert (row["steps_done"], row["grad_norm_argmax"], row["verdict_reason"]) == (0, None, "no_gradient_norm")


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"first_step": -1}])
def test_strides_without_meaning_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="stride"):
        dataclasses.replace(EVERY, **wrong)
